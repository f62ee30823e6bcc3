"""A model of karpathy/llama2.c (`stories260K.bin` with `tok512.bin`) as a Hugging Face folder, for the benchmarks.

    python benchmarks/llama2c.py stories260K.bin tok512.bin OUT [--score stories.txt]

`--score` prints the nats per token of stories divided by lines of <|endoftext|>, each after its own BOS.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.models.load import save_pretrained

HEADER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def convert(model_file: Path, tokenizer_file: Path, out: Path) -> None:
    """Read both files and write a model folder."""
    save_pretrained(read_model(model_file), read_tokenizer(tokenizer_file), out, {"verb": "convert"})


def read_model(file: Path) -> LlamaForCausalLM:
    """The legacy format: seven int32, then fp32 tensors by kind, each for all layers; the head is the embedding."""
    data = file.read_bytes()
    *sizes, vocab, length = struct.unpack("<7i", data[:28])
    config = LlamaConfig(
        **dict(zip(HEADER, sizes, strict=True)),
        vocab_size=abs(vocab),
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, shared = sizes[3], sizes[4]
    key_value = width // heads * shared
    floats, position = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return floats[position - count : position].view(shape)

    tensors = {"model.embed_tokens.weight": take(config.vocab_size, width)}
    stacked = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": _half_rotation(take(layers, width, width), heads),
        "self_attn.k_proj": _half_rotation(take(layers, key_value, width), shared),
        "self_attn.v_proj": take(layers, key_value, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, hidden, width),
        "mlp.down_proj": take(layers, width, hidden),
        "mlp.up_proj": take(layers, hidden, width),
    }
    tensors["model.norm.weight"] = take(width)
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": value[layer] for name, value in stacked.items()}
    model = LlamaForCausalLM(config).eval()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def _half_rotation(weight: Tensor, heads: int) -> Tensor:
    """Rows for rotary pairs (2i, 2i + 1) of each head, reordered for pairs (i, i + half)."""
    layers, rows, width = weight.shape
    return weight.view(layers, heads, rows // heads // 2, 2, width).transpose(2, 3).reshape(layers, rows, width)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: of all neighbours, those merge first whose union has the highest score."""
    pieces = list(_pieces(file.read_bytes()))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece.decode().replace(" ", "▁") for _, piece in pieces[len(names) :]]
    ids = {name: number for number, name in enumerate(names)}
    merges = [
        (-pieces[number][0], name[:cut], name[cut:])
        for number, name in enumerate(names)
        if number > 258
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[0])
    core = Tokenizer(BPE(ids, [merge[1:] for merge in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _pieces(data: bytes) -> Iterator[tuple[float, bytes]]:
    position = 4  # after the length of the longest
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        yield score, data[position + 8 : position + 8 + length]
        position += 8 + length


@torch.no_grad()
def score(folder: Path, text: Path) -> tuple[float, int]:
    """Nats per token and the number of tokens of stories."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    total, count = 0.0, 0
    for story in text.read_text(encoding="utf-8").split("<|endoftext|>"):
        if story.strip():
            ids = torch.tensor([[1, *tokenizer.encode(story.strip(), add_special_tokens=False)]])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count, count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("model", "tokenizer", "out", "--score"):
        parser.add_argument(argument, type=Path)
    options = parser.parse_args()
    convert(options.model, options.tokenizer, options.out)
    if options.score:
        print("{:.4f} nats per token over {} tokens".format(*score(options.out, options.score)))

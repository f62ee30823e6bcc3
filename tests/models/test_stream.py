"""Streaming a model layer by layer equals running it whole, for many architectures; bad folders get clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from luthier.core.errors import CheckpointError
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, save_pretrained
from luthier.models.stream import LayerStream

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**SHAPE, **SLIDING, use_sliding_window=True, head_dim=20, tie_word_embeddings=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, mlp_only_layers=[0]),
    "qwen3-next": lambda: Qwen3NextConfig(**SHAPE, **EXPERTS, **LINEAR_ATTENTION, head_dim=16),
    "instella": lambda: InstellaConfig(**{**SHAPE, "hidden_size": 64}),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=18, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **SLIDING, head_dim=18),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0, embedding_multiplier=2.0),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder("llama")` holds a random model of that kind; do not write into it."""
    made = dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
            made[kind] = tmp_path_factory.mktemp("models") / kind
            save_pretrained(model, None, made[kind], {})
        return made[kind]

    return make


@pytest.fixture
def copy(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A model folder to damage."""
    return lambda kind: Path(shutil.copytree(folder(kind), tmp_path / kind))


def ids(rows: int = 5, tokens: int = 12) -> Tensor:
    return torch.randint(2, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streamed(stream: LayerStream, input_ids: Tensor, batch_size: int = 2) -> Tensor:
    batches, arguments = stream.start(input_ids, batch_size=batch_size)
    hidden = torch.cat(list(batches))
    for index in range(stream.num_layers):
        layer = stream.load_layer(index)
        hidden = torch.cat([layer(batch, **arguments[index]) for batch in hidden.split(batch_size)])
    return torch.cat(list(stream.finish(hidden.split(batch_size))))


@pytest.mark.parametrize("kind", CONFIGS)
def test_streaming_equals_the_whole_model(kind: str, folder: Callable[[str], Path]) -> None:
    stream = LayerStream.open(folder(kind))
    model = load_pretrained(folder(kind), dtype=torch.float32)
    expected = model(ids()).logits
    torch.testing.assert_close(streamed(stream, ids()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(streamed(stream, ids(), batch_size=4), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_a_layer_carries_the_weights_of_its_place(folder: Callable[[str], Path]) -> None:
    stream = LayerStream.open(folder("qwen3-moe"))
    model = load_pretrained(folder("qwen3-moe"), dtype=torch.float32)
    for index in range(stream.num_layers):
        layer, original = stream.load_layer(index), model.get_submodule(stream.prefix(index))
        assert not layer.training
        for (name, ours), (_, theirs) in zip(layer.named_parameters(), original.named_parameters(), strict=True):
            assert torch.equal(ours, theirs), name
            assert not ours.requires_grad
    half = stream.load_layer(0, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_layers_differ_in_their_arguments_where_the_model_says_so(folder: Callable[[str], Path]) -> None:
    _, arguments = LayerStream.open(folder("gemma3")).start(ids())
    masks = [layer["attention_mask"] for layer in arguments]
    assert masks[0] is not None
    assert torch.equal(masks[0], masks[2])
    assert masks[1] is None or not torch.equal(masks[0], masks[1])
    assert all(mask is None or mask.shape[0] == 1 for mask in masks)


def test_nothing_stays_in_memory(folder: Callable[[str], Path]) -> None:
    stream = LayerStream.open(folder("gemma3"))
    streamed(stream, ids())
    assert {tensor.device.type for tensor in stream._model.state_dict().values()} == {"meta"}
    assert stream._model.lm_head.weight is stream._model.get_input_embeddings().weight


def test_a_sharded_folder_and_one_of_a_head_only(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_pretrained(folder("qwen3-moe"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    expected = model(ids()).logits
    torch.testing.assert_close(streamed(LayerStream.open(tmp_path / "shards"), ids()), expected, rtol=0, atol=1e-5)


def test_tied_embeddings_may_be_stored_under_the_name_of_the_head(copy: Callable[[str], Path]) -> None:
    where = copy("qwen3")
    expected = load_pretrained(where, dtype=torch.float32)(ids()).logits
    change(where, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    torch.testing.assert_close(streamed(LayerStream.open(where), ids()), expected, rtol=0, atol=1e-5)


def test_stored_half_precision_is_read_exactly(copy: Callable[[str], Path]) -> None:
    where = copy("llama")
    change(where, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    expected = load_pretrained(where, dtype=torch.float32)(ids()).logits
    torch.testing.assert_close(streamed(LayerStream.open(where), ids()), expected, rtol=0, atol=1e-5)


def change(folder: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda tensors: tensors.pop(DOWN), f"1 missing: {DOWN}"),
        (lambda tensors: tensors.update({DOWN: torch.zeros(3, 4)}), rf"mis-shaped: {DOWN} \(file \(3, 4\), model \(72"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(3)}), "unexpected: model.extra"),
    ],
)
def test_tensors_that_do_not_fit_are_named(how: Callable, told: str, copy: Callable[[str], Path]) -> None:
    where = copy("llama")
    change(where, how)
    with pytest.raises(CheckpointError, match=told):
        LayerStream.open(where)


def test_a_missing_expert_is_named(copy: Callable[[str], Path]) -> None:
    where = copy("qwen3-moe")
    change(where, lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model.layers.2.mlp.experts.3.up_proj.weight"):
        LayerStream.open(where)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_found_in_the_layer_that_has_it(value: float, copy: Callable[[str], Path]) -> None:
    where = copy("llama")
    change(where, lambda tensors: tensors[DOWN].view(-1)[5].fill_(value))
    stream = LayerStream.open(where)
    stream.load_layer(0)
    with pytest.raises(CheckpointError, match=f"{DOWN} has values that are NaN or infinite"):
        stream.load_layer(1)


def test_a_truncated_file_and_no_folder(copy: Callable[[str], Path], tmp_path: Path) -> None:
    where = copy("llama")
    data = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        LayerStream.open(where)
    (where / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        LayerStream.open(where)
    with pytest.raises(CheckpointError, match="no model folder"):
        LayerStream.open(tmp_path / "nowhere")


def test_a_quantized_source_is_refused(copy: Callable[[str], Path]) -> None:
    where = copy("llama")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "paroquant"}}))
    with pytest.raises(CheckpointError, match="quantized already"):
        LayerStream.open(where)


def test_architectures_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(CheckpointError, match="not an architecture that can be streamed"):
        LayerStream.open(tmp_path)
    bert = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    AutoModelForCausalLM.from_config(bert).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="0 lists of decoder layers"):
        LayerStream.open(tmp_path)
    tuples = GPTNeoConfig(vocab_size=96, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
    tuples.bos_token_id = tuples.eos_token_id = 0
    AutoModelForCausalLM.from_config(tuples).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="between its layers 0 and 1"):
        LayerStream.open(tmp_path).start(ids())
    AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=2)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit config\.json"):  # other names than the modules'
        LayerStream.open(tmp_path)


def test_buffers_inside_a_layer_are_computed(folder: Callable[[str], Path]) -> None:
    stream = LayerStream.open(folder("gemma3"))
    stream._layers[1].rotary = stream._model.model.rotary_emb
    found = stream.load_layer(1).rotary
    expected = load_pretrained(folder("gemma3")).model.rotary_emb
    assert {name for name, _ in found.named_buffers()} >= {"full_attention_inv_freq", "sliding_attention_inv_freq"}
    for name, buffer in expected.named_buffers():
        assert torch.equal(found.get_buffer(name), buffer)


def test_a_buffer_that_nobody_computes_is_an_error(folder: Callable[[str], Path]) -> None:
    stream = LayerStream.open(folder("llama"))
    for dtype in (torch.float32, torch.bool):
        empty = torch.empty(3, dtype=dtype, device="meta")
        stream._layers[1].mlp.register_buffer("secret", empty, persistent=False)
        stream.load_layer(0)
        with pytest.raises(CheckpointError, match="does not say how its buffer 'secret' is computed"):
            stream.load_layer(1)


class Between(nn.Module):
    """A body that scales hidden states between its layers, or gives a layer something of the text."""

    def __init__(self, body: nn.Module, *, scale: float, tell: bool) -> None:
        super().__init__()
        self.body, self.scale, self.tell = body, scale, tell

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        hidden = self.body.embed_tokens(input_ids)
        for layer in self.body.layers:
            hidden = layer(hidden, **({"position_ids": input_ids} if self.tell else {}))
            hidden = hidden if self.scale == 1 else hidden * self.scale


@pytest.mark.parametrize(
    ("scale", "tell", "told"),
    [(2.0, False, "between its layers 0 and 1"), (1.0, True, "'position_ids', which depends on the text")],
)
def test_what_streaming_cannot_follow_is_an_error(
    scale: float, tell: bool, told: str, folder: Callable[[str], Path]
) -> None:
    stream = LayerStream.open(folder("llama"))
    model: PreTrainedModel = stream._model
    body = model.model
    model.model = Between(body, scale=scale, tell=tell)
    stream._list_name = "model.body.layers"
    stream._files.read = lambda name, device, dtype: torch.zeros(stream._files._expected[name.replace("body.", "")])  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=told):
        stream.start(ids())

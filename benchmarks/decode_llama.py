"""llama.cpp's side of `decode.py`: random weights in the shape of Qwen3-0.6B; runs in an environment of its own.

Arguments: a folder for the files, the quantization (Q4_0, Q4_K_M), threads, tokens of the prompt. Prints `ready`, then
for every number of tokens read from the input the tokens per second of writing them.
"""

import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 28, 1024, 16, 8, 128, 3072, 151936
KINDS = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def write(path: Path) -> None:
    """The model in fp16, without a tokenizer; the embedding is the head too."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    pool = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", np.resize(pool, (rows, columns)))

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", VOCABULARY, HIDDEN)
    norm("output_norm", HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        matrix(block + "attn_q", HEADS * HEAD, HIDDEN)
        matrix(block + "attn_k", KV_HEADS * HEAD, HIDDEN)
        matrix(block + "attn_v", KV_HEADS * HEAD, HIDDEN)
        matrix(block + "attn_output", HIDDEN, HEADS * HEAD)
        matrix(block + "ffn_gate", INNER, HIDDEN)
        matrix(block + "ffn_up", INNER, HIDDEN)
        matrix(block + "ffn_down", HIDDEN, INNER)
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)):
            norm(block + name, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, kind, threads, prompt = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    whole, small = folder / "f16.gguf", folder / f"{kind}.gguf"
    if not whole.exists():
        write(whole)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = KINDS[kind], threads
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), settings):
        raise SystemExit("llama_model_quantize failed")
    model = llama_cpp.Llama(str(small), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    print("ready", flush=True)
    for line in sys.stdin:
        model.reset()
        model.eval(list(range(prompt)))
        began = time.perf_counter()
        for token in range(int(line)):
            model.eval([token])
        print(int(line) / (time.perf_counter() - began), flush=True)


main()

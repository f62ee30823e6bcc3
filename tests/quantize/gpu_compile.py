"""Compiles the GPU kernels to machine code of an A100, in bf16, and prints the name of each; no GPU is needed."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from luthier.quantize.kernels import triton_fused, triton_product, triton_rotate

TARGET = GPUTarget("cuda", 80, 32)
ROWS_OF_X = {"n_rows": "i32", "features": "i32", "stride": "i32"}
ROTATION = {"x": "*bf16", "y": "*bf16", "scales": "*fp16", "norm": "*bf16", "rms": "*fp32", **ROWS_OF_X}
TABLES = {"partner": "*u8", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
PACKED = {"codes": "*u8", "points": "*u8", "steps": "*fp16"}
PRODUCT = {"x": "*bf16", **PACKED, "bias": "*bf16", "y": "*bf16", "outputs": "i32", "groups": "i32"}
SIZES = {"CHANNELS": 1024, "GROUP": 128}
HALVES = {"HALF": 64, "NIBBLES": True}


def compile_kernel(kernel: triton.JITFunction, arguments: dict[str, str], constants: dict[str, object]) -> None:
    """Compile one kernel, arguments being its types by name."""
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(name),): v for name, v in constants.items()})
    assert triton.compile(source, target=TARGET).asm["cubin"]
    print(kernel.__name__)


if __name__ == "__main__":
    compile_kernel(triton_rotate._rotate_kernel, {**ROTATION, **TABLES}, {**SIZES, "ROUNDS": 3, "ROWS": 4, "NORM": 2})
    compile_kernel(triton_rotate._blocks_kernel, {**ROTATION, "blocks": "*fp32"}, {**SIZES, "ROWS": 64, "NORM": True})
    compile_kernel(triton_product._one_kernel, PRODUCT, {**HALVES, "OUTPUTS": 4, "GROUPS": 8, "BIAS": True})
    few = {**HALVES, "OUTPUTS": 16, "BIAS": True, "PRECISION": "tf32", "WIDEN": False}
    compile_kernel(triton_product._few_kernel, {**PRODUCT, "n_rows": "i32"}, few)
    compile_kernel(
        triton_product._decode_kernel, {**PACKED, "result": "*bf16", "count": "i32"}, {**HALVES, "GROUPS": 16}
    )
    compile_kernel(
        triton_fused._fused_kernel,
        {**PRODUCT, **TABLES, "scales": "*fp16", "features": "i32"},
        {**HALVES, "ROUNDS": 3, "OUTPUTS": 16, "BIAS": True},
    )

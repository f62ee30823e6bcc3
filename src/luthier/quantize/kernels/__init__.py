"""Products with quantized weights, by machine: `dispatch.py` chooses and says why, `cpu.py` and `gpu.py` compute.

`rotate.c` is an optional compiled form of the rotation for a few rows on a CPU. The slow and obvious version of all of
this is `QuantizedWeight.dequantized`.
"""

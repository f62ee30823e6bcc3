"""The lossless compressor: bytes in, bits out. Everything that decides a probability is integer arithmetic.

So a file made on one machine is decoded on any other. Files in reading order:

- `range_coder.py`       bits of known probability to bytes and back
- `tables.py`            the integer constants of context mixing
- `mixing_reference.py`  context mixing: what predicts a bit, how predictions are weighed, what learns
- `mixing.c`             the same, fast
- `mixing.py`            which of the two runs
- `segment_code.py`      a code of a whole frame: its number, and the search for it
- `frames.py`            pieces of the input, the streams in them, and where the network enters
- `container.py`         the `.lut` file

The network (none of it is needed to compress without one):

- `byte_config.py`, `byte_model.py`, `byte_training.py`  a byte-level network in floating point, and its training
- `quantize_network.py`  from floating point to integers
- `integer_weights.py`, `integer_features.py`, `integer_reference.py`, `integer_network.c`, `integer_network.py`
                         the integer network: its file, what it reads, its definition, and the fast form
"""

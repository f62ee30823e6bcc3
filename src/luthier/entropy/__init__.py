"""Entropy estimation models, arXiv 2511.10618: how many bits a text holds, always with everything charged.

A decoder predicts each token from those before it and from a short code that an encoder made of the whole segment. The
decoder's loss alone is no entropy; loss plus the code's bits is a code length, and so an upper bound in expectation.

Files in reading order:

- `config.py`          the architecture, its presets, and the settings of training
- `quantizer.py`       from an encoder's numbers to a code of a few levels
- `network_config.py`  the Hugging Face configuration
- `network.py`         encoder and decoder, three ways in, and the null mode, which is a causal language model
- `code_length.py`     loss + code + header, in bits per byte with an interval over documents
- `training.py`        training on the loop that pretraining uses
- `estimators.py`      what single tokens cost: surprisal, allocation, differences
- `prequential.py`     a code length without held-out text: each block is scored before it is learned
- `second_order.py`    heads that predict surprisal and entropy
- `objectives.py`      losses that stop at a target
- `targets.py`         such targets, cross-fitted
- `codec/`             the lossless compressor
"""

"""Instella (arXiv 2511.10628) and the masked mixer as native Hugging Face classes, and model folders of any kind.

Files in reading order:

- `arithmetic.py`       sizes by name, parameter count, tensor names and shapes, KV cache, FLOPs; needs no torch
- `instella_config.py`  `InstellaConfig`, the Hugging Face configuration
- `instella.py`         `InstellaModel` and `InstellaForCausalLM`, operation by operation
- `initialization.py`   the paper's random weights, the same for every world size
- `mixer_config.py`     `MixerConfig`, the Hugging Face configuration
- `mixer.py`            masked mixers (arXiv 2409.01482): one learned matrix over positions in place of attention
- `load.py`             strict loading and atomic saving of model folders
- `tensor_files.py`     the tensors of a model folder one by one, without a model
- `stream.py`           any model one decoder layer at a time, from its safetensors files
- `convert.py`          the original trainer's fused checkpoints to and from Hugging Face names
- `register.py`         makes transformers' Auto classes know these models, without importing transformers early
"""

"""ParoQuant, arXiv 2511.10645: a few bits a weight by scaled pairwise rotation, and what stores and runs the result.

Files in reading order:

- `config.py`         the settings
- `pairs.py`          which channels rotate together
- `rotation.py`       the rotation itself, and its matrix form
- `affine.py`         the quantizer: step sizes, zero points, codes
- `weights.py`        one quantized matrix
- `layer.py`          what is quantized in a decoder layer, and what shares a transform
- `assemble.py`       from the rows of a bundle to its matrices
- `gptq.py`           GPTQ, a baseline and the start of stage 2
- `scales.py`         where the channel scales start
- `student.py`        a bundle in training
- `gradient.py`       the published angle gradient, an ablation
- `optimize.py`       the two stages on one layer
- `baselines.py`      rounding, AWQ, GPTQ
- `methods.py`        all methods by name
- `calibration.py`    windows of text
- `memory.py`         what it takes, and what it took
- `activations.py`    hidden states in memory or in a file
- `layer_files.py`    finished layers
- `walk.py`           the loop over the layers
- `plan.py`           what a run will give and cost
- `packing.py`        codes in 32-bit words
- `tensors.py`        a matrix as the tensors of a checkpoint
- `older_layouts.py`  two earlier layouts
- `checkpoint.py`     folders of quantized models
- `hook.py`           transformers reads and writes them
- `inspect.py`        what is in a folder
- `kernels/`          products and rotations by device
- `linear.py`         a linear module that computes with codes
- `experts.py`        the same for the experts of a layer
- `sharing.py`        one rotation and one product for matrices with one input
- `head.py`           an 8-bit output head
- `compare.py`        how far a model is from another
- `speed.py`          tokens per second
- `outliers.py`       a test of robustness
"""

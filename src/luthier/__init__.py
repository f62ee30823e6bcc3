"""luthier makes, tunes and uses small language models.

`import luthier` is light: it loads neither torch nor transformers. It tells transformers, as soon as that is imported,
that `model_type: instella` exists, so that `AutoModelForCausalLM.from_pretrained(folder)` needs no remote code.
"""

from luthier.models.register import register_when_transformers_loads

__version__ = "0.1.0"

register_when_transformers_loads()

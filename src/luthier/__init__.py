"""luthier makes, tunes and uses small language models.

`import luthier` is light: it loads neither torch nor transformers. It tells transformers, as soon as that is imported,
that `model_type: instella`, `masked_mixer` and `entropy_estimation` and `quant_method: paroquant` exist, so that
`AutoModelForCausalLM.from_pretrained(folder)` and `AutoModel` need no remote code.
"""

from luthier.models.register import register_when_transformers_loads, run_after_import

__version__ = "0.1.0"


def _register_quantizer() -> None:
    from luthier.quantize.hook import register

    register()


def _register_entropy() -> None:
    from luthier.entropy.network_config import register_config

    register_config()


register_when_transformers_loads()
run_after_import("transformers.quantizers.auto", _register_quantizer)
run_after_import("transformers.models.auto.configuration_auto", _register_entropy)

"""`EntropyConfig`: the Hugging Face configuration of entropy-estimation models, around `EemConfig`."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from transformers import PreTrainedConfig

from luthier.core.config import build, to_mapping
from luthier.entropy.config import EemConfig


class EntropyConfig(PreTrainedConfig):
    """`config.json` with the fields of `EemConfig` under `architecture`; ConfigError when they are impossible."""

    model_type = "entropy_estimation"

    architecture: dict | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.architecture is not None:  # the library also makes empty ones, to compare with
            self.architecture = to_mapping(self.eem)
        register_model()

    @property
    def eem(self) -> EemConfig:
        """The architecture, checked."""
        return build(EemConfig, self.architecture or {}, where="architecture.")

    @classmethod
    def of(cls, architecture: EemConfig) -> EntropyConfig:
        """The configuration of an architecture."""
        return cls(architecture=to_mapping(architecture))


def register_config() -> None:
    """Make `AutoConfig` read `model_type: entropy_estimation`. Imports transformers."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register("entropy_estimation", EntropyConfig, exist_ok=True)


@functools.cache
def register_model() -> None:
    """Make `AutoModel` build these models. Imports torch; does nothing where it is missing.

    Not `AutoModelForCausalLM`: there row t of the logits predicts token t + 1, here token t.
    """
    if importlib.util.find_spec("torch") is None:
        return
    from transformers.models.auto.modeling_auto import AutoModel

    from luthier.entropy.network import EntropyModel

    AutoModel.register(EntropyConfig, EntropyModel, exist_ok=True)

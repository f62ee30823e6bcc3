"""`MixerConfig`: the Hugging Face configuration of masked mixers (arXiv 2409.01482)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from luthier.core.errors import ConfigError
from luthier.models.register import register_mixer


class MixerConfig(PreTrainedConfig):
    """Hyper-parameters of a masked mixer. ConfigError when heads do not divide the width, or sizes are not positive."""

    model_type = "masked_mixer"

    vocab_size: int = 8000
    hidden_size: int = 512
    num_hidden_layers: int = 16
    max_position_embeddings: int = 512
    """Longest input: it is the size of the mixing matrices, so no longer one is possible."""
    kernel_size: int = 1
    """Features that a mixing weight reaches across."""
    num_heads: int = 0
    """Heads of the token mixing; 0: flat, one matrix for all features and no projections around it."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = (self.vocab_size, self.hidden_size, self.num_hidden_layers, self.max_position_embeddings)
        if min(*sizes, self.kernel_size) < 1 or self.num_heads < 0:
            raise ConfigError(
                f"masked mixer: got sizes {sizes}, kernel {self.kernel_size} and {self.num_heads} heads, expected at "
                "least 1 (heads: 0 or more)",
                hint="correct config.json",
            )
        if self.hidden_size % max(1, self.num_heads):
            raise ConfigError(
                f"masked mixer: {self.num_heads} heads do not divide the width {self.hidden_size}",
                hint="choose a number of heads that does, or 0 for flat mixing",
            )
        super().__post_init__(**kwargs)
        register_mixer()

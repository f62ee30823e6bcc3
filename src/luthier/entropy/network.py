"""The entropy-estimation model: an encoder that has seen the whole segment, a code, a decoder that predicts each token.

The encoder reads the segment and its last hidden state is projected to a few
numbers; these are quantized; the code enters a causal decoder. Without a code (the null mode) the same network is a
plain causal language model, so one network gives both numbers, matched in every respect.

Departures from the published code:
- The decoder sees a quantized code, in training and in use; there is no public way to give it anything else.
- Row t of the logits predicts token t, token 0 included: from the code's position, or from a learned start vector.
- The decoder has no unused embedding table, and the code's position in front replaces the last token, which predicts
  nothing, so that no input is longer than the window.
- Padding lies on the side that the configuration says, and never changes a result: the last real token is read, the
  start stands before the first real one.

Shapes: B segments, T tokens at most `window`, D hidden width, V vocabulary, m numbers in a code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from luthier.core.errors import CheckpointError
from luthier.entropy.config import EemConfig
from luthier.entropy.network_config import EntropyConfig, register_config
from luthier.entropy.quantizer import (
    fsq_code,
    fsq_straight_through,
    fsq_values,
    noise_code,
    noise_values,
    replace_by_null,
    with_noise,
)
from luthier.learn.objectives import CHUNK, token_nll
from luthier.models.load import load_pretrained
from luthier.models.mixer import MixerModel
from luthier.models.mixer_config import MixerConfig


def make_half(config: EemConfig, width: int, layers: int) -> PreTrainedModel:
    """A causal stack of blocks from hidden states (B, T, width) to hidden states, without an embedding of its own."""
    half: PreTrainedModel
    if config.half == "mixer":
        half = MixerModel(
            MixerConfig(
                vocab_size=1,
                hidden_size=width,
                num_hidden_layers=layers,
                max_position_embeddings=config.window,
                kernel_size=config.kernel,
                num_heads=config.heads,
            )
        )
    else:
        half = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.window,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    half.embed_tokens = None  # type: ignore[assignment]  # both halves are given embeddings
    return half


class EntropyModel(PreTrainedModel):
    """Encoder, quantizer and decoder.

    A segment's code is int64 (B, m), each number from 0 to levels - 1; None stands for the null mode. `mask` (B, T) is
    true at real tokens; without one all are. ValueError for a code out of range, a segment longer than the window, or
    padding on the side that the configuration does not name.
    """

    config_class = EntropyConfig
    config: EntropyConfig
    main_input_name = "input_ids"
    base_model_prefix = "entropy"
    _no_split_modules = ["LlamaDecoderLayer", "MixerBlock"]  # noqa: RUF012 (the library declares it as a plain one)

    def __init__(self, config: EntropyConfig) -> None:
        super().__init__(config)
        eem = self.eem = config.eem
        beside = eem.intro == "embedding"
        self.encoder_tokens = nn.Embedding(eem.vocab_size, eem.encoder_width)
        self.encoder = make_half(eem, eem.encoder_width, eem.encoder_layers)
        self.down = nn.Linear(eem.encoder_width, eem.dims)
        self.null = nn.Parameter(torch.zeros(eem.dims))
        token_width = eem.decoder_width - (eem.dims if beside else 0)
        if not beside:
            self.up = nn.Linear(eem.dims, eem.encoder_width)
            same = eem.intro == "token" and eem.encoder_width == eem.decoder_width
            self.widen = nn.Identity() if same else nn.Linear(eem.encoder_width, eem.decoder_width)
        self.decoder_tokens = nn.Embedding(eem.vocab_size, token_width)
        if eem.intro != "token":
            self.start = nn.Parameter(torch.zeros(token_width))
        self.decoder = make_half(eem, eem.decoder_width, eem.decoder_layers)
        self.lm_head = nn.Linear(eem.decoder_width, eem.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EntropyModel):
            initialization.zeros_(module.null)
            if hasattr(module, "start"):
                initialization.normal_(module.start, std=self.config.initializer_range)

    @property
    def code_bits(self) -> float:
        """Bits that the code of one segment costs."""
        return self.eem.code_bits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        code: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (B, T, V), whose row t predicts token t (not t + 1, as in causal language models)."""
        return CausalLMOutput(logits=self.logits(input_ids, code, mask=attention_mask))

    def logits(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) given tokens before t and the code; row t predicts token t."""
        self._check(ids, mask)
        return self.lm_head(self._hidden(ids, self._values(ids, code), mask))

    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """-ln p of each token (B, T), token 0 included, fp32 nats; 0 at padding. The code's own cost is not in it."""
        self._check(ids, mask)
        hidden, weight = self._hidden(ids, self._values(ids, code), mask), self.lm_head.weight
        chunk = CHUNK.get(ids.device.type, CHUNK["cpu"])
        nats = token_nll(hidden.flatten(0, 1).to(weight.dtype), weight, ids.flatten(), chunk).view(ids.shape)
        return nats if mask is None else nats.masked_fill(~mask.bool(), 0.0)

    @torch.no_grad()
    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The code (B, m) of each segment, int64."""
        self._check(ids, mask)
        numbers = self._numbers(ids, mask)
        if self.eem.quantizer == "fsq":
            return fsq_code(numbers, self.eem.levels)
        return noise_code(numbers, self.eem.levels, self.eem.noise_width)

    def training_hidden(self, ids: Tensor, replaced: Tensor, uniform: Tensor) -> Tensor:
        """The decoder's hidden states (B, T, D) with the quantizer's gradient.

        `replaced` (B,) bool says which segments go without their code; `uniform` (B, m) in [0, 1) is the published
        noise, which FSQ does not use.
        """
        self._check(ids, None)
        if bool(replaced.all()):
            return self._hidden(ids, self._values(ids, None), None)
        numbers = self._numbers(ids, None)
        if self.eem.quantizer == "fsq":
            values = fsq_straight_through(numbers, self.eem.levels)
        else:
            values = with_noise(numbers, uniform, self.eem.noise_width)
        return self._hidden(ids, replace_by_null(values, self.null, replaced), None)

    def _values(self, ids: Tensor, code: Tensor | None) -> Tensor:
        """What the decoder sees of a code (B, m), or of none."""
        if code is None:
            return self.null.expand(len(ids), -1)
        if code.dtype != torch.int64 or code.shape != (len(ids), self.eem.dims):
            raise ValueError(f"code: got {code.dtype} {tuple(code.shape)}, expected int64 {(len(ids), self.eem.dims)}")
        if bool(((code < 0) | (code >= self.eem.levels)).any()):
            raise ValueError(f"code: got numbers outside 0 to {self.eem.levels - 1}")
        if self.eem.quantizer == "fsq":
            return fsq_values(code, self.eem.levels)
        return noise_values(code, self.eem.levels, self.eem.noise_width)

    def _numbers(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The encoder's numbers (B, m): its hidden state at the last real token, projected."""
        hidden = self._run(self.encoder, self.encoder_tokens(ids), mask)
        if mask is None or self.eem.padding_side == "left":
            return self.down(hidden[:, -1])
        last = mask.long().sum(1) - 1
        return self.down(hidden[torch.arange(len(ids), device=ids.device), last])

    def _hidden(self, ids: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The decoder's hidden states (B, T, D), of which row t predicts token t."""
        tokens = self.decoder_tokens(ids)
        values = values.to(tokens.dtype)
        if self.eem.intro == "token":
            return self._run(self.decoder, self._shifted(tokens, self.widen(self.up(values)), mask), mask)
        x = self._shifted(tokens, self.start.expand(len(ids), -1), mask)
        if self.eem.intro == "embedding":
            x = torch.cat((x, values[:, None].expand(-1, x.shape[1], -1)), dim=-1)
        else:
            x = x + self.widen(self.up(values))[:, None]
        return self._run(self.decoder, x, mask)

    def _shifted(self, tokens: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings (B, T, D) one place to the right, with `first` (B, D) in the place of the first real token."""
        shifted = torch.cat((first[:, None], tokens[:, :-1]), dim=1)
        if mask is None or self.eem.padding_side == "right":
            return shifted
        begin = (mask.bool() & (mask.long().cumsum(1) == 1))[..., None]
        return torch.where(begin, first[:, None], shifted)

    def _run(self, half: PreTrainedModel, x: Tensor, mask: Tensor | None) -> Tensor:
        """A half on embeddings. Both are causal, so padding on the right needs no mask: nothing before it sees it."""
        wanted = mask.long() if mask is not None and self.eem.padding_side == "left" else None
        return half(inputs_embeds=x, attention_mask=wanted, use_cache=False).last_hidden_state

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.eem.window:
            raise ValueError(f"segments: got shape {tuple(ids.shape)}, expected (B, 1 to {self.eem.window})")
        if mask is None:
            return
        real = mask.bool()
        # Padding on the left: once real, always real; on the right: once padding, always padding.
        steps = real.long().diff(dim=1)
        wrong = steps < 0 if self.eem.padding_side == "left" else steps > 0
        if mask.shape != ids.shape or bool(wrong.any()) or not bool(real.any(1).all()):
            raise ValueError(
                f"mask: expected shape {tuple(ids.shape)}, a real token in each row, and padding on the "
                f"{self.eem.padding_side} only, the side that this model's configuration names"
            )


def load_entropy_model(folder: Path, *, device: torch.device | str = "cpu") -> EntropyModel:
    """The model of a folder, in evaluation mode. CheckpointError when it holds none, or when a tensor does not fit."""
    register_config()
    model = load_pretrained(folder, device=device, auto=AutoModel)
    if not isinstance(model, EntropyModel):
        raise CheckpointError(
            f"{folder}: not an entropy-estimation model but a {type(model).__name__}",
            hint="give the model folder of a `luthier train-eem` run",
        )
    return model

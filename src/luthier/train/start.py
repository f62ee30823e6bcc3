"""What a run begins with: random weights, those of a model folder, or weights and moments of an earlier run.

Stage 2 of Instella (arXiv 2511.10628, spec: section 2.1) takes AdamW's moments over from stage 1, and phase 2 of its
long-context training (section 4.1) takes them over from phase 1. Step counter and data cursor begin at 0; the moments
keep their own count of updates, so that their bias correction goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.seeds import derive_seed
from luthier.learn.objectives import is_causal
from luthier.learn.parallel import Ranks
from luthier.learn.prepare import check_vocabulary
from luthier.learn.state import TrainState, inherit_state
from luthier.models.arithmetic import SIZES
from luthier.models.initialization import WRAPPERS, initialize, place
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig, sized_config
from luthier.models.load import UNLOADABLE, load_pretrained
from luthier.models.register import register_config
from luthier.train.config import PretrainConfig


class Start(Protocol):
    """Where the weights of a run come from, and its moments."""

    def build(self, *, meta: bool) -> PreTrainedModel:
        """The model in fp32 on the CPU. With `meta`, an Instella comes without storage, for `fill` after sharding."""

    def fill(self, model: PreTrainedModel) -> None:
        """Give a model that was built without storage its weights; it may be sharded by now."""

    def carry_over(self, state: TrainState, who: Ranks) -> str:
        """Give a new run what a training state holds beyond weights; one line that says what was taken, or ''."""


@dataclass(frozen=True)
class RandomStart:
    """Random weights that depend on the seed alone (stage 1)."""

    config: PretrainConfig
    tokenizer: PreTrainedTokenizerFast

    def build(self, *, meta: bool) -> PreTrainedModel:
        """Of the size that the config names, or the architecture that its `model` describes."""
        config, tokenizer = self.config, self.tokenizer
        if config.model:
            return _other_model(config, tokenizer)
        check_vocabulary(tokenizer, config.vocab_size)
        longest = config.context_length or config.sequence_length
        sized = sized_config(config.size, tokenizer, vocab_size=config.vocab_size, max_position_embeddings=longest)
        model = _empty(sized, meta=meta)
        if not meta:
            self.fill(model)
        return model

    def fill(self, model: PreTrainedModel) -> None:
        """The paper's initial weights."""
        assert isinstance(model, InstellaForCausalLM)  # nothing else is built without storage
        initialize(model, derive_seed(self.config.seed, "initial weights"))

    def carry_over(self, state: TrainState, who: Ranks) -> str:
        """Nothing: moments begin at zero."""
        return ""


@dataclass(frozen=True, kw_only=True)
class ModelStart:
    """The weights of a model folder or hub id, in a model of `config`, which may differ in its RoPE and length."""

    name: str
    """What the user gave."""
    source: str
    """Model folder or hub id of the weights and the tokenizer."""
    config: PreTrainedConfig

    def build(self, *, meta: bool) -> PreTrainedModel:
        """The model with its weights; an Instella without any where `meta` asks for that."""
        if meta and isinstance(self.config, InstellaConfig):
            return _empty(self.config, meta=True)
        model = _empty(self.config, meta=False)
        model.load_state_dict(load_pretrained(self.source).state_dict())
        return model

    def fill(self, model: PreTrainedModel) -> None:
        """The weights of the folder, of which each rank keeps its part."""
        loaded = dict(load_pretrained(self.source).named_parameters())
        for name, parameter in model.named_parameters():
            place(loaded[WRAPPERS.sub("", name)].detach(), parameter)

    def carry_over(self, state: TrainState, who: Ranks) -> str:
        """Nothing: a model folder has no moments."""
        return f"start: weights of {self.name}; it holds no training state, so the optimizer's moments begin at zero"


@dataclass(frozen=True, kw_only=True)
class RunStart(ModelStart):
    """Weights and moments of an earlier run of this kind, from its training state."""

    state: Path
    """Folder of the training state."""

    def fill(self, model: PreTrainedModel) -> None:
        """Nothing yet: `carry_over` reads the weights together with the moments."""

    def carry_over(self, state: TrainState, who: Ranks) -> str:
        """Weights and moments."""
        step = inherit_state(state, self.state, who)
        return f"start: weights and moments of {self.name} after its {step:,} steps"


def read_config(source: str) -> PreTrainedConfig:
    """The Hugging Face configuration of a folder or hub id. CheckpointError for none, or one of a quantized model."""
    register_config()
    try:
        described: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"start: {source} is no model folder ({reason})", hint="give a run folder, a model folder or a hub id"
        ) from error
    if getattr(described, "quantization_config", None):
        raise CheckpointError(
            f"start: {source} is quantized, and codes cannot be trained", hint="give the model it was made from"
        )
    return described


def check_shape(config: PretrainConfig, start: ModelStart) -> None:
    """ConfigError when `size` or `vocab_size` says another shape than that of an Instella of a named size.

    Where they say nothing, and for any other model, the shape is the start's; `size` then sets batch, steps and
    learning rate only.
    """
    named = _size_name(start.config)
    if not named:
        return
    if config.size not in ("auto", named):
        raise ConfigError(
            f"size: got {config.size}, but {start.name} is of size {named}",
            hint="drop --size: the start has one",
        )
    if (rows := start.config.vocab_size) != (config.vocab_size or rows):
        raise ConfigError(
            f"vocab_size: got {config.vocab_size}, but the embedding of {start.name} has {rows} rows",
            hint="drop --vocab-size: the start has its own",
        )


def check_use(config: PretrainConfig, start: ModelStart) -> None:
    """ConfigError when the model cannot be trained in this way: too short a limit, or document masks elsewhere."""
    limit = getattr(start.config.get_text_config(), "max_position_embeddings", None)
    longest = max(config.sequence_length, config.context_length)
    if limit and longest > limit:
        raise ConfigError(
            f"sequence_length: got {longest}, but {start.name} reads at most {limit} tokens",
            hint=f"give --sequence-length {limit} or less, or lengthen an Instella with luthier extend",
        )
    if config.document_mask and not isinstance(start.config, InstellaConfig):
        raise ConfigError(
            "document_mask: other architectures cannot be told which document a token belongs to",
            hint="drop document_mask, or start from an Instella",
        )


def _size_name(described: PreTrainedConfig) -> str:
    """The named size whose shape an Instella has, '' for another shape or architecture."""
    if not isinstance(described, InstellaConfig) or described.num_key_value_heads != described.num_attention_heads:
        return ""
    fitting = (name for name, size in SIZES.items() if all(getattr(described, key) == size[key] for key in size))
    return next(fitting, "")


def _empty(config: PreTrainedConfig, *, meta: bool) -> PreTrainedModel:
    """A model of a configuration in fp32, with weights of no meaning or, on the device `meta`, none."""
    with torch.device("meta" if meta else "cpu"), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _other_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The architecture of a Hugging Face config, with random weights and the special tokens of the tokenizer."""
    try:
        described = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        text = described.get_text_config()
        check_vocabulary(tokenizer, text.vocab_size)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(tokenizer, name))
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(config.seed, "initial weights"))
            model = AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {config.model!r} is no causal language model ({str(error).splitlines()[0]})",
            hint="give a folder or hub id whose config.json describes a decoder",
        ) from error
    limit = getattr(text, "max_position_embeddings", None)
    if limit and config.sequence_length > limit:
        raise ConfigError(
            f"sequence_length: got {config.sequence_length}, but {config.model} reads at most {limit} tokens",
            hint=f"set sequence_length to {limit} or less, or raise max_position_embeddings in its config.json",
        )
    if isinstance(model, InstellaForCausalLM):
        initialize(model, derive_seed(config.seed, "initial weights"))
    if not is_causal(model):
        raise ConfigError(
            f"model: {config.model!r} is no causal language model: its positions see the tokens after them",
            hint="give a decoder; some encoders become one with is_decoder: true in config.json",
        )
    return model

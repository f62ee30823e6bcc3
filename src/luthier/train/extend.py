"""Instella-Long, arXiv 2511.10628 (spec: section 4): an Instella learns to use a longer context.

The RoPE base grows by one exact law (section 4.2), rows are as long as the new context, packed with documents that do
not see each other, and the learning rate falls linearly to a thousandth. Phase 1 begins with new moments (a model
folder), phase 2 goes on with those of phase 1 (its run folder). Loop, data and optimizer are those of pretraining.

Departures: the base is kept in full (514,640.3, which theirs rounds); a row is the next window of a corpus, in which a
document may begin or end anywhere (theirs are cut and packed beforehand); a batch is `batch_size` different rows,
however many ranks compute each (theirs counts ranks).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.data.mixture import WindowMixture
from luthier.learn.evaluate import TokenStream
from luthier.learn.parallel import Ranks
from luthier.models.instella_config import InstellaConfig
from luthier.train.extend_config import ExtendConfig, new_theta
from luthier.train.pretrain import Pretrained, pretrain
from luthier.train.start import ModelStart


def lengthened(start: ModelStart, config: ExtendConfig) -> ModelStart:
    """The same weights in a model whose RoPE base and longest position are those of the new context.

    ConfigError for another architecture than Instella, or one whose RoPE is scaled in another way already.
    """
    described = start.config
    if not isinstance(described, InstellaConfig):
        raise ConfigError(
            f"start: {start.name} is of type {described.model_type}, expected an Instella",
            hint="give the folder of an Instella model; luthier pretrain makes one",
        )
    rope = described.rope
    if rope["rope_type"] != "default":
        raise ConfigError(
            f"start: the RoPE of {start.name} is scaled ({rope['rope_type']}), expected the default",
            hint="give a model without rope_scaling",
        )
    longer = copy.deepcopy(described)
    rope["rope_theta"] = new_theta(config, rope["rope_theta"], described.max_position_embeddings)  # § 4.2
    longer.rope_parameters = rope
    longer.max_position_embeddings = max(config.sequence_length, described.max_position_embeddings)
    return replace(start, config=longer)


def extend(
    config: ExtendConfig,
    tokenizer: PreTrainedTokenizerFast,
    mixture: WindowMixture,
    held_out: TokenStream,
    *,
    who: Ranks,
    checkpoints: Path,
    run: RunFolder | None,
    console: Console,
    start: ModelStart,
) -> Pretrained:
    """Train on long rows, resuming from the newest state in `checkpoints`; arguments as those of `pretrain`."""
    return pretrain(
        config.as_pretraining(),
        tokenizer,
        mixture,
        held_out,
        who=replace(who, sequence_parallel=config.sequence_parallel),  # § 4.3
        checkpoints=checkpoints,
        run=run,
        console=console,
        start=lengthened(start, config),
    )

"""What a pretraining run will cost, from its config alone: parameters, memory, FLOPs, tokens, hours. Needs no torch."""

from __future__ import annotations

from luthier.core.errors import ConfigError
from luthier.models.arithmetic import (
    Dimensions,
    attention_flops_per_token,
    dense_flops_per_token,
    num_parameters,
    size_table,
)
from luthier.train.config import PretrainConfig

BYTES_PER_PARAMETER = 16  # fp32 master, gradient and two Adam moments
# Dense bf16 FLOP/s from the vendors' data sheets, and device counts worth a line.
DEVICES = {"H100": 989e12, "H200": 989e12, "MI300X": 1307e12}
DEVICE_COUNTS = (1, 8, 64, 128)
ASSUMED_MFU = 0.4


def dimensions(config: PretrainConfig) -> Dimensions:
    """The model that a config describes. ConfigError for another architecture, which only torch can count, and for the
    shape of a start that is not said."""
    if config.model:
        raise ConfigError(
            f"model: {config.model!r} is another architecture, whose size is known only once it is built",
            hint="drop --dry-run, or plan with one of the sizes",
        )
    if config.size == "auto" or not config.vocab_size:
        raise ConfigError(
            f"start: {config.start} is no Instella on this machine, so that its shape is not known",
            hint="drop --dry-run, or give --size and --vocab-size",
        )
    return Dimensions(vocab_size=config.vocab_size, **size_table(config.size))  # type: ignore[arg-type]


def plan_rows(config: PretrainConfig, size: Dimensions | None = None) -> list[tuple[str, str]]:
    """(quantity, value with unit) of the whole run; `size` is that of a start, None: the one that the config names."""
    size = size or dimensions(config)
    tokens = config.steps * config.batch_size * config.sequence_length
    dense, attention = dense_flops_per_token(size), attention_flops_per_token(size, config.sequence_length)
    return [
        ("parameters", f"{num_parameters(size):,}"),
        ("tokens per step", f"{config.batch_size * config.sequence_length:,}"),
        ("steps", f"{config.steps:,}"),
        ("tokens", f"{tokens:,}"),
        ("training FLOPs per token", f"{dense + attention:.3g} ({dense:.3g} dense + {attention:.3g} attention)"),
        ("training FLOPs", f"{tokens * (dense + attention):.3g}"),
        ("weights in bf16", f"{num_parameters(size) * 2 / 2**30:.2f} GiB"),
        ("weights, gradients and moments", _state_text(num_parameters(size) * BYTES_PER_PARAMETER, config.shard_size)),
        ("activations of a micro-batch", f"about {activation_bytes(config, size) / 2**30:.2f} GiB per rank"),
    ]


def _state_text(num_bytes: int, shard_size: int) -> str:
    whole = f"{num_bytes / 2**30:.2f} GiB"
    if shard_size == 0:
        return f"{whole}, divided among all ranks"
    return f"{whole}, {num_bytes / shard_size / 2**30:.2f} GiB on each of {shard_size} ranks"


def activation_bytes(config: PretrainConfig, size: Dimensions) -> int:
    """Bytes that one micro-batch keeps for the backward pass, in bf16, without attention scores (SDPA keeps none).

    Per token and block: eight tensors as wide as the model and three as wide as the MLP; with checkpointing one.
    """
    per_block = (
        size.hidden_size if config.activation_checkpointing else 8 * size.hidden_size + 3 * size.intermediate_size
    )
    return 2 * config.micro_batch_size * config.sequence_length * size.num_hidden_layers * per_block


def hour_rows(config: PretrainConfig, size: Dimensions | None = None) -> list[list[str]]:
    """For each device: hours on each of DEVICE_COUNTS at an assumed MFU of 40 %; `size` as for `plan_rows`."""
    size = size or dimensions(config)
    per_token = dense_flops_per_token(size) + attention_flops_per_token(size, config.sequence_length)
    flops = per_token * config.steps * config.batch_size * config.sequence_length
    return [
        [name, *(f"{flops / (peak * ASSUMED_MFU * count) / 3600:,.2f}" for count in DEVICE_COUNTS)]
        for name, peak in DEVICES.items()
    ]

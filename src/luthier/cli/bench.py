"""`luthier bench decode MODEL …`: tokens per second of local models, measured in turn in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from luthier.core.checks import at_least
from luthier.core.console import Console
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.quantize.speed import Speed


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure how fast models read and write, one request at a time."""

    what: tyro.conf.Positional[Literal["decode"]]
    """decode: prefill and token-by-token decoding."""
    models: tyro.conf.Positional[tuple[str, ...]]
    """Model folders or hub ids; the first is the baseline of the last column."""
    prompt_tokens: int = 128
    """Length of the prompt."""
    new_tokens: int = 64
    """Tokens that are written after it."""
    repeats: int = 10
    """Rounds that count, after one that only warms up; each takes every model once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the models compute; auto: as each is stored."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: got none, expected one or more", hint="luthier bench decode MODEL OTHER")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("models: the same one is given twice", hint="give each model once")
        at_least(self, 1, "prompt_tokens", "new_tokens", "repeats")


def run(config: BenchConfig, console: Console) -> None:
    """Load the models, measure them in turn, print the table."""
    import torch

    from luthier.learn.parallel import choose_device
    from luthier.models.load import load_pretrained
    from luthier.quantize.speed import measure_speed

    device = choose_device(config.device)
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    models = {name: load_pretrained(name, dtype=dtype, device=device) for name in config.models}
    _check_lengths(config, models)
    with console.progress(config.repeats + 1, "rounds") as advance:
        speeds = measure_speed(
            models,
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens,
            repeats=config.repeats,
            advance=advance,
        )
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    baseline = speeds[config.models[0]]
    console.table(
        f"decode on {device.type}, {where}: {config.prompt_tokens} tokens read, {config.new_tokens} written",
        ["model", "dtype", "in memory", "prefill, tokens/s", "decode, tokens/s", "decode, × first"],
        [_row(name, models[name], speeds[name], baseline) for name in models],
        note=f"Medians of {config.repeats} interleaved rounds with 95 % intervals; batch of one.",
    )
    for name, model in models.items():
        if kernel := _kernel(model):
            console.print(f"{name}: {kernel}")
    console.result(
        {"device": device.type, "where": where, "models": {n: _result(models[n], speeds[n]) for n in models}}
    )


def _check_lengths(config: BenchConfig, models: dict[str, PreTrainedModel]) -> None:
    asked = config.prompt_tokens + config.new_tokens
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", asked)
        if asked > limit:
            raise ConfigError(
                f"{name} reads at most {limit} tokens, got {config.prompt_tokens} + {config.new_tokens}",
                hint="lower --prompt-tokens or --new-tokens",
            )


def _row(name: str, model: PreTrainedModel, speed: Speed, baseline: Speed) -> list[str]:
    ratio = speed.against(baseline)
    times = "1" if speed is baseline else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    rates = [f"{rate.value:,.1f} [{rate.low:,.1f}, {rate.high:,.1f}]" for rate in (speed.prefill, speed.decode)]
    return [name, str(model.dtype).removeprefix("torch."), f"{_memory(model) / 1e6:,.1f} MB", *rates, times]


def _memory(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers, each once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _kernel(model: PreTrainedModel) -> str:
    """The kernels that a quantized model runs on, and why; '' for an ordinary one."""
    from luthier.quantize.linear import RotatedLinear
    from luthier.quantize.sharing import describe

    modules = [module for module in model.modules() if isinstance(module, RotatedLinear)]
    used = {describe((module.shared or module).runner(module.dtype)) for module in modules}
    return "; ".join(f"{product} ({why}), {rotation}" for product, why, rotation in sorted(used))


def _result(model: PreTrainedModel, speed: Speed) -> dict[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": _memory(model),
        "prefill": speed.prefill._asdict(),
        "decode": speed.decode._asdict(),
        "kernel": _kernel(model),
    }

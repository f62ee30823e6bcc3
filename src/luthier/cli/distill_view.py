"""What `luthier distill` shows: the plan, the gate, held-out figures before and after, both stages' curves as one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.stats import bootstrap_mean
from luthier.distill.distill_config import DistillConfig

if TYPE_CHECKING:
    from luthier.distill.examined import Examined

Rows = list[tuple[str, str]]
TRAINED = 16  # bytes a parameter: fp32 weight, gradient and two moments
SUMMED = 4  # the discriminator's gradient once more, to be summed over ranks
FROZEN = 4  # the reference, in fp32
SEQKD = "seqkd/nats_per_token"
DRAWN = (
    "completions/mean_length",
    "completions/teacher_length",
    "completions/unique_share",
    "completions/clipped_ratio",
    "discriminator/",
    "entropy",
    "fresh_accuracy",
    "grad_norm",
    "kl",
    "learning_rate",
    "matched_quality",
    "text",
)


def planned(config: DistillConfig, counted: tuple[int, int] | None) -> Rows:
    """Updates and tokens; `counted` are the rows to learn from and the tokens of their replies, if known."""
    rows = [("prompts per update", f"{config.batch_size:,}"), ("adversarial replies for each", str(config.generations))]
    stages = list(zip(config.steps, config.epochs, strict=True))
    if counted is None:
        made = [f"{steps:,}" if steps else f"{epochs:g} passes" for steps, epochs in stages]
        rows += [("updates of the warm-up", made[0]), ("updates of the adversarial stage", made[1])]
        return [*rows, ("tokens", "counted once the student and the replies are on this machine")]
    of_warmup, of_gad = (steps or math.ceil(epochs * (counted[0] // config.batch_size)) for steps, epochs in stages)
    mean = counted[1] / counted[0]
    learned, sampled = of_warmup * config.batch_size, of_gad * config.batch_size * config.generations
    return [
        *rows,
        ("replies of the teacher", f"{counted[0]:,}, {mean:,.0f} tokens each"),
        ("updates of the warm-up", f"{of_warmup:,}"),
        ("of them the discriminator's alone", f"{min(config.discriminator_alone, of_warmup):,}"),
        ("updates of the adversarial stage", f"{of_gad:,}"),
        ("teacher's tokens learned in warm-up", f"{round(learned * mean):,}"),
        ("replies sampled", f"{learned:,} in warm-up, {sampled:,} adversarially"),
        ("tokens sampled", f"about {round((learned + sampled) * mean):,} at the teacher's length"),
        ("tokens sampled at most", f"{(learned + sampled) * config.max_lengths[1]:,}"),
    ]


def memory_rows(config: DistillConfig) -> Rows:
    """Weights, gradients and moments of all three networks; a line that says so where the student is not known."""
    import torch

    from luthier.cli.quantize import empty_model
    from luthier.cli.run import recipe_folder

    warmed = Path(config.model).expanduser() / "warmup"
    names = [str(warmed / part) for part in ("model", "discriminator")] if warmed.is_dir() else [config.model]
    names += [config.discriminator] if config.discriminator else []
    known = (Path(name).expanduser().exists() or (recipe_folder() / "architectures" / name).is_dir() for name in names)
    if not all(known):
        return [("student, reference and discriminator", "known once the models are on this machine")]
    models = [empty_model(name) for name in names]
    model, critic = models[0], models[-1]
    whole = sum(parameter.numel() for parameter in model.parameters())
    base: torch.nn.Module = critic.base_model
    body = sum(parameter.numel() for parameter in base.parameters())
    student = whole * FROZEN if config.lora_rank else whole * TRAINED
    reference = whole * FROZEN if config.kl and not config.lora_rank else 0
    discriminator = body * (TRAINED + SUMMED)
    fresh = body * (TRAINED + SUMMED) if config.fresh_steps else 0
    adapters = ", adapters on top" if config.lora_rank else ""
    divided = ", divided among the ranks" if config.shard else ""
    return [
        ("student", f"{_size(student)}{adapters}{divided} ({whole:,} parameters)"),
        ("reference of the KL term", _size(reference) + (divided if reference else "")),
        ("discriminator", f"{_size(discriminator)}, whole on each rank ({body:,} parameters)"),
        *([("fresh discriminator, at evaluations", _size(fresh))] if fresh else []),
        ("together", _size(student + reference + discriminator + fresh)),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def gate_table(config: DistillConfig, before: Examined) -> dict[str, Any]:
    """Held-out accuracy of the warmed-up discriminator and of what sees next to nothing, and its lead."""
    from luthier.distill.gate import FEWEST_PROMPTS, gate

    found = gate(before.accuracy, before.baselines, config.margin)
    rows = [["discriminator", found.accuracy.text(), ""]]
    rows += [[name, known.text(), found.leads[name].text()] for name, known in found.baselines.items()]
    state = "open" if found.is_open else "shut, and forced" if config.has_gate else "shut; the reward does not need it"
    return {
        "title": f"Gate: {state}",
        "columns": ["told teacher from student by", "accuracy", "discriminator's lead"],
        "rows": rows,
        "note": f"{found.accuracy.n} held-out prompts, 95 % intervals over them. Open: every lead is at least "
        f"{config.margin:g} at its low end, with {FEWEST_PROMPTS} prompts or more.",
    }


def held_out_table(before: Examined, after: Examined) -> dict[str, Any]:
    """Before and after the adversarial stage, on the same prompts."""
    from luthier.distill.examined import SAMPLES, compared

    return {
        "title": f"Held-out prompts ({len(before.accuracy)})",
        "columns": ["of the student's replies", "after warm-up", "at the end", "change"],
        "rows": compared(before, after),
        "note": f"{SAMPLES} replies a prompt; 95 % intervals over prompts, the change paired. The discriminator is "
        "the one of that moment. The last step counts; no checkpoint is chosen.",
    }


def headline(before: Examined, after: Examined, alarms: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures that say whether the student got closer, or games its discriminator; `alarms`: rows of that kind."""
    ratio = [sum(seen.length) / sum(seen.teacher_length) for seen in (before, after)]
    accuracy = [bootstrap_mean(seen.accuracy) for seen in (before, after)]
    return {
        "held-out accuracy of the discriminator": f"{accuracy[1].text()}, before {accuracy[0].value:.3f}",
        "length over the teacher's": f"{ratio[1]:.3f}, before {ratio[0]:.3f}",
        "unique replies": f"{after.unique_share:.3f}, before {before.unique_share:.3f}",
        "alarms": str(sum(bool(row["name"]) for row in alarms)),
    }


def merged_metrics(stages: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The stages' main figures one after another as lines of JSON, with steps that go on.

    The loss is SeqKD's: the adversarial one is zero at every step but for rounding, whatever is learned.
    """
    lines, done = list[str](), 0
    for rows in stages:
        for row in rows:
            kept = {name: value for name, value in row.items() if name.startswith(DRAWN)}
            if SEQKD in row:
                kept["loss"] = row[SEQKD]
            kept = {"kind": row["kind"], "step": row.get("step", 0) + done, **kept}
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
        done += max((row.get("step", 0) for row in rows), default=0)
    return "".join(lines)

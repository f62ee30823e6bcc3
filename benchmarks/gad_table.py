"""The table and the figure of gad_arms.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gad_world import MATCHED, Row

from luthier.core.stats import bootstrap_mean, paired_difference

TEMPERATURES = (1.0, 0.7, 0.4, 0.2, 0.1)


def at(row: Row, temperature: float | None) -> Row:
    """Test figures of an arm at a temperature; None: at the one that validation prompts chose."""
    found: Row = row["test"][str(row["temperature"] if temperature is None else temperature)]
    return found


def mean_text(values: Sequence[float | None]) -> str:
    """Mean over seeds with its interval; seeds without a value are named, not guessed."""
    known = [value for value in values if value is not None]
    if not known:
        return "undefined"
    missing = f" ({len(values) - len(known)} undefined)" if len(known) < len(values) else ""
    return bootstrap_mean(known).text() + missing


def lead_text(values: Sequence[float | None], base: Sequence[float | None]) -> str:
    """Paired difference over the seeds where both are defined."""
    pairs = [(a, b) for a, b in zip(values, base, strict=True) if a is not None and b is not None]
    return paired_difference(*map(list, zip(*pairs, strict=True))).text() if pairs else "undefined"


def line(of: Mapping[str, Sequence[Row]], arm: str, temperature: float | None) -> Row:
    """One line of the table; GAD minus the arm is at the same temperature, or each at its best."""
    rows = of[arm]
    found, gad = ([at(row, temperature) for row in of[name]] for name in (arm, "GAD"))
    base = [at(row, None) for row in of["SeqKD"]]
    means = {
        name: round(float(np.mean([row[name] for row in found])), 3)
        for name in ("forward_kl", "reverse_kl", "valid", "length", "unique")
        if name in found[0]
    }
    chosen = temperature if temperature is not None else " ".join(f"{row['temperature']}" for row in rows)
    values, of_gad, of_base = ([row[MATCHED] for row in some] for some in (found, gad, base))
    told = {"arm": arm, "temperature": chosen, MATCHED: mean_text(values)}
    told |= {"minus SeqKD at its best": lead_text(values, of_base), "GAD minus it": lead_text(of_gad, values)}
    if temperature == 1:
        told["last"] = mean_text([row["last"][MATCHED] for row in rows])
        told["d_acc"] = mean_text([row.get("d_acc") for row in rows])
    return told | means


def summarize(rows: Sequence[Row], arms: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Two lines per arm, at temperature 1 and at its best one; every temperature of SeqKD."""
    of = {arm: [row for seed in seeds for row in rows if (row["arm"], row["seed"]) == (arm, seed)] for arm in arms}
    lines = [line(of, "SeqKD", temperature) for temperature in TEMPERATURES[1:]]
    for arm in arms:
        lines += [line(of, arm, temperature) for temperature in (1.0, None)]
    return lines


def draw(rows: Sequence[Row], seeds: Sequence[int], path: Path) -> None:
    """GAD and the frozen discriminator step by step, on validation prompts; a thin line per seed."""
    from matplotlib.figure import Figure

    panels = {"length": "tokens of a reply", "valid": "valid", MATCHED: "valid at the teacher's lengths"}
    panels |= {"unique": "different replies", "score": "D's score", "d_acc": "D's held-out accuracy"}
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for arm, color in (("GAD", "C0"), ("D frozen", "C3")):
            curves = [row["curve"] for row in rows if row["arm"] == arm and row["seed"] in seeds]
            values = np.array([[np.nan if p[name] is None else p[name] for p in curve] for curve in curves], float)
            steps = [point["step"] for point in curves[0]]
            axes.plot(steps, values.T, color=color, linewidth=0.5, alpha=0.5)
            axes.plot(steps, values.mean(0), color=color, linewidth=2, label=arm)
        axes.set_title(title, fontsize=10)
    figure.axes[0].legend()
    figure.supxlabel("steps")
    figure.savefig(path)

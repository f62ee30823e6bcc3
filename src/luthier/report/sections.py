"""The sections of a run's report, in order. Each is a function from a record to HTML; '' leaves the section out."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from luthier.core.config import dump_yaml
from luthier.report import figures, layers
from luthier.report.curves import Row, constant, measured_keys, number, smoothing_window
from luthier.report.record import Record
from luthier.report.tables import cell, flatten, table

SAMPLE_STEPS = 20  # a report shows the texts of at most so many steps,
SAMPLE_TEXTS = 12  # so many texts a step,
SAMPLE_CHARACTERS = 3000  # and so much of each text
VALUE = re.compile(
    r"([-+−<>~≈]?[\d.,]+)\s*([^\d\s\[(±]*\s*([\[(±].*)?)"
)  # "2.05 [1.98, 2.12]", "196.6 M", "71 % ± 2 %"

# What is drawn beside the losses: key of the train rows -> (title, unit, whether single rows are noisy). All from zero.
OPTIMIZATION = {"learning_rate": ("Learning rate", "", False), "grad_norm": ("Gradient norm", "", True)}
THROUGHPUT = {"tokens_per_second": ("Tokens per second", "", True), "mfu": ("MFU", "fraction of peak", True)}
DRAWN = {
    "train": {"loss", *OPTIMIZATION, *THROUGHPUT},
    "eval": {"loss", "bits_per_byte", "low", "high", "documents"},
    "layer": {"layer", "stage", "relative_error", "seconds", *layers.STAGES, *layers.ENDS},
    "hidden": {"layer", "relative_error"},
    "divergence": {"percent", "nats"},
}
BY_LAYER = {"layer", "hidden", "divergence"}  # kinds of rows that no training made


def headline(record: Record) -> str:
    """The few numbers that the run is about."""
    numbers: Mapping[str, Any] = record.summary.get("headline") or {}
    if not numbers:
        return '<p class="none">No headline numbers yet: the run has not finished.</p>' if not record.summary else ""
    return f'<dl class="headline">{"".join(_headline_item(name, value) for name, value in numbers.items())}</dl>'


def _headline_item(name: str, value: object) -> str:
    text = cell(value)
    split = VALUE.fullmatch(text)
    main, rest = (split[1], split[2]) if split else (text, "")
    long = ' class="long"' if len(main) > 9 else ""
    tail = f"<small> {html.escape(rest)}</small>" if rest else ""
    return f"<div><dt>{html.escape(name)}</dt><dd{long}>{html.escape(main)}{tail}</dd></div>"


def results(record: Record) -> str:
    """The tables that the run wrote."""
    return "".join(
        table(item.get("columns", []), item.get("rows", []), title=item.get("title", ""), note=item.get("note", ""))
        for item in record.summary.get("tables") or []
    )


def losses(record: Record) -> str:
    """Loss and bits per byte over the run."""
    if BY_LAYER & set(record.rows):
        return ""
    if not record.train and not record.held_out:
        return '<p class="none">No training or evaluation rows yet.</p>' if record.state != "finished" else ""
    drawn: list[str] = []
    if any("loss" in row for row in [*record.train, *record.held_out]):
        svg = figures.loss(record.train, record.held_out, name=_name(record, "loss"))
        drawn.append(_figure("Loss", svg, _loss_note(record.train)))
    if any("bits_per_byte" in row for row in record.held_out):
        svg = figures.bits_per_byte(record.held_out, name=_name(record, "bits-per-byte"))
        drawn.append(_figure("Bits per byte", svg, _interval_note(record.held_out)))
    so_far = "" if record.state == "finished" else " yet"
    missing = "" if record.held_out else f'<p class="none">No evaluation rows{so_far}.</p>'
    return _grid(drawn) + missing


def _loss_note(train: Sequence[Row]) -> str:
    window = smoothing_window(len(train))
    broken = sum(1 for row in train if "loss" in row and not abs(number(row["loss"])) < float("inf"))
    smoothed = f"Faint: every row; solid: moving average over {window} rows." if window > 1 else ""
    lost = f"{broken} {'row is' if broken == 1 else 'rows are'} not finite and not drawn." if broken else ""
    return f"{smoothed} {lost}".strip()


def _interval_note(held_out: Sequence[Row]) -> str:
    documents = sorted({row["documents"] for row in held_out if "documents" in row})
    over = f" over {' or '.join(map(cell, documents))} held-out documents" if documents else ""
    return f"Band: confidence interval{over}." if any("low" in row for row in held_out) else ""


def by_layer(record: Record) -> str:
    """What quantizing did to each layer, and how far two models are apart."""
    mean = "‖difference‖ / ‖original‖ over the validation windows."
    parts = [
        ("Validation loss by layer", layers.losses_by_layer, "layer", _loss_by_layer_note(record)),
        ("Relative error by layer", layers.hidden_errors, "layer", mean),
        ("Error of the hidden states", layers.hidden_errors, "hidden", "The last point is after the final norm."),
        ("KL divergence over tokens", layers.divergence_quantiles, "divergence", "So many % of tokens diverge less."),
    ]
    drawn = [
        (title, draw(record.rows[kind], name=_name(record, kind, number)), note)
        for number, (title, draw, kind, note) in enumerate(parts)
        if kind in record.rows
    ]
    return _grid(_figure(title, svg, note) for title, svg, note in drawn if svg)


def _loss_by_layer_note(record: Record) -> str:
    slowed = [cell(row["layer"]) for row in record.rows.get("layer", ()) if row.get("diverged_at")]
    return f"Started again at a lower rate: layers {', '.join(slowed)}." if slowed else ""


def optimization(record: Record) -> str:
    """Learning rate and gradient norm."""
    return _panels(record, OPTIMIZATION)


def throughput(record: Record) -> str:
    """Speed, and the share of the machine's peak that it is."""
    return _panels(record, THROUGHPUT)


def _panels(record: Record, keys: Mapping[str, tuple[str, str, bool]]) -> str:
    present = measured_keys(record.train)
    return _grid(
        _figure(
            title, figures.measurement(record.train, key, name=_name(record, key), unit=unit, noisy=noisy, scale="zero")
        )
        for key, (title, unit, noisy) in keys.items()
        if key in present
    )


def _name(record: Record, *parts: object) -> str:
    """An id for a figure: unique on the page, because the anchor is."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", "-".join(map(str, (record.anchor, *parts))))


def other_measurements(record: Record) -> str:
    """Every other number that the run recorded more than once: a figure if it changed (rewards), else a line."""
    drawn: list[str] = []
    unchanged: list[str] = []
    for kind, rows in record.rows.items():
        for key in measured_keys(rows):
            title = key.replace("_", " ") if kind == "train" else f"{key.replace('_', ' ')} ({kind})"
            if key in DRAWN.get(kind, ()):
                continue
            if constant(rows, key):
                unchanged.append(f"{title} {cell(next(row[key] for row in rows if key in row))}")
                continue
            name = _name(record, kind, key, len(drawn))  # the count tells "a/b" from "a-b"
            drawn.append(_figure(title, figures.measurement(rows, key, name=name)))
    same = f'<p class="note">The same all the time: {html.escape("; ".join(unchanged))}.</p>' if unchanged else ""
    return _grid(drawn) + same


def _figure(title: str, svg: str, note: str = "") -> str:
    tail = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{tail}</figure>"


def _grid(drawn: Iterable[str]) -> str:
    inside = "".join(drawn)
    return f'<div class="grid">{inside}</div>' if inside else ""


def samples(record: Record) -> str:
    """Generated texts, the latest step open, older steps folded."""
    shown = "".join(_sample_step(entry, first=i == 0) for i, entry in enumerate(record.samples[:SAMPLE_STEPS]))
    left = len(record.samples) - SAMPLE_STEPS
    return shown + (
        f'<p class="none">Texts of {left} earlier steps are in the run folder, in samples/.</p>' if left > 0 else ""
    )


def _sample_step(entry: Mapping[str, Any], *, first: bool) -> str:
    texts = entry.get("samples") or []
    body = "".join(_sample(sample) for sample in texts[:SAMPLE_TEXTS])
    if len(texts) > SAMPLE_TEXTS:
        body += f'<p class="none">{len(texts) - SAMPLE_TEXTS} more texts of this step are in samples/.</p>'
    return _fold(f"Step {cell(entry.get('step'))}", body, note=f"{len(texts)} texts", opened=first)


def _sample(sample: Mapping[str, Any]) -> str:
    prompt, text = _as_text(sample.get("prompt")), _as_text(sample.get("text"))
    cut = len(text) - SAMPLE_CHARACTERS
    more = f' <em class="note">… {cut:,} more characters</em>' if cut > 0 else ""
    shown = html.escape(text[:SAMPLE_CHARACTERS])
    return f'<p class="sample"><b>{html.escape(prompt[-SAMPLE_CHARACTERS:])}</b>{shown}{more}</p>'


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def reproduce(record: Record) -> str:
    """The command that makes the run again."""
    command = record.env.get("command")
    if not command:
        return ""
    commit = record.env.get("commit")
    source = f'<p class="note">Source commit {html.escape(str(commit))}.</p>' if commit else ""
    return f"<pre><code>{html.escape(str(command))}</code></pre>{source}"


def config(record: Record) -> str:
    """The resolved settings, folded."""
    count = len(flatten(record.config)) if isinstance(record.config, Mapping) else len(record.config or ())
    text = html.escape(dump_yaml(record.config))
    return _fold("Configuration", f"<pre><code>{text}</code></pre>", note=f"{count} settings, config.yaml")


def environment(record: Record) -> str:
    """Machine and versions, folded."""
    if not record.env:
        return '<p class="none">No env.json: the machine of this run is not known.</p>'
    return _fold("Environment", table(["", ""], list(flatten(record.env).items())), note=_machine(record.env))


def _machine(env: Mapping[str, Any]) -> str:
    memory = f"{cell(env['memory_gib'])} GiB" if env.get("memory_gib") else ""
    cores = f"{env['cores']} cores" if env.get("cores") else ""
    return ", ".join(filter(None, (str(env.get("processor") or ""), cores, memory)))


def _fold(title: str, body: str, *, note: str = "", opened: bool = False) -> str:
    tail = f' <span class="note">{html.escape(note)}</span>' if note else ""
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{html.escape(title)}{tail}</summary>{body}</details>"


Sections = Sequence[tuple[str, Callable[[Record], str]]]

# Title ('' for none) and function, in the order of the page. A new section is one more row.
SECTIONS: Sections = (
    ("", headline),
    ("Results", results),
    ("Layers", by_layer),
    ("Learning curves", losses),
    ("Optimization", optimization),
    ("Throughput", throughput),
    ("Other measurements", other_measurements),
    ("Samples", samples),
    ("Reproduce", reproduce),
    ("", config),
    ("", environment),
)

# What a recipe's own folder adds, before and after the table of its stages.
OVERVIEW_FIRST: Sections = (("", headline), ("Results", results))
OVERVIEW_LAST: Sections = (("", config), ("", environment))


def body(record: Record, sections: Sections, *, level: int = 2) -> str:
    """Those of the sections that have something to show; `level` is that of their headings."""
    shown = []
    for title, section in sections:
        inside = section(record)
        heading = f"<h{level}>{html.escape(title)}</h{level}>" if title else ""
        if inside:
            shown.append(f"<section>{heading}{inside}</section>")
    return "".join(shown)

"""Traces of reasoning as one page: what was solved, how sure each step is, what changed between rounds, what it cost.

The page needs no network and reads without its script, which only searches and opens.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.core.config import dump_yaml
from luthier.core.errors import DataError
from luthier.core.files import atomic_write
from luthier.report.html import page
from luthier.report.rounds import mappings, rounds, shorten
from luthier.report.spans import HINT, ProblemTrace, Span, Traces, read_traces
from luthier.report.tables import cell, compact, table
from luthier.report.waterfall import waterfall

MOST_PROBLEMS = 200
"""Problems in one page: more of them make a browser slow."""
MOST_CHARACTERS = 30_000_000
"""After this much, no further problem is shown, for the same reason."""
STOPS = {
    "agreed": "agreed",
    "rounds": "rounds used up",
    "budget": "budget spent",
    "context": "context full",
    "done": "done",
    "no answer": "no answer",
    "failed": "failed",
    "unfinished": "unfinished",
}
READ, WRITTEN = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
SYMBOLS = {
    "agreed": "good",
    "budget": "busy",
    "context": "busy",
    "no answer": "bad",
    "failed": "bad",
    "unfinished": "bad",
}


def is_traces(path: Path) -> bool:
    """Whether to read this as traces: a file, or a folder that holds nothing but .jsonl files and what we made."""
    if not path.is_dir():
        return path.is_file()
    names = [entry.name for entry in path.iterdir() if entry.suffix != ".html"]
    return bool(names) and all(name.endswith(".jsonl") for name in names)


def write_traces(path: Path, out: Path | None = None) -> Path:
    """Write the page of a trace file or a folder of them; returns where (`out`, or beside the file, or in the folder).

    Raises: DataError for other files.
    """
    beside = path / "report.html" if path.is_dir() else path.with_suffix(".html")
    target = Path(out) if out is not None else beside
    if target.resolve() == path.resolve():
        raise DataError(f"{path}: the page would take the place of its trace", hint="name another file with --out")
    atomic_write(target, render_traces(path))
    return target


def render_traces(path: Path) -> str:
    """The page as HTML text."""
    traces = _read(path)
    problems = traces.problems
    shown, size = [], 0
    for number, problem in enumerate(problems[:MOST_PROBLEMS], 1):
        shown.append(_problem(problem, number, is_open=len(problems) == 1))
        size += len(shown[-1])
        if size > MOST_CHARACTERS:
            break
    parts = resources.files("luthier.report")
    style, script = (parts.joinpath(name).read_text(encoding="utf-8") for name in ("traces.css", "traces.js"))
    title = path.resolve().name if path.is_dir() else path.stem
    content = (
        f"<header><h1>{html.escape(title)}</h1>{_kinds(problems)}</header>"
        f'<section><dl class="headline">{_totals(problems)}</dl></section>'
        f"<section><h2>How they ended</h2>{_endings(problems)}</section>"
        f"<section><h2>Problems</h2>{_notes(traces, len(shown))}{_search(problems[: len(shown)])}{''.join(shown)}"
        f"</section><section>{_legend()}</section>"
    )
    text = page(title, content, style=style, script=script)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a pair of surrogates is no character


def _read(path: Path) -> Traces:
    if not path.is_dir():
        return read_traces(path, MOST_PROBLEMS)
    whole = Traces()
    for file in sorted(path.glob("*.jsonl")):
        if file.stat().st_size:  # a method whose first problem is not over yet
            part = read_traces(file, max(0, MOST_PROBLEMS - len(whole.problems)))
            whole = Traces(whole.problems + part.problems, whole.cut + part.cut)
    if not whole.problems:
        raise DataError(f"{path}: it holds no events of a trace yet", hint=HINT)
    return whole


# The head of the page


def _kinds(problems: Sequence[ProblemTrace]) -> str:
    tops = [top for problem in problems if (top := problem.top)]
    methods, models = (dict.fromkeys(str(top.data.get(name)) for top in tops) for name in ("method", "model"))
    spans = "".join(f"<span>{html.escape(', '.join(names))}</span>" for names in (methods, models) if names)
    return f'<p class="meta">{spans}</p>'


def _totals(problems: Sequence[ProblemTrace]) -> str:
    count = len(problems)
    read, written = (sum(each) for each in zip(*(problem.tokens() for problem in problems), strict=True))
    calls = sum(len(problem.calls) for problem in problems)
    seconds = [problem.last for problem in problems]
    costs = [cost for problem in problems if (cost := _cost(problem)) is not None]
    numbers: dict[str, tuple[str, str]] = {
        "problems": (f"{count:,}", ""),
        "calls": (f"{calls:,}", f"{calls / count:.1f} each"),
        "tokens written": (compact(written), f"{compact(written / count)} each"),
        "tokens read": (compact(read), f"{compact(read / count)} each"),
        "seconds": (f"{sum(seconds) / count:,.2f}", f"each, at most {max(seconds):,.2f}"),
    }
    if costs:
        numbers["cost"] = (f"${sum(costs):.3g}", "" if len(costs) == count else f"{len(costs):,} of them known")
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)} <small>{html.escape(small)}</small></dd></div>"
        for name, (value, small) in numbers.items()
    )


def _cost(problem: ProblemTrace) -> float | None:
    """Dollars of all calls; None where one is not known."""
    costs = [call.data.get("cost") for call in problem.calls if call.end is not None and not call.error]
    return None if not costs or None in costs else sum(cost for cost in costs if isinstance(cost, int | float))


def _endings(problems: Sequence[ProblemTrace]) -> str:
    by_method: dict[str, list[ProblemTrace]] = {}
    for problem in problems:
        by_method.setdefault(_method(problem), []).append(problem)
    met = Counter(problem.outcome for problem in problems)
    outcomes = [name for name in STOPS if name in met] + [name for name in met if name not in STOPS]
    columns = ["method", "problems", *(STOPS.get(name, name) for name in outcomes), "calls", "tokens", "seconds"]
    rows: list[list[object]] = []
    for method, group in by_method.items():
        ended = Counter(problem.outcome for problem in group)
        shares = [f"{ended[name]:,} ({ended[name] / len(group):.0%})" if ended[name] else "–" for name in outcomes]
        each = (
            sum(len(problem.calls) for problem in group) / len(group),
            sum(problem.tokens()[1] for problem in group) / len(group),
            sum(problem.last for problem in group) / len(group),
        )
        rows.append([method, len(group), *shares, f"{each[0]:.1f}", f"{each[1]:,.0f}", f"{each[2]:.2f}"])
    return table(columns, rows, note="Calls, written tokens and seconds: mean of a problem.")


def _method(problem: ProblemTrace) -> str:
    return str(problem.top.data.get("method", "unknown")) if problem.top else "unknown"


def _notes(traces: Traces, shown: int) -> str:
    count = len(traces.problems)
    notes = []
    if shown < count:
        notes.append(f"The first {shown:,} of {count:,} problems; the numbers above are of all.")
    if traces.cut:
        lines = "1 line was" if traces.cut == 1 else f"{traces.cut:,} lines were"
        notes.append(f"{lines} cut off when a run was stopped, and left out.")
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _search(problems: Sequence[ProblemTrace]) -> str:
    """Controls that only work with the script, which shows them."""
    met = Counter(problem.outcome for problem in problems)
    options = "".join(
        f'<option value="{html.escape(name)}">{html.escape(STOPS.get(name, name))} ({count:,})</option>'
        for name, count in met.most_common()
    )
    return (
        '<form class="search" hidden><label>Find <input type="search" name="find" autocomplete="off"></label>'
        f'<label>Ended <select name="stop"><option value="">any way ({len(problems):,})</option>{options}</select>'
        "</label>"
        '<label><input type="checkbox" name="noted"> with notes</label>'
        '<button type="button" name="open">Open all</button><output></output></form>'
    )


def _legend() -> str:
    lines = (
        "Each step was answered again, given the stated answers before it. Confidence is the share of these re-answers "
        "that equal what the solution states. A step is outvoted when another answer is more common; it is mended with "
        "that answer as a hint. Kept: step and predecessors are as in an earlier round, and so are their re-answers.",
        "Solutions: + a line that is new, − a line that is gone, against the solution that the model was shown.",
        "Calls over time: each bar is a call, a hollow one has no reply. Dashed lines: where a round begins.",
        "Ended: agreed, nothing was left in doubt; rounds used up, doubt was left; done, the method has no check.",
    )
    return f"<details><summary>How to read this</summary>{''.join(f'<p>{line}</p>' for line in lines)}</details>"


# One problem


def _problem(problem: ProblemTrace, number: int, *, is_open: bool) -> str:
    top, outcome = problem.top, problem.outcome
    data: Mapping[str, Any] = top.data if top else {}
    question = shorten(str(data.get("question", problem.name)))
    flags = data.get("flags") if isinstance(data.get("flags"), list) else []
    flags = [*(flags or []), *([top.error] if top and top.error else [])]
    state = f'<span class="status {SYMBOLS.get(outcome, "plain")}">{html.escape(STOPS.get(outcome, outcome))}</span>'
    written = problem.tokens()[1]
    facts = [
        _method(problem),
        f"{len(problem.calls):,} {'call' if len(problem.calls) == 1 else 'calls'}",
        f"{compact(written)} tokens",
        f"{problem.last:.2f} s",
    ]
    facts += [f"{len(flags)} {'note' if len(flags) == 1 else 'notes'}"] if flags else []
    summary = (
        f'<span class="number">{number}</span><span class="question">{html.escape(question[:300])}</span> '
        f'<b class="answer">{html.escape(shorten(cell(data.get("answer"))))}</b> '
        f'<span class="facts">{state} <span class="note">{html.escape(" · ".join(facts))}</span></span>'
    )
    body = (
        f'<p class="sample">{html.escape(question)}</p>{_about(problem)}'
        + (f'<ul class="flags">{"".join(f"<li>{html.escape(str(f))}</li>" for f in flags)}</ul>' if flags else "")
        + rounds(problem)
        + _calls(problem, f"p{number}")
        + _settings(data.get("config"))
    )
    marks = f'data-stop="{html.escape(outcome)}"{" data-noted" if flags else ""}{" open" if is_open else ""}'
    return f'<details class="problem" id="p{number}" {marks}><summary>{summary}</summary>{body}</details>'


def _about(problem: ProblemTrace) -> str:
    """Name, method, model, and the way of the answer through the rounds."""
    data: Mapping[str, Any] = problem.top.data if problem.top else {}
    answers = [cell(point.data.get("answer")) for point in problem.points if point.name == "proposal"]
    way = " → ".join(answers) if 1 < len(answers) <= 8 and problem.rounds else ""
    facts = [problem.name, str(data.get("method", "")), str(data.get("model", "")), f"answers: {way}" if way else ""]
    cost = _cost(problem)
    facts += [f"${cost:.3g}"] if cost is not None else []
    return f'<p class="meta">{"".join(f"<span>{html.escape(shorten(fact))}</span>" for fact in facts if fact)}</p>'


def _settings(config: object) -> str:
    if not isinstance(config, Mapping) or not config:
        return ""
    text = html.escape(dump_yaml(dict(config)))
    return f"<details><summary>Settings</summary><pre>{text}</pre></details>"


def _calls(problem: ProblemTrace, anchor: str) -> str:
    calls = problem.calls
    if not calls:
        return ""
    columns = ("role", "model", "calls", "replies", "tokens read", "tokens written", "seconds in calls")
    rows: list[Sequence[object]] = []
    for role in dict.fromkeys(call.name for call in calls):
        mine = [call for call in calls if call.name == role]
        models = ", ".join(dict.fromkeys(str(call.data.get("gen_ai.request.model", "")) for call in mine))
        replies = sum(len(_replies(call)) for call in mine)
        read, written = (int(sum(call.count(name) for call in mine)) for name in (READ, WRITTEN))
        seconds = sum(call.end - call.start for call in mine if call.end is not None)
        rows.append([role, models, len(mine), replies, read, written, f"{seconds:.2f}"])
    each = "".join(_call(problem, call, f"{anchor}-{number}") for number, call in enumerate(calls, 1))
    every = (
        f'<details class="calls"><summary>Every call <span class="note">{len(calls):,}</span></summary>{each}</details>'
    )
    picture = f'<div class="scroll">{waterfall(problem, anchor)}</div>'
    return f'<section class="round"><h3>Calls over time</h3>{picture}{table(columns, rows)}{every}</section>'


def _replies(call: Span) -> list[object]:
    replies = call.data.get("replies")
    return replies if isinstance(replies, list) else []


def _call(problem: ProblemTrace, call: Span, anchor: str) -> str:
    replies = _replies(call)
    took = "no reply" if call.end is None or call.error else f"{call.end - call.start:.3f} s"
    facts = [_where(problem, call), f"at {call.start:.3f} s, {took}"]
    facts += [f"{len(replies)} replies"] if len(replies) > 1 else []
    facts += [f"{call.count(READ):,.0f} → {call.count(WRITTEN):,.0f} tokens"] if replies else []
    asked = "".join(_said(f"Asked, {m.get('role')}", m.get("content")) for m in mappings(call.data.get("messages")))
    reasons = call.data.get("gen_ai.response.finish_reasons")
    reasons = reasons if isinstance(reasons, list) else []
    said = ""
    for number, reply in enumerate(replies):
        ended = f", ended by {reasons[number]}" if number < len(reasons) and reasons[number] != "stop" else ""
        said += _said(f"Reply {number + 1}{ended}" if len(replies) > 1 else f"Reply{ended}", reply)
    failed = f'<p class="flags">{html.escape(call.error)}</p>' if call.error else ""
    what = f'{html.escape(call.name)} <span class="note">{html.escape(" · ".join(filter(None, facts)))}</span>'
    return f'<details id="{anchor}" class="call"><summary>{what}</summary>{asked}{said}{failed}</details>'


def _where(problem: ProblemTrace, call: Span) -> str:
    """The round, and the step that is re-answered."""
    number = problem.round_of(call.parent)
    round_ = f"round {problem.spans[number].data.get('number', '')}" if number is not None else ""
    parent = problem.spans.get(call.parent) if call.parent is not None else None
    index = parent.data.get("index") if parent is not None and parent.kind == "step" else None
    return ", ".join(filter(None, (round_, f"step {index + 1}" if isinstance(index, int) else "")))


def _said(title: str, text: object) -> str:
    return (
        f"<h4>{html.escape(title)}</h4><pre>{html.escape(shorten(text if isinstance(text, str) else cell(text)))}</pre>"
    )

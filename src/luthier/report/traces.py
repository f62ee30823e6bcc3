"""Traces of reasoning as one page: what was solved, how sure each step is, what changed between rounds, what it cost.

The page needs no network and reads without its script, which only searches and opens.
"""

from __future__ import annotations

import difflib
import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.core.files import atomic_write
from luthier.report.html import page
from luthier.report.spans import Point, ProblemTrace, Span, read_traces
from luthier.report.tables import cell, compact, table
from luthier.report.waterfall import waterfall

MOST_PROBLEMS = 200
"""Problems in one page: more of them make a browser slow."""
NOTED = ("fallback", "budget")
WAYS = ("input", "output")
STOPS = {
    "agreed": "no step is in doubt",
    "rounds": "all rounds used",
    "budget": "budget spent",
    "done": "done",
    "no answer": "no answer found",
}


def write_traces(path: Path, out: Path | None = None) -> Path:
    """Write the page of a trace file; returns where (`out`, or beside the file). Raises: DataError for other files."""
    target = Path(out) if out is not None else path.with_suffix(".html")
    atomic_write(target, render_traces(path))
    return target


def render_traces(path: Path) -> str:
    """The page as HTML text."""
    problems = read_traces(path)
    shown = problems[:MOST_PROBLEMS]
    rest = len(problems) - len(shown)
    note = f'<p class="note">The first {len(shown)} of {len(problems):,} problems; the numbers are of all.</p>'
    parts = resources.files("luthier.report")
    style, script = (parts.joinpath(name).read_text(encoding="utf-8") for name in ("traces.css", "traces.js"))
    search = (
        '<form class="search" hidden><label>Find <input type="search" name="find" autocomplete="off"></label>'
        '<button type="button" name="open">Open all</button><output></output></form>'
    )
    content = (
        f"<header><h1>{html.escape(path.stem)}</h1>{_kinds(problems)}</header>"
        f'<section><dl class="headline">{_totals(problems)}</dl></section>'
        f"<section><h2>Problems</h2>{search}{note if rest else ''}"
        f"{''.join(_problem(problem, is_open=len(problems) == 1) for problem in shown)}</section>"
    )
    return page(path.stem, content, style=style, script=script)


def _kinds(problems: Sequence[ProblemTrace]) -> str:
    tops = [top for problem in problems if (top := problem.top)]
    methods, models = (Counter(str(top.data.get(name)) for top in tops) for name in ("method", "model"))
    unfinished = sum(top.end is None for top in tops) + len(problems) - len(tops)
    spans = [", ".join(methods), ", ".join(models)] + ([f"{unfinished:,} unfinished"] if unfinished else [])
    return f'<p class="meta">{"".join(f"<span>{html.escape(text)}</span>" for text in spans)}</p>'


def _totals(problems: Sequence[ProblemTrace]) -> str:
    tops = [top for problem in problems if (top := problem.top)]
    read, written = (sum(each) for each in zip(*(problem.tokens() for problem in problems), strict=True))
    costs = [top.data.get("cost") for top in tops]
    known = [cost for cost in costs if cost is not None]
    calls = sum(len(problem.calls) for problem in problems)
    numbers: dict[str, tuple[str, str]] = {
        "problems": (f"{len(problems):,}", ""),
        "calls": (f"{calls:,}", f"{calls / len(problems):.1f} each"),
        "tokens written": (compact(written), f"{compact(written / len(problems))} each"),
        "tokens read": (compact(read), ""),
        "seconds": (f"{max(problem.last for problem in problems):,.1f}", "longest"),
    }
    if known:
        numbers["cost"] = (f"${sum(known):.4g}", "" if len(known) == len(costs) else f"{len(known):,} of them known")
    for stop, count in Counter(str(top.data["stop"]) for top in tops if "stop" in top.data).most_common():
        numbers[STOPS.get(stop, stop)] = (f"{count:,}", f"{count / len(problems):.0%}")
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)} <small>{html.escape(small)}</small></dd></div>"
        for name, (value, small) in numbers.items()
    )


def _problem(problem: ProblemTrace, *, is_open: bool) -> str:
    top = problem.top
    data = top.data if top else {}
    question = str(data.get("question", problem.name))
    answer = data.get("answer")
    finished = top is not None and top.end is not None and not top.error
    state = STOPS.get(str(data.get("stop")), str(data.get("stop"))) if finished else _unfinished(top)
    facts = f"{state} · {len(problem.calls)} calls · {problem.last:.2f} s"
    summary = (
        f'<span class="question">{html.escape(question)}</span> '
        f'<b class="answer">{html.escape(cell(answer))}</b><span class="note">{html.escape(facts)}</span>'
    )
    flags = "".join(f"<li>{html.escape(str(flag))}</li>" for flag in data.get("flags", ()))
    body = (
        f'<p class="sample">{html.escape(question)}</p>'
        + (f'<ul class="flags">{flags}</ul>' if flags else "")
        + _rounds(problem)
        + f"<h4>When</h4>{waterfall(problem)}{_calls(problem)}"
    )
    return f'<details class="problem"{" open" if is_open else ""}><summary>{summary}</summary>{body}</details>'


def _unfinished(top: Span | None) -> str:
    return f"failed: {top.error}" if top and top.error else "unfinished"


def _rounds(problem: ProblemTrace) -> str:
    """Every round: the checked steps, what was chosen to mend, and the new solution against the one before."""
    parts, before = [], ""
    for span in problem.rounds:
        points = [point for point in problem.points if problem.round_of(point.parent) == span.number]
        selected = next((p.data for p in points if p.name == "selected"), {})
        body = "".join(_steps(point.data["steps"], selected) for point in points if point.name == "steps")
        body += "".join(_fallback(point) for point in points if point.name in NOTED)
        for point in (proposals := [point for point in points if point.name == "proposal"]):
            text = str(point.data.get("text", ""))
            body += _solution(point, before if len(proposals) == 1 else "")
            before = text
        number = span.data.get("number", 0)
        title = "The first solution" if not number else f"Round {number}"
        title = f"{title}: {span.name}" if span.name not in ("round",) else title
        parts.append(f"<h3>{html.escape(title)}</h3>{body or '<p class=none>Nothing came of it.</p>'}")
    outside = [point for point in problem.points if problem.round_of(point.parent) is None]
    return "".join(parts) + "".join(_fallback(point) for point in outside if point.name in NOTED)


def _steps(steps: Iterable[Mapping[str, Any]], selected: Mapping[str, Any]) -> str:
    chosen = set(selected.get("indices", ()))
    rows = "".join(_step(step, step["index"] in chosen) for step in steps)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "step", "stated", "confidence", "re-answers", ""))
    return f'<div class="scroll"><table class="steps"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _step(step: Mapping[str, Any], is_chosen: bool) -> str:
    sure = step.get("confidence")
    known = "unknown" if sure is None else f"{sure:.0%}"
    bar = f'<span class="bar" style="--share:{0 if sure is None else sure:.3f}"></span>{known}'
    votes = " ".join(f"{html.escape(str(vote['answer']))}&thinsp;×{vote['count']}" for vote in step.get("votes", ()))
    decided_by = str(step.get("decided_by", "votes"))
    by = "" if decided_by == "votes" else f'<span class="note">{html.escape(decided_by)}</span>'
    verdict = "" if step.get("agrees") else f"says {cell(step.get('majority'))}"
    mend = f"<strong>{html.escape(verdict)}, mend</strong>" if is_chosen else html.escape(verdict)
    cells = (
        f'<td class="n">{step["index"] + 1}</td><td class="w">{html.escape(str(step["question"]))}</td>'
        f'<td>{html.escape(str(step["answer"]))}</td><td class="sure">{bar}</td><td>{votes} {by}</td><td>{mend}</td>'
    )
    return f'<tr class="{"doubted" if not step.get("agrees") else "agreed"}">{cells}</tr>'


def _fallback(point: Point) -> str:
    text = point.data.get("spent") or f"{point.data.get('what')}: {point.data.get('why')}"
    return f'<p class="flags">{"Budget spent: " if point.name == "budget" else ""}{html.escape(str(text))}</p>'


def _solution(point: Point, before: str) -> str:
    text, answer = str(point.data.get("text", "")), cell(point.data.get("answer"))
    lines = _changes(before, text) if before else [("", line) for line in text.split("\n")]
    body = "".join(
        f'<span class="{ {"+": "added", "−": "removed"}.get(mark, "kept") }">{mark or " "} {html.escape(line)}\n</span>'
        for mark, line in lines
    )
    changed = sum(bool(mark) for mark, _ in lines)
    note = f'<span class="note">{changed} lines changed</span>' if before else ""
    note = '<span class="note">unchanged</span>' if before and not changed else note
    return f'<h4>Answer {html.escape(answer)} {note}</h4><pre class="diff">{body}</pre>'


def _changes(before: str, after: str) -> list[tuple[str, str]]:
    """Lines of `after`, with those of `before` that are gone: ('+' | '−' | '', line)."""
    marks = {"+ ": "+", "- ": "−", "  ": ""}
    compared = difflib.ndiff(before.split("\n"), after.split("\n"))
    return [(marks[line[:2]], line[2:]) for line in compared if line[:2] in marks]


def _calls(problem: ProblemTrace) -> str:
    calls = problem.calls
    if not calls:
        return ""
    columns = ("role", "model", "calls", "replies", "tokens read", "tokens written", "seconds in calls")
    rows = []
    for role in dict.fromkeys(call.name for call in calls):
        mine = [call for call in calls if call.name == role]
        models = ", ".join(dict.fromkeys(str(call.data.get("gen_ai.request.model", "")) for call in mine))
        replies = sum(len(call.data.get("replies", ())) for call in mine)
        read, written = (sum(call.data.get(f"gen_ai.usage.{way}_tokens", 0) for call in mine) for way in WAYS)
        seconds = sum(call.end - call.start for call in mine if call.end is not None)
        rows.append([role, models, len(mine), replies, read, written, round(seconds, 2)])
    each = "".join(map(_call, calls))
    return f'{table(columns, rows)}<details class="calls"><summary>All {len(calls)} calls</summary>{each}</details>'


def _call(call: Span) -> str:
    written = call.data.get("gen_ai.usage.output_tokens", 0)
    took = "no answer" if call.end is None else f"{call.end - call.start:.3f} s, {written} tokens"
    asked = "\n\n".join(f"[{m.get('role')}]\n{m.get('content')}" for m in call.data.get("messages", ()))
    replies = call.data.get("replies", ())
    said = "".join(f"<pre>{html.escape(str(reply))}</pre>" for reply in replies)
    failed = f'<p class="flags">{html.escape(call.error)}</p>' if call.error else ""
    what = f"{html.escape(call.name)} <span class='note'>at {call.start:.3f} s, {took}</span>"
    return (
        f"<details><summary>{what}</summary><h4>Asked</h4><pre>{html.escape(asked)}</pre>"
        f"<h4>Replied</h4>{said}{failed}</details>"
    )

"""What happened to a problem, round by round: checked steps with their votes, what was mended, solutions with changes.

A solution is compared with the one that its author was shown, found in the messages of the call; the trace does not say
it otherwise. Where nothing earlier was shown (first chains, samples), there is nothing to compare.
"""

from __future__ import annotations

import difflib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.report.spans import Point, ProblemTrace, Span
from luthier.report.tables import cell

LONGEST = 20_000  # characters of one text on the page
MOST_WORDS = 2_000  # in lines whose single words are compared
DECIDED_BY = {
    "votes": "",
    "checker": "computed",
    "memo": "kept",
    "judge": "by a judge",
    "trust": "first reply, trusted",
}
DOUBTS = {"votes": "outvoted", "memo": "outvoted", "checker": "refuted"}


@dataclass
class Part:
    """A round, or what lies between rounds (`span` is None)."""

    span: Span | None
    items: list[Span | Point] = field(default_factory=list)

    @property
    def proposals(self) -> list[Point]:
        """The solutions of this part."""
        return [item for item in self.items if isinstance(item, Point) and item.name == "proposal"]


def rounds(problem: ProblemTrace) -> str:
    """The rounds of a problem as HTML, in order."""
    return "".join(_part(problem, part) for part in parts_of(problem))


def parts_of(problem: ProblemTrace) -> list[Part]:
    """Points and spans by round, in the order in which they came."""
    parts: list[Part] = []
    of_round: dict[int, Part] = {}
    for item in problem.items:
        if isinstance(item, Span) and item.kind == "round":
            parts.append(of_round.setdefault(item.number, Part(item)))
            continue
        number = problem.round_of(item.parent)
        if number is None and (not parts or parts[-1].span is not None):
            parts.append(Part(None))
        (parts[-1] if number is None else of_round[number]).items.append(item)
    return parts


def _part(problem: ProblemTrace, part: Part) -> str:
    selected = next((i.data for i in part.items if isinstance(i, Point) and i.name == "selected"), {})
    body = "".join(_item(problem, part, item, selected) for item in part.items)
    if part.span is None:
        several = len(part.proposals) > 1
        title = ("Solutions" if several else "Solution") if part.proposals else ""
        heading = f"<h3>{title}</h3>" if title else ""
        return f'<section class="round">{heading}{body}</section>' if body else ""
    if not body:
        body = f'<p class="none">{"Nothing came of it." if part.span.end is not None else "It was not finished."}</p>'
    return f'<section class="round"><h3>{html.escape(_title(part.span))}{_took(part.span)}</h3>{body}</section>'


def _title(span: Span) -> str:
    number = span.data.get("number", 0)
    if span.name == "plan":
        return "The plan behind it"
    title = f"Round {number}" if number else "The first solution"
    return title if span.name == "round" else f"{title}: {span.name}"


def _took(span: Span) -> str:
    return "" if span.end is None else f' <span class="note">{span.end - span.start:.2f} s</span>'


def _item(problem: ProblemTrace, part: Part, item: Span | Point, selected: Mapping[str, Any]) -> str:
    if isinstance(item, Span):
        if item.kind != "stage":
            return ""
        checked = any(isinstance(i, Point) and i.name == "steps" for i in part.items)
        # A check that was stopped on the way left single steps.
        stopped = item.name == "verify" and not checked
        left = [span.data for span in problem.spans.values() if stopped and span.parent == item.number]
        return _steps(left, selected) if left else _judgement(problem, part, item)
    if item.name == "proposal":
        return _solution(problem, part, item)
    if item.name == "steps":
        return _steps(mappings(item.data.get("steps")), selected)
    if item.name == "votes":
        return f"<p>Votes: {_votes(item.data.get('votes'))}</p>"
    if item.name == "budget":
        return f'<p class="flags">Budget spent: {html.escape(str(item.data.get("spent")))}</p>'
    if item.name == "fallback":
        return (
            f'<p class="flags">{html.escape(str(item.data.get("what")))}: {html.escape(str(item.data.get("why")))}</p>'
        )
    return "" if item.name == "selected" else f'<p class="note">{html.escape(item.name)}: {_plain(item.data)}</p>'


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The mappings of what should be a list of them."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _plain(value: object) -> str:
    return html.escape(shorten(json.dumps(value, ensure_ascii=False)))


def shorten(text: str) -> str:
    """At most `LONGEST` characters: the beginning and the end, and how much is missing between them."""
    left = len(text) - LONGEST
    half = LONGEST // 2
    return text if left <= 0 else f"{text[:half]}\n[… {left:,} characters …]\n{text[-half:]}"


# Steps


def _steps(steps: Sequence[Mapping[str, Any]], selected: Mapping[str, Any]) -> str:
    chosen, hints = selected.get("indices"), selected.get("hints")
    chosen = chosen if isinstance(chosen, list) else []
    hints = hints if isinstance(hints, Mapping) else {}
    rows = ""
    for place, step in enumerate(steps):
        index = step.get("index", place)
        # A step that was refuted may have no hint: it is to be done again.
        rows += _step(index, step, (hints.get(str(index)) or "do again") if index in chosen else None)
    names = ("", "step", "stated", "confidence", "re-answers", "verdict")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="steps"><table class="steps">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _step(index: object, step: Mapping[str, Any], hint: object | None) -> str:
    by = str(step.get("decided_by", ""))
    by = DECIDED_BY.get(by, by)
    note = f' <span class="note">{html.escape(by)}</span>' if by else ""
    number = index + 1 if isinstance(index, int) else "?"
    kind, verdict = _verdict(step)
    mend = "" if hint is None else f'<strong class="mend">→ mend: {html.escape(cell(hint))}</strong>'
    return (
        f'<tr class="{kind}"><td class="n">{number}</td><td class="w">{html.escape(str(step.get("question", "")))}</td>'
        f'<td class="v">{html.escape(cell(step.get("answer")))}</td>'
        f'<td class="sure">{_bar(step.get("confidence"))}</td>'
        f'<td class="v">{_votes(step.get("votes"))}{note}</td><td class="verdict">{verdict}{mend}</td></tr>'
    )


def _verdict(step: Mapping[str, Any]) -> tuple[str, str]:
    """A class and words: the color only repeats what the words say."""
    if "agrees" not in step:
        return "open", "not finished"
    if not step["agrees"]:
        return "doubted", f"✗ {DOUBTS.get(str(step.get('decided_by', 'votes')), 'doubted')}"
    return ("open", "? no majority") if step.get("majority") is None else ("confirmed", "✓ confirmed")


def _bar(confidence: object) -> str:
    if not isinstance(confidence, int | float):
        return '<span class="bar" style="--share:0"></span>unknown'
    share = min(max(float(confidence), 0.0), 1.0)
    return f'<span class="bar" style="--share:{share:.3f}"></span>{share:.0%}'


def _votes(votes: object) -> str:
    shown = (
        f"{html.escape(cell(v.get('answer')))} <b>×{html.escape(str(v.get('count')))}</b>" for v in mappings(votes)
    )
    return ", ".join(shown) or '<span class="none">–</span>'


def _judgement(problem: ProblemTrace, part: Part, stage: Span) -> str:
    """A judge's words on a whole solution, folded under the score."""
    calls = [call for call in problem.calls if call.parent == stage.number and call.data.get("replies")]
    if stage.name != "judge" or not calls:
        return ""
    score = stage.data.get("score")
    said = f"gives {html.escape(cell(score))} of 5" if score is not None else "says"
    unread = ' <span class="note">no score could be read</span>' if "score" in stage.data and score is None else ""
    reply = html.escape(shorten("\n".join(map(str, calls[-1].data["replies"]))))
    judged = [n for n, one in enumerate(part.proposals, 1) if _was_shown(one, calls)]
    which = f"solution {judged[0]}" if len(judged) == 1 < len(part.proposals) else "the whole solution"
    return f"<details><summary>A judge of {which} {said}{unread}</summary><pre>{reply}</pre></details>"


# Solutions


def _solution(problem: ProblemTrace, part: Part, point: Point) -> str:
    text, before = _text(point), base(problem, point)
    lines = changes(_text(before), text) if before else [("", html.escape(line)) for line in text.split("\n")]
    body = "".join(_line(mark, line) for mark, line in lines)
    added, removed = (sum(mark == sign for mark, _ in lines) for sign in "+−")
    lines_added = f"{added} line{'' if added == 1 else 's'} added"
    change = f"{lines_added}, {removed} removed" if added or removed else "unchanged"
    note = f'<span class="note">{change}, against the solution that was mended</span>' if before else ""
    counts = '<span class="counts">✓ this one counts</span>' if _counts(problem, point) else ""
    name = f"Answer {html.escape(cell(point.data.get('answer')))}"
    if len(part.proposals) > 1:
        number = part.proposals.index(point) + 1
        title = f"Solution {number} of {len(part.proposals)}: answer {html.escape(cell(point.data.get('answer')))}"
        return f'<details><summary>{title} {counts}{note}</summary><pre class="diff">{body}</pre></details>'
    return f'<h4>{name} {counts}{note}</h4><pre class="diff">{body}</pre>'


def _text(point: Point) -> str:
    return shorten(str(point.data.get("text", "")))


def _line(mark: str, line: str) -> str:
    tag, kind = {"+": ("ins", "added"), "−": ("del", "removed")}.get(mark, ("span", "kept"))
    return f'<{tag} class="{kind}">{mark or " "} {line}\n</{tag}>'


def _counts(problem: ProblemTrace, point: Point) -> bool:
    """Whether the text is that of the solution in the end (its last appearance), where there was a choice."""
    proposals = [one for one in problem.points if one.name == "proposal"]
    top = problem.top
    if top is None or top.end is None or len(proposals) < 2:
        return False
    same = [one for one in proposals if one.data.get("text") == top.data.get("text")]
    return bool(same) and same[-1] is point


def base(problem: ProblemTrace, point: Point) -> Point | None:
    """The earlier solution that the author of this one was shown; None: none, or that of another author.

    Of several that were shown, it is the one at the same place in the round before (debaters keep their places).
    """
    proposals = [one for one in problem.points if one.name == "proposal"]
    here = next(i for i, one in enumerate(proposals) if one is point)
    group = [one for one in proposals if one.parent == point.parent]
    calls = [call for call in problem.calls if call.parent == point.parent]
    earlier = [one for one in proposals[:here] if all(one is not other for other in group)]
    shown = [one for one in earlier if _was_shown(one, calls)]
    if len(group) == 1 or not shown:
        return shown[-1] if shown else None
    place = next(i for i, one in enumerate(group) if one is point)
    before = [one for one in proposals if one.parent == shown[-1].parent]
    return before[place] if place < len(before) == len(group) else None


def _was_shown(point: Point, calls: Sequence[Span]) -> bool:
    """Whether a solution stands in the messages of some calls."""
    said = (str(m.get("content", "")) for call in calls for m in mappings(call.data.get("messages")))
    text = str(point.data.get("text") or "")
    return bool(text) and any(text in message for message in said)


def changes(before: str, after: str) -> list[tuple[str, str]]:
    """The lines of `after` among those of `before` that are gone: ('+' | '−' | '', escaped line).

    In lines that took each other's place, the words that differ are in <b>.
    """
    old, new = before.split("\n"), after.split("\n")
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            found += [("", html.escape(line)) for line in new[c:d]]
            continue
        removed, added = list(map(html.escape, old[a:b])), list(map(html.escape, new[c:d]))
        if b - a == d - c:
            pairs = [_words(x, y) for x, y in zip(old[a:b], new[c:d], strict=True)]
            removed, added = [x for x, _ in pairs], [y for _, y in pairs]
        found += [("−", line) for line in removed] + [("+", line) for line in added]
    return found


def _words(before: str, after: str) -> tuple[str, str]:
    old, new = re.findall(r"\s+|\w+|[^\w\s]", before), re.findall(r"\s+|\w+|[^\w\s]", after)
    if max(len(old), len(new)) > MOST_WORDS:
        return html.escape(before), html.escape(after)
    left, right = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        left.append(_marked(old[a:b], kind != "equal"))
        right.append(_marked(new[c:d], kind != "equal"))
    return "".join(left), "".join(right)


def _marked(words: Iterable[str], differ: bool) -> str:
    text = html.escape("".join(words))
    return f"<b>{text}</b>" if differ and text else text

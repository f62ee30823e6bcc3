"""The page of a trace: made from real events, escaped, readable without its script, and alive in a real browser."""

from __future__ import annotations

import asyncio
import html
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.llm.endpoint import Endpoint
from luthier.llm.stub_server import StubServer
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.reason.trace import Trace, TraceFile
from luthier.report import traces
from luthier.report.rounds import LONGEST, changes, shorten
from luthier.report.spans import ProblemTrace, Span, read_traces
from luthier.report.traces import is_traces, render_traces, write_traces
from luthier.report.waterfall import tick_step, waterfall

METHODS = ("ssr", "ssr-lin:preset=paper,rounds=1", "ssr-ada", "maj@5", "best-of-n", "cot", "ssr:max_calls=4")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")


class Page(HTMLParser):
    """Reads a page strictly: tags must balance; keeps ids, links, and the text without style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids.update(value or "" for name, value in attrs if name == "id")
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "input", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


async def undecided(a: str, b: str) -> bool | None:
    return None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems that ran at the same time, in one file."""
    path = tmp_path_factory.mktemp("traces") / "run.jsonl"

    async def write() -> None:
        file = TraceFile(path)
        async with StubServer(SimulatedSolver(Habits(error=0.3)).reply, model="sim") as stub:
            endpoint = Endpoint(stub.url, "sim")
            work = []
            for number, method in enumerate(METHODS):
                trace, chain = Trace(f"q{number}", (file,)), Chain.draw(6, number + 40)
                how = {"equivalence": undecided, "trace": trace, "seed": number}
                models = Models(endpoint, price=lambda model, usage: 1e-5)
                work.append(solve(chain.question, models, parse_method(method), **how))  # type: ignore[arg-type]
            await asyncio.gather(*work)
            await endpoint.aclose()
        file.close()

    asyncio.run(write())
    return path


def test_mixed_problems_are_told_apart(path: Path) -> None:
    problems = read_traces(path).problems
    assert [problem.top.data["method"] for problem in problems if problem.top] == [
        method.partition(":")[0].partition("@")[0] for method in METHODS
    ]
    first = problems[0]
    assert first.top is not None
    assert len(first.calls) == first.top.data["usage"]["calls"]
    assert first.tokens()[1] == first.top.data["usage"]["completion_tokens"]
    assert {call.name for call in first.calls} >= {"solve", "decompose", "step"}
    assert all(first.round_of(call.number) for call in first.calls)


def test_the_page_shows_doubts_votes_changes_and_costs(path: Path) -> None:
    page = render_traces(path)
    assert page.count('class="problem"') == len(METHODS)
    for part in (
        "✗ outvoted",
        "→ mend: ",
        "<b>×3</b>",
        "lines added",
        "Budget spent: 4 calls",
        'class="waterfall"',
        "$",
        "(50%)",
    ):
        assert part in page
    assert 'class="added">+ ' in page
    assert 'class="removed">− ' in page
    assert "http://" not in page
    assert "https://" not in page
    assert render_traces(path) == page


def test_what_models_write_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    trace = Trace("q", (file := TraceFile(tmp_path / "t.jsonl"),))
    step = {"index": 0, "question": evil, "answer": evil, "confidence": 0.0, "agrees": False, "majority": evil}
    with (
        trace.span("problem", "ssr", question=evil, method=evil, model=evil) as top,
        trace.span("round", evil, number=1),
        trace.span("call", evil, messages=[{"role": evil, "content": evil}]) as call,
    ):
        call.data.update(replies=[evil])
        trace.point("proposal", round=0, text=evil, answer=evil)
        trace.point("steps", steps=[{**step, "votes": [{"answer": evil, "count": 2}], "decided_by": evil}])
        trace.point("selected", indices=[0], hints={"0": evil})
        trace.point("fallback", what=evil, why=evil)
        top.data.update(answer=evil, stop=evil, flags=[evil])
    file.close()
    text = render_traces(tmp_path / "t.jsonl")
    assert "<script>alert" not in text
    page = Page(text)
    assert page.tags["script"] == 1
    assert page.text.count(evil) > 10


def test_a_killed_run_is_readable(path: Path, tmp_path: Path) -> None:
    lines = path.read_text().split("\n")
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[0][:40])
    assert "unfinished" in render_traces(cut)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(path.read_text() * 2)
    assert len(read_traces(twice).problems) == 2 * len(METHODS)


BROKEN = [
    "",
    "no json\n",
    '{"a": 1}\n',
    "[1]\n",
    '{"trace": "q", "event": "start", "t": 0}\n',
    '{"trace": "q", "event": "point", "t": 0, "name": "x"}\n{}\n',
    '{"trace": "q", "event": "point", "t": "soon", "name": "x"}\n',
    '{"trace": "q", "event": "point", "t": NaN, "name": "x"}\n',
    '{"trace": "q", "event": ["point"], "t": 0, "name": "x"}\n',
    '{"trace": "q", "event": "point", "t": 0, "name": "x", "data": [1]}\n',
]


@pytest.mark.parametrize("content", BROKEN)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"x\.jsonl.*expected"):
        write_traces(tmp_path / "x.jsonl")
    assert not (tmp_path / "x.html").exists()


def test_a_page_never_takes_the_place_of_its_trace(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "trace.html"
    copy.write_text(path.read_text())
    with pytest.raises(DataError, match="take the place"):
        write_traces(copy)
    assert copy.read_text() == path.read_text()


def test_a_line_cut_off_in_the_middle_is_told(path: Path, tmp_path: Path) -> None:
    """A killed run that went on in the same file."""
    lines = path.read_text().splitlines()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([*lines[:40], lines[40][:30] + lines[0], *lines[1:]]) + "\n")
    assert read_traces(cut).cut == 1
    assert "1 line was cut off" in render_traces(cut)
    assert "cut off" not in render_traces(path)


def test_tags_balance_and_links_lead_to_calls(path: Path) -> None:
    page = Page(render_traces(path))
    assert max(page.ids.values()) == 1
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.links) == sum(len(problem.calls) for problem in read_traces(path).problems)


def test_every_solution_is_shown_whatever_the_method(path: Path) -> None:
    text = Page(render_traces(path)).text
    for problem in read_traces(path).problems:
        proposals = [point for point in problem.points if point.name == "proposal"]
        assert proposals
        for point in proposals:
            assert str(point.data["text"]).splitlines()[0] in text
    assert "Solution 5 of 5" in text
    assert "A judge of solution 2 gives" in text
    assert "Votes: " in text


def make(path: Path, proposals: list[tuple[int, str, list[str]]], end: str = "") -> str:
    """The page of a problem with proposals (round, text, what their author was shown)."""
    trace = Trace("q", (file := TraceFile(path),))
    with trace.span("problem", "debate", question="?", method="debate", model="m") as top:
        for number in dict.fromkeys(number for number, _, _ in proposals):
            with trace.span("round", "round", number=number):
                mine = [(text, shown) for n, text, shown in proposals if n == number]
                for _, shown in mine:
                    with trace.span("call", "solve", messages=[{"role": "user", "content": s} for s in shown]):
                        pass
                for text, _ in mine:
                    trace.point("proposal", round=number, text=text, answer=text[-1:], confidence=None)
        top.data.update(answer="1", stop="done", text=end)
    file.close()
    return render_traces(path)


def test_debaters_are_compared_with_themselves(tmp_path: Path) -> None:
    shown = ["one: 1", "two: 2"]
    page = make(
        tmp_path / "t.jsonl", [(0, "one: 1", []), (0, "two: 2", []), (1, "one: 3", shown), (1, "two: 2", shown)]
    )
    assert page.count(", against the solution that was mended") == 2
    assert '<del class="removed">− one: <b>1</b>\n</del><ins class="added">+ one: <b>3</b>\n</ins>' in page
    assert "unchanged, against" in page


def test_what_was_not_shown_is_not_compared(tmp_path: Path) -> None:
    page = make(tmp_path / "t.jsonl", [(0, "x=1", []), (1, "x=2", ["?"]), (2, "x=3", ["was: x=1"])], end="x=2")
    assert page.count(", against the solution that was mended") == 1
    assert '<del class="removed">− x=<b>1</b>\n</del><ins class="added">+ x=<b>3</b>\n</ins>' in page
    assert page.count("this one counts") == 1
    assert page.index("<h3>Round 1") < page.index("this one counts") < page.index("<h3>Round 2")


words = st.lists(st.sampled_from(["", "a", "b <i>", "c & d", "the same line"]), max_size=6).map("\n".join)


@given(words, words)
def test_changes_hold_both_texts(before: str, after: str) -> None:
    found = [(mark, html.unescape(re.sub(r"</?b>", "", line))) for mark, line in changes(before, after)]
    assert [line for mark, line in found if mark != "−"] == after.split("\n")
    assert [line for mark, line in found if mark != "+"] == before.split("\n")


def test_long_texts_lose_their_middle() -> None:
    assert shorten("x" * LONGEST) == "x" * LONGEST
    cut = shorten("a" * LONGEST + "b" * LONGEST)
    assert cut.startswith("a")
    assert cut.endswith("b")
    assert "20,000 characters" in cut


def test_a_check_that_was_stopped_shows_its_steps(tmp_path: Path) -> None:
    trace = Trace("q", (file := TraceFile(tmp_path / "t.jsonl"),))
    with (
        pytest.raises(RuntimeError),
        trace.span("problem", "ssr", question="?", method="ssr", model="m"),
        trace.span("round", "round", number=1),
        trace.span("stage", "verify"),
        trace.span("step", "step", index=0, question="What is v1?", answer="7"),
    ):
        raise RuntimeError("the server is gone")
    file.close()
    text = Page(render_traces(tmp_path / "t.jsonl")).text
    for part in ("What is v1?", "not finished", "failed", "RuntimeError: the server is gone"):
        assert part in text


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"agrees": True, "majority": "1", "decided_by": "votes"}, "✓ confirmed"),
        ({"agrees": True, "majority": None, "decided_by": "votes"}, "? no majority"),
        ({"agrees": False, "majority": "2", "decided_by": "memo"}, "✗ outvoted"),
        ({"agrees": False, "majority": "2", "decided_by": "checker"}, "✗ refuted"),
        ({"agrees": False, "majority": None, "decided_by": "judge", "confidence": None}, "unknown"),
        ({"agrees": True, "votes": None, "confidence": "high", "index": "x", "question": None}, "unknown"),
    ],
)
def test_verdicts_in_words(tmp_path: Path, step: dict[str, Any], words: str) -> None:
    trace = Trace("q", (file := TraceFile(tmp_path / "t.jsonl"),))
    with trace.span("problem", "ssr", question="?"), trace.span("round", "round", number=1):
        trace.point("steps", steps=[step, "no step"])
        trace.point("selected", indices=None, hints=None)
    file.close()
    assert words in render_traces(tmp_path / "t.jsonl")


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    trace = Trace("q", (file := TraceFile(tmp_path / "t.jsonl"),))
    with trace.span("problem", "cot", question="\ud83d what?"):
        pass
    file.close()
    assert "? what?" in write_traces(tmp_path / "t.jsonl").read_text(encoding="utf-8")


def test_the_first_problems_are_shown_and_all_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Page(render_traces(path)).text
    monkeypatch.setattr(traces, "MOST_PROBLEMS", 2)
    text = render_traces(path)
    assert text.count('class="problem"') == 2
    assert f"The first 2 of {len(METHODS)} problems" in text
    assert Page(text).text.split("Problems")[0].split("</style>")[-1] == whole.split("Problems")[0]
    kept = read_traces(path, 2).problems
    assert "messages" in kept[0].calls[0].data
    assert not any("messages" in call.data or "replies" in call.data for p in kept[2:] for call in p.calls)
    monkeypatch.setattr(traces, "MOST_CHARACTERS", 10)
    assert "The first 1 of" in render_traces(path)


def test_a_folder_of_traces_is_one_page(path: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(path.read_text())
    (tmp_path / "c.jsonl").touch()
    assert is_traces(tmp_path)
    page = write_traces(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text().count('class="problem"') == 2 * len(METHODS)
    assert is_traces(tmp_path)  # what we wrote changes nothing
    (tmp_path / "config.yaml").touch()
    assert not is_traces(tmp_path)
    (tmp_path / "empty").mkdir()
    assert not is_traces(tmp_path / "empty")


def test_bars_do_not_lie_over_each_other() -> None:
    problem = ProblemTrace("q")
    times = [(0.0, 1.0), (0.5, 2.0), (1.0, 1.5), (1.75, None)]
    for number, (start, end) in enumerate(times):
        span = Span(number, None, "call", "step", start, {}, end=end)
        problem.spans[number] = span
        problem.items.append(span)
    drawing = waterfall(problem, "p1")
    bars = re.findall(r'<rect x="([\d.]+)" y="(\d+)" width="([\d.]+)"', drawing)
    rows = [(y, float(x), float(x) + float(width)) for x, y, width in bars]
    assert len(rows) == len(times)
    for i, (y, left, right) in enumerate(rows):
        assert all(y != other or right <= start or end <= left for other, start, end in rows[i + 1 :])
    assert len({y for y, _, _ in rows}) == 2
    assert drawing.count('class="failed"') == 1
    assert waterfall(ProblemTrace("none")) == ""


@given(st.floats(1e-6, 1e6))
def test_ticks_are_round_and_few(total: float) -> None:
    step = tick_step(total)
    assert f"{step:e}"[0] in "125"
    assert 2 <= total / step <= 6.1


def seen_by_a_browser(page: Path, folder: Path, fragment: str = "") -> str:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder}", "--dump-dom", page.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_script_runs_and_follows_links(path: Path, tmp_path: Path) -> None:
    """The page as it is written: its policy lets its own script run."""
    seen = seen_by_a_browser(write_traces(path, tmp_path / "t.html"), tmp_path / "profile", "#p2-3")
    assert 'data-script="on"' in seen
    opened = re.findall(r'<details [^>]*id="p[^>]*open[^>]*>', seen)
    assert [re.findall(r'id="([^"]+)"', tag)[0] for tag in opened] == ["p2", "p2-3"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_searching_and_opening_in_a_browser(path: Path, tmp_path: Path) -> None:
    page = write_traces(path, tmp_path / "t.html")
    # The browser's own errors are put where the test can see them; then somebody uses the controls.
    watch = "<script>window.onerror = (text) => { document.body.dataset.error = text; };</script>"
    uses = (
        "<script>const say = (name, value) => {"
        "form.elements[name].value = value; form.elements[name].dispatchEvent(new Event('input', {bubbles: true})); };"
        "say('find', 'BUDGET spent: 4'); document.body.dataset.found = form.querySelector('output').textContent;"
        "say('find', ''); say('stop', 'done'); form.elements.open.click();</script>"
    )
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # the policy forbids the test's own scripts
    page.write_text(text.replace("<main>", f"{watch}<main>").replace("</body>", f"{uses}</body>"))
    seen = seen_by_a_browser(page, tmp_path / "profile")
    assert 'data-script="on"' in seen
    assert "data-error" not in seen
    assert f'data-found="1 of {len(METHODS)}"' in seen
    assert f"3 of {len(METHODS)}" in seen
    problems = re.findall(r'<details class="problem"[^>]*>', seen)
    assert sum("hidden" in tag for tag in problems) == len(METHODS) - 3
    assert all(("open" in tag) == ('data-stop="done"' in tag) for tag in problems)
    assert "Close all" in seen


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_script_that_is_not_ours_is_not_run(path: Path, tmp_path: Path) -> None:
    page = write_traces(path, tmp_path / "t.html")
    foreign = "<script>document.body.dataset.foreign = 'ran';</script>"
    page.write_text(page.read_text().replace("</main>", f"</main>{foreign}"))
    seen = seen_by_a_browser(page, tmp_path / "profile")
    assert 'data-script="on"' in seen
    assert "data-foreign" not in seen

"""The page of a trace: made from real events, escaped, readable without its script, and alive in a real browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from luthier.core.errors import DataError
from luthier.llm.endpoint import Endpoint
from luthier.llm.stub_server import StubServer
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.reason.trace import Trace, TraceFile
from luthier.report.spans import read_traces
from luthier.report.traces import render_traces, write_traces

METHODS = ("ssr", "ssr-lin:preset=paper,rounds=1", "ssr-ada", "maj@5", "ssr:max_calls=4")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")


async def undecided(a: str, b: str) -> bool | None:
    return None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five problems that ran at the same time, in one file."""
    path = tmp_path_factory.mktemp("traces") / "run.jsonl"

    async def write() -> None:
        file = TraceFile(path)
        async with StubServer(SimulatedSolver(Habits(error=0.3)).reply, model="sim") as stub:
            endpoint = Endpoint(stub.url, "sim")
            work = []
            for number, method in enumerate(METHODS):
                trace, chain = Trace(f"q{number}", (file,)), Chain.draw(6, number + 40)
                how = {"equivalence": undecided, "trace": trace, "seed": number}
                work.append(solve(chain.question, Models(endpoint), parse_method(method), **how))  # type: ignore[arg-type]
            await asyncio.gather(*work)
            await endpoint.aclose()
        file.close()

    asyncio.run(write())
    return path


def test_mixed_problems_are_told_apart(path: Path) -> None:
    problems = read_traces(path)
    assert [problem.top.data["method"] for problem in problems if problem.top] == [
        method.partition(":")[0].partition("@")[0] for method in METHODS
    ]
    first = problems[0]
    assert first.top is not None
    assert len(first.calls) == first.top.data["usage"]["calls"] or first.calls
    assert first.tokens()[1] == first.top.data["usage"]["completion_tokens"]
    assert {call.name for call in first.calls} >= {"solve", "decompose", "step"}
    assert all(first.round_of(call.number) for call in first.calls)


def test_the_page_shows_doubts_votes_changes_and_costs(path: Path) -> None:
    page = render_traces(path)
    assert page.count('class="problem"') == len(METHODS)
    for part in (", mend", "×3", "lines changed", "Budget spent: 4 calls", 'class="waterfall"', "tokens written"):
        assert part in page
    assert 'class="added">+ ' in page
    assert 'class="removed">− ' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
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
    assert "<script>alert" not in render_traces(tmp_path / "t.jsonl")


def test_a_killed_run_is_readable(path: Path, tmp_path: Path) -> None:
    lines = path.read_text().split("\n")
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[0][:40])
    assert "unfinished" in render_traces(cut)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(path.read_text() * 2)
    assert len(read_traces(twice)) == 2 * len(METHODS)


@pytest.mark.parametrize("content", ["", "no json\n", '{"a": 1}\n', '{"trace": "q", "event": "start", "t": 0}\n{}\n'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"x\.jsonl"):
        write_traces(tmp_path / "x.jsonl")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_script_runs_in_a_browser(path: Path, tmp_path: Path) -> None:
    page = write_traces(path, tmp_path / "t.html")
    # The browser's own errors are put where the test can see them; then somebody types into the search field.
    watch = "<script>window.onerror = (text) => { document.body.dataset.error = text; };</script>"
    types = (
        "<script>const find = document.querySelector('[name=find]'); find.value = 'budget spent';"
        "find.dispatchEvent(new Event('input')); document.querySelector('[name=open]').click();</script>"
    )
    page.write_text(page.read_text().replace("<main>", f"{watch}<main>").replace("</body>", f"{types}</body>"))
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'data-script="on"' in seen
    assert "data-error" not in seen
    assert f"1 of {len(METHODS)}" in seen
    assert seen.count('<details class="problem" hidden') == len(METHODS) - 1
    assert "Close all" in seen


def test_events_are_json_lines(path: Path) -> None:
    assert all(json.loads(line)["event"] in ("start", "end", "point") for line in path.read_text().splitlines())

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError, EndpointError
from luthier.core.files import read_jsonl
from luthier.data.formats import read_rows
from luthier.distill.teacher import (
    FAILURES_IN_A_ROW,
    Collected,
    Prompt,
    ReplyFolder,
    Sampling,
    collect,
    preferences,
    prompt_id,
    read_prompts,
    split_of,
)
from luthier.llm.budget import BudgetedBackend
from luthier.llm.scripted import Reply, ScriptedBackend
from luthier.llm.types import Completion, Request, RequestFailed, Usage

ONCE = Sampling()


def prompts(count: int, **options: Any) -> list[Prompt]:
    found, _ = read_prompts(((f"row {n}", {"prompt": f"question {n}"}) for n in range(count)), **options)
    return found


def echo(request: Request, index: int) -> Reply:
    return f"{request.messages[-1]['content']}: reply {index}"


def run(
    backend: ScriptedBackend,
    folder: Path,
    asked: list[Prompt],
    sampling: Sampling = ONCE,
    limits: dict[str, int] | None = None,
    **options: Any,
) -> Collected:
    folder.mkdir(exist_ok=True)

    async def work() -> Collected:
        replies = ReplyFolder(folder)
        within = BudgetedBackend(backend, **(limits or {}), spent=replies.usage())  # type: ignore[arg-type]
        return await collect(within, asked, sampling, replies, **options)

    return asyncio.run(work())


def test_rows_are_whole_in_order_and_readable_for_training(tmp_path: Path) -> None:
    backend = ScriptedBackend(echo, delay=0.001)
    done: list[int] = []
    result = run(backend, tmp_path, prompts(20), Sampling(samples=2), at_once=5, advance=done.append)
    assert [(row["prompt"][0]["content"], row["sample"]) for row in result.rows] == [
        (f"question {n}", sample) for n in range(20) for sample in range(2)
    ]
    assert backend.max_in_flight == 5
    assert sum(done) == 40
    assert {row["completion"][0]["content"] for row in read_rows(tmp_path / "replies.jsonl", "completion")} == {
        f"question {n}: reply {sample}" for n in range(20) for sample in range(2)
    }
    assert all(set(map(len, (row["id"], row["key"]))) == {16, 64} for row in result.rows)


def test_a_second_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    run(ScriptedBackend(echo), tmp_path, prompts(6))
    path = tmp_path / "replies.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])  # killed while it wrote
    backend = ScriptedBackend(echo)
    result = run(backend, tmp_path, prompts(8), Sampling(samples=3))
    assert Counter(request.n for request in backend.requests) == {2: 5, 3: 3}
    assert {request.first_sample for request in backend.requests if request.n == 2} == {1}
    assert len(result.rows) == len(read_jsonl(path)) == 24
    idle = ScriptedBackend(echo)
    assert run(idle, tmp_path, prompts(8), Sampling(samples=3)).rows == result.rows
    assert not idle.requests


def test_other_settings_or_weights_are_other_samples(tmp_path: Path) -> None:
    run(ScriptedBackend(echo), tmp_path, prompts(2))
    for sampling, identity in ((Sampling(temperature=0.5), None), (Sampling(), "scripted@2")):
        backend = ScriptedBackend(echo)
        assert len(run(backend, tmp_path, prompts(2), sampling, identity=identity).rows) == 2
        assert len(backend.requests) == 2


def test_replies_that_are_not_whole_are_dropped_counted_and_not_asked_again(tmp_path: Path) -> None:
    def reply(request: Request, index: int) -> Reply:
        kinds: dict[str, Reply] = {
            "question 0": Completion(text="cut", finish_reason="length"),
            "question 1": Completion(text="", finish_reason="content_filter"),
            "question 2": "  ",
            "question 3": "half a pair \ud83d",
            "question 4": Completion(text="call", finish_reason="tool_calls"),
        }
        return kinds.get(request.messages[-1]["content"], "whole")

    result = run(ScriptedBackend(reply), tmp_path, prompts(6))
    assert result.dropped == dict.fromkeys(("length", "content_filter", "empty", "not text", "tool_calls"), 1)
    assert [row["completion"][0]["content"] for row in result.rows] == ["whole"]
    assert len(read_jsonl(tmp_path / "dropped.jsonl")) == 5
    idle = ScriptedBackend(reply)
    assert run(idle, tmp_path, prompts(6)).dropped == result.dropped
    assert not idle.requests


def test_a_failed_call_leaves_no_row_and_is_tried_again(tmp_path: Path) -> None:
    def failing(request: Request, index: int) -> Reply:
        if request.messages[-1]["content"] == "question 2":
            kept = Completion(text="first half", finish_reason="stop", usage=Usage(calls=1))
            return RequestFailed("broken", hint="wait", status=500, completions=[kept])
        return echo(request, index)

    result = run(ScriptedBackend(failing), tmp_path, prompts(4), Sampling(samples=2))
    assert (result.failed, result.left, [str(error) for error in result.errors]) == (1, 0, ["broken"])
    assert len(result.rows) == 7  # what the failed request did return is paid for, and kept
    backend = ScriptedBackend(echo)
    assert len(run(backend, tmp_path, prompts(4), Sampling(samples=2)).rows) == 8
    assert [(request.first_sample, request.n) for request in backend.requests] == [(1, 1)]


def test_what_no_retry_can_mend_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        run(ScriptedBackend(lambda r, i: ConfigError("no chat template", hint="--raw")), tmp_path, prompts(5))


def test_a_server_that_is_down_is_not_asked_for_ever(tmp_path: Path) -> None:
    backend = ScriptedBackend(lambda request, index: EndpointError("down", hint="start it"))
    result = run(backend, tmp_path, prompts(200), at_once=4)
    assert FAILURES_IN_A_ROW <= len(backend.requests) < FAILURES_IN_A_ROW + 4
    assert result.stopped.endswith("calls in a row failed")
    assert result.failed + result.left == 200


def test_a_budget_holds_before_sending_and_over_several_runs(tmp_path: Path) -> None:
    backend = ScriptedBackend(echo)
    result = run(backend, tmp_path, prompts(10), limits={"max_calls": 4})
    assert (len(backend.requests), len(result.rows), result.left, result.stopped) == (
        4,
        4,
        6,
        "the budget of 4 calls is spent",
    )
    again = run(backend, tmp_path, prompts(10), limits={"max_calls": 5})
    assert (len(backend.requests), len(again.rows), again.left) == (5, 5, 5)
    assert run(backend, tmp_path, prompts(10)).stopped == ""


@given(most=st.integers(1, 300), lengths=st.lists(st.integers(1, 20), min_size=1), at_once=st.integers(1, 5))
def test_no_budget_of_tokens_is_ever_passed(
    tmp_path_factory: pytest.TempPathFactory, most: int, lengths: list[int], at_once: int
) -> None:
    backend = ScriptedBackend(lambda request, index: "w " * lengths[int(request.messages[0]["content"].split()[1])])
    sampling = Sampling(max_tokens=20)
    result = run(
        backend, tmp_path_factory.mktemp("c"), prompts(len(lengths)), sampling, {"max_tokens": most}, at_once=at_once
    )
    assert backend.usage.completion_tokens <= most
    assert len(result.rows) + result.left == len(lengths)
    assert bool(result.stopped) == (result.left > 0)


def test_prompts_are_read_from_every_kind_of_row() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"messages": talk},
        {"prompt": talk[:1], "completion": "x"},
        {"prompt": " Hi"},
        {"prompt": "Ho", "answer": "1"},
    ]
    found, repeated = read_prompts(enumerate_rows(rows))
    assert [prompt.asked[0]["content"] for prompt in found] == ["Hi", "Ho"]  # type: ignore[index]
    assert repeated == 2
    (with_system,), _ = read_prompts(enumerate_rows(rows[:1]), system="Be short.")
    assert with_system.asked[0] == {"role": "system", "content": "Be short."}
    (raw,), _ = read_prompts([("r", {"prompt": "Once"})], raw=True)
    assert raw.asked == "Once"


def enumerate_rows(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"file row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "x"}, {}, "expected 'prompt' or 'messages', got text"),
        ({"prompt": "  "}, {}, "nothing is asked"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "nothing is asked"),
        ({"prompt": [{"role": "user", "content": "x"}]}, {"raw": True}, "expected a text in 'prompt'"),
        ({"prompt": [{"role": "gpt", "content": "x"}]}, {}, "role 'gpt'"),
    ],
)
def test_rows_that_ask_nothing_are_named(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"file row 1.*{message}"):
        read_prompts(enumerate_rows([row]), **options)


def test_a_prompt_keeps_its_split_whatever_comes_with_it() -> None:
    few, many = prompts(50, shares=(0.2, 0.1)), prompts(2000, shares=(0.2, 0.1))
    assert many[:50] == few
    shares = Counter(prompt.split for prompt in many)
    assert shares["validation"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert shares["test"] / 2000 == pytest.approx(0.1, abs=0.03)
    assert prompt_id("a  b\n") == prompt_id("a b") != prompt_id("ab")
    assert prompt_id([{"role": "user", "content": "a"}]) != prompt_id("a")
    with pytest.raises(ConfigError, match="sum below 1"):
        split_of("0", (0.5, 0.5))


def test_samples_at_temperature_zero_would_be_equal() -> None:
    with pytest.raises(ConfigError, match="temperature 0"):
        Sampling(samples=2, temperature=0)
    assert replace(Sampling(), samples=1).samples == 1


def test_preferences_pair_a_teacher_with_the_student(tmp_path: Path) -> None:
    asked = prompts(3)
    teacher = run(ScriptedBackend(echo), tmp_path / "t", asked).rows
    student = run(
        ScriptedBackend(lambda r, i: echo(r, i) if "1" in str(r.messages) else "bad"), tmp_path / "s", asked[:2]
    ).rows
    (row,) = preferences(teacher, student)  # the second reply is the teacher's own, the third prompt was not asked
    assert row["chosen"][0]["content"] == "question 0: reply 0"
    assert row["rejected"][0]["content"] == "bad"
    assert row["id"] == asked[0].id

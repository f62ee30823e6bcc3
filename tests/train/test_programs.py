"""The whole pipeline, on a model that answers from the rules of three small worlds, or errs on purpose."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError, EndpointError
from luthier.llm import CachedBackend, Request, ScriptedBackend
from luthier.llm.budget import BudgetedBackend
from luthier.llm.stub_server import StubServer
from luthier.llm.types import Message
from luthier.tasks.task import Problem
from luthier.train import program_prompts as prompts
from luthier.train.program_config import ProgramsConfig
from luthier.train.program_numbers import find_numbers, write_answer
from luthier.train.program_records import Outcome, collect, gate_rows, growth
from luthier.train.programs import ProgramMaker, make_all
from luthier.train.sandbox import Result, Sandbox
from luthier.train.sandbox_child import namespace, plain, write

STEPS = {getattr(prompts, name): name for name in ("ABSTRACT", "PROGRAM", "VALUES", "REWORD", "READ", "SOLVE")}
Values = dict[str, Fraction]


@dataclass(frozen=True)
class World:
    """One kind of problem: as it is told, retold and calculated. `word` is in all its questions."""

    word: str
    question: str
    retold: str
    names: dict[str, str]
    code: str
    calculate: Callable[[Values], Fraction]
    old: dict[str, str]
    draw: Callable[[random.Random], dict[str, str]]

    @property
    def problem(self) -> Problem:
        values = {name: Fraction(text) for name, text in self.old.items()}
        return Problem(
            id=self.word, prompt=self.question.format(**self.old), answer=write_answer(self.calculate(values))
        )

    def order(self, text: str) -> list[str]:
        """The names in the order in which a telling has them."""
        return re.findall(r"\{(\w+)\}", text)

    def read(self, question: str) -> Values:
        told = self.retold if self.retold.split()[0] in question else self.question
        return dict(zip(self.order(told), (n.value for n in find_numbers(question)), strict=True))


WORLDS = (
    World(
        word="pen",
        question="Ada buys {boxes} boxes of {pens} pens each and gives {given} pens away. How many pens are left?",
        retold="Ben, who sells pens, has given away {given} of those from {boxes} trays with {pens} in each. How many "
        "has he?",
        names={"boxes": "count", "pens": "count", "given": "count"},
        code="def answer(boxes, pens, given):\n    return boxes * pens - given",
        calculate=lambda v: v["boxes"] * v["pens"] - v["given"],
        old={"boxes": "3", "pens": "12", "given": "5"},
        draw=lambda r: {"boxes": str(r.randint(2, 9)), "pens": str(r.randint(10, 40)), "given": str(r.randint(1, 9))},
    ),
    World(
        word="lamp",
        question="A lamp costs ${price}. In a sale its price falls by {off}%. What does it cost then, in dollars?",
        retold="With a voucher that takes {off}% off, how many dollars is a lamp of ${price}?",
        names={"price": "amount", "off": "percent"},
        code="import math\ndef answer(price: float, off: float) -> float:\n    return price * (1 - off / 100)",
        calculate=lambda v: v["price"] * (1 - v["off"] / 100),
        old={"price": "80.50", "off": "20"},
        draw=lambda r: {"price": f"{r.randint(20, 99)}.50", "off": str(10 * r.randint(1, 9))},
    ),
    World(
        word="egg",
        question="Hens lay a dozen eggs on each of {days} days. Half of the eggs are sold for ${price} each. "
        "How many dollars is that?",
        retold="For {days} mornings a cook boils a dozen eggs, then sells half of them, each at ${price}. "
        "How many dollars come in?",
        names={"days": "count", "price": "amount"},
        code="def answer(days, price):\n    total = 12 * days\n    total /= 2\n    return total * price",
        calculate=lambda v: v["days"] * 6 * v["price"],
        old={"days": "5", "price": "0.25"},
        draw=lambda r: {"days": str(r.randint(2, 9)), "price": f"0.{r.randint(1, 9)}5"},
    ),
)
PROBLEMS = [world.problem for world in WORLDS]


class Model:
    """Answers every call by the rules; with `errors`, at that rate with something wrong. `own`: replies instead."""

    def __init__(self, errors: float = 0.0, **own: Callable[[World, Sequence[Message], str], str]) -> None:
        self.errors, self.own = errors, own

    def answer(self, messages: Sequence[Message], salt: object) -> str:
        step, asked = STEPS[messages[0]["content"]], messages[-1]["content"]
        (world,) = [world for world in WORLDS if world.word in asked]
        if step in self.own:
            return self.own[step](world, messages, str(salt))
        digest = hashlib.sha256(repr((step, asked, salt)).encode()).digest()
        rng = random.Random(digest)
        reply: str = getattr(self, step.lower())(world, asked, rng)
        return self.spoil(step, reply, rng) if rng.random() < self.errors else reply

    def abstract(self, world: World, asked: str, rng: random.Random) -> str:
        return "\n".join(f"{i}: {name}, {world.names[name]}" for i, name in enumerate(world.order(world.question), 1))

    def program(self, world: World, asked: str, rng: random.Random) -> str:
        return f"Of course:\n```python\n{world.code}\n```\nDone."

    def values(self, world: World, asked: str, rng: random.Random) -> str:
        return "\n".join(", ".join(f"{n}={v}" for n, v in world.draw(rng).items()) for _ in range(5))

    def reword(self, world: World, asked: str, rng: random.Random) -> str:
        texts = dict(zip(world.order(world.question), (n.text.strip("$") for n in find_numbers(asked)), strict=True))
        return f"<question>{world.retold.format(**texts)}</question>"

    def read(self, world: World, asked: str, rng: random.Random) -> str:
        return "\n".join(f"{i}: {name}" for i, name in enumerate(world.order(world.retold), 1))

    def solve(self, world: World, asked: str, rng: random.Random) -> str:
        return f"I know this one.\nAnswer: {write_answer(world.calculate(world.read(asked)))}"

    def spoil(self, step: str, reply: str, rng: random.Random) -> str:
        """Something that only the gate of this step can see, or later ones."""
        if step in ("ABSTRACT", "READ"):
            lines = reply.splitlines()
            names = [line.partition(": ")[2] for line in lines]
            return "\n".join(f"{i}: {name}" for i, name in enumerate(names[::-1], 1))
        if step == "PROGRAM":
            return rng.choice([reply.replace("return ", "return 1 + "), reply.replace("return", "import os; return")])
        if step == "VALUES":
            return re.sub(r"=(\d)", r"=1\g<1>7", reply, count=2)
        if step == "REWORD":
            return rng.choice([re.sub(r"\d", "8", reply, count=1), reply.replace("with", "with 2"), "no"])
        return reply.replace("Answer: ", "Answer: 1")


class InProcess:
    """Runs what the tests above wrote themselves: quicker than a sandbox, with the same arithmetic."""

    async def run(self, source: str, name: str, arguments: list[Values], *, may_round: bool = False) -> list[Result]:
        results = []
        for one in arguments:
            names = namespace(may_round=may_round)
            exec(source, names)
            try:
                results.append(Result(Fraction(write(names[name](**{key: plain(v) for key, v in one.items()})))))
            except (ValueError, ZeroDivisionError) as error:
                results.append(Result(None, f"{type(error).__name__}: {error}"))
        return results


def settings(**values: Any) -> ProgramsConfig:
    usual: dict[str, Any] = {"problems": "p.jsonl", "model": "fake", "rounds": 2, "variants": 3, "deadline": 20.0}
    return ProgramsConfig(**usual | values)


def make(
    model: Model,
    path: Path,
    config: ProgramsConfig | None = None,
    *,
    problems: Sequence[Problem] = PROBLEMS,
    kept_out: Callable[[str], str] = lambda text: "",
    sandbox: Any = None,
    max_calls: int | None = None,
    stop_after: int | None = None,
) -> tuple[list[Outcome], ScriptedBackend]:
    """The outcomes, and the backend that was asked. `stop_after`: calls after which the run is interrupted."""
    config, sandbox = config or settings(), sandbox or InProcess()
    running: list[asyncio.Task[Any]] = []
    answered = itertools.count()

    def reply(request: Request, index: int) -> str:
        if next(answered) == stop_after:
            running[0].cancel()
        return model.answer(request.messages, index)

    backend = ScriptedBackend(reply)

    async def work() -> list[Outcome]:
        running.append(asyncio.current_task())  # type: ignore[arg-type]
        budget = BudgetedBackend(backend, max_calls=max_calls)
        cached = CachedBackend(budget, path / "replies.sqlite")
        budget.spent = cached.stored()
        try:
            maker = ProgramMaker(cached, sandbox, config, problems, kept_out=kept_out)
            return await make_all(maker, problems, path / "problems.jsonl", at_once=config.at_once)
        finally:
            await cached.aclose()

    return asyncio.run(work()), backend


def world_of(row: dict[str, Any]) -> World:
    (world,) = [world for world in WORLDS if world.word in row["prompt"]]
    return world


def check_right(rows: list[dict[str, Any]]) -> None:
    """Every row is right by the rules of its world, and its parts belong to each other."""
    for row in rows:
        world, metadata = world_of(row), row["metadata"]
        values = world.read(row["prompt"])
        assert {name: write_answer(value) for name, value in values.items()} == metadata["parameters"]
        assert row["answer"] == write_answer(world.calculate(values))
        assert metadata["solution"].endswith(f"Answer: {row['answer']}")
        assert metadata["parent"] == world.word
        assert row["id"].startswith(f"{world.word}-{metadata['round']}-")


def gates(outcomes: list[Outcome]) -> dict[str, tuple[int, int]]:
    return {row[0]: (row[1], row[2]) for row in gate_rows(outcomes)}


def test_what_an_honest_model_makes_passes_every_gate(tmp_path: Path) -> None:
    outcomes, _ = make(Model(), tmp_path, sandbox=Sandbox(seconds=20))
    rows = collect(outcomes)
    check_right(rows.accepted)
    counts = gates(outcomes)
    assert {name: counts[name] for name in ("question", "naming", "program")} == dict.fromkeys(
        ("question", "naming", "program"), (3, 3)
    )
    assert counts["values"][0] == 18
    assert counts["calculation"] == counts["solution"] == (counts["values"][1],) * 2  # only repeated values fell
    assert {row["reason"] for row in rows.rejected} <= {"seen before"}
    assert len(rows.accepted) == counts["distinct"][1] >= 14
    assert rows.texts[0]["text"] == f"{rows.accepted[0]['prompt']}\n{rows.accepted[0]['metadata']['solution']}"
    growing = growth(outcomes)
    assert growing is not None
    assert 0.3 < growing < 3


def test_nothing_wrong_gets_through(tmp_path: Path) -> None:
    config = settings(rounds=6, cap=100, variants=5)
    outcomes, _ = make(Model(errors=0.25), tmp_path, config)
    rows = collect(outcomes)
    check_right(rows.accepted)
    stopped = {row["gate"] for row in rows.rejected}
    assert {"values", "retelling", "reading"} <= stopped
    assert len(rows.accepted) > 10
    assert any(outcome.programs > 1 for outcome in outcomes)


@pytest.mark.parametrize("settled", [{"at_once": 1}, {"at_once": 8}], ids=str)
def test_order_and_interruption_change_nothing(tmp_path: Path, settled: dict[str, int]) -> None:
    straight, asked = make(Model(errors=0.1), tmp_path / "a", settings(at_once=3))
    paid = len(asked.requests)
    config = settings(**settled)
    for calls in (7, 25):
        with pytest.raises(asyncio.CancelledError):
            make(Model(errors=0.1), tmp_path / "b", config, stop_after=calls)
    resumed, _ = make(Model(errors=0.1), tmp_path / "b", config)
    assert collect(resumed) == collect(straight)
    again, asked = make(Model(errors=0.1), tmp_path / "b", config)
    assert asked.requests == []
    assert collect(again) == collect(straight)
    (tmp_path / "b" / "problems.jsonl").unlink()  # what is lost here is made again from the stored replies
    again, asked = make(Model(errors=0.1), tmp_path / "b", config)
    assert asked.requests == []
    assert collect(again) == collect(straight)
    assert paid > 50


def test_a_budget_holds_over_all_runs_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    straight, asked = make(Model(), tmp_path / "a")
    needed = len(asked.requests)
    first, asked = make(Model(), tmp_path / "b", max_calls=needed // 2)
    assert len(asked.requests) == needed // 2
    assert any("budget" in outcome.failure for outcome in first)
    check_right(collect(first).accepted)
    assert collect(first).accepted
    same, asked = make(Model(), tmp_path / "b", max_calls=needed // 2)
    assert asked.requests == []
    assert collect(same).accepted
    whole, asked = make(Model(), tmp_path / "b", max_calls=needed)
    assert len(asked.requests) == needed - needed // 2
    assert collect(whole) == collect(straight)


def test_each_new_problem_keeps_its_own_answer_when_others_fail(tmp_path: Path) -> None:
    """The published loop shortens the list of answers when an execution fails, and pairs the rest wrongly."""
    world = WORLDS[0]
    lines = ["boxes=2, pens=10, given=9", "boxes=4, pens=11", "boxes=1, pens=11, given=9", "boxes=5, pens=10, given=1"]
    code = "def answer(boxes, pens, given):\n    return boxes * pens - given + 0 / (boxes - 1)"
    model = Model(VALUES=lambda *_: "\n".join(lines), PROGRAM=lambda *_: f"```\n{code}\n```")
    outcomes, _ = make(model, tmp_path, settings(rounds=1, variants=5), problems=[world.problem])
    rows = collect(outcomes)
    assert [(row["id"], row["answer"]) for row in rows.accepted] == [("pen-0-0", "11"), ("pen-0-3", "49")]
    assert [(row["gate"], row["reason"].partition(":")[0]) for row in rows.rejected] == [
        ("values", "unreadable"),
        ("calculation", "ZeroDivisionError"),
    ]


def test_a_solution_of_another_round_does_not_count(tmp_path: Path) -> None:
    first: list[str] = []

    def solve(world: World, messages: Sequence[Message], salt: str) -> str:
        first.append(Model().solve(world, messages[-1]["content"], random.Random()))
        return first[0]

    outcomes, _ = make(Model(SOLVE=solve), tmp_path, settings(passes=1), problems=PROBLEMS[:1])
    check_right(collect(outcomes).accepted)
    assert any(row["gate"] == "solution" for row in collect(outcomes).rejected)


def retold(text: str) -> Callable[[World, Sequence[Message], str], str]:
    return lambda *_: f"<question>{text}</question>"


@pytest.mark.parametrize(
    ("own", "gate", "reason"),
    [
        # Numbers in swapped roles: the question is well formed, and only reading it again tells.
        ({"READ": lambda *_: "1: boxes\n2: given\n3: pens"}, "reading", "numbers in other roles"),
        ({"READ": lambda *_: "1: given\n2: boxes\n3: -"}, "reading", "other parameters: given, boxes"),
        ({"READ": lambda *_: "1: given"}, "reading", "unreadable: other marks: 1, expected 3"),
        ({"REWORD": retold("Give 7 pens.")}, "retelling", "more or fewer numbers: 1, expected 3"),
        ({"REWORD": retold("Of 7 pens 8 have 9.")}, "retelling", "other numbers"),
        ({"REWORD": retold("Half of 20 boxes with 2 pens make 9.")}, "retelling", "other numbers"),
        ({"REWORD": lambda *_: "2 boxes"}, "retelling", "no question in the reply"),
        ({"VALUES": lambda *_: "boxes=2, pens=10, given=-5"}, "values", "another sign: given"),
        ({"VALUES": lambda *_: "boxes=200, pens=10, given=5"}, "values", "another order of magnitude: boxes"),
        ({"VALUES": lambda *_: "boxes=2.5, pens=10, given=5"}, "values", "not a whole number: boxes"),
        ({"VALUES": lambda *_: "boxes=3, pens=12, given=5"}, "values", "seen before"),
        ({"VALUES": lambda *_: "more"}, "values", "unreadable: no line of values"),
        ({"VALUES": lambda *_: "boxes=1, pens=10, given=15"}, "calculation", "a negative answer"),
        ({"SOLVE": lambda *_: "Answer: 11.0001"}, "solution", "another answer: 11.0001"),
        ({"SOLVE": lambda *_: "At 5:30."}, "solution", "another answer: none"),
    ],
)
def test_every_gate_stops_what_it_is_for(tmp_path: Path, own: dict[str, Any], gate: str, reason: str) -> None:
    usual = {"VALUES": lambda *_: "boxes=2, pens=10, given=9"}
    outcomes, _ = make(Model(**{**usual, **own}), tmp_path, settings(rounds=1), problems=PROBLEMS[:1])
    (row,) = collect(outcomes).rejected
    assert (row["gate"], row["reason"]) == (gate, reason)
    assert not collect(outcomes).accepted


def test_number_words_must_stay(tmp_path: Path) -> None:
    def reword(world: World, messages: Sequence[Message], salt: str) -> str:
        return Model().reword(world, messages[-1]["content"], random.Random()).replace("half", "a third")

    outcomes, _ = make(Model(REWORD=reword), tmp_path, settings(rounds=1), problems=PROBLEMS[2:])
    assert {row["reason"] for row in collect(outcomes).rejected} == {"other number words"}


@pytest.mark.parametrize(
    ("reply", "gate", "reason"),
    [
        ("def answer(boxes, pens): return boxes * pens - 5", "program", "other parameters"),
        ("def answer(boxes, pens, given): return boxes * pens - 5", "program", "does not use"),
        ("def answer(boxes, pens, given): return boxes * pens - given + 0.4", "program", "another answer"),
        ("def answer(boxes, pens, given): return round(boxes * pens - given + 0.4)", "program", "ValueError"),
        (
            "def answer(boxes, pens, given): return boxes + pens + given and 1e999",
            "program",
            "uses a constant that is not",
        ),
        ("import os\ndef answer(boxes, pens, given): return boxes + pens + given", "program", "imports"),
        ("def answer(boxes, pens, given): return [boxes] * pens * given", "program", "ValueError"),
        ("I cannot write programs.", "program", "no function in the reply"),
    ],
)
def test_programs_that_are_no_good(tmp_path: Path, reply: str, gate: str, reason: str) -> None:
    config = settings(abstractions=1, programs=1)
    outcomes, asked = make(Model(PROGRAM=lambda *_: reply), tmp_path, config, problems=PROBLEMS[:1])
    (row,) = collect(outcomes).rejected
    assert row["gate"] == gate
    assert row["reason"].startswith(reason), row
    assert len(asked.requests) == 2


def test_a_program_that_never_ends_is_one_that_fails(tmp_path: Path) -> None:
    loop = "def answer(boxes, pens, given):\n    while boxes + pens + given > 0:\n        pass\n    return 1"
    model, sandbox = Model(PROGRAM=lambda *_: loop), Sandbox(seconds=0.3)
    config = settings(abstractions=1, programs=1)
    outcomes, _ = make(model, tmp_path, config, problems=PROBLEMS[:1], sandbox=sandbox)
    assert (outcomes[0].gate, outcomes[0].reason) == ("program", "timeout")


def test_given_problems_that_cannot_be_used(tmp_path: Path) -> None:
    pen = PROBLEMS[0]
    problems = [
        pen,
        replace(pen, id="b", prompt=pen.prompt.upper()),
        replace(pen, id="c", prompt="How many pens?"),
        replace(pen, id="d", prompt=f"{pen.prompt} Say.", answer="many"),
        replace(pen, id="e", prompt=f"{pen.prompt} Secret."),
    ]
    kept_out = {"e": "kept out: test row 1"}
    outcomes, _ = make(
        Model(), tmp_path, settings(rounds=1), problems=problems, kept_out=lambda t: kept_out["e"] * ("Secret" in t)
    )
    assert {o.problem: o.reason for o in outcomes if o.gate} == {
        "b": "the same question stands before it",
        "c": "no numbers in the question",
        "d": "the answer is no number",
        "e": "kept out: test row 1",
    }
    assert gates(outcomes)["question"] == (5, 1)


def test_what_test_sets_hold_is_not_made(tmp_path: Path) -> None:
    outcomes, _ = make(Model(), tmp_path, kept_out=lambda text: "kept out: test row 3" * ("Ben" in text))
    rows = collect(outcomes)
    assert {row["metadata"]["parent"] for row in rows.accepted} == {"lamp", "egg"}
    assert {row["reason"] for row in rows.rejected} >= {"kept out: test row 3"}


def test_equal_questions_of_two_parents_count_once(tmp_path: Path) -> None:
    twin = replace(PROBLEMS[0], id="twin", prompt=PROBLEMS[0].prompt.replace("Ada", "Eve"))
    model = Model(VALUES=lambda *_: "boxes=2, pens=10, given=9")
    outcomes, _ = make(model, tmp_path, settings(rounds=1), problems=[PROBLEMS[0], twin])
    rows = collect(outcomes)
    assert [row["id"] for row in rows.accepted] == ["pen-0-0"]
    assert [(row["id"], row["gate"]) for row in rows.rejected] == [("twin-0-0", "distinct")]


def test_no_more_than_the_cap(tmp_path: Path) -> None:
    outcomes, _ = make(Model(), tmp_path, settings(rounds=5, variants=4, cap=6))
    assert [len(outcome.accepted) for outcome in outcomes] == [6, 6, 6]


def test_drawn_values_need_no_calls(tmp_path: Path) -> None:
    config = settings(values="draw", variants=7, rounds=1)
    outcomes, asked = make(Model(), tmp_path, config)
    assert "VALUES" not in {STEPS[request.messages[0]["content"]] for request in asked.requests}
    rows = collect(outcomes)
    check_right(rows.accepted)
    assert len(rows.accepted) == 21
    assert not rows.rejected


def test_a_failing_model_is_told_and_asked_again(tmp_path: Path) -> None:
    def down(*_: object) -> str:
        raise EndpointError("the server is down", hint="wait")

    def solve(world: World, messages: Sequence[Message], salt: str) -> str:
        return down() if world.word == "lamp" else Model().solve(world, messages[-1]["content"], random.Random())

    first, _ = make(Model(SOLVE=solve), tmp_path)
    assert {o.problem: o.failure for o in first} == {"pen": "", "lamp": "the server is down", "egg": ""}
    assert {row["metadata"]["parent"] for row in collect(first).accepted} == {"pen", "egg"}
    second, asked = make(Model(), tmp_path)
    assert {STEPS[request.messages[0]["content"]] for request in asked.requests} == {
        "SOLVE",
        "VALUES",
        "REWORD",
        "READ",
    }
    assert all("lamp" in request.messages[-1]["content"] for request in asked.requests)
    straight, _ = make(Model(), tmp_path / "straight")
    assert collect(second) == collect(straight)


def test_settings_that_no_model_can_keep_end_the_run(tmp_path: Path) -> None:
    def refuse(*_: object) -> str:
        raise ConfigError("the prompt exceeds the context", hint="shorten it")

    with pytest.raises(ConfigError, match="exceeds the context"):
        make(Model(ABSTRACT=refuse), tmp_path)


def run_file(tmp_path: Path, *extra: Problem) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": p.id, "prompt": p.prompt, "answer": p.answer} for p in (*PROBLEMS, *extra)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_verb_over_http_and_again_for_nothing(luthier: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "how many dollars is a lamp of", "answer": "1"}) + "\n")
    stub = StubServer(lambda messages, seed, index: Model(errors=0.1).answer(messages, seed))
    with stub.running():
        where = ("--model", "stub", "--endpoint", stub.url, "-o", tmp_path / "run")
        keep = ("--keep-out", tmp_path / "test.jsonl", "--overlap", 7)
        command = ("programs", run_file(tmp_path), *where, *keep, "--rounds", 2, "--deadline", 20)
        outcome = luthier(*command)
        assert outcome.code == 0, outcome.err
        assert "solved to the program's answer" in outcome.out
        asked = stub.ledger.requests
        files = ("accepted.jsonl", "text.jsonl", "rejected.jsonl")
        before = [(tmp_path / "run" / name).read_bytes() for name in files]
        result = json.loads(luthier(*command, "--json").out)
        assert stub.ledger.requests == asked == result["calls"]
        assert [(tmp_path / "run" / name).read_bytes() for name in files] == before
        rows = [json.loads(line) for line in before[0].splitlines()]
        check_right(rows)
        assert {row["metadata"]["parent"] for row in rows} == {"pen", "egg"}
        assert "kept out" in outcome.out
        assert result["gates"]["distinct"][1] == len(rows) == result["accepted"] > 8
        assert luthier(*command, "--seed", 1).error.startswith(f"{tmp_path / 'run'} holds a run with another config")
        plan = json.loads(luthier(*command, "--dry-run", "--json").out)
        assert plan["most calls"] == 3 * plan["most calls for one"] == 3 * (4 * 4 + 2 * (1 + 5 * 7))


def test_budgets_and_failures_are_told(luthier: Callable[..., Any], tmp_path: Path) -> None:
    stub = StubServer(lambda messages, seed, index: Model().answer(messages, seed))
    file = run_file(tmp_path)
    prices = tmp_path / "prices.yaml"
    prices.write_text("stub: {input: 100, output: 100}\n")
    with stub.running():
        where = ("--model", "stub", "--endpoint", stub.url, "-o", tmp_path / "run")
        some = luthier("programs", file, *where, "--budget", "calls=30", "--json")
        assert json.loads(some.out)["calls"] == stub.ledger.requests == 30
        assert "problems are not finished: the budget of 30 calls is spent" in some.err
        assert luthier("programs", file, *where, "--budget", "dollars=1").error == "budget: dollars need prices"
        assert luthier("programs", file, *where, "--budget", "seconds=1").error == "budget: seconds are no limit here"
        more = luthier("programs", file, *where, "--budget", "dollars=3.5", "--prices", prices, "--json")
        result = json.loads(more.out)
        assert 0 < (result["prompt_tokens"] + result["completion_tokens"]) * 100 / 1e6 <= 3.5
        assert stub.ledger.requests > 30
        nothing = luthier("programs", file, *where[:-1], tmp_path / "none", "--budget", "calls=2")
        assert nothing.error == "the budget of 2 calls is spent"


def test_no_torch_is_needed(luthier_without_torch: Callable[..., Any], tmp_path: Path) -> None:
    stub = StubServer(lambda messages, seed, index: Model().answer(messages, seed))
    with stub.running():
        where = ("--model", "stub", "--endpoint", stub.url, "--out", tmp_path / "run", "--limit", 1, "--rounds", 1)
        outcome = luthier_without_torch("programs", run_file(tmp_path), *where, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["accepted"] > 0

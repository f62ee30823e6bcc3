from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from luthier.core.errors import DataError
from luthier.core.stats import wilson
from luthier.llm.scripted import ScriptedBackend
from luthier.llm.types import ContextExceeded
from luthier.tasks.needles import Reader, cells, find_needles, is_found
from luthier.tasks.task import Problem


def problem(length: int, depth: float, answer: str = "471") -> Problem:
    metadata = {"length": length, "depth": depth}
    return Problem(id=f"{length}-{depth}", prompt=f"{length} {depth}", answer=answer, kind="exact", metadata=metadata)


@pytest.mark.parametrize(
    ("reply", "found"),
    [("471", True), ("The code is 471.", True), ("4711", False), ("147 1", False), ("", False), ("x471", False)],
)
def test_an_answer_is_a_word_of_its_own(reply: str, found: bool) -> None:
    assert is_found("471", reply) is found


def test_accuracy_and_loss_by_place() -> None:
    problems = [problem(64, 0.0), problem(64, 0.0), problem(64, 1.0), problem(256, 0.0)]
    replies = iter(["471", "5", "471.", "no"])
    backend = ScriptedBackend(lambda request, sample: next(replies), scores=lambda p, c: -math.log(4) * len(p))
    reader = Reader(lambda prompt: prompt[:2], lambda text: 5)
    found = asyncio.run(find_needles(problems, backend, reader, at_once=1))
    table = {(cell.length, cell.depth): cell for cell in cells(found)}
    assert list(table) == [(64, 0.0), (64, 1.0), (64, None), (256, 0.0), (256, None)]
    assert table[64, 0.0].accuracy == wilson(1, 2)
    assert table[64, None].accuracy == wilson(2, 3)
    assert table[256, None].accuracy == wilson(0, 1)
    assert table[64, 0.0].loss == pytest.approx(2 * math.log(4))
    assert [request.prompt for request in backend.requests] == ["64", "64", "64", "25"]
    assert backend.scored[0] == ("64", "471")
    assert all(request.temperature == 0 and request.max_tokens == 5 for request in backend.requests)


def test_a_model_behind_messages_has_no_loss() -> None:
    backend = ScriptedBackend(["471"])
    (needle,) = asyncio.run(find_needles([problem(64, 0.5)], backend, None))
    assert needle.correct
    assert next(iter(cells([needle]))).loss is None
    assert backend.requests[0].messages[0]["content"] == "64 0.5"


def test_the_loss_is_that_of_the_answer_after_its_lead() -> None:
    given = replace(problem(64, 0.5), metadata={"length": 64, "depth": 0.5, "lead": " Kelu"})
    backend = ScriptedBackend([" Kelu471"], scores=lambda prompt, completion: -1.0)
    (needle,) = asyncio.run(find_needles([given], backend, Reader(lambda prompt: f"{prompt}\n", lambda text: None)))
    assert needle.correct
    assert backend.scored == [("64 0.5\n Kelu", "471")]


def test_problems_without_a_place_are_refused() -> None:
    plain = Problem(id="7", prompt="?", answer="1")
    with pytest.raises(DataError, match="problem 7: metadata has no length and depth"):
        asyncio.run(find_needles([plain], ScriptedBackend([]), None))


def test_a_document_beyond_the_context_is_not_found_and_has_no_loss() -> None:
    def score(prompt: str, completion: str) -> float:
        if prompt.startswith("256"):
            raise ContextExceeded("too long", hint="")
        return -1.0

    backend = ScriptedBackend(["471"], scores=score)
    problems = [problem(64, 0.0), problem(256, 0.0), problem(256, 1.0)]
    found = asyncio.run(find_needles(problems, backend, Reader(lambda prompt: prompt, lambda text: None)))
    assert [(needle.correct, needle.too_long) for needle in found] == [(True, False), (False, True), (False, True)]
    short, long = (cell for cell in cells(found) if cell.depth is None)
    assert (short.accuracy, short.loss, short.too_long) == (wilson(1, 1), 1.0, 0)
    assert (long.accuracy, long.loss, long.too_long) == (wilson(0, 2), None, 2)

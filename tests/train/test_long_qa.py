from __future__ import annotations

import asyncio
import re

import pytest

from luthier.core.errors import ConfigError, EndpointError
from luthier.data.formats import check_row
from luthier.llm.cache import CachedBackend
from luthier.llm.scripted import ScriptedBackend
from luthier.train.long_qa import LongQuestions, long_document_rows, read_reply, short_document_rows


def words(text: str) -> int:
    return len(text.split())


def book(name: str, count: int) -> str:
    return " ".join(f"{name} did thing number {number}." for number in range(count))


def writer(request, sample: int) -> str:
    """Asks about the first sentence that it is shown."""
    who, number = re.search(r"(\w+) did thing number (\d+)", request.messages[0]["content"]).groups()
    return f"Question: What did {who} do first there?\nAnswer: Thing number {number}."


def long(**changes) -> LongQuestions:
    return LongQuestions(**{"size": words, "length": 400, "shortest": 60, "part": (20, 40), **changes})


def test_replies_are_read_in_their_form_only() -> None:
    assert read_reply("Question: Who?\nAnswer: Me.") == ("Who?", "Me.")
    assert read_reply("**Question:** Who?\n\n**Answer:** Me,\nand you.\n") == ("Who?", "Me,\nand you.")
    assert read_reply("Question: Who?") is None
    assert read_reply("Sure! Question: Who?\nAnswer: Me.") is None
    assert read_reply("Question: \nAnswer: Me.") is None


def test_questions_on_a_part_follow_the_full_document() -> None:
    documents = [book("Anna", 60), book("Bob", 5), book("Cleo", 200)]
    backend = ScriptedBackend(writer)
    found = asyncio.run(long_document_rows(documents, backend, long(per_document=2)))
    assert len(found.rows) == 4
    assert found.left_out == {"too short": 1, "no part": 0, "no question": 0}
    for row, whole in zip(found.rows, [documents[0]] * 2 + [documents[2]] * 2, strict=True):
        check_row(row, "messages", "row")
        user, reply = row["messages"]
        document, _, question = user["content"].rpartition("\n\n")
        assert whole.startswith(document)
        assert words(document) == min(words(whole), 400)  # cut at the length, on a sentence border
        assert question.startswith("What did")
        assert reply["content"].removeprefix("Thing ") in document
    for request in backend.requests:
        passage = request.messages[0]["content"].split("-----")[1]
        assert 20 <= words(passage) <= 40


def test_short_documents_are_joined_until_the_length_and_one_is_asked_about() -> None:
    documents = [book(f"Person{number}", 10) for number in range(11)]  # 50 words each
    found = asyncio.run(short_document_rows(documents, ScriptedBackend(writer), long(length=180)))
    assert len(found.rows) == 2
    assert found.left_out == {"no question": 0, "no full row": 3}
    used = [re.findall(r"(Person\d+) did thing number 0\.", row["messages"][0]["content"]) for row in found.rows]
    assert [len(part) for part in used] == [4, 4]  # the last one is kept whole
    assert len({name for part in used for name in part}) == 8
    for row, members in zip(found.rows, used, strict=True):
        assert re.search(r"What did (\w+) do", row["messages"][0]["content"])[1] in members


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_counted_in_the_end() -> None:
    replies = ["no idea", "Question: Who?\nAnswer: Anna.", *["no idea"] * 3]
    backend = ScriptedBackend(replies)
    found = asyncio.run(long_document_rows([book("Anna", 60)] * 2, backend, long(at_once=1)))
    assert [row["messages"][1]["content"] for row in found.rows] == ["Anna."]
    assert found.left_out["no question"] == 1
    assert len({request.seed for request in backend.requests}) == 5  # each attempt is another sample


def test_a_run_that_failed_asks_only_for_the_rest(tmp_path) -> None:
    documents = [book(name, 60) for name in ("Anna", "Bob", "Cleo", "Dora")]

    async def make(inner: ScriptedBackend):
        backend = CachedBackend(inner, tmp_path / "replies.sqlite")
        try:
            return await long_document_rows(documents, backend, long(at_once=1))
        finally:
            await backend.aclose()

    straight = asyncio.run(long_document_rows(documents, ScriptedBackend(writer), long()))

    def failing(request, sample: int):
        return (
            EndpointError("gone", hint="wait") if "Cleo" in request.messages[0]["content"] else writer(request, sample)
        )

    with pytest.raises(EndpointError):
        asyncio.run(make(ScriptedBackend(failing)))
    second = ScriptedBackend(writer)
    assert asyncio.run(make(second)).rows == straight.rows
    assert len(second.requests) == 2


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="part: got"):
        long(part=(30, 20))
    with pytest.raises(ConfigError, match="attempts"):
        long(attempts=0)

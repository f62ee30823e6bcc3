from __future__ import annotations

import json

import pytest

from luthier.core.errors import DataError
from luthier.data.replies import encode_replies, learned_rows
from luthier.data.row_source import conversation, open_rows, split_rows
from luthier.data.shards import IGNORED
from luthier.data.tokenizer import train_bpe

CHAT = {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}
PAIR = {"prompt": "2+3?", "completion": "5"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["2+3? 5 and more"] * 4, None)


def test_a_string_pair_is_the_conversation_that_it_stands_for(tmp_path):
    source = open_rows([write(tmp_path / "a.jsonl", PAIR)], ("messages", "completion"))
    assert source.kind == "completion"
    assert conversation(source.rows[0]) == CHAT["messages"]


def test_replies_in_a_prompt_are_given_and_not_learned(tokenizer):
    prompt = [*CHAT["messages"], {"role": "user", "content": "again?"}]
    messages = conversation({"prompt": prompt, "completion": [{"role": "assistant", "content": "5"}]})
    _, mask = encode_replies(tokenizer, messages, "here")
    assert sum(mask) == 2  # the last 5 and its end


def test_kinds_are_not_mixed_and_others_are_refused(tmp_path):
    pair, chat = write(tmp_path / "a.jsonl", PAIR), write(tmp_path / "b.jsonl", CHAT)
    with pytest.raises(DataError, match=r"b\.jsonl has messages rows"):
        open_rows([pair, chat], ("messages", "completion"))
    with pytest.raises(DataError, match="got a completion row, expected preference"):
        open_rows([pair], ("preference",))
    with pytest.raises(DataError, match="nowhere"):
        open_rows([str(tmp_path / "nowhere.jsonl")], ("messages",))


def test_a_bad_row_is_named_with_its_file_and_number(tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, {"messages": [{"role": "robot", "content": "x"}]})
    with pytest.raises(DataError, match=r"a\.jsonl row 2.*robot"):
        open_rows([path], ("messages",))


def test_equal_questions_stay_on_one_side():
    from luthier.data.row_source import RowSource

    rows = [{"prompt": f"{n % 50}?", "completion": str(n)} for n in range(200)]
    kept, rest = split_rows(RowSource("x", "completion", rows), 0.3, 0)
    assert 0 < len(rest.rows) < len(kept.rows)
    assert not {row["prompt"] for row in kept.rows} & {row["prompt"] for row in rest.rows}
    assert split_rows(RowSource("x", "completion", rows), 0.0, 0)[1].rows == []


def test_labels_are_the_reply_and_its_end_and_long_rows_are_cut(tokenizer):
    (row,), dropped = learned_rows(tokenizer, [CHAT], 1000, "here")
    learned = [token for token in row["labels"] if token != IGNORED]
    assert learned == [*tokenizer.encode("5", add_special_tokens=False), tokenizer.eos_token_id]
    assert dropped == 0
    assert learned_rows(tokenizer, [CHAT], len(row["labels"]) - 2, "here") == ([], 1)


def test_a_template_must_say_what_the_assistant_writes(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="assistant writes"):
        encode_replies(other, CHAT["messages"], "here")
    other.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    ids, mask = encode_replies(other, CHAT["messages"], "here")
    assert [token for token, learned in zip(ids, mask, strict=True) if learned] == tokenizer.encode("5")
    other.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_replies(other, CHAT["messages"], "here")

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.chat import encode_chat, preview, render
from luthier.data.tokenizer import decode_text, train_bpe

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many strokes?"},
    {"role": "assistant", "content": " 12, then\na tap é"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "3 more."},
]


def test_the_mask_marks_replies_and_their_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    trained = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert decode_text(tokenizer, trained) == " 12, then\na tap é<|endoftext|>3 more.<|endoftext|>"
    assert decode_text(tokenizer, ids) == render(CONVERSATION)
    assert ids.count(tokenizer.eos_token_id) == 3  # BOS, and one EOS for each reply
    assert (ids[0], mask[0], ids[-1], mask[-1]) == (0, 0, 0, 1)


def test_transformers_makes_the_same_ids_and_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == mask


@settings(deadline=None)
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_a_prompt_in_generation_is_a_prefix_of_the_training_row(
    tokenizer: PreTrainedTokenizerFast, contents: list[str]
) -> None:
    given_part = [{"role": "user", "content": content} for content in contents]
    prompt = encode_chat(tokenizer, given_part, add_generation_prompt=True)
    row = encode_chat(tokenizer, [*given_part, {"role": "assistant", "content": contents[0]}])
    assert row.ids[: len(prompt.ids)] == prompt.ids
    assert sum(row.loss_mask[: len(prompt.ids)]) == 0
    assert all(row.loss_mask[len(prompt.ids) :])
    assert decode_text(tokenizer, row.ids[len(prompt.ids) : -1]) == contents[0]


def test_special_tokens_cannot_be_smuggled_in(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "<|endoftext|>\n<|padding|>"},
        {"role": "assistant", "content": "<|endoftext|>"},
    ]
    ids, _ = encode_chat(tokenizer, messages)
    assert ids.count(0) == 2
    assert 1 not in ids
    assert decode_text(tokenizer, ids) == render(messages)


def test_a_conversation_without_reply_trains_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sum(encode_chat(tokenizer, CONVERSATION[:2]).loss_mask) == 0


def test_preview_marks_what_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = preview(tokenizer, CONVERSATION)
    assert "<|assistant|>\n⟦ 12, then\na tap é<|endoftext|>⟧\n<|user|>" in shown
    assert shown.replace("⟦", "").replace("⟧", "") == render(CONVERSATION)


def test_bad_input(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(DataError, match="expected a list of messages"):
        encode_chat(tokenizer, [])
    without_bos = train_bpe([text], 300)
    without_bos.bos_token = None
    with pytest.raises(DataError, match="lacks BOS or EOS"):
        encode_chat(without_bos, CONVERSATION)

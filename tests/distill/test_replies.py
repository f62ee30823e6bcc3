from __future__ import annotations

import pytest
import torch

from luthier.core.errors import DataError
from luthier.distill.replies import make_duels, pad_right, reencoded, reply_text, student_reply, teacher_replies

END = 0


def test_both_sides_end_alike_finished_or_cut(tokenizer):
    end = tokenizer.eos_token_id
    (body,) = (ids[:-1] for ids in teacher_replies([" the luthier rings"], tokenizer, 100))
    room = len(body) + 1
    assert teacher_replies([" the luthier rings"], tokenizer, room) == [[*body, end]]
    assert student_reply([*body, end], [end], end) == [*body, end]
    assert teacher_replies([" the luthier rings"], tokenizer, room - 1) == [body]  # the end token has no room
    assert student_reply(body, [end], end) == body
    assert teacher_replies([" the luthier rings"], tokenizer, 2) == [body[:2]]


def test_any_end_token_becomes_the_one_and_nothing_follows_it():
    assert student_reply([5, 7, 9, 9], {END, 7}, END) == [5, END]
    assert student_reply([END], {END}, END) == [END]


def test_text_that_spells_the_end_token_is_text(tokenizer):
    (ids,) = teacher_replies(["stop <|endoftext|> here"], tokenizer, 100)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_canonical_ids_stay_and_others_are_respelled(tokenizer):
    canonical = teacher_replies([" the luthier", " violin"], tokenizer, 100)
    assert reencoded(canonical, tokenizer) == canonical
    spelled_out = [tokenizer.convert_tokens_to_ids(c) for c in "\u0120violin"] + [tokenizer.eos_token_id]
    assert spelled_out != canonical[1]
    assert reencoded([spelled_out], tokenizer) == [canonical[1]]
    assert reencoded([[tokenizer.eos_token_id]], tokenizer) == [[tokenizer.eos_token_id]]


def test_a_teacher_reply_is_shared_by_the_samples_that_meet_it():
    prompts, teachers = [[1], [1], [2], [2]], [[8, 0], [8, 0], [8, 0], [9, 0]]
    duels = make_duels(prompts, [[5], [6], [7], [5, 5]], teachers, torch.device("cpu"))
    assert duels.teachers == [[8, 0], [8, 0], [9, 0]]
    assert duels.owner.tolist() == [0, 0, 1, 2]
    assert duels.sequences()[4:] == [([1], [8, 0]), ([2], [8, 0]), ([2], [9, 0])]
    assert duels.student_lengths.tolist() == [1, 1, 1, 2]


def test_the_last_token_is_found_by_index():
    batch = pad_right([([1, 2], [3, 0]), ([1], [4])], torch.device("cpu"))
    assert batch["last"].tolist() == [3, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_replies_are_text_or_one_message():
    assert reply_text("yes") == reply_text([{"role": "assistant", "content": "yes"}]) == "yes"
    with pytest.raises(DataError, match="one assistant message"):
        reply_text([{"role": "user", "content": "yes"}])

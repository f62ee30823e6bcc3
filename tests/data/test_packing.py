from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.packing import best_fit, pack

PAD = 1
LENGTH = 16
DOCUMENTS = st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=LENGTH), min_size=1, max_size=30)


@given(DOCUMENTS)
def test_every_document_is_there_once_and_in_order(documents: list[list[int]]) -> None:
    packed = pack(documents, LENGTH, pad_id=PAD)
    found = {}
    for row, members in enumerate(packed.members):
        for number, (index, start) in enumerate(members):
            here = packed.document_ids[row] == number
            assert start == 0
            assert packed.positions[row][here].tolist() == list(range(len(documents[index])))
            found[index] = packed.input_ids[row][here].tolist()
    assert found == dict(enumerate(documents))
    padding = packed.document_ids == -1
    assert (~padding).sum() == sum(map(len, documents))
    assert (packed.input_ids[padding] == PAD).all()
    assert not packed.loss_mask[padding].any()
    assert packed.loss_mask[~padding].all()


@given(st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=100), min_size=1, max_size=10))
def test_long_documents_are_cut_only_on_request(documents: list[list[int]]) -> None:
    packed = pack(documents, LENGTH, pad_id=PAD, split_long=True)
    rebuilt = [[-1] * len(document) for document in documents]
    for row, members in enumerate(packed.members):
        for number, (index, start) in enumerate(members):
            piece = packed.input_ids[row][packed.document_ids[row] == number].tolist()
            rebuilt[index][start : start + len(piece)] = piece
    assert rebuilt == documents


@given(DOCUMENTS)
def test_masks_move_with_their_tokens(documents: list[list[int]]) -> None:
    masks = [[int(token % 2) for token in document] for document in documents]
    packed = pack(documents, LENGTH, pad_id=PAD, masks=masks)
    real = packed.document_ids >= 0
    assert (packed.loss_mask[real] == packed.input_ids[real] % 2).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_rows_are_neither_overfull_nor_wasted(sizes: list[int]) -> None:
    bins = best_fit(sizes, 20)
    fill = [sum(sizes[item] for item in items) for items in bins]
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert max(fill) <= 20
    assert all(a + b > 20 for number, a in enumerate(fill) for b in fill[:number])  # no two rows would fit in one


def test_a_row_is_filled_with_the_best_fit() -> None:
    assert best_fit([6, 3, 7, 4], 10) == [[2, 1], [0, 3]]


def test_bad_input() -> None:
    with pytest.raises(DataError, match="document 1 has 17 tokens, but a row has 16"):
        pack([[2], [2] * 17], LENGTH, pad_id=PAD)
    with pytest.raises(DataError, match="document 0 is empty"):
        pack([[]], LENGTH, pad_id=PAD)
    with pytest.raises(DataError, match="differ in length"):
        pack([[2, 3]], LENGTH, pad_id=PAD, masks=[[1]])
    with pytest.raises(DataError, match="no documents"):
        pack([], LENGTH, pad_id=PAD)

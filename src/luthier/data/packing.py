"""Packing: several short documents in one row of fixed length, so that little of a batch is padding.

Best fit decreasing: the longest document first, each into the fullest row that still has room. Documents are never
mixed inside and never cut unless asked; an attention mask made of `document_ids` keeps them apart.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed rows; all arrays are int64 [num_rows, length].

    document_ids count from 0 in each row and are -1 on padding; positions restart at 0 with each document and are 0 on
    padding; loss_mask is 0 on padding. `members[row][id]` is (index of the document, offset of its first token here),
    where the offset is 0 unless a long document was split.
    """

    input_ids: NDArray[np.int64]
    loss_mask: NDArray[np.int64]
    document_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    members: tuple[tuple[tuple[int, int], ...], ...]


def pack(
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    pad_id: int,
    masks: Sequence[Sequence[int]] | None = None,
    split_long: bool = False,
) -> Packed:
    """Pack token ids into rows of `length`.

    masks: which tokens to train on, shaped like documents (default: all). split_long: cut a document that is longer
    than a row into pieces, each then a document of its own, instead of refusing it.
    Raises: DataError for no documents, an empty or too long document, or a mask of another length.
    """
    _check(documents, length, masks, split_long)
    pieces = [
        (index, start, min(length, len(document) - start))
        for index, document in enumerate(documents)
        for start in range(0, len(document), length)
    ]
    rows = [[pieces[piece] for piece in row] for row in best_fit([size for _, _, size in pieces], length)]
    packed = Packed(
        input_ids=np.full((len(rows), length), pad_id, np.int64),
        loss_mask=np.zeros((len(rows), length), np.int64),
        document_ids=np.full((len(rows), length), -1, np.int64),
        positions=np.zeros((len(rows), length), np.int64),
        members=tuple(tuple((index, start) for index, start, _ in row) for row in rows),
    )
    for row, placed in enumerate(rows):
        begin = 0
        for number, (index, start, size) in enumerate(placed):
            here = (row, slice(begin, begin + size))
            packed.input_ids[here] = documents[index][start : start + size]
            packed.loss_mask[here] = 1 if masks is None else masks[index][start : start + size]
            packed.document_ids[here] = number
            packed.positions[here] = np.arange(size)
            begin += size
    return packed


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the indices of the items in each bin, in O(n log n) comparisons.

    Every size must be between 1 and capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free capacity, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = bisect.bisect_left(room, (sizes[item], 0))
        if place == len(room):
            free, chosen = capacity, len(bins)
            bins.append([])
        else:
            free, chosen = room.pop(place)
        bins[chosen].append(item)
        bisect.insort(room, (free - sizes[item], chosen))
    return bins


def _check(
    documents: Sequence[Sequence[int]], length: int, masks: Sequence[Sequence[int]] | None, split_long: bool
) -> None:
    if not documents:
        raise DataError("no documents to pack", hint="give at least one")
    if masks is not None and [len(mask) for mask in masks] != [len(document) for document in documents]:
        raise DataError("masks and documents differ in length", hint="a mask has one entry per token")
    for index, document in enumerate(documents):
        if len(document) == 0:
            raise DataError(f"document {index} is empty", hint="leave it out")
        if len(document) > length and not split_long:
            raise DataError(
                f"document {index} has {len(document)} tokens, but a row has {length}",
                hint="make rows longer, shorten the document, or allow splitting",
            )

"""Stores of hidden states keep what is written, wherever they are, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.core.errors import CheckpointError, ConfigError
from luthier.quantize import activations
from luthier.quantize.activations import HiddenStates, check_memory

SHAPE = (5, 7, 6)


def values() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def fill(store: HiddenStates, given: Tensor) -> None:
    store.write(0, given[:2])
    store.write(2, given[2:])


@pytest.mark.parametrize("spilled", [False, True])
def test_small_stores_are_exact(spilled: bool, tmp_path: Path) -> None:
    with HiddenStates(SHAPE, folder=tmp_path if spilled else None) as store:
        fill(store, values())
        assert len(store) == 5
        assert torch.equal(store.read(0, 5), values())
        assert torch.equal(store.read(1, 3), values()[1:3])
        store.write(1, values()[:2])  # over what was there
        assert torch.equal(store.read(0, 5), torch.cat([values()[:1], values()[:2], values()[3:]]))


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        store = HiddenStates(SHAPE, folder=folder)
        fill(store, values())
        store.read(0, 5).zero_()
        assert torch.equal(store.read(0, 5), values())


@pytest.mark.parametrize("spilled", [False, True])
def test_large_stores_keep_half_precision_and_large_values(
    spilled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "HALF_ABOVE", 100)
    with HiddenStates(SHAPE, folder=tmp_path if spilled else None) as store:
        given = values()
        given[1, 2] *= 1e4
        given[3, 4, 5] = 3e6  # far beyond fp16
        fill(store, given)
        found = store.read(0, 5)
        plain = torch.ones(5, 7, dtype=torch.bool)
        plain[1, 2] = plain[3, 4] = False
        assert torch.equal(found[plain], given[plain].half().float())
        torch.testing.assert_close(found[1, 2], given[1, 2], rtol=1e-3, atol=0)
        torch.testing.assert_close(found[3, 4], given[3, 4], rtol=1e-3, atol=1e-5)
        store.write(3, values()[3:4])  # a small token again, where a large one was
        assert torch.equal(store.read(3, 4), values()[3:4].half().float())


def test_values_that_are_not_finite_are_refused() -> None:
    store = HiddenStates(SHAPE)
    for bad in (float("nan"), float("inf")):
        given = values()
        given[3, 0, 0] = bad
        with pytest.raises(CheckpointError, match="windows 2 to 5"):
            store.write(2, given[2:])


def test_a_file_leaves_no_name_behind(tmp_path: Path) -> None:
    store = HiddenStates(SHAPE, folder=tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    fill(store, values())
    assert torch.equal(store.read(0, 5), values())
    store.close()


def test_too_little_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "available_memory", lambda: 1000)
    check_memory(1000)
    with pytest.raises(ConfigError, match="GiB of memory, but") as caught:
        check_memory(1001)
    assert "--spill" in caught.value.hint

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left"):
        HiddenStates(SHAPE, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot hold"):
        HiddenStates(SHAPE, folder=tmp_path / "file")

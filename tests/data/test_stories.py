from __future__ import annotations

from itertools import islice

import pytest

from luthier.core.errors import ConfigError
from luthier.data.stories import draw_stories


def test_stories_have_three_to_five_sentences_without_numbers() -> None:
    stories = list(islice(draw_stories("some", 0), 500))
    assert {story.count(".") for story in stories} == {3, 4, 5}
    assert not any(c.isdigit() or c in "{}" for story in stories for c in story)
    assert len(set(stories)) > 490


def test_stories_are_decided_by_seed_and_purpose_and_splits_share_none() -> None:
    train = list(islice(draw_stories("some", 0), 300))
    assert train == list(islice(draw_stories("some", 0), 300))
    assert train != list(islice(draw_stories("some", 1), 300))
    assert train != list(islice(draw_stories("other", 0), 300))
    assert not set(train) & set(islice(draw_stories("some", 0, held_out=True), 300))


def test_no_held_out_stories_without_a_share() -> None:
    with pytest.raises(ConfigError, match="no stories are held out"):
        next(draw_stories("some", 0, held_out=True, share=0.0))

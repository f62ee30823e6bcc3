from __future__ import annotations

import pytest

from luthier.core.errors import ConfigError
from luthier.reason.prompts import PLAIN


def test_plain_prompts_are_the_question_alone():
    assert PLAIN.solve("2 + 3 {x}?") == [{"role": "user", "content": "2 + 3 {x}?"}]


def test_plain_prompts_cannot_verify():
    with pytest.raises(ConfigError, match="no wording for 'decompose'"):
        PLAIN.decompose("2 + 3?", "5")

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from luthier.data.tokenizer import train_bpe

TEXT = """The luthier planes the top of the violin until it rings. Twelve strokes, then a tap, then 3 more strokes.
A table of 40 numbers says little; the ear says more.

    def tap(top, strokes=12):
        return [listen(top) for _ in range(strokes)]

Varnish comes last. It's thin, it isn't glossy, and it takes 21 days: "patience," says the luthier, "is a tool."
"""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe([TEXT] * 2, 400)


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT

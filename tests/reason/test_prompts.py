from __future__ import annotations

import pytest

from luthier.core.errors import ConfigError
from luthier.reason.prompts import PLAIN


def test_plain_prompts_are_the_question_alone():
    assert PLAIN.solve("2 + 3 {x}?") == [{"role": "user", "content": "2 + 3 {x}?"}]


def test_plain_prompts_cannot_verify():
    with pytest.raises(ConfigError, match="no wording for 'decompose'"):
        PLAIN.decompose("2 + 3?", "5")


def test_base_models_are_asked_without_a_chat_template():
    import asyncio

    from luthier.llm.scripted import ScriptedBackend
    from luthier.reason.methods import parse_method, solve
    from luthier.reason.session import Models

    asked = []

    def reply(request, index):
        asked.append(request)
        return "2 + 3 = 5\n#### 5"

    async def equal(first, second):
        return first == second

    async def run():
        models = Models(ScriptedBackend(reply))
        return await solve("2 + 3?", models, parse_method("cot:prompts=text"), equivalence=equal)

    assert asyncio.run(run()).answer == "5"
    assert (asked[0].prompt, list(asked[0].messages)) == ("2 + 3?\n", [])

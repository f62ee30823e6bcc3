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


def test_a_call_that_does_not_fit_the_context_leaves_the_answer_so_far():
    import asyncio

    from luthier.llm.scripted import ScriptedBackend
    from luthier.llm.types import ContextExceeded
    from luthier.reason.methods import parse_method, solve
    from luthier.reason.session import Models

    def counted(request, index):
        asked.append(request)
        if len(asked) > 1:
            raise ContextExceeded("700 tokens exceed the context of 640 tokens", hint="")
        return "2 + 3 = 5\n#### 5"

    async def equal(first, second):
        return first == second

    async def run():
        models = Models(ScriptedBackend(counted))
        return await solve("2 + 3?", models, parse_method("self-refine"), equivalence=equal)

    asked = []
    solution = asyncio.run(run())
    assert (solution.answer, solution.stop) == ("5", "context")
    assert "640 tokens" in solution.flags[0]
    asked = [None]
    with pytest.raises(ContextExceeded):
        asyncio.run(run())

from __future__ import annotations

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.template import render

MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=6,
)


def test_the_rendered_string() -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    first = "<|endoftext|><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello<|endoftext|>"
    assert render(conversation[:3]) == first
    assert render(conversation) == first + "\n<|user|>\nBye\n"
    assert render(conversation, add_generation_prompt=True) == first + "\n<|user|>\nBye\n<|assistant|>\n"


@settings(deadline=None)
@given(messages=MESSAGES, prompt=st.booleans())
def test_jinja_and_python_agree(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prompt: bool
) -> None:
    jinja = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert jinja == render(messages, add_generation_prompt=prompt)


def test_both_refuse_unknown_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "tool", "content": "x"}]
    with pytest.raises(DataError, match="role 'tool'"):
        render(messages)
    with pytest.raises(jinja2.TemplateError, match="role tool"):
        tokenizer.apply_chat_template(messages, tokenize=False)

"""The Instella chat format: as a Jinja template for Hugging Face tools, and as plain Python that says the same.

    <|endoftext|><|system|>\\n{system}\\n<|user|>\\n{user}\\n<|assistant|>\\n{reply}<|endoftext|>\\n<|user|>\\n...

One BOS at the very start; the role tags are ordinary text, not special tokens; a reply ends with EOS, and then a
newline unless it is the last message. There is no default system message and contents are not stripped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.files import END_OF_TEXT
from luthier.data.formats import check_messages

GENERATION_PROMPT = "<|assistant|>\n"

# The generation block tells transformers and TRL what the model itself is to write: the reply and its EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% else %}"
    "{{ raise_exception('role ' + message['role'] + ' is not one of system, user, assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """The conversation as one string, equal to what CHAT_TEMPLATE makes of it. Raises: DataError for bad messages."""
    pieces = [END_OF_TEXT]
    for text, _ in segments(messages, add_generation_prompt=add_generation_prompt):
        pieces.append(END_OF_TEXT if text is None else text)
    return "".join(pieces)


def segments(
    messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> list[tuple[str | None, bool]]:
    """The conversation after its BOS, cut where the loss mask changes: (text, or None for EOS; trained on).

    Neighboring texts that are not trained on are one segment, so that they are tokenized together. A reply with
    `weight: 0` (as in OpenAI's fine-tuning files) is not trained on.
    Raises: DataError for an empty conversation, an unknown role or a content that is not a string.
    """
    pieces: list[tuple[str | None, bool]] = []
    given = ""
    checked = check_messages(messages)
    for number, message in enumerate(checked, 1):
        if message["role"] != "assistant":
            given += f"<|{message['role']}|>\n{message['content']}\n"
            continue
        trained = messages[number - 1].get("weight", 1) != 0
        pieces += [(given + GENERATION_PROMPT, False), (message["content"], trained), (None, trained)]
        given = "\n" if number < len(checked) else ""
    if add_generation_prompt:
        given += GENERATION_PROMPT
    return [*pieces, (given, False)] if given else pieces

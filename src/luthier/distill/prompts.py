"""Everything that is said to a judge, in our words. Raise VERSION when they change: scores change with them."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.llm.types import Message

VERSION = 1

COMPARE = """You will see a conversation and two replies to its last message. Decide which one serves the person better.

What counts: whether it does what was asked, whether what it says is true, whether it is clear. What does not count: how
long it is, which of the two comes first, how sure it sounds. A longer reply is better only where the additions are of
use to this person.

=== Conversation ===
{conversation}

=== Reply 1 ===
{first}

=== Reply 2 ===
{second}

=== End ===

Name the one difference that matters most, in at most three sentences. Then end with one of these lines:
Verdict: 1
Verdict: 2
Verdict: tie"""

RATE = """You will see a conversation and two replies to its last message. Give each reply a whole number from 1
(useless) to 10 (could not be better) for how helpful, relevant, accurate and sufficiently detailed it is. The order of
the two does not matter.

=== Conversation ===
{conversation}

=== Reply 1 ===
{first}

=== Reply 2 ===
{second}

=== End ===

Begin with a line that has both numbers and nothing else, in this form:
Scores: 6 7
After it, say in at most three sentences why."""


def compare(conversation: str | Sequence[Message], first: str, second: str) -> list[Message]:
    """Ask which of two replies is better."""
    return [_user(COMPARE.format(conversation=_shown(conversation), first=first, second=second))]


def rate(conversation: str | Sequence[Message], first: str, second: str) -> list[Message]:
    """Ask for a score of each of two replies."""
    return [_user(RATE.format(conversation=_shown(conversation), first=first, second=second))]


def _shown(conversation: str | Sequence[Message]) -> str:
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(f"[{message['role']}] {message['content']}" for message in conversation)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}

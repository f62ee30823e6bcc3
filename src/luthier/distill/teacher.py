"""The teacher's replies, collected once: all that black-box distillation ever sees of it. Loads no torch.

Requests run at the same time; limits on calls, tokens and dollars are those of the backend (`llm/budget.py`). Every
sample is one appended row, found again by the hash of model, request and sample index, so a run that was stopped goes
on where it was. Replies that were cut off by length or by a content filter are put aside and counted: a student would
learn to stop in the middle of a sentence, and a discriminator that a missing end means student. A failed call makes no
row, so the next run tries it again.

Prompts that differ in white space only are one prompt, asked once. Each belongs to one split for good, by its hash:
more prompts later move none of the earlier ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from luthier.core.errors import ConfigError, DataError, EndpointError
from luthier.core.files import append_jsonl, read_jsonl, sha256_bytes
from luthier.core.seeds import derive_seed
from luthier.data.formats import check_messages
from luthier.llm.budget import BudgetSpent
from luthier.llm.types import Backend, Completion, Message, Request, RequestFailed, Usage, request_key

SPLITS = ("train", "validation", "test")
FAILURES_IN_A_ROW = 20  # with no success between them: then the server is down, or the key is wrong
REPLIES, DROPPED = "replies.jsonl", "dropped.jsonl"
TERMS = (
    "Whether a model may be trained on this teacher's replies, and what may be done with such a model, is decided by "
    "the terms of use of the service and by the licence of the teacher's weights. Read them first."
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the teacher is asked."""

    samples: int = 1
    """Replies to each prompt."""
    max_tokens: int = 1536
    """Longest reply in tokens; longer ones are cut off and dropped."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    seed: int | None = None
    """Sent with every request; None: fresh randomness."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples: got {self.samples}, expected at least 1", hint="1 is usual")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples: got {self.samples} at temperature 0, where all replies to a prompt are equal",
                hint="take one sample, or a temperature above 0",
            )

    def request(self, asked: str | Sequence[Message], samples: range) -> Request:
        """The request for some of a prompt's samples."""
        question: dict[str, Any] = {"prompt": asked} if isinstance(asked, str) else {"messages": asked}
        return Request(
            **question,
            n=len(samples),
            first_sample=samples.start,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Prompt:
    """What is asked: chat messages, or a text to continue. `id`: hash of its words; `split`: where its replies go."""

    id: str
    asked: str | list[dict[str, str]]
    split: str


def read_prompts(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    raw: bool = False,
    system: str | None = None,
    shares: tuple[float, float] = (0.05, 0.05),
) -> tuple[list[Prompt], int]:
    """The different prompts of (where, row) pairs in order, and how many were repetitions.

    A row has `prompt` (text or messages) or `messages`, of which the last replies are left out. `raw`: prompts are
    texts to continue as they are. `system`: system message for conversations without one. `shares`: of validation and
    test. Raises: DataError starting with where.
    """
    found: dict[str, Prompt] = {}
    count = 0
    for where, row in rows:
        asked = _asked(row, where, raw, system)
        name = prompt_id(asked)
        found.setdefault(name, Prompt(name, asked, split_of(name, shares)))
        count += 1
    return list(found.values()), count - len(found)


def _asked(row: Mapping[str, Any], where: str, raw: bool, system: str | None) -> str | list[dict[str, str]]:
    content = row.get("prompt", row.get("messages"))
    if raw or content is None:
        if not isinstance(content, str) or not content:
            expected = "a text in 'prompt'" if raw else "'prompt' or 'messages'"
            raise DataError(f"{where}: expected {expected}, got {', '.join(row) or 'nothing'}", hint='{"prompt": "Hi"}')
        return content
    messages = check_messages([{"role": "user", "content": content}] if isinstance(content, str) else content, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: nothing is asked", hint="the last message has to be a user's, and not empty")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def prompt_id(asked: str | Sequence[Message]) -> str:
    """16 hexadecimal digits that name a prompt, whatever its white space."""
    turns = [asked] if isinstance(asked, str) else [f"{turn['role']}\x1f{turn['content']}" for turn in asked]
    return sha256_bytes("\x1e".join(" ".join(turn.split()) for turn in turns).encode())[:16]


def split_of(name: str, shares: tuple[float, float]) -> str:
    """train, validation or test, with the shares of the latter two, by the hash of a prompt's id."""
    if not (min(shares) >= 0 and sum(shares) < 1):
        raise ConfigError(f"shares: got {shares}, expected two shares with a sum below 1", hint="0.05 0.05 is usual")
    place = derive_seed(0, "split", name) / 2**63
    return "validation" if place < shares[0] else "test" if place < sum(shares) else "train"


class ReplyFolder:
    """All samples in a folder that exists: kept ones in replies.jsonl, dropped ones in dropped.jsonl, by their key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [row for name in (REPLIES, DROPPED) for row in read_jsonl(folder / name)]
        self.rows: dict[str, Row] = {row["key"]: row for row in rows}

    def add(self, row: Row) -> None:
        """Append a sample."""
        append_jsonl(self.folder / (DROPPED if "dropped" in row else REPLIES), row)
        self.rows[row["key"]] = row

    def usage(self) -> Usage:
        """What all samples have cost."""
        return sum((Usage(**row["usage"]) for row in self.rows.values()), Usage())


@dataclass
class Collected:
    """What came of a collection: the wanted samples that there are, and why others are missing."""

    rows: list[Row] = field(default_factory=list)
    """Kept samples, in the order of prompts and samples."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples that were put aside, by reason."""
    failed: int = 0
    """Samples whose call failed for good."""
    errors: list[EndpointError] = field(default_factory=list)
    """The different failures, in order."""
    left: int = 0
    """Samples that were not asked for, because of `stopped`."""
    stopped: str = ""
    """Why: the budget is spent, or too many calls in a row failed; '' when everything was asked for."""


class _Task(NamedTuple):
    prompt: Prompt
    request: Request


async def collect(
    backend: Backend,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    replies: ReplyFolder,
    *,
    identity: str | None = None,
    at_once: int = 16,
    advance: Callable[[int], None] = lambda samples: None,
) -> Collected:
    """Ask `backend` for every sample that `replies` lacks, and add it there. Cancelling keeps what is done.

    `identity` names the model in the keys (default: its `model`): one that changes with the weights keeps the replies
    of other weights apart. `at_once`: requests in flight. Calls that fail end nothing but their own samples, until too
    many fail in a row.
    """
    model = identity or backend.model
    tasks = missing(model, prompts, sampling, replies)
    wanted = len(prompts) * sampling.samples
    advance(wanted - sum(task.request.n for task in tasks))
    work = _Work(backend, model, replies, iter(tasks), advance)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(tasks))):
                group.create_task(work.run())
    except ExceptionGroup as failures:  # of several workers, for one reason
        raise failures.exceptions[0] from failures
    result = work.result
    for prompt in prompts:
        for key in _keys(model, prompt, sampling).values():
            row = replies.rows.get(key)
            if row is not None and "dropped" in row:
                result.dropped[row["dropped"]] += 1
            elif row is not None:
                result.rows.append(row)
    result.left = wanted - len(result.rows) - sum(result.dropped.values()) - result.failed
    return result


def missing(model: str, prompts: Iterable[Prompt], sampling: Sampling, replies: ReplyFolder) -> list[_Task]:
    """The requests for all samples that `replies` lacks, each for neighboring samples of one prompt."""
    tasks = []
    for prompt in prompts:
        keys = _keys(model, prompt, sampling)
        for run in _runs([index for index, key in keys.items() if key not in replies.rows]):
            tasks.append(_Task(prompt, sampling.request(prompt.asked, run)))
    return tasks


def _keys(model: str, prompt: Prompt, sampling: Sampling) -> dict[int, str]:
    request = sampling.request(prompt.asked, range(1))
    return {index: request_key(model, request, index) for index in range(sampling.samples)}


def _runs(indices: Sequence[int]) -> Iterator[range]:
    """Ascending indices as runs of neighbors."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield range(indices[start], indices[end - 1] + 1)
            start = end


class _Work:
    """What the workers of one collection share."""

    def __init__(
        self,
        backend: Backend,
        model: str,
        replies: ReplyFolder,
        tasks: Iterator[_Task],
        advance: Callable[[int], None],
    ) -> None:
        self.backend, self.model, self.replies = backend, model, replies
        self.tasks, self.advance = tasks, advance
        self.result = Collected()
        self.in_a_row = 0

    async def run(self) -> None:
        for task in self.tasks:
            if self.result.stopped:
                return
            for completion in await self._ask(task.request):
                self.replies.add(reply_row(self.model, task.prompt, task.request, completion))
            self.advance(task.request.n)

    async def _ask(self, request: Request) -> Sequence[Completion]:
        """The samples that there are; failures are counted."""
        try:
            completions = await self.backend.complete(request)
        except BudgetSpent as error:
            self.result.stopped = self.result.stopped or str(error)
            return ()
        except EndpointError as error:
            return self._failed(request, error)
        self.in_a_row = 0
        return completions

    def _failed(self, request: Request, error: EndpointError) -> Sequence[Completion]:
        """Count a failure. What did succeed of its request is paid for, so it is returned."""
        completions = error.completions if isinstance(error, RequestFailed) else ()
        self.result.failed += request.n - len(completions)
        if str(error) not in map(str, self.result.errors):
            self.result.errors.append(error)
        self.in_a_row += 1
        if self.in_a_row >= FAILURES_IN_A_ROW:
            self.result.stopped = self.result.stopped or f"{self.in_a_row} calls in a row failed"
        return completions


def reply_row(model: str, prompt: Prompt, request: Request, completion: Completion) -> Row:
    """A sample as a row of kind completion (`data/formats.py`); one that is no whole reply names the reason."""
    reason = why_dropped(completion)
    text = completion.text.encode("utf-8", "replace").decode()  # half a surrogate pair can be in dropped ones
    reply = text if isinstance(prompt.asked, str) else [{"role": "assistant", "content": text}]
    row: Row = {"prompt": prompt.asked, "completion": reply, "id": prompt.id, "split": prompt.split}
    row |= {"sample": completion.index, "key": request_key(model, request, completion.index)}
    row |= {"dropped": reason} if reason else {}
    row |= {"reasoning": completion.reasoning} if completion.reasoning and not reason else {}
    return row | {"usage": vars(completion.usage)}


def why_dropped(completion: Completion) -> str:
    """Why a sample is no whole reply: length, content_filter, tool_calls, empty or not text; '' when it is one."""
    if completion.finish_reason != "stop":
        return completion.finish_reason
    if not completion.text.strip():
        return "empty"
    try:
        (completion.text + completion.reasoning).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no file can hold
        return "not text"
    return ""


def preferences(chosen: Iterable[Row], rejected: Iterable[Row]) -> Iterator[Row]:
    """Rows of kind preference: a teacher's reply against the student's to the same prompt, sample by sample.

    What SODA (arXiv 2604.03873) trains on with DPO: the student's own replies of one moment are the rejected ones.
    Where the two wrote the same there is nothing to prefer, and no row.
    """
    own = {(row["id"], row["sample"]): row for row in rejected}
    for row in chosen:
        other = own.get((row["id"], row["sample"]))
        if other is not None and other["completion"] != row["completion"]:
            yield {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": other["completion"],
                "id": row["id"],
                "sample": row["sample"],
                "split": row["split"],
            }

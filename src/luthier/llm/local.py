"""LocalModel: a transformers model in this process as a `Backend`.

Concurrent requests share batches: whatever is waiting when the worker thread is free runs together, up to
`max_batch_size` rows. What a request gets does not depend on its company: sample k of a request with a seed is drawn
with random numbers of its own, derived from (seed, prompt, k), over float32 logits.

Log-probabilities are the model's own (log-softmax of the float32 logits at temperature 1, nothing masked), so they can
be compared with those of a training forward pass; the truncation by temperature, top_k and top_p is not part of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.errors import ConfigError, EndpointError, UserError
from luthier.core.seeds import derive_seed
from luthier.data.chat import encode_chat
from luthier.data.template import CHAT_TEMPLATE
from luthier.data.tokenizer import encode_texts, num_ids
from luthier.llm import generation
from luthier.llm.generation import Row, Vocabulary
from luthier.llm.types import GO_ON, Completion, ContextExceeded, Request, Score, Usage

MERGE_WINDOW = 0.003  # seconds that a free worker waits for requests of the same moment
UNBOUNDED = 1024  # default max_tokens of a model that names no context length


@dataclass(kw_only=True)
class _Generate:
    row: Row
    future: Future[Row] = field(default_factory=Future)


@dataclass(kw_only=True)
class _Score:
    ids: list[int]
    start: int
    future: Future[tuple[list[float], bool]] = field(default_factory=Future)


_Job = _Generate | _Score


class LocalModel:
    """A model and its tokenizer, ready to answer.

    `name`: what results and caches call the model (default: where its weights came from). `seed`: of requests that have
    none; each such request is a fresh draw, and a program that asks in the same order gets the same answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str | None = None,
        max_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.model = name or model.config.name_or_path or type(model).__name__
        self.usage = Usage()
        config = model.config.get_text_config(decoder=True)
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._network = model
        self._tokenizer = tokenizer
        self._embedding_rows = int(next(model.get_input_embeddings().parameters()).shape[0])
        known = num_ids(tokenizer)
        size = min(known, self._embedding_rows)
        self._vocabulary = Vocabulary(size=size, end_ids=end_ids(model, tokenizer), decode=self._decode)
        self._max_batch_size = max_batch_size
        self._seed = seed
        self._unseeded = itertools.count()
        self._waiting: deque[_Job] = deque()
        self._lock = threading.Lock()
        # Fast tokenizers change their own settings while they encode, so two threads must not use one at a time.
        self._tokenizer_lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="luthier-local")

    @property
    def has_chat_template(self) -> bool:
        """Whether it takes messages; a base model continues text only."""
        return self._tokenizer.chat_template is not None

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples. A cancelled call leaves its batch at the next token."""
        jobs = [_Generate(row=row) for row in self._rows(request)]
        rows = await self._run(jobs)
        return [self._completion(request, position, row) for position, row in enumerate(rows)]

    async def stream(
        self, request: Request, finished: Callable[[Completion], None] | None = None
    ) -> AsyncIterator[str]:
        """The request's single sample, piece by piece. Text that a stop string may still remove is held back.

        `finished` gets the whole completion after the last piece.
        """
        if request.n != 1:
            raise ConfigError(f"only one sample can be streamed, got n={request.n}", hint="ask with n=1")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def post(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        (row,) = self._rows(request)
        row.on_text = post
        job = _Generate(row=row)
        job.future.add_done_callback(lambda _: post(None))
        self._submit([job])
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            completion = self._completion(request, 0, job.future.result())
            if finished is not None:
                finished(completion)
        finally:
            job.future.cancel()

    async def score(self, prompt: str, completion: str) -> Score:
        """Log-probability of `completion` after `prompt`, tokenized together (raw text, no chat template).

        A token that spans the border belongs to the completion. An empty prompt is the beginning of a document.
        """
        if not completion:
            raise ConfigError("nothing to score: the completion is empty", hint="give the text to score")
        with self._tokenizer_lock:
            encoding = self._tokenizer(prompt + completion, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
        inside = [position for position, end in enumerate(ends) if end > len(prompt)]
        ids, start = encoding["input_ids"][: inside[-1] + 1], inside[0]
        if start == 0:
            ids, start = [self._beginning(), *ids], 1
        self._check_ids(ids)
        self._check_context(len(ids))
        job = _Score(ids=ids, start=start)
        ((logprobs, greedy),) = await self._run([job])
        if any(math.isnan(logprob) for logprob in logprobs):
            raise EndpointError("the model computes NaN logits", hint="its weights or its number format are broken")
        usage = Usage(prompt_tokens=len(ids), calls=1)
        self.usage += usage
        tokens = zip(ids[start:], logprobs, strict=True)
        scored = tuple(generation.token_logprob(*token, self._vocabulary) for token in tokens)
        return Score(tokens=scored, usage=usage, greedy=greedy)

    async def aclose(self) -> None:
        """Stop the worker thread; waiting requests are cancelled."""
        with self._lock:
            for job in self._waiting:
                job.future.cancel()
        await asyncio.to_thread(self._worker.shutdown)

    def room(self, request: Request) -> int | None:
        """Tokens left in the context after the request's prompt; None when the model names no limit."""
        return None if self.context_length is None else self.context_length - len(self._encode(request))

    def _rows(self, request: Request) -> list[Row]:
        if unknown := set(request.extra) - {"chat_template_kwargs", *GO_ON}:
            raise ConfigError(
                f"extra={sorted(unknown)} means nothing to a model in this process",
                hint="leave it out, or use a server",
            )
        if request.response_format is not None and request.require_format and request.response_format["type"] != "text":
            raise EndpointError(
                f"a model in this process cannot enforce response_format {request.response_format['type']!r}",
                hint="use a server (vLLM, llama.cpp), or Request(require_format=False) and parse tolerantly",
            )
        prompt = self._encode(request)
        self._check_ids(prompt)
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = UNBOUNDED if self.context_length is None else max(1, self.context_length - len(prompt))
        self._check_context(len(prompt) + max_tokens, f"{len(prompt)} for the prompt and {max_tokens} for the answer")
        seed = derive_seed(self._seed, "unseeded", next(self._unseeded)) if request.seed is None else request.seed
        content = ",".join(map(str, prompt))
        samples = range(request.first_sample, request.first_sample + request.n)
        return [self._row(request, prompt, max_tokens, derive_seed(seed, content, index)) for index in samples]

    def _row(self, request: Request, prompt: list[int], max_tokens: int, seed: int) -> Row:
        return Row(
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            stop=tuple(request.stop),
            seed=seed,
            top_logprobs=request.top_logprobs if request.logprobs else None,
        )

    def _encode(self, request: Request) -> list[int]:
        """Token ids of the prompt; a chat ends with the template's cue for the assistant."""
        with self._tokenizer_lock:
            if request.prompt is not None:
                return list(self._tokenizer(request.prompt)["input_ids"]) or [self._beginning()]
            if self._tokenizer.chat_template is None:
                raise EndpointError(
                    f"{self.model} has no chat template, so it cannot take messages",
                    hint="it is a base model: ask with Request(prompt=...), on the command line with --raw",
                )
            options = request.extra.get("chat_template_kwargs", {})
            messages, begun = _unfinished(request)
            if self._tokenizer.chat_template == CHAT_TEMPLATE and not options:
                asked = encode_chat(self._tokenizer, messages, add_generation_prompt=True).ids
                return [*asked, *(encode_texts(self._tokenizer, [begun])[0] if begun else ())]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            return list(self._tokenizer(f"{text}{begun}", add_special_tokens=False)["input_ids"])

    def _beginning(self) -> int:
        """The token that stands before a document."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise EndpointError(f"{self.model} cannot start from nothing: no BOS or EOS token", hint="give a prompt")

    def _check_ids(self, ids: Sequence[int]) -> None:
        """On a GPU an id without a row would not be an exception: it would end the process's use of the device."""
        if max(ids) >= self._embedding_rows:
            raise EndpointError(
                f"the tokenizer gives id {max(ids)}, but {self.model} has embeddings for {self._embedding_rows} ids",
                hint="use the tokenizer that belongs to the model",
            )

    def _check_context(self, length: int, parts: str = "") -> None:
        if self.context_length is not None and length > self.context_length:
            raise ContextExceeded(
                f"{length} tokens{f' ({parts})' if parts else ''} exceed the context of {self.context_length} tokens",
                hint="shorten the prompt or lower max_tokens",
            )

    def _decode(self, ids: Sequence[int]) -> str:
        with self._tokenizer_lock:
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _completion(self, request: Request, position: int, row: Row) -> Completion:
        first = position == 0
        usage = Usage(
            prompt_tokens=len(row.prompt) if first else 0, completion_tokens=row.sampled, calls=1 if first else 0
        )
        self.usage += usage
        assert row.finish_reason is not None
        return Completion(
            text=row.text,
            finish_reason=row.finish_reason,
            index=request.first_sample + position,
            logprobs=tuple(row.logprobs) if request.logprobs else None,
            usage=usage,
        )

    async def _run(self, jobs: Sequence[_Job]) -> list[Any]:
        self._submit(jobs)
        return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))

    def _submit(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            if isinstance(job, _Generate):
                job.row.cancelled = job.future.cancelled
        with self._lock:
            self._waiting.extend(jobs)
        self._worker.submit(self._work)

    def _work(self) -> None:
        """In the worker thread: answer everything that is waiting."""
        if self._waiting:
            time.sleep(MERGE_WINDOW)
        while batch := self._take():
            try:
                results = self._answer(batch)
            except Exception as error:  # each caller gets it
                for job in batch:
                    _settle(job.future, error=_explain(error))
            else:
                for job, result in zip(batch, results, strict=True):
                    _settle(job.future, result)

    def _take(self) -> list[_Job]:
        """The next jobs that can run together: the first one and others of its kind, in order of arrival."""
        with self._lock:
            alive = [job for job in self._waiting if not job.future.cancelled()]
            batch = [job for job in alive if type(job) is type(alive[0])][: self._max_batch_size]
            taken = set(map(id, batch))
            self._waiting = deque(job for job in alive if id(job) not in taken)
        return batch

    def _answer(self, batch: Sequence[_Job]) -> Sequence[Any]:
        training = self._network.training
        self._network.eval()
        try:
            texts = [(job.ids, job.start) for job in batch if isinstance(job, _Score)]
            if texts:
                return generation.score(self._network, texts, self._vocabulary.size)
            rows = [job.row for job in batch if isinstance(job, _Generate)]
            generation.generate(self._network, rows, self._vocabulary)
            return rows
        finally:
            self._network.train(training)


def _unfinished(request: Request) -> tuple[list[dict[str, str]], str]:
    """The messages, and the reply that is to be gone on with; it stands last. '' when there is none."""
    messages = [dict(message) for message in request.messages]
    if not request.extra.get("continue_final_message"):
        return messages, ""
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"continue_final_message: the last message is the {messages[-1]['role']}'s, expected the assistant's",
            hint="put the beginning of the reply last",
        )
    return messages[:-1], messages[-1]["content"]


def _settle(future: Future[Any], result: Any = None, *, error: Exception | None = None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _explain(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return UserError("the batch does not fit into memory", hint="lower max_batch_size or max_tokens")
    return error


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Every token that ends an answer: those of the generation settings, and the tokenizer's EOS."""
    settings = getattr(model.generation_config, "eos_token_id", None)
    listed = settings if isinstance(settings, list) else [settings]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)

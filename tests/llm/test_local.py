"""LocalModel on a random tiny network: batching must not be visible in any answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from luthier.core.errors import ConfigError, EndpointError
from luthier.llm import Completion, LocalModel, Request, generation
from luthier.llm.types import GO_ON

Make = Callable[..., LocalModel]
CHAT = [{"role": "user", "content": "hello"}]
# Lengths, sampling settings, stops and chat in one batch.
MIXED = [
    Request(prompt="the quick brown fox", max_tokens=12, temperature=0),
    Request(prompt="h", max_tokens=20, temperature=0),
    Request(prompt="h", max_tokens=3, seed=1, n=3),
    Request(prompt="hello world! " * 5, max_tokens=9, seed=1, temperature=0.7, top_p=0.8),
    Request(messages=CHAT, max_tokens=15, seed=5, top_k=7, n=2),
    Request(prompt="the lazy", max_tokens=30, seed=3, temperature=2.0, stop=["e", "o"]),
]


def complete(local: LocalModel, requests: Sequence[Request]) -> list[list[Completion]]:
    """All requests at the same moment."""

    async def main() -> list[list[Completion]]:
        try:
            return await asyncio.gather(*(local.complete(request) for request in requests))
        finally:
            await local.aclose()

    return asyncio.run(main())


def sampled(answers: list[list[Completion]]) -> list[list[tuple[str, str]]]:
    return [[(completion.text, completion.finish_reason) for completion in answer] for answer in answers]


def test_answers_do_not_depend_on_the_batch(local: Make) -> None:
    alone = [complete(local(max_batch_size=1), [request])[0] for request in MIXED]
    for size in (1, 3, 32):
        assert sampled(complete(local(max_batch_size=size), MIXED)) == sampled(alone)
    assert sampled(complete(local(), MIXED[::-1]))[::-1] == sampled(alone)


def test_padding_does_not_shift_absolute_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    """Rotary positions are relative and would hide a shift; GPT-2's learned ones do not."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 96, "initializer_range": 0.5}
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)).eval()
    alone = [complete(LocalModel(network, tokenizer, max_batch_size=1), [request])[0] for request in MIXED]
    assert sampled(complete(LocalModel(network, tokenizer), MIXED)) == sampled(alone)


TINY = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
HYBRID = {"layer_types": ["conv", "full_attention"], "intermediate_size": 64, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config", [Lfm2Config(**TINY, **HYBRID, num_key_value_heads=2), MambaConfig(**TINY)], ids=["lfm2", "mamba"]
)
def test_recurrent_states_follow_their_rows(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    alone = [complete(LocalModel(network, tokenizer, max_batch_size=1), [request])[0] for request in MIXED]
    assert sampled(complete(LocalModel(network, tokenizer), MIXED)) == sampled(alone)

    greedy = Request(prompt="hello world", max_tokens=6, temperature=0, logprobs=True)
    (answer,) = complete(LocalModel(network, tokenizer), [greedy])[0]
    tokens = answer.logprobs or ()
    ids = torch.tensor([*tokenizer("hello world")["input_ids"], *(token.token_id for token in tokens)])
    with torch.no_grad():
        table = network(ids[None], use_cache=False).logits[0, -len(tokens) - 1 : -1].log_softmax(dim=-1)
    expected = table.gather(1, ids[-len(tokens) :, None])[:, 0]
    assert [token.logprob for token in tokens] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_model_whose_state_cannot_be_batched_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = RwkvConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    local = LocalModel(RwkvForCausalLM(config).eval(), tokenizer)
    with pytest.raises(EndpointError, match="RwkvForCausalLM keeps its state"):
        complete(local, [MIXED[1]])


def test_ids_after_a_gap_can_be_drawn(network: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """len(tokenizer) is 3 here, but the highest id is 5."""
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 2, "b": 5}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")

    def favoring_b(*arguments: Any) -> torch.Tensor:
        return torch.zeros(len(arguments[1]), 1, network.config.vocab_size).index_fill(2, torch.tensor(5), 50.0)

    monkeypatch.setattr(generation, "_forward", favoring_b)
    (answer,) = complete(LocalModel(network, tokenizer), [Request(prompt="a", max_tokens=2, temperature=0)])[0]
    assert answer.text.split() == ["b", "b"]


def test_greedy_equals_the_transformers_loop(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["the quick", "hello world! the lazy dog", "fox"]
    requests = [Request(prompt=prompt, max_tokens=16, temperature=0) for prompt in prompts]
    for prompt, (completion,) in zip(prompts, complete(local(), requests), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(16):  # no cache, no padding
            logits = network(ids).logits[:, -1, : len(tokenizer)]
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(prompt)
        assert completion.text == expected


def test_samples_have_seeds_of_their_own(local: Make) -> None:
    def ask(**options: Any) -> list[str]:
        request = Request(prompt="the", max_tokens=12, **options)
        return [completion.text for completion in complete(local(), [request])[0]]

    five = ask(seed=1, n=5)
    assert len(set(five)) == 5
    assert ask(seed=1, n=2, first_sample=3) == five[3:]
    assert ask(seed=2, n=5) != five


def test_without_a_seed_every_call_is_a_fresh_draw_of_the_models_seed(local: Make) -> None:
    request = Request(prompt="the", max_tokens=12)

    def two(seed: int) -> list[list[tuple[str, str]]]:
        return sampled(complete(local(seed=seed), [request, request]))

    assert two(0)[0] != two(0)[1]
    assert two(0) == two(0)
    assert two(0) != two(1)


def test_logprobs_are_the_models_own(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    request = Request(
        prompt="hello", max_tokens=10, seed=4, temperature=0.5, top_k=5, logprobs=True, top_logprobs=3, n=2
    )
    for completion in complete(local(), [request, MIXED[3]])[0]:
        assert completion.logprobs
        prompt = tokenizer("hello")["input_ids"]
        ids = torch.tensor([prompt + [token.token_id for token in completion.logprobs]])
        table = network(ids).logits.float().log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
        expected = table.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor([token.logprob for token in completion.logprobs]), expected, atol=1e-4, rtol=1e-4
        )
        best = table.topk(3).values
        torch.testing.assert_close(
            torch.tensor([[value for _, value in token.top] for token in completion.logprobs]), best, atol=1e-4, rtol=0
        )
    (without,) = complete(local(), [Request(prompt="hello", max_tokens=2)])[0]
    assert without.logprobs is None


def test_score_equals_a_forward_pass_and_ignores_the_batch(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [("the quick", " brown fox"), ("hello", " world! the lazy dog."), ("", "the")]

    async def main() -> list[Any]:
        model = local()
        scores = await asyncio.gather(*(model.score(*pair) for pair in pairs))
        await model.aclose()
        return scores

    for (prompt, completion), score in zip(pairs, asyncio.run(main()), strict=True):
        start = len(tokenizer(prompt)["input_ids"]) or 1
        beginning = [] if prompt else [tokenizer.bos_token_id]
        ids = torch.tensor([beginning + tokenizer(prompt + completion)["input_ids"]])
        table = network(ids).logits.float().log_softmax(dim=-1)[0, start - 1 : -1]
        expected = table.gather(1, ids[0, start:, None]).sum().item()
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert "".join(token.token for token in score.tokens) == completion
    with pytest.raises(ConfigError, match="empty"):
        asyncio.run(local().score("x", ""))


def forced(monkeypatch: pytest.MonkeyPatch, script: list[int], vocabulary: int) -> None:
    """Make generation see logits that dictate a script, one entry per step."""
    steps = itertools.count()

    def logits(*arguments: Any) -> torch.Tensor:
        ids = arguments[1]
        table = torch.full((len(ids), 1, vocabulary), -20.0)
        table[:, 0, script[next(steps)]] = 20.0
        return table

    monkeypatch.setattr(generation, "_forward", logits)


def dictate(
    local: Make,
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    **options: Any,
) -> Completion:
    script = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    forced(monkeypatch, script, network.config.vocab_size)
    return complete(local(), [Request(prompt="x", logprobs=True, **options)])[0][0]


def test_end_of_text_stops_and_is_counted_but_not_shown(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = dictate(local, network, tokenizer, monkeypatch, "hello world!")
    assert (completion.text, completion.finish_reason) == ("hello world!", "stop")
    assert completion.logprobs is not None
    assert completion.usage.completion_tokens == len(completion.logprobs) + 1


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["wor"], "hello "),
        ([" "], "hello"),
        (["ld", "lo w"], "hel"),
        (["never"], "hello world!"),
        (["!"], "hello world"),
        (["hello"], ""),
    ],
)
def test_stop_strings_cut_the_text(
    stop: list[str],
    expected: str,
    local: Make,
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    completion = dictate(local, network, tokenizer, monkeypatch, "hello world!", stop=stop)
    assert (completion.text, completion.finish_reason) == (expected, "stop")
    assert completion.logprobs is not None
    covered = "".join(token.token for token in completion.logprobs)
    assert covered.startswith(expected), "log-probabilities cover the text"
    assert len(covered) - len(expected) < 7, "and at most the rest of one token"


def test_stop_strings_over_multibyte_characters(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dictate(local, network, tokenizer, monkeypatch, "né 中文 end", stop=["文"]).text == "né 中"


def test_a_stop_string_may_begin_with_the_answers_first_space() -> None:
    """SentencePiece decoders drop the first space of what they are given."""
    words = ["Say:", " the", " end"]
    vocabulary = generation.Vocabulary(
        size=3, end_ids=frozenset(), decode=lambda ids: "".join(words[i] for i in ids).removeprefix(" ")
    )
    row = generation.Row(
        prompt=[0], max_tokens=9, temperature=0, top_k=0, top_p=1, stop=(" the",), seed=0, top_logprobs=None
    )
    row.accept(1, None, vocabulary)
    assert (row.text, row.finish_reason) == ("", "stop")


def test_max_tokens_ends_with_length(local: Make) -> None:
    (completion,) = complete(local(), [MIXED[0]])[0]
    assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", 12)


def test_rows_beyond_the_tokenizer_are_never_drawn(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def favoring_padding(*arguments: Any) -> torch.Tensor:
        table = torch.zeros(len(arguments[1]), 1, network.config.vocab_size)
        table[..., len(tokenizer) :] = 50.0
        return table

    monkeypatch.setattr(generation, "_forward", favoring_padding)
    request = Request(prompt="x", max_tokens=30, seed=0, n=4, logprobs=True)
    for completion in complete(local(), [request])[0]:
        assert completion.logprobs is not None
        assert all(token.token_id < len(tokenizer) for token in completion.logprobs)


def test_a_tokenizer_with_more_ids_than_the_model_is_noticed(network: LlamaForCausalLM) -> None:
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 1000}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    request = Request(prompt="a", max_tokens=2, temperature=0, logprobs=True, top_logprobs=999)
    (answer,) = complete(LocalModel(network, tokenizer), [request])[0]
    assert answer.logprobs is not None
    assert all(len(token.top) == network.config.vocab_size for token in answer.logprobs)
    with pytest.raises(EndpointError, match=r"gives id 1000, but .* has embeddings for 290 ids"):
        complete(LocalModel(network, tokenizer), [Request(prompt="b", max_tokens=2)])


def test_nan_is_an_error_for_everyone_in_the_batch_and_the_next_call_works(
    local: Make, network: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = local()

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(generation, "_forward", lambda *a: torch.full((len(a[1]), 1, 300), torch.nan))
            results = await asyncio.gather(*(model.complete(r) for r in MIXED[:2]), return_exceptions=True)
            assert [str(result) for result in results] == ["the model computes NaN logits"] * 2
        assert (await model.complete(MIXED[0]))[0].text
        await model.aclose()

    asyncio.run(main())


def test_concurrent_requests_share_forward_passes_and_equal_prompts_are_read_once(
    local: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.llm.local.MERGE_WINDOW", 0.1)
    shapes: list[tuple[int, ...]] = []
    forward = generation._forward

    def recording(*arguments: Any) -> torch.Tensor:
        shapes.append(tuple(arguments[1].shape))
        return forward(*arguments)

    monkeypatch.setattr(generation, "_forward", recording)
    requests = [Request(prompt=prompt, max_tokens=4, temperature=0, n=3) for prompt in ("hh", "xx")]
    complete(local(), requests)
    assert shapes[0][0] == 2
    assert [shape[0] for shape in shapes[1:]] == [6, 6, 6]


def test_usage_adds_up(local: Make) -> None:
    model = local()
    answers = complete(model, MIXED)
    usages = [completion.usage for answer in answers for completion in answer]
    assert model.usage == sum(usages[1:], usages[0])
    assert model.usage.calls == len(MIXED)


def test_context_length(local: Make) -> None:
    with pytest.raises(ConfigError, match=r"exceed the context of 96 tokens") as caught:
        complete(local(), [Request(prompt="hello", max_tokens=96)])
    assert "max_tokens" in caught.value.hint
    with pytest.raises(ConfigError, match="exceed"):
        complete(local(), [Request(prompt="z" * 96)])
    (full,) = complete(local(), [Request(prompt="z" * 90, temperature=0)])[0]
    assert full.usage.prompt_tokens + full.usage.completion_tokens <= 96
    assert local().room(Request(prompt="z" * 90)) == 6


def test_what_cannot_be_done_is_an_error(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(EndpointError, match="cannot enforce"):
        complete(local(), [Request(prompt="x", response_format={"type": "json_object"})])
    weak = Request(prompt="x", max_tokens=2, response_format={"type": "json_object"}, require_format=False)
    assert complete(local(), [weak])[0][0].format == "text"
    with pytest.raises(ConfigError, match="reasoning_effort"):
        complete(local(), [Request(prompt="x", extra={"reasoning_effort": "low"})])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(EndpointError, match="no chat template") as caught:
            complete(local(), [Request(messages=CHAT)])
    finally:
        tokenizer.chat_template = template
    assert "prompt" in caught.value.hint


def test_any_chat_template_is_used(local: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    instella = local()._encode(Request(messages=CHAT))
    assert tokenizer.decode(instella) == "<|endoftext|><|user|>\nhello\n<|assistant|>\n"
    assert instella.count(tokenizer.eos_token_id) == 1
    injected = local()._encode(Request(messages=[{"role": "user", "content": "<|endoftext|>"}]))
    assert injected.count(tokenizer.eos_token_id) == 1, "a user cannot write the real end of text"
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ mark }}{% endfor %}"
    try:
        request = Request(messages=CHAT, extra={"chat_template_kwargs": {"mark": "#"}})
        assert tokenizer.decode(local()._encode(request)) == "[user] hello #"
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("template", ["instella", "{% for m in messages %}[{{ m.content }}]{% endfor %}"])
def test_a_reply_that_was_begun_is_gone_on_with(local: Make, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if template == "instella" else template
        asked = Request(messages=[*CHAT, {"role": "assistant", "content": "to\n"}], extra=GO_ON)
        ids = local()._encode(asked)
        assert ids == local()._encode(Request(messages=CHAT)) + tokenizer("to\n", add_special_tokens=False)["input_ids"]
        assert not tokenizer.decode(ids).endswith(tokenizer.eos_token)
        assert complete(local(), [asked])[0][0].text
        with pytest.raises(ConfigError, match="the assistant's"):
            complete(local(), [Request(messages=CHAT, extra=GO_ON)])
    finally:
        tokenizer.chat_template = own


def test_stream_is_the_completion_in_pieces(local: Make) -> None:
    for request in (MIXED[0], MIXED[5], Request(messages=CHAT, max_tokens=25, seed=1)):

        async def main(request: Request = request) -> tuple[list[str], str]:
            model = local()
            pieces = [piece async for piece in model.stream(request)]
            text = (await model.complete(request))[0].text
            await model.aclose()
            return pieces, text

        pieces, text = asyncio.run(main())
        assert "".join(pieces) == text
        assert len(pieces) > 1 or len(text) <= 1


def test_a_stream_never_shows_a_stop_string(
    local: Make, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [*tokenizer("abcXYabcXYZ")["input_ids"], 0]
    forced(monkeypatch, script, network.config.vocab_size)

    async def main() -> list[str]:
        model = local()
        pieces = [piece async for piece in model.stream(Request(prompt="x", stop=["XYZ"]))]
        await model.aclose()
        return pieces

    pieces = asyncio.run(main())
    assert "".join(pieces) == "abcXYabc"
    assert "a" in pieces[0]


def test_unsettled_text() -> None:
    assert generation.unsettled("ab\ufffd\ufffd", []) == 2
    assert generation.unsettled("hello \n", ["\n\n", "lo \nx"]) == 4
    assert generation.unsettled("hello", ["xyz"]) == 0


def test_a_cancelled_request_leaves_its_batch(local: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.llm.local.MERGE_WINDOW", 0.1)
    sizes: list[int] = []
    forward = generation._forward

    def recording(*arguments: Any) -> torch.Tensor:
        sizes.append(len(arguments[1]))
        return forward(*arguments)

    monkeypatch.setattr(generation, "_forward", recording)

    async def main() -> list[Any]:
        model = local()
        short = model.stream(Request(prompt="xx", max_tokens=80, temperature=0))
        long = asyncio.create_task(model.complete(Request(prompt="hello", max_tokens=80, seed=1)))
        await anext(short)
        await short.aclose()
        answer = await long
        await model.aclose()
        return answer

    assert asyncio.run(main())[0].usage.completion_tokens > 10
    assert sizes[0] == 2
    assert sizes[-1] == 1


def test_the_training_flag_is_restored(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    network.train()
    try:
        complete(LocalModel(network, tokenizer), [MIXED[0]])
        assert network.training
    finally:
        network.eval()


def test_one_model_serves_several_event_loops(local: Make) -> None:
    model = local()
    texts = {asyncio.run(model.complete(MIXED[0]))[0].text for _ in range(2)}
    assert len(texts) == 1
    asyncio.run(model.aclose())

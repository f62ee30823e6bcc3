"""Pretraining as in Instella, arXiv 2511.10628 section 2, on one process or many: stage 1, and stage 2 with a start.

AdamW on every parameter, warm-up from a tenth of the peak, cosine to a tenth (stage 2: linear to zero, no warm-up),
gradient norm clipped at 1, bf16 compute over fp32 masters, no dropout, sequences that cross document borders.

Departures: the loss is a mean over targets, not over input positions (theirs is scaled by 4095/4096); every window has
as many targets as inputs; evaluation and samples run in the loop.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.data.mixture import WindowMixture
from luthier.learn.evaluate import TokenStream, code_length, stream_nll
from luthier.learn.loop import Job, LoopSettings, train
from luthier.learn.meters import Meter, peak_flops, prefers_bf16, training_flops_per_token
from luthier.learn.muon import Muon
from luthier.learn.objectives import CausalLoss, has_plain_head
from luthier.learn.parallel import Ranks, make_mesh, shard, transformer_blocks
from luthier.learn.precision import Weights
from luthier.learn.schedule import learning_rate
from luthier.learn.sequence_parallel import parallelize
from luthier.learn.state import TrainState, resume
from luthier.llm.local import LocalModel
from luthier.llm.types import Request
from luthier.models.instella import InstellaForCausalLM
from luthier.train.config import PretrainConfig
from luthier.train.start import RandomStart, Start

# Tokens up to which plain matrix products are no slower than SDPA in bf16 on a CPU: benchmarks/attention_cpu.py.
EAGER_LIMIT = 256
COMPILED_STEPS = 500  # compiling takes about as long as 40 steps and saves a tenth to a fifth of each
SAMPLE_TOKENS = 48
EVAL_TOKENS = 32_768  # held-out tokens of an evaluation on the way; the last one uses all
EPSILON = 1e-8  # AdamW's denominator offset, the paper's
GPU_ATTENTION = ("flex_attention", "flash_attention_2")  # on a CPU the one has no backward pass, the other does not run


@dataclass(frozen=True)
class Pretrained:
    """The outcome: a model whose weights `state_dict` holds in fp32 (main rank), and the held-out measurement."""

    finished: bool
    model: PreTrainedModel
    state_dict: dict[str, torch.Tensor]
    held_out: dict[str, Any]
    state: TrainState


def pretrain(
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    mixture: WindowMixture,
    held_out: TokenStream,
    *,
    who: Ranks,
    checkpoints: Path,
    run: RunFolder | None,
    console: Console,
    start: Start | None = None,
) -> Pretrained:
    """Train, resuming from the newest state in `checkpoints`. All ranks call it; only the main one has a `run`.

    `start` is where a run that has no state yet begins; None: at random weights.
    """
    start = start or RandomStart(config, tokenizer)
    model = start.build(meta=who.world_size > 1)
    flops = training_flops_per_token(model, config.sequence_length)
    low = _low_precision(config, who, console)
    objective = _place(model, start, config, low, who)
    choose_attention(model, config, low, who)
    parallelize(model, who)
    weights = Weights(objective, low if who.world_size == 1 else None)
    state = TrainState(weights, _optimizer(objective, weights, config), cursor=mixture.state_dict())
    resume(state, mixture, checkpoints, who, run, console)
    if state.step == 0 and (taken := start.carry_over(state, who)):
        console.status(taken)
    score = partial(evaluate, objective, tokenizer, config=config, who=who)
    job = Job(
        objective=objective,
        state=state,
        batch_at=partial(
            mixture.batch,
            rank=who.data_rank,
            world_size=who.data_size,
            document_ids=config.document_mask,
            stretch=max(config.context_length / config.sequence_length, 1.0),
        ),
        learning_rate=schedule(config),
        seed=config.seed,
        meter=Meter(flops, peak_flops(who.device, low or torch.float32) * who.world_size),
        checkpoints=checkpoints,
        run=run,
        evaluate=partial(score, held_out.head(max(EVAL_TOKENS, config.sequence_length)), stride=config.sequence_length),
        sample=partial(sample, model, tokenizer, config) if who.world_size == 1 and config.sample_prompts else None,
    )
    if who.world_size > 1 and config.sample_prompts:
        console.status("samples: none on the way, because the model is sharded; `luthier chat` draws them afterwards")
    finished = train(job, LoopSettings.of(config), who, console)
    weights.restore()
    if config.attention == "flash_attention_2":
        model.set_attn_implementation("sdpa")  # it takes no fp32, and the masters are fp32
    final = score(held_out, stride=config.sequence_length // 2) if finished else {}
    return Pretrained(finished, model, gather_weights(objective, weights, who), final, state)


def schedule(config: PretrainConfig) -> Callable[[int], float]:
    """Finished updates -> learning rate of the next one."""
    return partial(
        learning_rate,
        schedule=config.schedule,
        peak=config.learning_rate,
        warmup=config.warmup_steps,
        total=config.steps,
        final_fraction=config.final_fraction,
    )


def _optimizer(objective: CausalLoss, weights: Weights, config: PretrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": EPSILON,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights.masters.values(), fused=True, **settings)
    ends = (objective.model.get_input_embeddings(), objective.model.get_output_embeddings())
    edges = {id(end.weight) for end in ends if end is not None}
    outside = {name for name, parameter in objective.named_parameters() if id(parameter) in edges}
    return Muon(weights.masters, outside, **settings)


def _low_precision(config: PretrainConfig, who: Ranks, console: Console) -> torch.dtype | None:
    """The dtype of compute, or None for fp32 throughout."""
    low = config.precision == "bf16" or (config.precision == "auto" and prefers_bf16(who.device))
    if who.is_main:
        reason = " (this device multiplies it natively)" if low and config.precision == "auto" else ""
        console.status(f"precision: {'bf16 over fp32 masters' if low else 'fp32'}{reason}")
    return torch.bfloat16 if low else None


def choose_attention(model: PreTrainedModel, config: PretrainConfig, low: torch.dtype | None, who: Ranks) -> None:
    """Switch to the attention kernel that the config names, or to the one that is fastest here."""
    kernel = config.attention
    if kernel == "auto":
        short = config.sequence_length <= EAGER_LIMIT and who.sequence_parallel == 1
        if low is not None and who.device.type == "cpu" and short:
            model.set_attn_implementation("eager")
        return
    if kernel in GPU_ATTENTION and who.device.type == "cpu":
        raise ConfigError(f"attention: {kernel} trains on GPUs only, got a CPU", hint="use --attention auto")
    if kernel == "flash_attention_2" and low is None:
        raise ConfigError("attention: flash_attention_2 computes in bf16 only, got fp32", hint="use --precision bf16")
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"attention: {kernel} cannot be used here ({str(error).splitlines()[0]})", hint="use --attention auto"
        ) from error


def compiles(config: PretrainConfig, who: Ranks) -> bool:
    """Whether blocks are compiled; auto does where that wins back its time: on CUDA, and on a CPU in long runs."""
    if config.compile == "off" or who.device.type == "cuda":
        return config.compile != "off"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if config.compile == "on" and compiler is None:
        raise ConfigError("compile: found no C++ compiler", hint="install g++ or clang++, or use --compile off")
    pays = compiler is not None and who.world_size == 1 and config.steps >= COMPILED_STEPS
    return config.compile == "on" or pays


def _place(
    model: PreTrainedModel, start: Start, config: PretrainConfig, low: torch.dtype | None, who: Ranks
) -> CausalLoss:
    """Put the model on its device, or shards of it on all; wrap it with its loss."""
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    is_instella = isinstance(model, InstellaForCausalLM)
    objective = CausalLoss(model, plain_head=is_instella or has_plain_head(model))
    blocks = transformer_blocks(model)
    if compiles(config, who):
        for block in blocks:
            block.compile()
    if who.world_size == 1:
        objective.to(who.device)
        return objective
    without_storage = next(model.parameters()).is_meta
    shard(objective, blocks, make_mesh(who, config.shard_size), low)
    if without_storage:
        objective.to_empty(device=who.device)
        start.fill(model)
    else:
        objective.to(who.device)
    return objective


def evaluate(
    objective: CausalLoss,
    tokenizer: PreTrainedTokenizerFast,
    stream: TokenStream,
    *,
    config: PretrainConfig,
    who: Ranks,
    stride: int,
) -> dict[str, Any]:
    """Bits per byte of a held-out stream, with contexts of at least `sequence_length - stride` tokens."""
    with torch.compiler.set_stance("force_eager"):  # a few forward passes do not win back a compilation
        nats = stream_nll(
            objective,
            stream.tokens,
            start_token=tokenizer.eos_token_id,
            context=config.sequence_length,
            stride=max(1, stride),
            batch_size=config.micro_batch_size,
            who=who,
            document_starts=stream.starts if config.document_mask else None,
        )
    return code_length(stream, nats)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: PretrainConfig) -> list[dict[str, Any]]:
    """What the model writes after each of the prompts, at temperature 0.8 and with fixed seeds."""
    model.eval()
    backend = LocalModel(model, tokenizer)
    seed, longest = derive_seed(config.seed, "samples"), min(SAMPLE_TOKENS, config.sequence_length // 2)

    async def complete() -> list[str]:
        requests = [
            Request(prompt=prompt, max_tokens=longest, temperature=0.8, seed=seed) for prompt in config.sample_prompts
        ]
        replies = await asyncio.gather(*(backend.complete(request) for request in requests))
        await backend.aclose()
        return [reply[0].text for reply in replies]

    with torch.compiler.set_stance("force_eager"):
        texts = asyncio.run(complete())
    model.train()
    return [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample_prompts, texts, strict=True)]


def gather_weights(objective: CausalLoss, weights: Weights, who: Ranks) -> dict[str, torch.Tensor]:
    """fp32 weights under the model's own names; sharded ones are gathered on the main rank, empty elsewhere."""
    if who.world_size == 1:
        return {name.removeprefix("model."): p.detach() for name, p in weights.masters.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(objective, options=options)
    return {name.removeprefix("model."): w for name, w in gathered.items() if isinstance(w, torch.Tensor)}

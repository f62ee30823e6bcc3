"""Step time of GAD against plain GRPO with a constant reward: same student, prompts, samples per prompt and KL term.

They take turns in one process, round by round, so that a noisy machine disturbs all; the figure is the median ratio of
a round with a bootstrap interval over rounds. A student with random weights never ends a reply, so all replies have the
full length. Beside GAD as it is stands GAD that runs the discriminator once for the rewards and again for its update.

    python benchmarks/gad_overhead.py [--rounds 5] [--steps 4] [--prompts 4] [--tokens 64] [--device cpu] [--record]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from record import record
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

import luthier  # noqa: F401  (registers Instella)
from luthier.core.stats import bootstrap_median
from luthier.data.tokenizer import byte_tokenizer
from luthier.distill.discriminator import Discriminator
from luthier.distill.gad_config import GADConfig
from luthier.distill.gad_trainer import GADTrainer
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
SAMPLES, WARM = 8, 1  # replies per prompt, steps of each turn that are not timed
KEPT_GRAPHS: dict[str, int | None] = {"GRPO": None, "GAD": 2, "GAD, scored twice": 0}
REPLY = "a teacher's reply, which is about as long as the student's are, more or less; "


class Clock(TrainerCallback):
    """When each step ended: wall clock on a GPU, the process's own time on a CPU, which others may be using too."""

    def __init__(self) -> None:
        self.stamps = list[float]()

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())
        else:
            self.stamps.append(time.process_time())


def constant(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """The reward of plain GRPO here."""
    return [0.0] * len(completion_ids)


def save_student(folder: Path) -> None:
    """A student with random weights, and its tokenizer, in a folder."""
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = InstellaForCausalLM(InstellaConfig(vocab_size=4096, max_position_embeddings=2048, **SHAPE, **ends))
    initialize(model, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def seconds_per_step(kept_graphs: int | None, folder: Path, options: argparse.Namespace) -> float:
    """Mean seconds of the timed steps of one turn; None is plain GRPO."""
    settings = GADConfig(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=options.prompts * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=options.tokens,
        max_steps=options.steps + WARM,
        use_cpu=options.device == "cpu",
        bf16=options.device == "cuda",
        activation_checkpointing=False,
        discriminator_reencode=False,
        discriminator_kept_graphs=kept_graphs or 0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        generation_kwargs={"min_new_tokens": options.tokens},
    )
    data = Dataset.from_list([{"prompt": f"question {i:4d}", "completion": REPLY * 8} for i in range(256)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    given: dict[str, Any] = {"processing_class": byte_tokenizer(), "train_dataset": data, "callbacks": [clock]}
    trainer: GRPOTrainer
    if kept_graphs is not None:
        trainer = GADTrainer(model, Discriminator.of(model), settings, **given)
    else:
        trainer = GRPOTrainer(model, [constant], settings, **given)
    trainer.train()
    return (clock.stamps[-1] - clock.stamps[WARM - 1]) / options.steps


def over(rounds: list[dict[str, float]], arm: str) -> list[float]:
    """Median ratio of an arm to plain GRPO, with its interval over rounds."""
    return [round(value, 3) for value in bootstrap_median([taken[arm] / taken["GRPO"] for taken in rounds])[:3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--record", action="store_true", help="append a row to results/")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    rounds = list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as name:
        save_student(Path(name))
        for number in range(options.rounds):
            order = list(KEPT_GRAPHS)[:: -1 if number % 2 else 1]
            rounds.append({arm: seconds_per_step(KEPT_GRAPHS[arm], Path(name), options) for arm in order})
            print(f"round {number}: " + ", ".join(f"{arm} {rounds[-1][arm]:.3f} s" for arm in KEPT_GRAPHS), flush=True)
    told = {
        "ratio": over(rounds, "GAD"),
        "ratio_scored_twice": over(rounds, "GAD, scored twice"),
        **{f"{arm}, seconds": round(median(taken[arm] for taken in rounds), 4) for arm in KEPT_GRAPHS},
        **{key: getattr(options, key) for key in ("rounds", "steps", "prompts", "tokens", "device")},
        "samples": SAMPLES,
        "threads": torch.get_num_threads(),
    }
    print(told)
    if options.record:
        record("gad_overhead", **told)


if __name__ == "__main__":
    main()

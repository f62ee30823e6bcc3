from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.data.tokenizer import train_bpe

if TYPE_CHECKING:
    from luthier.distill.gad_trainer import GADTrainer

WORDS = [
    "the",
    "luthier",
    "planes",
    "top",
    "of",
    "violin",
    "until",
    "it",
    "rings",
    "tap",
    "wood",
    "spruce",
    "maple",
    "bow",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, a few words of English in it."""
    return train_bpe([" ".join(WORDS) + "\n"] * 4, 300)


@pytest.fixture(scope="session")
def student_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, saved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("student") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def student(student_folder: Path) -> PreTrainedModel:
    """A fresh copy, loaded from its folder."""
    return load(student_folder)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def duel_rows() -> list[dict[str, str]]:
    """Prompts with a teacher's replies."""
    return [{"prompt": f"tap {WORDS[i]}", "completion": f" {WORDS[-i]} rings"} for i in range(1, 9)]


@pytest.fixture
def make_trainer(
    student_folder: Path, tokenizer: PreTrainedTokenizerFast, duel_rows: list[dict[str, str]], tmp_path: Path
) -> Callable[..., GADTrainer]:
    """`make_trainer(**settings)`: a GADTrainer of two prompts with four replies each per step."""

    from luthier.distill.discriminator import Discriminator
    from luthier.distill.gad_config import GADConfig
    from luthier.distill.gad_trainer import GADTrainer

    def make(
        *,
        kind: Any = GADTrainer,
        settings_of: Any = GADConfig,
        model: Any = None,
        discriminator: Any = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> GADTrainer:
        chosen = {
            "output_dir": str(tmp_path / "trainer"),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": [],
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "discriminator_learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            **settings,
        }
        model = load(student_folder) if model is None else model
        return kind(
            model,
            discriminator or Discriminator.of(model),
            settings_of(**chosen),
            Dataset.from_list(duel_rows),
            Dataset.from_list(duel_rows[:2]),
            processing_class=tokenizer,
            **(trainer or {}),
        )

    return make

"""What `test_gad_ranks.py` runs on one rank and on two: GAD on rollouts that do not depend on the number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.core.seeds import derive_seed
from luthier.distill.discriminator import Discriminator
from luthier.distill.gad_config import GADConfig
from luthier.distill.gad_trainer import GADTrainer

REPLIES = 8  # per update, over all ranks
NAMES = ("student", "discriminator")


class Scripted(GADTrainer):
    """Samples are decided by step, and by the place of a reply in the batch of all ranks."""

    def _generate_single_turn(self, prompt_ids, *arguments, **options):
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._reply(first + place) for place in range(len(prompt_ids))], None

    def _reply(self, place: int) -> list[int]:
        draw = torch.Generator().manual_seed(derive_seed(0, self.state.global_step, place))
        length = int(torch.randint(1, 6, (), generator=draw))
        ids = torch.randint(2, len(self._tokenizer), (length,), generator=draw).tolist()
        return [*ids, self._tokenizer.eos_token_id] if place % 3 else ids


VARIANTS = {
    "replies": {"num_generations": 4, "adversarial_reward": "residual"},
    "tokens": {"num_generations": 8, "adversarial_credit": "tokens"},  # one group, which two ranks share
}


def main(folder: Path, out: Path, ranks: int) -> None:
    for name, settings in VARIANTS.items():
        (out / name).mkdir(parents=True, exist_ok=True)  # by each rank
        train(folder, out / name, ranks, settings)


def train(folder: Path, out: Path, ranks: int, variant: dict[str, Any]) -> None:
    """Three updates; writes the weights of both networks to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"prompt": "tap " * (1 + i % 3), "completion": f" wood {i}"} for i in range(8)]
    settings = GADConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=REPLIES // ranks,
        max_completion_length=6,
        max_steps=3,
        learning_rate=1e-3,
        discriminator_learning_rate=1e-3,
        discriminator_steps=2,
        discriminator_length_tolerance=0.7,  # ranks then have unlike numbers of pairs
        beta=0.05,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **variant,
    )
    trainer = Scripted(model, Discriminator.of(model), settings, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        modules = (trainer.accelerator.unwrap_model(trainer.model), trainer.adversary.discriminator)
        for name, module in zip(NAMES, modules, strict=True):
            weights = {key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}
            save_file(weights, out / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

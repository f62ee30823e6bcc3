"""The reference for teachers that tell their probabilities is TRL's own trainer (docs/distill.md)."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def instella(tokenizer, seed):
    model = InstellaForCausalLM(sized_config("nano", tokenizer, max_position_embeddings=64, **SHAPE))
    initialize(model, seed)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_instella_learns_from_another_ones_probabilities(tokenizer, duel_rows, tmp_path):
    student, teacher = instella(tokenizer, 0), instella(tokenizer, 1)
    prompts = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 8, 7, 6, 5, 4]])

    def apart():
        with torch.no_grad():
            p, q = (model(input_ids=prompts).logits.float().log_softmax(-1) for model in (teacher, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    settings = DistillationConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_completion_length=6,
        max_steps=20,
        learning_rate=1e-2,
        beta=0.5,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in duel_rows])
    before = apart()
    DistillationTrainer(student, teacher, settings, rows, processing_class=tokenizer).train()
    assert apart() < 0.9 * before

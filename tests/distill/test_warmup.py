from __future__ import annotations

import pytest
import torch

from luthier.distill.gad_config import WarmupConfig
from luthier.distill.warmup import WarmupTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL asks


@pytest.fixture
def make_warmup(make_trainer):
    def make(**settings):
        chosen = {"num_generations": 2, "max_completion_length": 12, "discriminator_only_steps": 0, **settings}
        return make_trainer(kind=WarmupTrainer, settings_of=WarmupConfig, per_device_train_batch_size=4, **chosen)

    return make


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("alone", [1, 2])
def test_the_discriminator_learns_alone_for_exactly_so_many_steps(make_warmup, alone):
    first = make_warmup(discriminator_only_steps=alone, max_steps=alone)
    student, discriminator = weights(first.model), weights(first.adversary.discriminator)
    first.train()
    assert not moved(student, first.model)  # not even by weight decay
    assert moved(discriminator, first.adversary.discriminator)
    assert first.adversary.updates == alone
    longer = make_warmup(discriminator_only_steps=alone, max_steps=alone + 1)
    longer.train()
    assert moved(student, longer.model)
    assert longer.adversary.updates == alone + 1


def test_the_students_loss_is_the_mean_over_the_teachers_tokens(make_warmup, duel_rows, tokenizer):
    trainer = make_warmup()
    rows = duel_rows[:4]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch)
    nats, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        reply = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = trainer.model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        nats -= sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(reply))
        count += len(reply)
    assert loss.item() == pytest.approx(nats / count, rel=1e-5)
    assert batch["labels"].shape[0] == 4  # one sample per prompt, no prompt twice
    assert int(batch["num_items_in_batch"]) == count


def test_accumulated_warm_up_equals_one_batch(make_trainer, make_warmup):
    whole = make_warmup(max_steps=1)
    whole.train()
    parts = make_trainer(
        kind=WarmupTrainer,
        settings_of=WarmupConfig,
        num_generations=2,
        max_completion_length=12,
        discriminator_only_steps=0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    parts.train()
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=0, atol=2e-5)


def test_the_student_learns_the_teachers_replies(make_warmup):
    trainer = make_warmup(max_steps=8, learning_rate=1e-2, max_grad_norm=1.0)
    trainer.train()
    losses = [row["seqkd/nats_per_token"] for row in trainer.state.log_history if "seqkd/nats_per_token" in row]
    assert losses[-1] < 0.8 * losses[0]
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_seqkd/nats_per_token"] < losses[0]
    assert trainer.adversary.updates == 8

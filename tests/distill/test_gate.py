from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from luthier.distill.adversary import Adversary, AdversarySettings
from luthier.distill.discriminator import Discriminator
from luthier.distill.gate import Uninformative, as_texts, gate, measure_gate, per_prompt, require_open
from luthier.distill.replies import make_duels

CPU = torch.device("cpu")


def test_it_opens_on_a_sure_lead_only():
    even = [1.0, 0.0] * 50
    assert gate([1.0] * 100, {"length": even, "n-grams": even}).is_open
    shut = gate([1.0] * 100, {"length": even, "n-grams": [1.0] * 100})
    assert not shut.is_open
    with pytest.raises(Uninformative, match=r"n-grams 1\.000"):
        require_open(shut)
    require_open(shut, force=True)


def test_a_lead_on_few_prompts_is_not_believed():
    few = gate([1.0] * 5, {"length": [0.0] * 5})
    with pytest.raises(Uninformative, match="only 5 held-out prompts"):
        require_open(few)


def test_a_small_lead_is_not_enough():
    ahead = [1.0] * 53 + [0.0] * 47
    assert not gate(ahead, {"length": [1.0] * 50 + [0.0] * 50}, margin=0.05).is_open


def test_pairs_are_averaged_by_prompt():
    assert per_prompt(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])) == [0.5, 1.0]
    duels = make_duels([[1], [1], [2]], [[5], [6], [7]], [[8], [8], [9]], CPU)
    told = as_texts(duels)
    assert [(duel.teacher, duel.student) for duel in told] == [([[8]], [[5], [6]]), ([[9]], [[7]])]


def duels_of(prompts, teacher_right):
    """The right reply repeats its prompt's token; the other takes another: only a reader of prompts can tell."""
    prompt = [[2 + p % 6] for p in prompts]
    right, wrong = [[ids[0], 0] for ids in prompt], [[2 + (ids[0] - 1) % 6, 0] for ids in prompt]
    return make_duels(prompt, wrong if teacher_right else right, right if teacher_right else wrong, CPU)


def test_a_discriminator_that_reads_the_prompt_beats_those_that_do_not():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=12, num_key_value_heads=2, **shape))
    settings = AdversarySettings(learning_rate=3e-3, max_grad_norm=1.0, micro_batch_size=64)
    adversary = Adversary(Discriminator.of(model), Accelerator(cpu=True), settings)
    train, held_out = duels_of(range(30), True), duels_of(range(60), True)
    for _ in range(60):
        adversary.update(train)
    after = measure_gate(adversary, train, held_out)
    assert after.is_open, after.text()
    assert after.baselines["length"].value == 0.5

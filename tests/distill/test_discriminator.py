from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from luthier.core.errors import CheckpointError
from luthier.distill.adversary import Adversary, AdversarySettings, micro_batches
from luthier.distill.discriminator import HEAD, Discriminator, load_discriminator, save_discriminator
from luthier.distill.objective import bradley_terry
from luthier.distill.replies import make_duels, pad_right
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
MODELS = {
    "instella": lambda: InstellaForCausalLM(InstellaConfig(**SHAPE, num_attention_heads=2, max_position_embeddings=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_attention_heads=2, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}
CPU = torch.device("cpu")
SEQUENCES = [([3, 4], [5, 6, 0]), ([7], [8]), ([9, 10, 11], [12, 13, 14, 15])]
DUELS = make_duels(
    [[1, 2], [1, 2], [3], [3]], [[4, 0], [5, 6, 7], [8], [9, 0]], [[4, 5, 0], [4, 5, 0], [6, 0], [6, 0]], CPU
)


def discriminator_of(name="qwen2"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    return Discriminator.of(model, seed=3)


def with_large_head(discriminator):
    """Scores of order one, so that a difference shows."""
    with torch.no_grad():
        discriminator.head.weight.mul_(50)
    return discriminator


@pytest.mark.parametrize("name", MODELS)
def test_a_score_depends_neither_on_padding_nor_on_the_batch(name):
    discriminator = with_large_head(discriminator_of(name))
    alone = torch.cat([discriminator(**pad_right([sequence], CPU)) for sequence in SEQUENCES])
    together = discriminator(**pad_right(SEQUENCES, CPU))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.std() > 0.05
    right = pad_right(SEQUENCES, CPU)
    unmasked = discriminator(right["input_ids"], None, right["last"])
    torch.testing.assert_close(unmasked, alone, rtol=1e-5, atol=1e-5)
    shift = [right["input_ids"].shape[1] - int(mask.sum()) for mask in right["attention_mask"]]
    left = {
        key: torch.stack([row.roll(by) for row, by in zip(right[key], shift, strict=True)])
        for key in ("input_ids", "attention_mask")
    }
    padded_left = discriminator(**left, last=right["last"] + torch.tensor(shift))
    torch.testing.assert_close(padded_left, alone, rtol=1e-5, atol=1e-5)


def test_the_end_token_is_seen_even_where_it_is_the_padding_too():
    discriminator = with_large_head(discriminator_of())
    finished, cut = discriminator(**pad_right([([1], [2, 3, 0]), ([1], [2, 3])], CPU))  # 0 pads, and ends
    assert abs(finished - cut) > 1e-3


def test_the_same_text_scores_the_same_on_both_sides():
    same = make_duels([[1], [1]], [[2, 3, 0], [2, 4]], [[2, 3, 0], [2, 4]], CPU)
    student, teacher = Adversary(with_large_head(discriminator_of()), Accelerator(cpu=True)).scores(same)
    torch.testing.assert_close(student, teacher[same.owner], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_discriminator_is_the_same(name, tmp_path, tokenizer):
    discriminator = with_large_head(discriminator_of(name))
    save_discriminator(discriminator, tokenizer, tmp_path / "d", {"verb": "test"})
    batch = pad_right(SEQUENCES, CPU)
    assert torch.equal(load_discriminator(tmp_path / "d")(**batch), discriminator(**batch))


def test_damaged_folders_are_told(tmp_path):
    save_discriminator(discriminator_of(), None, tmp_path / "d", {})
    save_discriminator(discriminator_of("gpt2"), None, tmp_path / "other", {})
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "d" / "config.json")
    with pytest.raises(CheckpointError):
        load_discriminator(tmp_path / "d")
    (tmp_path / "other" / HEAD).unlink()
    with pytest.raises(CheckpointError, match="no discriminator"):
        load_discriminator(tmp_path / "other")


def test_it_starts_from_a_copy_of_the_student():
    model = MODELS["qwen2"]()
    discriminator = Discriminator.of(model)
    assert torch.equal(discriminator.backbone.embed_tokens.weight, model.model.embed_tokens.weight)
    with torch.no_grad():
        discriminator.backbone.embed_tokens.weight.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0


def gradients(settings, monkeypatch):
    """What one update hands to the optimizer."""
    adversary = Adversary(discriminator_of(), Accelerator(cpu=True), settings)
    kept = []
    monkeypatch.setattr(adversary.optimizer, "step", lambda: kept.extend(p.grad.clone() for p in adversary.parameters))
    told = adversary.update(DUELS)
    return adversary, kept, told


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"checkpoint_activations": True},
        {"label_smoothing": 0.1, "centering": 0.3},
    ],
)
def test_an_update_is_the_gradient_of_the_whole_loss(settings, monkeypatch):
    settings = AdversarySettings(**settings, max_grad_norm=1e9)
    _, found, told = gradients(settings, monkeypatch)
    plain = discriminator_of()
    scores = plain(**pad_right(DUELS.sequences(), CPU))
    options = {"smoothing": settings.label_smoothing, "centering": settings.centering}
    loss = bradley_terry(scores[:4], scores[4:], DUELS.owner, **options) / 4
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    assert told["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert told["used"] == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [1, 2, 9])
def test_kept_graphs_change_nothing_but_the_number_of_passes(name, kept, monkeypatch):
    sides = [
        Adversary(
            discriminator_of(name),
            Accelerator(cpu=True),
            AdversarySettings(learning_rate=1e-2, micro_batch_size=2, kept_graphs=graphs),
        )
        for graphs in (0, kept)
    ]
    passes = [count_passes(adversary, monkeypatch) for adversary in sides]
    for _ in range(2):
        scored = [adversary.scored(DUELS) for adversary in sides]
        assert all(map(torch.equal, scored[0].scores, scored[1].scores))
        told = [adversary.update(DUELS, seen) for adversary, seen in zip(sides, scored, strict=True)]
        assert told[0] == told[1]
    assert all(map(torch.equal, *(adversary.parameters for adversary in sides)))
    assert [len(made) for made in passes] == [2 * 6, 2 * (6 - min(kept, 3))]  # three micro-batches, two updates


def count_passes(adversary, monkeypatch):
    """The sizes of all batches that a discriminator is run on, as they come."""
    made, forward = [], adversary._forward
    monkeypatch.setattr(adversary, "_forward", lambda sequences: made.append(len(sequences)) or forward(sequences))
    return made


def test_micro_batches_are_few_about_equal_and_of_similar_lengths():
    sequences = [([1] * length, [2]) for length in (5, 1, 4, 2, 3, 9, 7)]
    assert micro_batches(sequences, 3) == [[1, 3, 4], [2, 0, 6], [5]]
    assert [len(rows) for rows in micro_batches(sequences, 6)] == [4, 3]
    assert micro_batches(sequences, 99) == [[1, 3, 4, 2, 0, 6, 5]]


def test_the_gradient_is_clipped(monkeypatch):
    _, found, told = gradients(AdversarySettings(max_grad_norm=0.01), monkeypatch)
    assert told["grad_norm"] > 0.01
    assert torch.cat([g.flatten() for g in found]).norm() == pytest.approx(0.01, rel=1e-3)


def test_pairs_of_unlike_length_teach_nothing():
    adversary = Adversary(discriminator_of(), Accelerator(cpu=True), AdversarySettings(length_tolerance=0.1))
    before = [p.clone() for p in adversary.parameters]
    told = adversary.update(make_duels([[1], [1]], [[4], [5, 6, 7, 8, 9]], [[4, 0], [4, 0]], CPU))
    assert told["used"] == 0
    assert adversary.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.parameters, strict=True))
    assert adversary.update(DUELS)["used"] == 0.5  # three tokens against three, and two against two


@pytest.mark.parametrize("name", MODELS)
def test_rises_are_differences_of_scores_of_prefixes(name):
    discriminator = with_large_head(discriminator_of(name))
    adversary = Adversary(discriminator, Accelerator(cpu=True), AdversarySettings(micro_batch_size=3))
    rises, mask = adversary.rises(DUELS)
    assert mask.sum(1).tolist() == [2, 3, 1, 2]
    for row, (prompt, reply) in enumerate(zip(DUELS.prompts, DUELS.students, strict=True)):
        ids = [*prompt, *reply]
        cuts = [ids[:end] for end in range(len(prompt), len(ids) + 1)]
        alone = [discriminator(torch.tensor([cut]), None, torch.tensor([len(cut) - 1])).item() for cut in cuts]
        expected = [after - before for before, after in itertools.pairwise(alone)]
        assert rises[row, : len(reply)].tolist() == pytest.approx(expected, abs=1e-5)
        assert rises[row, len(reply) :].abs().sum() == 0


def test_it_learns_to_tell_teacher_from_student():
    adversary = Adversary(discriminator_of(), Accelerator(cpu=True), AdversarySettings(learning_rate=1e-2))
    losses = [adversary.update(DUELS)["loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert adversary.accuracy(adversary.scores(DUELS), DUELS).mean() == 1


def test_a_saved_adversary_goes_on_the_same(tmp_path):
    straight = Adversary(discriminator_of(), Accelerator(cpu=True), AdversarySettings(learning_rate=1e-2))
    straight.update(DUELS)
    straight.save(tmp_path / "d", steps=3)
    resumed = Adversary(discriminator_of("qwen2"), Accelerator(cpu=True), AdversarySettings(learning_rate=1e-2))
    assert resumed.load(tmp_path / "d")["steps"] == 3
    assert resumed.update(DUELS) == straight.update(DUELS)
    assert resumed.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, resumed.parameters, strict=True))
    (tmp_path / "d" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        resumed.load(tmp_path / "d")

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from luthier.data.tokenizer import encode_texts
from luthier.distill.adversary import Adversary, AdversarySettings
from luthier.distill.alarms import FRESH, QUALITY, AlarmCallback, AlarmLimits
from luthier.distill.auditor import (
    Auditor,
    exact_quality,
    fresh_accuracy,
    matched_quality,
    overlap_quality,
    part_of,
)
from luthier.distill.bracket_teacher import BracketTeacher
from luthier.distill.discriminator import Discriminator
from luthier.distill.lessons import make_lessons
from luthier.distill.replies import make_duels

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # TRL asks for it
]
CPU = torch.device("cpu")
LONG = " until it rings tap wood spruce maple bow the luthier planes top of violin"  # longer than replies may be


def test_overlap_is_the_mean_f1_of_shared_ngrams():
    assert overlap_quality("", [3, 4, 5, 6, 0], [3, 4, 5, 6, 0]) == 1
    assert overlap_quality("", [3, 4], [5, 6]) == 0
    assert overlap_quality("", [3, 4, 9], [3, 4, 7]) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)  # no four tokens
    assert overlap_quality("", [3], [3, 4]) == pytest.approx((2 / 3 + 0) / 2)


def test_exact_quality_is_whether_the_teacher_could_have_written_it(tokenizer):
    quality = exact_quality(BracketTeacher(types=2, max_tokens=6), tokenizer)
    end = [tokenizer.eos_token_id]

    def of(text, ending, prompt="abc"):
        return quality(prompt, encode_texts(tokenizer, [text])[0] + ending, [])

    assert (of("([])", end), of("([)]", end), of("([])", []), of("(((())))", end)) == (1, 0, 0, 0)
    assert of("()", end, [{"role": "system", "content": "x"}, {"role": "user", "content": "abc"}]) == 1
    assert quality("abc", end, []) == 0  # the teacher always writes a pair


def test_quality_is_read_at_the_teachers_lengths():
    """Long replies are good and short ones bad; the teacher is long half of the time, the student mostly short."""
    students = [[9] * 2] * 24 + [[9] * 6] * 8
    teachers = [[8] * (2 if number % 2 else 6) for number in range(32)]
    duels = make_duels([[number] for number in range(32)], students, teachers, CPU)
    prompts = {(number,): f"question {number}" for number in range(32)}
    asked = []

    def quality(prompt, reply, teacher):
        asked.append(prompt)
        return float(len(reply) == 6)

    assert matched_quality(duels, prompts, quality) == (0.5, 1.0)
    assert asked == list(prompts.values())
    short = make_duels([[number] for number in range(32)], [[9] * 2] * 32, teachers, CPU)
    assert matched_quality(short, prompts, quality).value is None


def separable(first, count):
    """Pairs in which the teacher's replies end in 5, the student's in another token; two samples a prompt."""
    prompts = [[number // 2 + first] for number in range(2 * count)]
    students = [[7 + number % 3, 6] for number in range(2 * count)]
    return make_duels(prompts, students, [[7 + number // 2 % 3, 5] for number in range(2 * count)], CPU)


def test_a_part_of_duels_keeps_who_meets_whom():
    duels = separable(10, 4)
    part = part_of(duels, [1, 4, 5])
    assert part.students == [duels.students[row] for row in (1, 4, 5)]
    assert [part.teachers[owner] for owner in part.owner.tolist()] == [
        duels.teachers[duels.owner[row]] for row in (1, 4, 5)
    ]
    assert len(part.teachers) == 2


def test_a_fresh_discriminator_learns_what_can_be_told(student):
    def fresh():
        return Adversary(Discriminator.of(student), Accelerator(cpu=True), AdversarySettings(learning_rate=1e-2))

    seen, unseen = separable(10, 70), separable(100, 8)  # more than one batch
    assert fresh_accuracy(fresh(), seen, unseen, 12) == 1
    untrained = fresh()
    before = untrained.accuracy(untrained.scores(unseen), unseen).mean()
    assert fresh_accuracy(untrained, seen, unseen, 0) == before < 1


def audited(make_trainer, tokenizer, student, auditing=True, steps=0, **settings):
    """A trainer with an evaluation after every step, and with an auditor."""
    rows = [{"prompt": f"tap {number}", "completion": LONG} for number in range(16)]
    trainer = make_trainer(eval_strategy="steps", eval_steps=1, **settings)
    lessons = make_lessons(tokenizer, rows, rows, raw=True, longest=64)
    if auditing:
        fresh = lambda: Discriminator.of(student)  # noqa: E731
        trainer.add_callback(Auditor(trainer, lessons, overlap_quality, seed=0, fresh=fresh, steps=steps))
    return trainer


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_measuring_changes_nothing_of_the_training(make_trainer, tokenizer, student):
    sides = []
    for auditing in (True, False):
        sides.append(audited(make_trainer, tokenizer, student, auditing, steps=2))
        sides[-1].train()  # at once: a trainer is what seeds the global generator
    assert len(logged(sides[0], QUALITY)) == len(logged(sides[0], FRESH)) == 2
    assert not logged(sides[1], QUALITY)
    for of in (lambda trainer: trainer.model, lambda trainer: trainer.adversary.discriminator):
        one, other = (of(trainer).state_dict() for trainer in sides)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_quality_that_stands_still_raises_its_alarm(make_trainer, tokenizer, student):
    """A student that does not learn gives the same replies to the same random numbers."""
    trainer = audited(make_trainer, tokenizer, student, max_steps=4, learning_rate=0.0)
    alarms = AlarmCallback(trainer, limits=AlarmLimits(window=5), actions=(), tell=lambda words: None)
    trainer.add_callback(alarms)
    trainer.train()
    assert len(set(logged(trainer, QUALITY))) == 1
    assert not logged(trainer, FRESH)
    assert {name for _, name, _ in alarms.told} == {"quality is flat"}


def test_a_live_discriminator_that_sees_nothing_is_fooled(make_trainer, tokenizer, student):
    trainer = audited(
        make_trainer,
        tokenizer,
        student,
        steps=15,
        max_steps=1,
        discriminator_frozen=True,
        discriminator_learning_rate=1e-2,
    )
    with torch.no_grad():
        trainer.adversary.discriminator.head.weight.zero_()  # every score is 0
    alarms = AlarmCallback(trainer, actions=(), tell=lambda words: None)
    trainer.add_callback(alarms)
    trainer.train()
    assert logged(trainer, "eval_discriminator/accuracy") == [0.5]
    assert logged(trainer, FRESH)[0] > 0.9
    assert {name for _, name, _ in alarms.told} == {"fooled"}

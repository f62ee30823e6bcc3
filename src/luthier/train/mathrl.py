"""The stage of section 5.2 from start to end: which questions to practice on, GRPO, and answers before and after.

Questions that the starting model always or never solves have no informative groups; `keep_between` leaves them out.
The trainer is in math_trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.utils import hash_module

from luthier.core.console import Console
from luthier.core.errors import DataError
from luthier.core.run import RunFolder
from luthier.core.stats import Interval, paired_difference, wilson
from luthier.data.replies import encode_prompt
from luthier.data.row_source import Row
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Tuned, fit, lora, quiet_libraries
from luthier.tasks.grading import Grader
from luthier.tasks.math import row_problem
from luthier.tasks.metrics import pass_at_k_over
from luthier.train.marking import Marker
from luthier.train.math_trainer import make_trainer, uses_bf16
from luthier.train.measured import measured_once, rows_digest
from luthier.train.rollouts import Exam, Question, vocabulary_of
from luthier.train.tuning_configs import MathRLConfig


def questions_of(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], suffix: str, longest: int, where: str
) -> tuple[list[Question], int]:
    """Rows of kind answer as questions in the model's chat template, and how many had more than `longest` tokens."""
    found: list[Question] = []
    for number, row in enumerate(rows, 1):
        here = f"{where} row {number}"
        problem = row_problem(row, here)
        ids = encode_prompt(tokenizer, [{"role": "user", "content": problem.prompt + suffix}], here)
        found.append(Question(ids, problem))
    kept = [question for question in found if len(question.ids) <= longest]
    return kept, len(found) - len(kept)


class Examiner:
    """Held-out and training questions, answered by the model as it is. The numbers of the start are kept in the run."""

    def __init__(
        self, config: MathRLConfig, exam: Exam, held_out: Sequence[Question], who: Ranks, run: RunFolder | None
    ) -> None:
        self.config, self.exam, self.held_out, self.who, self.run = config, exam, held_out, who, run
        settings = [config.generations, config.temperature, config.max_lengths[1], config.seed]
        self._start = [hash_module(exam.model), settings]

    def answers(self) -> list[float]:
        """Right ones of `generations` samples for each held-out question, then right greedy ones."""
        config = self.config
        sampled = self.exam.right(self.held_out, config.generations, config.temperature, self.who)
        return sampled + self.exam.right(self.held_out, 1, 0.0, self.who)

    def before(self) -> list[float]:
        """Answers of the starting model."""
        of = [*self._start, _digest(self.held_out)]
        return measured_once("before.json", of, 2 * len(self.held_out), self.answers, who=self.who, run=self.run)

    def practice(self, questions: Sequence[Question]) -> list[Question]:
        """The questions that the starting model solves as often as `keep_between` says."""
        low, high = self.config.keep_between
        if (low, high) == (0.0, 1.0):
            return list(questions)

        def count() -> list[float]:
            return self.exam.right(questions, self.config.generations, self.config.temperature, self.who)

        of = [*self._start, _digest(questions)]
        right = measured_once("solved.json", of, len(questions), count, who=self.who, run=self.run)
        share = [number / self.config.generations for number in right]
        return [question for question, solved in zip(questions, share, strict=True) if low <= solved <= high]

    def now(self) -> dict[str, float]:
        """Shares of right answers, for the log of training."""
        return {name: interval.value for name, interval in scores(self.answers(), self.config.generations).items()}


def scores(answers: Sequence[float], generations: int) -> dict[str, Interval]:
    """Sampled pass@1 and pass@k (bootstrap over questions) and greedy accuracy (Wilson), from `Examiner.answers`."""
    half = len(answers) // 2
    sampled, greedy = [int(count) for count in answers[:half]], [int(count) for count in answers[half:]]
    return {
        "pass@1": pass_at_k_over(sampled, generations, 1),
        f"pass@{generations}": pass_at_k_over(sampled, generations, generations),
        "greedy": wilson(sum(greedy), half),
    }


def mathrl(
    config: MathRLConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    held_out: Sequence[Question],
    *,
    grader: Grader,
    who: Ranks,
    run: RunFolder | None,
    console: Console,
) -> tuple[Tuned, dict[str, Any], list[dict[str, Any]]]:
    """Train `model`, loaded from its folder, in place; the outcome, figures, and a table of before and after.

    Resumes from the newest checkpoint of the run. All ranks call it; only the main one has a `run`. With `shard` the
    figures are the main rank's alone.
    """
    model.to(who.device)  # type: ignore[arg-type]
    vocabulary = vocabulary_of(model, tokenizer)
    with Marker(grader) as marker:
        exam = Exam(
            model=model,
            vocabulary=vocabulary,
            marker=marker,
            max_tokens=config.max_lengths[1],
            seed=config.seed,
            low=uses_bf16(config, who),
        )
        examiner = Examiner(config, exam, held_out, who, run)
        practice = examiner.practice(questions)
        if len(practice) < len(questions):
            console.status(
                f"questions: {len(practice):,} of {len(questions):,} are solved as often as keep_between says"
            )
        if not practice:
            raise DataError("no question is solved as often as keep_between says", hint="widen keep_between")
        before = examiner.before() if held_out else []
        with quiet_libraries():
            trainer = make_trainer(
                config,
                model,
                tokenizer,
                practice,
                vocabulary,
                marker,
                examiner.now,
                who,
                peft_config=lora(model, config),
            )
        tuned = fit(trainer, trainer.pace, run, who, console, loss="policy_loss")
        if not tuned.finished or not held_out:
            return tuned, {"questions": len(practice)}, []
        after = final_answers(config, exam, held_out, tuned, who)
    figures = {"questions": len(practice), "held_out": len(held_out)}
    return tuned, figures | _figures(before, after, config.generations), [_table(before, after, config.generations)]


def final_answers(
    config: MathRLConfig, exam: Exam, held_out: Sequence[Question], tuned: Tuned, who: Ranks
) -> list[float]:
    """Answers of the trained model; of one that was sharded, the main rank's, which makes a whole one."""
    if not config.shard or who.world_size == 1:
        return Examiner(config, exam, held_out, who, None).answers()
    with who.main_first():
        if not who.is_main:
            return []
        whole: Any = type(exam.model)(exam.model.config)
        whole.load_state_dict(tuned.state_dict)
        alone = Ranks(device=who.device)
        fields = {name: getattr(exam, name) for name in ("vocabulary", "marker", "max_tokens", "seed", "low")}
        return Examiner(config, Exam(model=whole.to(who.device), **fields), held_out, alone, None).answers()


def _digest(questions: Sequence[Question]) -> str:
    return rows_digest([question.ids, question.problem.answer, question.problem.kind] for question in questions)


def _figures(before: Sequence[float], after: Sequence[float], generations: int) -> dict[str, float]:
    if not after:
        return {}
    named = {"before": scores(before, generations), "after": scores(after, generations)}
    return {f"{name} {when}": found.value for when, part in named.items() for name, found in part.items()}


def _table(before: Sequence[float], after: Sequence[float], generations: int) -> dict[str, Any]:
    """Before, after, and the change of the same questions, each with a 95 % interval."""
    if not after:
        return {}
    half = len(after) // 2
    first, second = scores(before, generations), scores(after, generations)
    one = [count / generations for count in (*before[:half], *after[:half])]
    any_ = [float(count > 0) for count in (*before[:half], *after[:half])]
    greedy = [*before[half:], *after[half:]]
    rows = [
        [name, first[name].text(), second[name].text(), paired_difference(values[half:], values[:half]).text()]
        for name, values in zip(first, (one, any_, greedy), strict=True)
    ]
    return {
        "title": f"Held-out questions ({half})",
        "columns": ["answers", "before", "after", "change"],
        "rows": rows,
        "note": "95 % intervals: Wilson for greedy, else bootstrap over questions; the change is paired.",
    }

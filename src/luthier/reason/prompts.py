"""Everything that is said to a model: two sets of wording, and the messages made of them.

`full` is for general models; it asks for JSON where a list comes back, and for the final answer in a tag. `short` says
the same in as few tokens as possible, for small models that were taught it (`lessons.py`). A set lacks what its models
cannot do: asking for it is an error that names the set.

The wording is ours. What each call is told and must return follows the paper; in particular, a reflection is appended
to the model's own solution, as if the model had begun to doubt it (Socratic Self-Refine, arXiv 2511.10621, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.core.errors import ConfigError
from luthier.llm.types import Message

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Step:
    """A Socratic step: a sub-question and the answer that a solution states for it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Finding:
    """A step whose re-answers disagree with what the solution states.

    `asserted`: the steps before it stand, so `hint` is its answer; otherwise an earlier step changes too, and `hint` is
    only what the step gives with the values stated so far. Without a hint it is only known to be wrong.
    """

    step: Step
    hint: str | None
    asserted: bool = True


@dataclass(frozen=True)
class Prompts:
    """One set of wording: templates by name, filled in by the methods. All methods return chat messages."""

    name: str
    texts: Mapping[str, str]
    raw: bool = False
    """Text to continue without a chat template, as base models expect it."""

    def fill(self, text: str, **values: str) -> str:
        """One template with its values. Raises: ConfigError when this set lacks it."""
        return self._template(text).format(**values)

    def _template(self, text: str) -> str:
        if text not in self.texts:
            raise ConfigError(
                f"the prompt set {self.name!r} has no wording for {text!r}",
                hint="use prompts=full, or a method that does not need it",
            )
        return self.texts[text]

    def solve(self, question: str) -> list[Message]:
        """Think step by step, then answer."""
        return [_user(self.fill("solve", question=question))]

    def go_on(self, question: str, begun: str) -> list[Message]:
        """Solve, with the beginning of the reply given; the last message is the assistant's and unfinished."""
        return [*self.solve(question), _assistant(begun)] if begun else self.solve(question)

    def solve_with_plan(self, question: str, plan: str) -> list[Message]:
        """As `solve`, along a plan."""
        return [_user(self.fill("solve_with_plan", question=question, plan=plan))]

    def decompose(self, question: str, solution: str) -> list[Message]:
        """Rewrite a solution as sub-questions with the answers that it states."""
        return [_user(self.fill("decompose", question=question, solution=solution))]

    def repair(self, messages: Sequence[Message], reply: str, problem: str) -> list[Message]:
        """Ask again for a reply that could not be read."""
        return [*messages, _assistant(reply), _user(self.fill("repair", problem=problem))]

    def step(self, question: str, earlier: Sequence[Step], sub_question: str) -> list[Message]:
        """Answer one sub-question, given the stated answers to those before it."""
        given = self.fill("earlier", steps=self.steps(earlier)) if earlier else ""
        return [_user(self.fill("step", question=question, earlier=given, sub_question=sub_question))]

    def steps(self, steps: Sequence[Step]) -> str:
        """Steps as text, numbered from 1."""
        pair = self._template("pair")
        return "\n".join(
            pair.format(n=n, question=step.question, answer=step.answer) for n, step in enumerate(steps, 1)
        )

    def confidence(self, answer: str, references: Sequence[str]) -> list[Message]:
        """Score 0 to 5 how well an answer matches references; nothing is said of the question."""
        lettered = "\n".join(f"{LETTERS[i % 26]}. {reference}" for i, reference in enumerate(references))
        return [_user(self.fill("confidence", answer=answer, references=lettered))]

    def reflection(self, findings: Sequence[Finding]) -> str:
        """The doubt that is appended to a solution, in the first person."""
        return "\n".join(map(self._doubt, findings))

    def _doubt(self, finding: Finding) -> str:
        said = {"question": finding.step.question, "answer": finding.step.answer}
        if finding.hint is None:
            return self.fill("finding_refuted", **said)
        return self.fill("finding" if finding.asserted else "finding_later", hint=finding.hint, **said)

    def refine(self, question: str, solution: str, findings: Sequence[Finding]) -> list[Message]:
        """Solve again after a reflection on single steps. The solution stays natural text, written by the model."""
        doubted = f"{solution}\n{self.texts.get('gap', '')}{self.reflection(findings)}"
        return [*self.solve(question), _assistant(doubted), _user(self.fill("refine"))]

    def patch(self, question: str, solution: str, findings: Sequence[Finding]) -> list[Message]:
        """As `refine`, but the part before the first doubted step is to be kept word for word."""
        doubted = f"{solution}\n{self.texts.get('gap', '')}{self.reflection(findings)}"
        return [*self.solve(question), _assistant(doubted), _user(self.fill("patch"))]

    def judge(self, question: str, solution: str) -> list[Message]:
        """Score a whole solution 0 (surely wrong) to 5 (surely right)."""
        return [_user(self.fill("judge", question=question, solution=solution))]

    def rewrite(self, question: str, solution: str, verdict: str) -> list[Message]:
        """Solve again after a judge's words on the whole solution (Self-Refine)."""
        return [_user(self.fill("rewrite", question=question, solution=solution, verdict=verdict))]

    def plan(self, question: str, solution: str) -> list[Message]:
        """Summarize the plan behind a solution, criticize it and score it 0 to 5."""
        return [_user(self.fill("plan", question=question, solution=solution))]

    def improve_plan(self, question: str, plan: str, critique: str) -> list[Message]:
        """Write a better plan."""
        return [_user(self.fill("improve_plan", question=question, plan=plan, critique=critique))]

    def debate(self, question: str, own: str, others: Sequence[str]) -> list[Message]:
        """Solve again after reading what other solvers wrote."""
        quoted = "\n\n".join(f"<solution>\n{other}\n</solution>" for other in others)
        return [_user(self.fill("debate", question=question, own=own, others=quoted))]

    def dependencies(self, question: str, solution: str) -> list[Message]:
        """As `decompose`, with the numbers of the steps that each one uses (Atom of Thoughts)."""
        return [_user(self.fill("dependencies", question=question, solution=solution))]

    def contract(self, question: str, known: Sequence[Step], unsolved: Sequence[Step]) -> list[Message]:
        """Fold answered steps into a simpler question with the same answer (Atom of Thoughts)."""
        asked = "\n".join(f"- {step.question}" for step in unsolved)
        return [_user(self.fill("contract", question=question, known=self.steps(known), unsolved=asked))]

    def ensemble(self, question: str, solutions: Sequence[str]) -> list[Message]:
        """Write the best solution out of several."""
        quoted = "\n\n".join(f"<solution>\n{solution}\n</solution>" for solution in solutions)
        return [_user(self.fill("ensemble", question=question, solutions=quoted))]

    def reward(self, question: str, solution: str) -> list[Message]:
        """Score a whole solution 0 to 100, strictly (MCTSr)."""
        return [_user(self.fill("reward", question=question, solution=solution))]

    def critique(self, question: str, solution: str) -> list[Message]:
        """Say what is wrong with a solution, without solving (MCTSr)."""
        return [_user(self.fill("critique", question=question, solution=solution))]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


_FINAL = (
    "Put the final answer alone, in the form that the problem asks for and without units, between <answer> and "
    "</answer> at the very end."
)

FULL = Prompts(
    "full",
    {
        "solve": (
            "{question}\n\nWork this out step by step and write down all of your reasoning, one inference at a time. "
            + _FINAL
        ),
        "solve_with_plan": (
            "{question}\n\nFollow this plan:\n<plan>\n{plan}\n</plan>\n\nWork the problem out step by step and write "
            "down all of your reasoning, one inference at a time. " + _FINAL
        ),
        "decompose": (
            "A problem and a solution to it:\n\n<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n"
            "</solution>\n\nTurn the solution into a list of small questions with the answers that the solution gives. "
            "Each question asks for exactly one result, names everything it needs, and can be answered from the "
            "problem and the answers before it. Keep the order of the solution. Report what the solution says even "
            "where you think it is mistaken: do not correct it. Keep answers exact (no rounding) and as short as "
            "possible. The last question is the problem's own and its answer is the solution's final answer; nothing "
            'follows it.\n\nReply with JSON only: {{"steps": [{{"question": "...", "answer": "..."}}, ...]}}, where '
            "every answer is a string."
        ),
        "repair": "That could not be used: {problem}. Send the whole reply again in the form asked for, nothing else.",
        "earlier": "Already established:\n{steps}\n\n",
        "pair": "{n}. {question}\n   -> {answer}",
        "step": (
            "<problem>\n{question}\n</problem>\n\n{earlier}Answer only the following question about this problem; take "
            "what is already established as given, and go no further than this question.\n\n<question>\n{sub_question}"
            "\n</question>\n\nThink step by step. " + _FINAL
        ),
        "confidence": (
            "An expression:\n\n<expression>\n{answer}\n</expression>\n\nReferences:\n\n<references>\n{references}\n"
            "</references>\n\nHow well does the expression agree with the references? Two forms of the same value or "
            "statement agree. Give a whole number from 0 (it agrees with none) to 5 (it agrees with all), or -1 when "
            "this cannot be decided, between <answer> and </answer>."
        ),
        "gap": "\n",
        "finding": (
            'Wait, I should look again at one point, "{question}". I had {answer} there, but when I work it out anew I '
            "get {hint}."
        ),
        "finding_later": (
            'The point "{question}" needs to be done again as well: from the values that I had before it, it would '
            "give {hint} and not {answer}, and those values may change too."
        ),
        "finding_refuted": (
            'Wait, I should look again at one point, "{question}". I had {answer} there, but that cannot be right: it '
            "contradicts what the problem says."
        ),
        "refine": (
            "First examine these doubts: between <evaluation> and </evaluation>, say what went wrong and what "
            "follows from it. Then solve the original problem again, completely and from the beginning, with the "
            "mistakes mended. " + _FINAL
        ),
        "patch": (
            "First examine these doubts: between <evaluation> and </evaluation>, say what went wrong and what "
            "follows from it. Then write the solution again: copy everything before the first mistake as it is, and "
            "from there on continue with the mistakes mended. " + _FINAL
        ),
        "judge": (
            "<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n</solution>\n\nCheck this solution "
            "impartially. First explain what you find, inference by inference. Then give a whole number from 0 "
            "(the final answer is certainly wrong) to 5 (it is certainly right) between <answer> and </answer>."
        ),
        "rewrite": (
            "<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n</solution>\n\nA review of this solution:"
            "\n\n<review>\n{verdict}\n</review>\n\nUsing the review, say between <evaluation> and </evaluation> where "
            "the solution is mistaken, if it is. Then write a complete solution of the problem. " + _FINAL
        ),
        "plan": (
            "<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n</solution>\n\nLook at the plan behind this "
            "solution, not at its calculations. Give three things: the plan in a few sentences without any "
            "calculation, between <summary> and </summary>; what is good and bad about the plan, between <evaluation> "
            "and </evaluation>; and a whole number from 0 (the plan cannot work) to 5 (it certainly works) between "
            "<score> and </score>."
        ),
        "improve_plan": (
            "<problem>\n{question}\n</problem>\n\n<plan>\n{plan}\n</plan>\n\n<review>\n{critique}\n</review>\n\nWrite "
            "a better plan for solving this problem, in a few sentences and without calculations, between <answer> "
            "and </answer>."
        ),
        "debate": (
            "<problem>\n{question}\n</problem>\n\nYour solution so far:\n\n<own>\n{own}\n</own>\n\nSolutions by "
            "others:\n\n{others}\n\nCompare them, decide what is right, and write a complete solution of the problem. "
            + _FINAL
        ),
        "dependencies": (
            "A problem and a solution to it:\n\n<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n"
            "</solution>\n\nTurn the solution into a list of small questions with the answers that the solution gives, "
            "in the order of the solution, the last one being the problem's own. For each, list the numbers (counted "
            "from 0) of the earlier questions whose answers it uses.\n\nReply with JSON only: "
            '{{"steps": [{{"question": "...", "answer": "...", "depends": [0, 1]}}, ...]}}, where every answer is a '
            "string."
        ),
        "contract": (
            "<problem>\n{question}\n</problem>\n\nThese parts are already answered:\n{known}\n\nThese remain:\n"
            "{unsolved}\n\nState a simpler problem that takes the answered parts as given facts, contains all that is "
            "needed, and has the same final answer as the original. Write it between <question> and </question>."
        ),
        "ensemble": (
            "<problem>\n{question}\n</problem>\n\nSeveral solutions:\n\n{solutions}\n\nDecide which results are right "
            "and write one complete solution. " + _FINAL
        ),
        "reward": (
            "<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n</solution>\n\nGrade this solution "
            "strictly: look for every flaw first, then give a whole number from 0 to 100 between <answer> and "
            "</answer>. A full score is for what is certainly right."
        ),
        "critique": (
            "<problem>\n{question}\n</problem>\n\n<solution>\n{solution}\n</solution>\n\nSay what is weak or wrong in "
            "this solution and how to improve it. Do not solve the problem."
        ),
    },
)

SHORT = Prompts(
    "short",
    {
        "solve": "{question}\nSolve.",
        "decompose": "{question}\n{solution}\nSteps?",
        "repair": "{problem}\nAgain.",
        "earlier": "{steps}\n",
        "pair": "Q: {question}\nA: {answer}",
        "step": "{question}\n{earlier}Q: {sub_question}\nNext?",
        "confidence": "{answer}\n{references}\nSame?",
        "finding": "Wait: {question} is {hint}.",
        "finding_later": "Wait: redo {question}.",
        "finding_refuted": "Wait: redo {question}.",
        "refine": "Again.",
        "judge": "{question}\n{solution}\nRight?",
        "rewrite": "{question}\n{solution}\n{verdict}\nAgain.",
    },
)

PLAIN = Prompts("plain", {"solve": "{question}"})
"""The question as it stands, for models that were fine-tuned on questions: chains of thought and votes only."""

TEXT = Prompts("text", {"solve": "{question}\n"}, raw=True)
"""The same for base models, which go on in the next line."""

PROMPTS = {prompts.name: prompts for prompts in (FULL, SHORT, PLAIN, TEXT)}

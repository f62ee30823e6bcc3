"""Settings of the reasoning methods. The defaults are ours; the preset `paper` is what was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from luthier.core.checks import at_least
from luthier.core.errors import ConfigError

Method = Literal[
    "ssr", "ssr-lin", "ssr-ada", "ssr-plan", "cot", "maj", "best-of-n", "self-refine", "debate", "atom", "mctsr"
]


@dataclass(frozen=True, kw_only=True)
class ReasonConfig:
    """How to reason. Methods read what concerns them and ignore the rest."""

    PRESET_FIELD: ClassVar[str] = "preset"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "luthier": {},
        "paper": {
            "confidence": "judged",
            "guard": False,
            "fix": "first",
            "min_votes": 1,
            "early_decision": False,
            "reuse_votes": False,
            "coverage": False,
            "reference_compat": True,
        },
    }

    preset: str = "luthier"
    """luthier, or paper: the published algorithm with the round count of the published code."""
    method: Method = "ssr"
    """ssr is ssr-lin: what we recommend."""
    prompts: Literal["full", "short", "plain", "text"] = "full"
    """Wording: full for general models, short for small ones that were taught it; plain: the bare question; text: the
    same without a chat template, for base models."""
    steps: Literal["asked", "lines"] = "asked"
    """Of ssr and ssr-lin. asked: the model turns its solution into small questions. lines: each line is a step,
    answered again by going on from the lines before it, and mended by going on from its majority; needs a model in this
    process, or a server that goes on with a reply (vLLM, SGLang, llama.cpp)."""
    rounds: int = 3
    """R: refinements (SSR, Self-Refine), rounds of debate, contractions (Atom of Thoughts)."""
    samples: int = 5
    """M: most re-answers of each step."""
    votes: int = 5
    """K: chains of maj and best-of-n."""
    chains: int = 1
    """First chains of SSR. Above 1: stop when all agree, otherwise repair the one with the most common answer."""
    agents: int = 2
    """Debaters."""
    iterations: int = 4
    """Expansions of the tree (mctsr)."""
    temperature: float = 0.6
    """Of everything but what follows."""
    top_p: float = 1.0
    """Of every reply: sample from the smallest set of tokens with at least this probability."""
    decompose_temperature: float = 0.0
    """Of decomposing."""
    max_tokens: int | None = None
    """Longest reply in tokens; None leaves it to the model."""
    judge_max_tokens: int = 512
    """Longest reply of the equivalence judge, in tokens."""
    confidence: Literal["match", "judged"] = "match"
    """match: the share of re-answers equal to the stated one; judged: a model scores 0 to 5 (as published)."""
    perfect_score: int = 5
    """The score at which a judge is content (c_max and h_max of the paper)."""
    guard: bool = True
    """Touch only steps whose re-answers outvote the stated answer, and stop when there are none."""
    fix: Literal["first", "all"] = "all"
    """Steps mended in one refinement: the least confident, or all that disagree."""
    min_votes: int = 2
    """Re-answers that must share a value before it is a hint."""
    early_decision: bool = True
    """Stop sampling a step when its majority cannot change any more."""
    reuse_votes: bool = True
    """A step whose text and predecessors did not change keeps its votes from the round before."""
    trust: float | None = None
    """A step is not sampled further when its first re-answer agrees with at least this probability (0 to 1); needs
    log-probabilities from the model. None: off."""
    patch: bool = False
    """Keep the part of a solution before the first doubted step word for word."""
    checkers: tuple[str, ...] = ()
    """Programs that decide steps they understand: arithmetic, sudoku, zebra."""
    decompose_attempts: int = 2
    """Calls for a readable decomposition before falling back to judging the whole solution."""
    coverage: bool = True
    """The last step must state the solution's answer; otherwise decompose again."""
    max_steps: int = 64
    """Longest decomposition."""
    final: Literal["last", "best", "vote"] = "last"
    """Which round's answer counts. best: by agreement across rounds, then by step confidence (checks the last round
    too); vote: the most common."""
    max_calls: int | None = None
    """Budget of requests to models for one problem."""
    max_tokens_total: int | None = None
    """Budget of generated tokens for one problem."""
    max_cost: float | None = None
    """Budget in dollars for one problem; the model's price must be known."""
    max_seconds: float | None = None
    """Time limit for one problem."""
    reference_compat: bool = False
    """Reproduce the published code: R + 1 refinements and a last check, votes on raw strings where an unread reply
    counts as "NA", unreadable confidence counts lowest, refining even what is fully confident; no early stop in
    Self-Refine; a random debater; Atom of Thoughts and MCTSr with their published faults."""

    def __post_init__(self) -> None:
        least = {"rounds": 0, "samples": 1, "votes": 1, "chains": 1, "agents": 1, "iterations": 0, "min_votes": 1}
        least |= {"decompose_attempts": 1, "max_steps": 1, "judge_max_tokens": 1, "temperature": 0}
        least |= {"decompose_temperature": 0}
        for name, low in least.items():
            at_least(self, low, name)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected a probability in (0, 1]", hint="1 leaves nothing out")
        for name in ("max_tokens", "max_calls", "max_tokens_total", "max_cost", "max_seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, expected more than 0", hint=f"leave {name} out for no limit")
        if self.trust is not None and not 0 < self.trust <= 1:
            raise ConfigError(f"trust is {self.trust}, expected a probability in (0, 1]", hint="for example 0.9")
        if self.steps == "lines" and (self.method not in ("ssr", "ssr-lin") or self.reference_compat):
            published = " as published" * self.reference_compat
            raise ConfigError(
                f"steps=lines: got method {self.method}{published}, expected ssr or ssr-lin", hint="use ssr:steps=lines"
            )
        if unknown := set(self.checkers) - {"arithmetic", "sudoku", "zebra"}:
            raise ConfigError(
                f"checkers: got {', '.join(sorted(unknown))}, expected some of arithmetic, sudoku, zebra",
                hint="for example checkers=[arithmetic]",
            )

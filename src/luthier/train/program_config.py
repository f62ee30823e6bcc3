"""Settings of `luthier programs`. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from luthier.core.checks import above, at_least
from luthier.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProgramsConfig:
    """Make new word problems out of given ones, each with an answer that a program calculated and a model agreed with.

    A model names the numbers of a problem, writes a program for it, and the program must give the known answer; then
    numbers change, the problem is told anew, read again and solved. Writes accepted.jsonl (prompt, answer, metadata),
    text.jsonl (problem and solution as text), rejected.jsonl (with reasons) and a table of the gates.
    """

    PRESET_FIELD: ClassVar[str] = "preset"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "luthier": {},
        "paper": {"abstractions": 30, "programs": 5, "deadline": 30.0},
    }
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("out", "device", "endpoint", "at_once", "budget", "prices", "limit")
    """Settings that may differ when a run is continued."""

    problems: tyro.conf.Positional[str]
    """Problems to start from: FILE with prompt and answer, gsm8k:FILE or math:FILE."""
    model: str
    """Model folder or hub id; with --endpoint, the model's name on that server."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server (OPENAI_API_KEY is used if set); by default the model runs in this process."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/programs")
    """Run folder; running the same command again resumes it."""
    keep_out: tuple[str, ...] = ()
    """Test sets, as FILE, gsm8k:FILE or math:FILE: what shares a run of words with them is neither used nor made."""
    overlap: int = 13
    """Words in a row that a problem must share with a test set to be kept out."""
    preset: Literal["luthier", "paper"] = "luthier"
    """paper: as many tries for a program, and as much time, as were published."""
    abstractions: int = 4
    """Times that the numbers of a problem are named, until a program works."""
    programs: int = 3
    """Programs that are tried for each naming."""
    rounds: int = 5
    """Times that new values are made for a problem."""
    variants: int = 5
    """Sets of new values in a round; 5 at most when the model thinks of them."""
    values: Literal["model", "draw"] = "model"
    """model: new values are asked for; draw: they are drawn at random, which costs no call and makes less sense."""
    passes: int = 5
    """Tries to solve a new problem."""
    cap: int = 20
    """Most accepted problems for each given one."""
    temperature: float = 0.7
    """Of all calls but retelling and reading, which are greedy."""
    max_tokens: int = 1024
    """Longest reply in tokens."""
    deadline: float = 5.0
    """Seconds that a program may run."""
    memory: int = 256
    """MiB that a program may use."""
    limit: int = 0
    """Start from the first problems only; 0: all."""
    budget: tuple[str, ...] = ()
    """Limits for the whole run folder: calls=5000, tokens=2000000 (generated), dollars=3. What is done then counts."""
    prices: Path | None = None
    """YAML file with dollars per million tokens, by model: NAME: {input: 0.05, output: 0.2}."""
    at_once: int = 16
    """Problems in work at the same time."""
    seed: int = 0
    """Equal seeds give equal requests."""
    device: str = "auto"
    """Where a model in this process runs: cpu, cuda, ...; auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        names = ("abstractions", "programs", "rounds", "variants", "passes", "cap", "max_tokens", "memory", "at_once")
        at_least(self, 1, *names, "overlap")
        at_least(self, 0, "temperature", "limit")
        above(self, 0, "deadline")
        if self.values == "model" and self.variants > 5:
            raise ConfigError(f"variants: got {self.variants}, a model is asked for 5", hint="add --values draw")

    def most_calls(self) -> int:
        """Calls for one problem if everything is tried as often as it may be."""
        finding = self.abstractions * (1 + self.programs)
        return finding + self.rounds * ((self.values == "model") + self.variants * (2 + self.passes))

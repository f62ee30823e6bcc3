"""`luthier VERB …`: find the verb, parse its options, run it, and turn errors into two lines."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from luthier import __version__

if TYPE_CHECKING:
    from luthier.core.console import Console


class Verb(NamedTuple):
    """Where a verb lives. `module` has `run(config, console)`; `extra` is what its heavy imports need.

    A `stage` makes its own run folder: its config has `out`. Around other verbs a recipe makes one, but for those that
    stand `alone`: they wait for a person, or run recipes themselves.
    """

    summary: str
    module: str
    config: str
    extra: str = ""
    stage: bool = False
    alone: bool = False


VERBS = {
    "tour": Verb(
        "all of luthier in minutes, on this machine", "luthier.cli.tour", "luthier.cli.tour:TourConfig", alone=True
    ),
    "pretrain": Verb(
        "train a model from random weights, or go on from an earlier run",
        "luthier.cli.pretrain",
        "luthier.train.config:PretrainConfig",
        "torch",
        stage=True,
    ),
    "soup": Verb(
        "average the weights of models that were trained from one start",
        "luthier.cli.soup",
        "luthier.train.soup_config:SoupConfig",
        "torch",
        stage=True,
    ),
    "extend": Verb(
        "train an Instella to use a longer context",
        "luthier.cli.extend",
        "luthier.train.extend_config:ExtendConfig",
        "torch",
        stage=True,
    ),
    "sft": Verb(
        "fine-tune a model on conversations",
        "luthier.cli.sft",
        "luthier.train.tuning_configs:SftConfig",
        "train",
        stage=True,
    ),
    "dpo": Verb(
        "make a model prefer one reply to another",
        "luthier.cli.dpo",
        "luthier.train.tuning_configs:DpoConfig",
        "train",
        stage=True,
    ),
    "mathrl": Verb(
        "reinforce replies whose answers are right",
        "luthier.cli.mathrl",
        "luthier.train.tuning_configs:MathRLConfig",
        "train",
        stage=True,
    ),
    "train-eem": Verb(
        "train a model that measures the entropy of text, every bit charged",
        "luthier.cli.train_eem",
        "luthier.entropy.config:TrainEemConfig",
        "torch",
        stage=True,
    ),
    "train-codec": Verb(
        "train the byte-level network of the compressor, and write it in integers",
        "luthier.cli.train_codec",
        "luthier.entropy.codec.byte_config:TrainCodecConfig",
        "torch",
        stage=True,
    ),
    "eval": Verb(
        "bits per byte of a model on any text, or the problems it solves",
        "luthier.cli.eval",
        "luthier.cli.eval:EvalConfig",
        stage=True,
    ),
    "estimate": Verb(
        "how many bits a text holds at most, everything charged, beside compressors",
        "luthier.cli.estimate",
        "luthier.cli.estimate:EstimateConfig",
        "torch",
        stage=True,
    ),
    "tokens": Verb(
        "what each token of a text costs, as a heat map",
        "luthier.cli.tokens",
        "luthier.cli.tokens:TokensConfig",
        "torch",
    ),
    "targets": Verb(
        "what each token costs a model that has not seen its document, for training that stops there",
        "luthier.cli.targets",
        "luthier.cli.targets:TargetsConfig",
        "torch",
        stage=True,
    ),
    "compress": Verb(
        "make files smaller, losslessly",
        "luthier.cli.compress",
        "luthier.cli.compress:CompressConfig",
    ),
    "decompress": Verb(
        "restore what compress made", "luthier.cli.decompress", "luthier.cli.decompress:DecompressConfig"
    ),
    "verify": Verb("check compressed files", "luthier.cli.verify", "luthier.cli.verify:VerifyConfig"),
    "info": Verb(
        "what a compressed file holds, without decoding it", "luthier.cli.info", "luthier.cli.info:InfoConfig"
    ),
    "quantize": Verb(
        "make a model's weights a few bits each, by scaled pairwise rotation",
        "luthier.cli.quantize",
        "luthier.quantize.config:QuantizeConfig",
        "torch",
        stage=True,
    ),
    "inspect": Verb(
        "where the bits of a quantized model go, and who can load it",
        "luthier.cli.inspect",
        "luthier.cli.inspect:InspectConfig",
        "torch",
    ),
    "compare": Verb(
        "how far a model is from another: divergence, agreement, layers, size, speed",
        "luthier.cli.compare",
        "luthier.cli.compare:CompareConfig",
        "torch",
        stage=True,
    ),
    "problems": Verb(
        "make problems of graded length, and lessons that teach a small model to reason",
        "luthier.cli.problems",
        "luthier.cli.problems:ProblemsConfig",
        stage=True,
    ),
    "word-problems": Verb(
        "make stories and verified word problems: the data of a small model's whole life",
        "luthier.cli.word_problems",
        "luthier.cli.word_problems:WordProblemsConfig",
        stage=True,
    ),
    "long-data": Verb(
        "make long documents with facts to look up, or with questions that a model writes",
        "luthier.cli.long_data",
        "luthier.cli.long_data:LongDataConfig",
        stage=True,
    ),
    "collect": Verb(
        "ask a teacher for replies to a file of prompts, once and within a budget",
        "luthier.cli.collect",
        "luthier.cli.collect:CollectConfig",
        stage=True,
    ),
    "distill": Verb(
        "make a student write like a teacher, against a discriminator that learns along",
        "luthier.cli.distill",
        "luthier.distill.distill_config:DistillConfig",
        "train",
        stage=True,
    ),
    "gauge": Verb(
        "how far students are from a teacher whose probabilities are known, or whose replies a judge prefers",
        "luthier.cli.gauge",
        "luthier.cli.gauge:GaugeConfig",
        stage=True,
    ),
    "programs": Verb(
        "make new word problems from given ones, each verified by a program that a model wrote",
        "luthier.cli.programs",
        "luthier.train.program_config:ProgramsConfig",
        stage=True,
    ),
    "solve": Verb("answer a question and check the steps", "luthier.cli.solve", "luthier.cli.solve:SolveConfig"),
    "serve": Verb(
        "an OpenAI-compatible server that reasons", "luthier.cli.serve", "luthier.cli.serve:ServeConfig", alone=True
    ),
    "chat": Verb("talk to a local model or an endpoint", "luthier.cli.chat", "luthier.cli.chat:ChatConfig", alone=True),
    "run": Verb("run a recipe, a YAML list of stages", "luthier.cli.run", "luthier.cli.run:RunConfig", alone=True),
    "report": Verb("write a run as one HTML file", "luthier.cli.report", "luthier.cli.report:ReportConfig"),
    "bench": Verb(
        "tokens per second of local models, in turn",
        "luthier.cli.bench",
        "luthier.cli.bench:BenchConfig",
        "torch",
    ),
    "env": Verb("versions, machine and devices", "luthier.cli.env", "luthier.cli.env:EnvConfig"),
}

OPTIONS = {
    "--json": "print one JSON object instead of text",
    "--dry-run": "check the settings, say what it would cost, and stop",
    "--debug": "show the traceback of an error",
}

# What the system says of a path that the user gave and that cannot be used.
UNUSABLE_PATH = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for an error that the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"luthier {__version__}")
        return 0
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments, debug=debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", "run the same command again to go on where it stopped", code=130)
    except Exception as error:
        if debug:
            raise
        from luthier.core.errors import Interrupted, UserError

        if isinstance(error, Interrupted):  # of all ranks at once: one of them says so
            return _fail(str(error), error.hint, code=130) if os.environ.get("RANK", "0") == "0" else 130
        if isinstance(error, UserError):
            return _fail(str(error), error.hint)
        if _is_disk_full(error):
            return _fail(f"the disk is full ({error})", "free some space and run the same command again: it resumes")
        if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE_PATH:
            return _fail(f"{error.filename}: {(error.strerror or '').lower()}", "give another path, or its permissions")
        raise


def _dispatch(arguments: list[str], *, debug: bool) -> int:
    from luthier.core.console import Console
    from luthier.core.errors import ConfigError, did_you_mean

    name = arguments[0]
    if name not in VERBS:
        raise ConfigError(f"{name!r}: no such verb{did_you_mean(name, VERBS)}", hint="luthier --help lists them")
    from luthier.cli.options import parse

    config: Any = parse(load_config(name), [a for a in arguments[1:] if a not in OPTIONS], f"luthier {name}")
    with _output() as out:
        console = Console(as_json="--json" in arguments, out=out, err=out)
        with _notes(console):
            _execute(name, config, console, dry="--dry-run" in arguments)
    return 0


@contextlib.contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Show what luthier's modules log, such as the kernels that a quantized model runs on."""
    import logging

    logger, handler = logging.getLogger("luthier"), logging.Handler(logging.INFO)
    handler.emit = lambda record: console.status(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextlib.contextmanager
def _output() -> Iterator[TextIO | None]:
    """Where a console writes: None (the standard streams) on the first rank, nowhere on the others."""
    if os.environ.get("RANK", "0") == "0":
        yield None
        return
    with open(os.devnull, "w") as nowhere:
        yield nowhere


def _execute(name: str, config: Any, console: Console, *, dry: bool) -> None:
    from luthier.core.errors import ConfigError, require

    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    if dry and not hasattr(module, "dry_run"):
        raise ConfigError(f"{name} has no dry run", hint="leave out --dry-run")
    if verb.extra and not dry:
        require("torch", verb.extra)
        require("transformers", verb.extra)
    (module.dry_run if dry else module.run)(config, console)


def load_config(verb: str) -> type:
    """The config class of a verb, without its heavy imports."""
    module, _, name = VERBS[verb].config.partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _help() -> str:
    width = max(map(len, [*VERBS, *OPTIONS, "--config FILE"]))
    lines = ["luthier: make, tune and use small language models", "", "usage: luthier VERB [options]", ""]
    lines += [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "every verb takes:", *(f"  {name:<{width}}  {text}" for name, text in OPTIONS.items())]
    lines += [f"  {'--config FILE':<{width}}  settings from a YAML file, such as the config.yaml of an earlier run"]
    lines += [f"  {'--help':<{width}}  its own options", "", "start with: luthier tour"]
    return "\n".join(lines)


def _is_disk_full(error: BaseException) -> bool:
    """Libraries wrap the system's error in their own, with its words in the message or as the cause."""
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return True
    return any(inner is not None and _is_disk_full(inner) for inner in (error.__cause__, error.__context__))


def _fail(message: str, hint: str, *, code: int = 2) -> int:
    rank = os.environ.get("RANK", "0")
    prefix = "luthier" if rank == "0" else f"luthier (rank {rank})"
    one_line, one_hint = " ".join(message.split("\n")), " ".join(hint.split("\n"))
    print(f"{prefix}: {one_line}\n  hint: {one_hint}", file=sys.stderr)
    return code

"""`luthier distill`: open a teacher's replies and a student, run warm-up, gate and GAD, and write a model folder."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.distill_view import gate_table, headline, held_out_table, memory_rows, merged_metrics, planned
from luthier.cli.tuning import open_run
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError, Interrupted, MissingExtra
from luthier.core.files import atomic_write, read_json, sha256_file, write_json
from luthier.data.row_source import RowSource, open_rows, split_rows
from luthier.distill.distill_config import DistillConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.core.run import RunFolder
    from luthier.distill.examined import Examined
    from luthier.distill.lessons import Lessons
    from luthier.learn.parallel import Ranks
    from luthier.learn.tuning import Tuned

KINDS = ("completion",)


def dry_run(config: DistillConfig, console: Console) -> None:
    """Print updates, tokens and memory, as far as the student and the replies are on this machine."""
    rows = planned(config, _counted(config))
    console.table(f"distill {config.model}", ("quantity", "value"), rows)
    memory = memory_rows(config)
    console.table("memory of one rank, without activations", ("item", "size"), memory)
    console.result(dict([*rows, *memory]))


def _counted(config: DistillConfig) -> tuple[int, int] | None:
    """Rows to learn from and the tokens of their replies; None where files or tokenizer are not on this machine."""
    specs = config.data or (str(config.teacher),)
    models = [config.model, *([config.discriminator] if config.discriminator else [])]
    if not all(Path(spec).expanduser().exists() for spec in (*specs, *models)):
        return None
    from luthier.data.tokenizer import encode_texts, load_tokenizer

    tokenizer = load_tokenizer(_student(config))
    _check_discriminator(config, tokenizer)
    lessons = _lessons(config, tokenizer, _parts(config))
    replies = encode_texts(tokenizer, [row["completion"] for row in lessons.train])
    return len(replies), sum(min(len(reply) + 1, config.max_lengths[1]) for reply in replies)


def run(config: DistillConfig, console: Console) -> None:
    """Distill or resume; under torchrun every rank comes here. Raises: Interrupted, Uninformative, Alarmed."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.learn.parallel import ranks

    if config.vllm != "off" and importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm: it is not installed", hint="pip install vllm, or leave vllm off")
    with ranks(config.device) as who, open_run(config, who) as folder:
        parts, tokenizer = _parts(config), load_tokenizer(_student(config))
        _check_discriminator(config, tokenizer)
        lessons = _lessons(config, tokenizer, parts)
        left_out = f", {lessons.left_out:,} left out (prompts too long)" if lessons.left_out else ""
        console.status(
            f"rows: {len(lessons.train):,} to learn from, {len(lessons.held_out):,} prompts held out{left_out}"
        )
        job = _Job(config, tokenizer, lessons, _origin(config, parts), who, console, config.stop_after)
        if not _is_warmed(config.model):
            job.warm_up()
        found = job.play()
        if folder is not None:
            _finish(config, folder, found, console)
        who.barrier()


def _is_warmed(model: str) -> bool:
    """Whether this is the folder of a distill run, whose warm-up is to be taken over."""
    return (Path(model).expanduser() / "warmup").is_dir()


def _student(config: DistillConfig) -> str:
    """The model folder whose tokenizer, and shape, the student has."""
    return str(Path(config.model).expanduser() / "warmup" / "model") if _is_warmed(config.model) else config.model


def _critics_own(warmup: Path) -> str | None:
    """The model that a warmed-up discriminator started from, where that was not the student."""
    from luthier.models.load import read_provenance

    own: str | None = read_provenance(warmup / "discriminator")["config"].get("discriminator")
    return own


def _check_discriminator(config: DistillConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """ConfigError where a discriminator of its own cannot read the student's tokens, or has been warmed up already."""
    from luthier.data.tokenizer import load_tokenizer

    if config.discriminator is None:
        return
    if _is_warmed(config.model):
        raise ConfigError(
            f"discriminator: got {config.discriminator}, but {config.model} has a warmed-up one",
            hint="leave it out, or give a student that has not been warmed up",
        )
    if load_tokenizer(config.discriminator).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"discriminator: {config.discriminator} has other tokens than the student {config.model}",
            hint="it reads the student's tokens: expected a model with the same tokenizer",
        )


def _parts(config: DistillConfig) -> tuple[RowSource, RowSource]:
    """Rows to learn from, and held-out ones. Raises: DataError for a folder without them."""
    if config.teacher is None:
        return split_rows(open_rows(config.data, KINDS), config.held_out, config.seed)
    files = [config.teacher / f"{split}.jsonl" for split in ("train", "validation")]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing, expected the folder that luthier collect wrote",
                hint="give its --out; collect with --validation above 0, so that some prompts can be held out",
            )
    train, held_out = (open_rows([str(file)], KINDS) for file in files)
    return train, held_out


def _lessons(config: DistillConfig, tokenizer: PreTrainedTokenizerFast, parts: tuple[RowSource, RowSource]) -> Lessons:
    from luthier.distill.lessons import make_lessons

    return make_lessons(tokenizer, parts[0].rows, parts[1].rows, raw=config.raw, longest=config.max_lengths[0])


def _origin(config: DistillConfig, parts: tuple[RowSource, RowSource]) -> dict[str, Any]:
    """What provenance says of settings and data."""
    told: dict[str, Any] = {
        "verb": "distill",
        "chat": not config.raw,
        "config": to_mapping(config),
        "data": [{"name": part.name, "sha256": part.sha256} for part in parts],
    }
    record = config.teacher / "teacher.json" if config.teacher is not None else None
    if record is not None and record.is_file():
        told["teacher"] = {"model": read_json(record)["model"], "sha256": sha256_file(record)}
    return told


class _Job:
    """The stages of one run, each in a folder of its own; one that has ended is not begun again."""

    def __init__(
        self,
        config: DistillConfig,
        tokenizer: PreTrainedTokenizerFast,
        lessons: Lessons,
        origin: Mapping[str, Any],
        who: Ranks,
        console: Console,
        left: int,
    ) -> None:
        self.config, self.tokenizer, self.lessons, self.origin = config, tokenizer, lessons, origin
        self.who, self.console = who, console
        self.left = left  # updates until this process is to stop; 0: no limit

    def warm_up(self) -> None:
        """Write warmup/model and warmup/discriminator."""
        import torch

        from luthier.distill.discriminator import Discriminator
        from luthier.distill.stages import learn, warmup_trainer
        from luthier.models.load import load_pretrained

        config, folder = self.config, self.config.out / "warmup"
        if _is_done(folder):
            return
        with open_run(dataclasses.replace(config, out=folder), self.who) as run:
            self.console.status("== warm-up")
            model = load_pretrained(config.model, dtype=torch.float32)
            own = config.discriminator
            critic = Discriminator.of(load_pretrained(own, dtype=torch.float32) if own else model, seed=config.seed)
            trainer = warmup_trainer(config, model, critic, self.tokenizer, self.lessons, self.who)
            tuned = self._count(*learn(trainer, self.left, run, self.who, self.console))
            if run is not None:
                self._save(run, folder / "model", model, tuned, [config.model])
                self._save_discriminator(run, critic, [own or config.model])
                self._close(run, {"updates": f"{tuned.step:,}"})
        self.who.barrier()
        if self.config.stop_after and not self.left:
            raise _interrupted("after the warm-up")

    def play(self) -> tuple[Examined, Examined]:
        """Write gad/discriminator and model; what was seen on held-out prompts before and after."""
        import torch

        from luthier.distill.discriminator import load_discriminator
        from luthier.distill.stages import gad_trainer, play
        from luthier.models.load import load_pretrained

        config, folder = self.config, self.config.out / "gad"
        if _is_done(folder):
            return _read(folder / "before.json"), _read(folder / "after.json")
        start = (Path(config.model).expanduser() if _is_warmed(config.model) else config.out) / "warmup"
        parents = [str(start / "model"), str(start / "discriminator")]
        with open_run(dataclasses.replace(config, out=folder), self.who) as run:
            self.console.status("== gate")
            model = load_pretrained(parents[0], dtype=torch.float32)
            critic = load_discriminator(start / "discriminator", device=self.who.device)
            trainer = gad_trainer(config, model, critic, self.tokenizer, self.lessons, self.who)
            before = self._once(folder / "before.json", run, lambda: self._examine(trainer))
            self._check(before)
            self.console.status("== adversarial stage")
            auditor = self._auditor(trainer, _critics_own(start) or parents[0])
            tuned = self._count(*play(config, trainer, auditor, self.left, run, self.who, self.console))
            after = self._once(folder / "after.json", run, lambda: self._examine(trainer))
            if run is not None:
                self._save(run, config.out / "model", model, tuned, parents)
                self._save_discriminator(run, critic, parents)
                self._close(run, headline(before, after, run.metrics("alarm")))
        self.who.barrier()
        return before, after

    def _examine(self, trainer: Any) -> Examined:
        from luthier.distill.examined import examine
        from luthier.learn.tuning import quiet_libraries

        with quiet_libraries():
            return examine(trainer, self.lessons.train, self.lessons.held_out, self.config.seed)

    def _auditor(self, trainer: Any, start: str) -> Any:
        """What measures for the alarms: by the teacher's own probabilities where it is known exactly."""
        import torch

        from luthier.cli.collect import BRACKETS, open_brackets
        from luthier.distill.auditor import Auditor, exact_quality, overlap_quality
        from luthier.distill.discriminator import Discriminator
        from luthier.models.load import load_pretrained

        config, teacher = self.config, str(self.origin.get("teacher", {}).get("model", ""))
        known = teacher.partition(":")[0] == BRACKETS
        return Auditor(
            trainer,
            self.lessons,
            exact_quality(open_brackets(teacher), self.tokenizer) if known else overlap_quality,
            seed=config.seed,
            fresh=lambda: Discriminator.of(load_pretrained(start, dtype=torch.float32), seed=config.seed),
            steps=config.fresh_steps,
        )

    def _once(self, file: Path, run: RunFolder | None, measure: Callable[[], Examined]) -> Examined:
        """What is in `file`, or what is measured now and written there."""
        if self.who.sum([float(run is not None and file.exists())])[0]:
            return _read(file)
        found = measure()
        if run is not None:
            write_json(file, dataclasses.asdict(found))
        return found

    def _check(self, before: Examined) -> None:
        """Uninformative when the gate is shut, and is not forced."""
        from luthier.distill.gate import gate, require_open

        found = gate(before.accuracy, before.baselines, self.config.margin)
        self.console.status(f"gate {'open' if found.is_open else 'shut'}: {found.text()}")
        require_open(found, force=self.config.force or not self.config.has_gate)

    def _count(self, tuned: Tuned, made: int) -> Tuned:
        if not tuned.finished:
            raise _interrupted(f"at step {tuned.step} of {tuned.total}")
        self.left = max(0, self.left - made)
        return tuned

    def _save(self, run: RunFolder, folder: Path, model: Any, tuned: Tuned, parents: list[str]) -> None:
        from luthier.models.load import save_pretrained

        save_pretrained(model, self.tokenizer, folder, self._provenance(run, parents), state_dict=tuned.state_dict)

    def _save_discriminator(self, run: RunFolder, critic: Any, parents: list[str]) -> None:
        """The last thing that a stage writes of its own: it has ended."""
        from luthier.distill.discriminator import save_discriminator
        from luthier.learn.tuning import quiet_libraries

        with quiet_libraries():
            save_discriminator(critic, self.tokenizer, run.path / "discriminator", self._provenance(run, parents))

    def _provenance(self, run: RunFolder, parents: list[str]) -> dict[str, Any]:
        from luthier.models.load import read_provenance

        made_from = [{"model": name, "weights": read_provenance(Path(name)).get("weights", {})} for name in parents]
        return {**self.origin, "stage": run.path.name, "parents": made_from, "env": run.env}

    def _close(self, run: RunFolder, told: Mapping[str, str]) -> None:
        from luthier.report.html import write_report

        run.write_summary({"verb": f"distill: {run.path.name}", "headline": dict(told), "tables": []})
        write_report(run.path)


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _interrupted(where: str) -> Interrupted:
    return Interrupted(f"stopped {where}, state saved", hint="run the same command again to go on from there")


def _read(file: Path) -> Examined:
    from luthier.distill.examined import Examined

    return Examined(**read_json(file))


def _finish(config: DistillConfig, folder: RunFolder, found: tuple[Examined, Examined], console: Console) -> None:
    """Summary, curves of both stages and report of the whole run."""
    from luthier.core.run import RunFolder
    from luthier.report.html import write_report

    before, after = found
    stages = [RunFolder.read(path) for name in ("warmup", "gad") if (path := config.out / name).is_dir()]
    atomic_write(folder.path / "metrics.jsonl", merged_metrics([stage.metrics() for stage in stages]))
    alarms = stages[-1].metrics("alarm")
    tables = [gate_table(config, before), held_out_table(before, after)]
    if alarms:
        rows = [[str(row["step"]), row["text"]] for row in alarms]
        tables.append(
            {"title": "Alarms of the adversarial stage", "columns": ["step", "what was seen and done"], "rows": rows}
        )
    shown = headline(before, after, alarms)
    metrics = {name: sum(values) / len(values) for name, values in _figures(after).items()}
    folder.write_summary({"verb": "distill", "headline": shown, "tables": tables, "metrics": metrics})
    report = write_report(folder.path)
    for table in tables:
        console.table(**table)
    for name, value in shown.items():
        console.print(f"{name}: {value}")
    console.print(f"model: {config.out / 'model'}")
    console.print(f"report: {report}")
    console.result(
        {**metrics, "alarms": int(shown["alarms"]), "model": str(config.out / "model"), "report": str(report)}
    )


def _figures(after: Examined) -> dict[str, list[float]]:
    return {name: getattr(after, name) for name in ("accuracy", "length", "teacher_length", "cut")}

"""`luthier targets`: what each token costs a model that has not seen its document, written beside token shards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.cli.corpora import is_tokenized
from luthier.cli.texts import opening
from luthier.core.checks import at_least
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError, Interrupted
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.data.shards import TokenShards
    from luthier.entropy.targets import Document, Scorer, TokenTargets
    from luthier.learn.parallel import Ranks

LONGEST_CONTEXT = 512  # tokens that an external model sees, unless asked for more
SCORED_AT_ONCE = 16  # windows
VALIDATION_SHARE, VALIDATION_TOKENS = 0.1, 32_768  # of a fold's training documents: where its model is stopped
PIECES_PER_FOLD = 4  # below so many documents for each fold, documents are cut into pieces


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """Write for each token of a corpus what it costs a model that has not seen its document, in nats.

    Deals the documents into folds, trains a model without each fold, and scores the fold with it. The objectives in
    luthier.entropy stop training at such targets.
    """

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = ("out", "device")

    data: str = "python-prose"
    """Token shards, such as data/train-0 of luthier pretrain; or text, which is tokenized first."""
    tokenizer: str = ""
    """Tokenizer folder or hub id: the one that made the shards. Text without one gets one of its own."""
    vocab_size: int = 2048
    """Of the tokenizer that text gets."""
    model: Literal["nano", "tiny", "small", "counts"] = "nano"
    """What is trained for each fold: an Instella of that size, or an n-gram model that counts."""
    teacher: str = ""
    """Score everything by this model folder or hub id instead. It may have seen the text, or more: that is transfer."""
    kind: Literal["surprisal", "entropy"] = "surprisal"
    """surprisal: of the token that came. entropy: of what might have come; training toward it is biased."""
    folds: int = 5
    """Parts of the corpus, each scored by a model of the others."""
    order: int = 3
    """Tokens of context that counts use."""
    steps: int = 600
    """Updates of each model; it is kept as it was at its best on a tenth of its own documents."""
    eval_every: int = 50
    """Steps between looks for the best one."""
    batch_size: int = 8
    """Windows in a step."""
    sequence_length: int = 256
    """Tokens in a window."""
    learning_rate: float = 3e-3
    """Peak; it falls to a tenth of it."""
    warmup_steps: int = 50
    """Steps until the peak."""
    context: int = 0
    """Tokens that a model sees when it scores; 0: sequence_length, or up to 512 of a teacher's own limit."""
    seed: int = 0
    """Decides folds, order and weights."""
    device: str = "auto"
    """cpu, cuda or auto."""
    out: Path = Path("runs/targets")
    """Run folder; its targets/ is the result. The same command again resumes."""

    def __post_init__(self) -> None:
        if self.teacher and self.tokenizer and not is_tokenized(self.data):
            raise ConfigError("tokenizer: text gets that of the teacher", hint="leave out --tokenizer")
        if is_tokenized(self.data) and not (self.tokenizer or self.teacher):
            raise ConfigError(
                f"tokenizer: got nothing, but {self.data} are token shards", hint="give the one that made them"
            )
        at_least(self, 1, "folds", "order", "steps", "eval_every", "batch_size", "sequence_length")


@dataclass
class _Job:
    """What every step of the verb needs, and the models that were made so far."""

    config: TargetsConfig
    shards: TokenShards
    tokenizer: PreTrainedTokenizerFast
    who: Ranks
    console: Console
    models: list[dict[str, Any]] = field(default_factory=list)

    @property
    def start(self) -> list[int]:
        """The ids that open a document."""
        return opening(self.tokenizer) or [self.tokenizer.eos_token_id]


def run(config: TargetsConfig, console: Console) -> None:
    """Make the targets, or go on where an earlier run stopped."""
    from luthier.entropy.targets import cross_fit, score, write_targets
    from luthier.learn.parallel import Ranks, choose_device

    opened = RunFolder.open(config.out, to_mapping(config), may_change=config.RESUMABLE_CHANGES)
    with contextlib.closing(opened) as folder:
        shards, tokenizer = _tokens(config, console)
        job = _Job(config, shards, tokenizer, Ranks(device=choose_device(config.device)), console)
        documents = [shards.document(index) for index in range(shards.num_documents)]
        if config.teacher:
            nats = score(documents, _external(job))
        else:
            fit = _fit_counts if config.model == "counts" else _fit_network
            nats = cross_fit(documents, partial(fit, job), folds=config.folds, seed=config.seed)
        targets = write_targets(
            config.out / "targets",
            shards,
            nats,
            kind=config.kind,
            folds=0 if config.teacher else config.folds,
            models=job.models,
        )
        _finish(job, folder, documents, targets, nats)


def _tokens(config: TargetsConfig, console: Console) -> tuple[TokenShards, PreTrainedTokenizerFast]:
    """The shards, made of the text where there are none yet."""
    from luthier.data.shards import TokenShards, write_shards
    from luthier.data.sources import open_source
    from luthier.data.tokenizer import load_tokenizer, train_bpe

    name = config.tokenizer or config.teacher
    tokenizer = load_tokenizer(name) if name else None
    if is_tokenized(config.data):
        assert tokenizer is not None  # the config has checked that
        return TokenShards.open(Path(config.data), tokenizer), tokenizer
    source = open_source(config.data)
    documents = source.documents
    if not source.conversations and len(documents) < PIECES_PER_FOLD * config.folds:
        documents = _pieces(documents, source.num_bytes // (2 * PIECES_PER_FOLD * config.folds))
    tokenizer = tokenizer or train_bpe(source.texts(), config.vocab_size)
    folder = config.out / "data"
    tokenizer.save_pretrained(folder / "tokenizer")
    shards = write_shards(
        documents, tokenizer, folder / "tokens", source=source.name, conversations=source.conversations
    )
    console.status(f"corpus: {source.name}, {shards.num_documents:,} documents, {shards.num_tokens:,} tokens")
    return shards, tokenizer


def _pieces(documents: Sequence[str], size: int) -> list[str]:
    from luthier.data.files import PIECE_BYTES, cut_paragraphs

    return [piece for text in documents for piece in cut_paragraphs(text, min(PIECE_BYTES, max(size, 256)))]


def _external(job: _Job) -> Scorer:
    from luthier.core.files import sha256_file
    from luthier.entropy.targets import TRANSFER
    from luthier.models.load import load_pretrained

    name = job.config.teacher
    model = load_pretrained(name, device=job.who.device)
    weights = {file.name: sha256_file(file) for file in sorted(Path(name).glob("*.safetensors"))}
    job.models.append({"model": name, "weights": weights})
    job.console.status(TRANSFER)
    limit = getattr(model.config, "max_position_embeddings", LONGEST_CONTEXT)
    if job.config.context > limit:
        raise ConfigError(
            f"context: got {job.config.context}, but {name} reads at most {limit} tokens",
            hint=f"give --context {limit} or less",
        )
    return _scorer(job, model, job.config.context or min(limit, LONGEST_CONTEXT), "scoring")


def _scorer(job: _Job, model: PreTrainedModel, context: int, label: str) -> Scorer:
    from luthier.entropy.targets import score_documents

    def scorer(documents: Sequence[Document]) -> list[NDArray[np.float64]]:
        with job.console.progress(sum(map(len, documents)), label) as advance:
            return score_documents(
                model,
                documents,
                kind=job.config.kind,
                start=job.start,
                context=context,
                batch_size=SCORED_AT_ONCE,
                advance=advance,
            )

    return scorer


def _fit_counts(job: _Job, fold: int, documents: Sequence[Document]) -> Scorer:
    from luthier.data.tokenizer import num_ids
    from luthier.entropy.targets import Counts

    size = num_ids(job.tokenizer)
    counts = Counts(documents, order=job.config.order, vocab_size=size, start=job.start[-1])
    job.models.append(_entry(job, fold, f"counts of order {job.config.order}", documents))
    return counts.surprisal if job.config.kind == "surprisal" else counts.entropy


def _fit_network(job: _Job, fold: int, documents: Sequence[Document]) -> Scorer:
    """Train a model on nine tenths of the documents, as it was at its best on the rest."""
    from luthier.data.mixture import WindowMixture
    from luthier.learn.loop import Job, LoopSettings, train
    from luthier.learn.meters import Meter
    from luthier.learn.objectives import CausalLoss
    from luthier.learn.precision import Weights
    from luthier.learn.state import TrainState, resume

    config, checkpoints = job.config, job.config.out / "checkpoints" / f"fold-{fold}"
    training, validation = _divide(documents, derive_seed(config.seed, "validation", fold))
    mixture = WindowMixture(
        [_joined(training, job.shards)],
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    model = _new_model(job, fold)
    objective = CausalLoss(model, plain_head=True).to(job.who.device).train()
    weights = Weights(objective)
    state = TrainState(weights, _optimizer(weights, config), cursor=mixture.state_dict())
    resume(state, mixture, checkpoints, job.who, None, job.console)
    best = _Best(job, model, validation, checkpoints / "best.safetensors")
    loop = Job(
        objective=objective,
        state=state,
        batch_at=partial(mixture.batch, document_ids=True),
        learning_rate=partial(_rate, config),
        seed=derive_seed(config.seed, "fold", fold),
        meter=Meter(1.0, 1.0),
        checkpoints=checkpoints,
        run=None,
        evaluate=lambda: best.look(state.step),
    )
    settings = LoopSettings(
        steps=config.steps,
        micro_batch_size=config.batch_size,
        grad_clip=1.0,
        log_every=0,
        checkpoint_every=0,  # when stopped, and at the end
        keep_checkpoints=0,
        eval_every=config.eval_every,
    )
    job.console.status(f"fold {fold + 1} of {config.folds}: {sum(map(len, training)):,} tokens to train on")
    if not train(loop, settings, job.who, job.console):
        raise Interrupted(
            f"stopped in fold {fold + 1} of {config.folds}, state saved", hint="run the same command again to go on"
        )
    job.models.append(_entry(job, fold, config.model, documents) | best.load())
    return _scorer(job, model.eval(), config.context or config.sequence_length, f"scoring fold {fold + 1}")


def _entry(job: _Job, fold: int, model: str, documents: Sequence[Document]) -> dict[str, Any]:
    """What the index says of the model of a fold; `documents` are those that it was made of."""
    amount = {"documents": len(documents), "trained_on": sum(map(len, documents))}
    return {"fold": fold, "model": model, "seed": job.config.seed, **amount}


def _divide(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """(to train on, to stop by): equal documents stay on one side. Raises: DataError for too few."""
    import hashlib

    def place(document: Document) -> bytes:
        return hashlib.sha256(seed.to_bytes(8, "big") + document.tobytes()).digest()

    places = [place(document) for document in documents]
    different = sorted(set(places))
    if len(different) < 2:
        raise DataError(
            "a fold leaves only one document to train on", hint="give more documents, or use --model counts"
        )
    border = different[max(1, round(VALIDATION_SHARE * len(different)))]
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document, where in zip(documents, places, strict=True):
        sides[where < border].append(document)
    return sides


def _joined(documents: Sequence[Document], shards: TokenShards) -> TokenShards:
    """Some documents of shards as shards of their own, in memory."""
    import numpy as np

    from luthier.core.files import sha256_bytes
    from luthier.data.shards import TokenShards

    tokens = np.concatenate(documents).astype(shards.tokens.dtype)
    ends = np.cumsum([len(document) for document in documents])
    boundaries = np.stack([ends, np.zeros_like(ends)], 1)
    digest = sha256_bytes(tokens.tobytes())
    return TokenShards(shards.name, tokens, boundaries, shards.tokenizer_sha256, source_sha256="", sha256=digest)


def _new_model(job: _Job, fold: int) -> PreTrainedModel:
    import torch

    from luthier.models.initialization import initialize
    from luthier.models.instella import InstellaForCausalLM
    from luthier.models.instella_config import sized_config

    longest = max(job.config.sequence_length, job.config.context)
    sized = sized_config(job.config.model, job.tokenizer, max_position_embeddings=longest)
    model: InstellaForCausalLM = InstellaForCausalLM._from_config(sized, dtype=torch.float32)
    initialize(model, derive_seed(job.config.seed, "initial weights", fold))
    return model


def _optimizer(weights: Any, config: TargetsConfig) -> Any:
    import torch

    return torch.optim.AdamW(
        weights.masters.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def _rate(config: TargetsConfig, step: int) -> float:
    from luthier.learn.schedule import learning_rate

    return learning_rate(
        step,
        schedule="cosine",
        peak=config.learning_rate,
        warmup=config.warmup_steps,
        total=config.steps,
        final_fraction=0.1,
    )


class _Best:
    """The weights of the best step so far, on disk, so that they outlive a stop."""

    def __init__(self, job: _Job, model: PreTrainedModel, documents: Sequence[Document], file: Path) -> None:
        self.job, self.model, self.file = job, model, file
        self.documents = list[Any]()
        for document in documents:
            if not self.documents or sum(map(len, self.documents)) < VALIDATION_TOKENS:
                self.documents.append(document[:VALIDATION_TOKENS])

    def look(self, step: int) -> dict[str, Any]:
        """Measure nats per token; keep the weights when they are the best."""
        import numpy as np
        from safetensors.torch import save_model

        from luthier.core.files import write_json
        from luthier.entropy.targets import score_documents

        config = self.job.config
        was_training = self.model.training
        nats = score_documents(
            self.model.eval(),
            self.documents,
            kind="surprisal",
            start=self.job.start,
            context=config.context or config.sequence_length,
            batch_size=SCORED_AT_ONCE,
        )
        self.model.train(was_training)
        loss = float(np.concatenate(nats).mean())
        if loss < self._note().get("loss", float("inf")):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(self.file))
            write_json(self.file.with_suffix(".json"), {"step": step, "loss": loss})
        return {"loss": loss}

    def load(self) -> dict[str, Any]:
        """Put the best weights into the model, and say which they are."""
        from safetensors.torch import load_model

        from luthier.core.files import sha256_file

        load_model(self.model, str(self.file))
        return {**{f"best_{key}": value for key, value in self._note().items()}, "weights": sha256_file(self.file)}

    def _note(self) -> dict[str, Any]:
        from luthier.core.files import read_json

        note = self.file.with_suffix(".json")
        return read_json(note) if note.exists() else {}


def _finish(
    job: _Job, folder: RunFolder, documents: Sequence[Document], targets: TokenTargets, nats: NDArray[np.float64]
) -> None:
    from luthier.report.html import write_report

    config, shards = job.config, job.shards
    headline = {
        f"mean {config.kind}": f"{nats.mean():.3f} nats/token",
        "made by": f"{config.teacher}, an external model" if config.teacher else f"{config.folds} cross-fitted models",
        "tokens": f"{shards.num_tokens:,} in {len(documents):,} documents",
    }
    if config.kind == "surprisal":
        headline["bits per byte"] = _bits_per_byte(shards, nats)
    table = _table(job, documents, nats)
    folder.write_summary({"verb": "targets", "headline": headline, "tables": [table]})
    report = write_report(folder.path)
    job.console.table(**table)
    for name, value in headline.items():
        job.console.print(f"{name}: {value}")
    where = config.out / "targets"
    job.console.print(f"targets: {where}")
    job.console.print(f"report: {report}")
    result = {"targets": str(where), "mean": float(nats.mean()), "kind": config.kind, "source": targets.source}
    job.console.result({**result, "folds": targets.folds, "sha256": targets.sha256, "report": str(report)})


def _bits_per_byte(shards: TokenShards, nats: NDArray[np.float64]) -> str:
    import numpy as np

    from luthier.learn.evaluate import bits_per_byte_interval

    boundaries = shards.boundaries()
    starts = np.concatenate([[0], boundaries[:-1, 0]])
    return bits_per_byte_interval(np.add.reduceat(nats, starts), np.asarray(boundaries[:, 1])).text()


def _table(job: _Job, documents: Sequence[Document], nats: NDArray[np.float64]) -> dict[str, Any]:
    """One row for each fold, or for the external model."""
    import numpy as np

    from luthier.entropy.targets import TRANSFER, deal

    config = job.config
    columns = ["fold", "documents", "tokens", f"mean {config.kind}", "scored by"]
    if config.teacher:
        row = ["—", f"{len(documents):,}", f"{len(nats):,}", f"{nats.mean():.3f}", config.teacher]
        return {"title": "Targets", "columns": columns, "rows": [row], "note": TRANSFER}
    folds = np.repeat(deal(documents, config.folds, config.seed), [len(document) for document in documents])
    owners = deal(documents, config.folds, config.seed)
    rows = []
    for model in job.models:
        own = folds == model["fold"]
        named = model["model"] + (f", step {model['best_step']}" if "best_step" in model else "")
        counts = [f"{int((owners == model['fold']).sum()):,}", f"{int(own.sum()):,}", f"{nats[own].mean():.3f}"]
        rows.append([str(model["fold"] + 1), *counts, named])
    note = f"Nats per token of data {job.shards.name}; each model was trained without the fold that it scores."
    return {"title": "Targets", "columns": columns, "rows": rows, "note": note}

"""The outer loop: right inputs and targets for each layer, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.console import Console
from luthier.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from luthier.models.load import load_pretrained
from luthier.models.stream import LayerStream
from luthier.quantize.affine import grid
from luthier.quantize.assemble import assemble
from luthier.quantize.baselines import rtn
from luthier.quantize.calibration import Windows
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import LayerTask
from luthier.quantize.methods import METHODS
from luthier.quantize.walk import Method, quantize_layers
from luthier.quantize.weights import QuantizedWeight

CONFIG = QuantizeConfig(
    model="m", method="rtn", samples=5, validation_samples=2, sequence_length=10, micro_batch_size=2, group_size=32
)
Weights = dict[str, QuantizedWeight]


def ids(rows: int, seed: int) -> Tensor:
    return torch.randint(2, 96, (rows, 10), generator=torch.Generator().manual_seed(seed))


WINDOWS = Windows(ids(5, 0), ids(2, 1))


@dataclass
class Setup:
    """One walk over a tiny model, with everything that it says."""

    source: Path
    folder: Path
    config: QuantizeConfig = CONFIG
    windows: Windows = WINDOWS
    rows: list[dict[str, Any]] = field(default_factory=list)
    err: io.StringIO = field(default_factory=io.StringIO)

    def run(self, method: Method = rtn) -> Weights:
        found = quantize_layers(
            LayerStream.open(self.source),
            self.windows,
            method,
            self.config,
            self.folder,
            console=Console(err=self.err),
            log=lambda kind, **row: self.rows.append({"kind": kind, **row}),
        )
        return dict(found)


@pytest.fixture
def setup(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Setup]:
    return lambda kind="llama", name="run", **more: Setup(tiny_folder(kind), tmp_path / name / "layers", **more)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for name in a
        for x, y in zip(vars(a[name]).values(), vars(b[name]).values(), strict=True)
    )


def read(states: Any) -> Tensor:
    return states.read(0, len(states))


class Watching:
    """Rounding, and a copy of what each layer was given."""

    def __init__(self) -> None:
        self.seen = list[tuple[Tensor, ...]]()

    def __call__(self, task: LayerTask) -> Weights:
        stores = (task.inputs, task.targets, task.validation_inputs, task.validation_targets)
        self.seen.append(tuple(map(read, stores)))
        assert torch.is_grad_enabled()
        return rtn(task)


def hidden_states(model: Any, input_ids: Tensor) -> list[Tensor]:
    """The input of every layer and the output of the last."""
    outputs = list[Tensor]()
    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda module, args: outputs.append(args[0]))]
    handles += [layer.register_forward_hook(lambda module, args, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe", "instella", "olmo2"])
def test_inputs_come_from_the_quantized_model_and_targets_from_the_original(
    kind: str, setup: Callable[..., Setup]
) -> None:
    here, watching = setup(kind), Watching()
    quantized = here.run(watching)
    original, damaged = (load_pretrained(here.source, dtype=torch.float32) for _ in range(2))
    parameters = dict(damaged.named_parameters())
    with torch.no_grad():
        for name, weight in quantized.items():
            parameter = parameters[name if name in parameters else f"{name}.weight"]
            parameter.copy_(weight.dequantized().view(parameter.shape))
    for place, windows in ((0, WINDOWS.training), (2, WINDOWS.validation)):
        inputs, targets = hidden_states(damaged, windows), hidden_states(original, windows)
        for layer, seen in enumerate(watching.seen):
            torch.testing.assert_close(seen[place], inputs[layer], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen[place + 1], targets[layer + 1], rtol=1e-5, atol=1e-5)
    found, wanted = hidden_states(damaged, WINDOWS.validation)[-1], hidden_states(original, WINDOWS.validation)[-1]
    error = float((found - wanted).norm() / wanted.norm())
    assert here.rows[-1]["relative_error"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < 1


def test_every_linear_layer_is_in_the_result(setup: Callable[..., Setup]) -> None:
    names = setup("qwen3-moe").run()
    assert "model.layers.0.mlp.gate_proj" in names  # the dense layer
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert names["model.layers.1.mlp.experts.gate_up_proj"].codes.shape == (4 * 2 * 32, 64)
    assert not any(name.endswith("mlp.gate") for name in names)


def test_skipped_modules_stay_as_they_are(setup: Callable[..., Setup]) -> None:
    here = setup(config=replace(CONFIG, skip=("mlp.*", "*k_proj")))
    assert {name.split(".", 3)[3] for name in here.run()} == {f"self_attn.{part}_proj" for part in "qvo"}


def exactly(task: LayerTask) -> Weights:
    """Codes that stand for the weights as they are; see `on_grid`."""
    parameters, found = dict(task.layer.named_parameters()), Weights()
    for bundle in task.bundles:
        grouped = bundle.stack(parameters).view(-1, bundle.in_features // 32, 32)
        steps = torch.full((*grouped.shape[:2],), 2.0**-6)
        found |= assemble(
            bundle,
            codes=(grouped / steps[..., None] + 8).flatten(1),
            points=torch.full_like(steps, 8),
            steps=steps,
            channel_scales=torch.ones(bundle.in_features),
            config=task.config,
        )
    return found


def test_chains_stay_equal_while_quantizing_changes_nothing(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_pretrained(tiny_folder("llama"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name:
            parameter.data = (parameter * 64).round().clamp(-8, 7) / 64
    model.save_pretrained(tmp_path / "model")
    here, equal = Setup(tmp_path / "model", tmp_path / "layers"), list[bool]()

    def method(task: LayerTask) -> Weights:
        out = task.forward(read(task.inputs))
        equal.append(torch.equal(out, read(task.targets)))
        return exactly(task)

    here.run(method)
    assert equal == [True, True]
    assert [row["relative_error"] for row in here.rows] == [0.0, 0.0]
    assert [row["loss_before"] for row in here.rows] == [0.0, 0.0]


def stopping(at: int, how: Callable[[], object]) -> Method:
    def method(task: LayerTask) -> Weights:
        if task.index == at:
            how()
        return rtn(task)

    return method


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", [interrupt, terminate])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_a_stopped_run_goes_on_and_ends_as_a_straight_one(
    how: Callable[[], object], kind: str, setup: Callable[..., Setup]
) -> None:
    straight, stopped = setup(kind, "straight"), setup(kind, "stopped")
    expected = straight.run()
    with pytest.raises(Interrupted, match="1 of 2 layers done and saved"):
        stopped.run(stopping(1, how))
    assert [path.name for path in stopped.folder.iterdir()] == ["00000.safetensors"]
    watching = Watching()
    assert same(stopped.run(watching), expected)
    assert len(watching.seen) == 1
    first, second = ([row | {"seconds": 0} for row in run.rows] for run in (straight, stopped))
    assert first == second
    for path in sorted(straight.folder.iterdir()):
        a, b = load_file(path), load_file(stopped.folder / path.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_real_method_resumes_bitwise(setup: Callable[..., Setup]) -> None:
    config = replace(CONFIG, method="paroquant", epochs=(1, 1), rounds=2)
    paroquant = METHODS["paroquant"]
    straight, stopped = setup(name="a", config=config), setup(name="b", config=config)
    expected = straight.run(paroquant)

    def method(task: LayerTask) -> Weights:
        return paroquant(task) if task.index == 0 else (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.raises(Interrupted):
        stopped.run(method)
    torch.manual_seed(99)
    assert same(stopped.run(paroquant), expected)
    assert {"loss_stage1", "loss_stage2", "loss", "loss_before", "seconds"} <= stopped.rows[-1].keys()


def test_a_failure_keeps_what_is_done(setup: Callable[..., Setup]) -> None:
    here = setup()

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        here.run(stopping(1, fail))
    assert [path.name for path in here.folder.iterdir()] == ["00000.safetensors"]


def test_a_finished_run_is_not_run_again(setup: Callable[..., Setup]) -> None:
    here = setup()
    expected = here.run()

    def never(task: LayerTask) -> Weights:
        raise AssertionError

    assert same(here.run(never), expected)
    assert len(here.rows) == 2


def test_a_damaged_layer_is_made_again(setup: Callable[..., Setup]) -> None:
    here, watching = setup(), Watching()
    expected = here.run()
    path = here.folder / "00000.safetensors"
    data = path.read_bytes()
    path.unlink()  # what was read is a view of that file
    path.write_bytes(data[:-50])
    assert same(here.run(watching), expected)
    assert len(watching.seen) == 1
    assert "layer 0 is made anew" in here.err.getvalue()


def test_layers_of_other_settings_text_or_weights_are_refused(setup: Callable[..., Setup], tmp_path: Path) -> None:
    here = setup()
    here.run()
    with pytest.raises(CheckpointError, match="made with other settings"):
        replace(here, config=replace(CONFIG, bits=3)).run()
    with pytest.raises(CheckpointError, match="settings or text"):
        replace(here, windows=Windows(ids(5, 7), WINDOWS.validation)).run()
    replace(here, config=replace(CONFIG, micro_batch_size=1, dtype="bfloat16", model="moved")).run()  # may differ
    model = load_pretrained(here.source, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data += 0.01
    model.save_pretrained(tmp_path / "trained-on")
    with pytest.raises(CheckpointError, match="other weights of the model"):
        replace(here, source=tmp_path / "trained-on").run()
    (here.folder / "00001.safetensors").unlink()
    replace(here, source=tmp_path / "trained-on").run()  # the layer that differs is made from the new weights


def test_batches_and_files_do_not_change_the_result(setup: Callable[..., Setup], tmp_path: Path) -> None:
    expected = setup().run()
    assert same(setup(name="one", config=replace(CONFIG, micro_batch_size=1)).run(), expected)
    spilled = setup(name="file", config=replace(CONFIG, spill=tmp_path / "spill"))
    assert same(spilled.run(), expected)
    assert list((tmp_path / "spill").iterdir()) == []
    assert f"a file in {tmp_path / 'spill'}" in spilled.err.getvalue()


def test_too_little_memory_is_told_before_the_first_layer(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = 2 * 4 * (5 + 2) * 10 * 64  # two stores of fp32 for all windows
    monkeypatch.setattr("luthier.quantize.activations.available_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match="activations need"):
        setup().run()
    setup(name="file", config=replace(CONFIG, spill=tmp_path)).run()
    monkeypatch.setattr("luthier.quantize.activations.available_memory", lambda: needed)
    setup().run()


def test_nan_weights_stop_before_their_layer_and_keep_the_others(setup: Callable[..., Setup], tmp_path: Path) -> None:
    here = setup()
    source = tmp_path / "nan"
    load_pretrained(here.source, dtype=torch.float32).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight has values that are NaN"):
        replace(here, source=source).run()
    assert [path.name for path in here.folder.iterdir()] == ["00000.safetensors"]


def test_overflow_is_told(setup: Callable[..., Setup], tmp_path: Path) -> None:
    here = setup()
    model = load_pretrained(here.source, dtype=torch.float32)
    model.model.layers[0].input_layernorm.weight.data *= 1e38
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        replace(here, source=tmp_path / "model").run()


@pytest.mark.parametrize("bad", [96, -1])
def test_ids_outside_the_vocabulary_are_told(bad: int, setup: Callable[..., Setup]) -> None:
    windows = Windows(WINDOWS.training.clone(), WINDOWS.validation)
    windows.training[1, 1] = bad
    with pytest.raises(DataError, match="but the model knows 96"):
        setup(windows=windows).run()


def test_windows_longer_than_the_model_reads_are_refused(setup: Callable[..., Setup]) -> None:
    ids = torch.zeros(1, 100, dtype=torch.int64)
    with pytest.raises(ConfigError, match="sequence_length: got 100, but the model reads at most 64 tokens"):
        setup(windows=Windows(ids, ids)).run()


def test_a_method_must_quantize_everything(setup: Callable[..., Setup]) -> None:
    with pytest.raises(ValueError, match="the method gave"):
        setup().run(lambda task: {name: weight for name, weight in rtn(task).items() if "q_proj" not in name})


def test_grid_is_what_rounding_uses(setup: Callable[..., Setup]) -> None:
    """The result is what rounding the file's own weights gives: nothing between file and method changes them."""
    here = setup()
    found = here.run()["model.layers.1.self_attn.o_proj"]
    weight = load_pretrained(here.source, dtype=torch.float32).model.layers[1].self_attn.o_proj.weight.detach()
    step, _ = grid(weight.view(64, -1, 32), 4)
    assert torch.equal(found.steps, step[..., 0].half())

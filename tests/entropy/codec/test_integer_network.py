"""The integer network: C equals the numpy reference bit for bit, is close to the float model, and refuses bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.entropy.codec.byte_config import ByteModelConfig
from luthier.entropy.codec.byte_model import ByteModel, context_rows
from luthier.entropy.codec.integer_features import NEWLINE, History, hashed
from luthier.entropy.codec.integer_network import IntegerNetwork, compiled
from luthier.entropy.codec.integer_reference import power, probabilities_of
from luthier.entropy.codec.integer_weights import IntegerWeights, Shape, check, expected_arrays, load, save
from luthier.entropy.codec.quantize_network import best_clip, quantize, quantized_rows

TEXT = " ".join(f"Line {n}: the {'quick ' * (n % 3)}brown fox isn't {n * n} na\u00efve;\n" for n in range(120)).encode()
CONFIG = ByteModelConfig(width=32, layers=2, heads=3, head_width=16, hidden=80, window=16, table_bits=(5, 6, 4, 7, 5))


def rows(streams: int, length: int, start: int = 0) -> np.ndarray:
    """Different pieces of the text, (streams, length) uint8."""
    return np.stack([np.frombuffer(TEXT, np.uint8)[start + 97 * i :][:length] for i in range(streams)])


@pytest.fixture(scope="module")
def model() -> ByteModel:
    """A network whose blocks and tables all matter, with random weights."""
    model = ByteModel(CONFIG)
    model.initialize(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                weight.normal_(std=0.7 * weight.shape[1] ** -0.5, generator=generator)
            elif name.startswith("tables."):
                weight.normal_(std=0.5, generator=generator)
        model.head.weight.mul_(4)  # certain of some bytes, as trained networks are
    return model


@pytest.fixture(scope="module")
def weights(model: ByteModel) -> IntegerWeights:
    return quantize(model, torch.from_numpy(rows(4, 200)).long(), {"recipe": "random"})


def predictions(network: IntegerNetwork, text: np.ndarray) -> np.ndarray:
    """Probabilities before each byte of (B, T), (B, T, 256)."""
    state, out = network.open(len(text)), []
    for column in text.T:
        out.append(network.probabilities(state).copy())
        network.advance(state, np.ascontiguousarray(column))
    return np.stack(out, 1)


needs_compiler = pytest.mark.skipif(compiled(portable=False)[0] is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("how", ["native", "portable"])
@pytest.mark.parametrize(("streams", "threads"), [(1, 1), (2, 1), (3, 2), (7, 3), (2, 5)])
def test_c_equals_the_reference_past_the_window(weights: IntegerWeights, how: str, streams: int, threads: int) -> None:
    text = rows(streams, 3 * CONFIG.window + 5)
    expected = predictions(IntegerNetwork(weights, how="reference"), text)
    network = IntegerNetwork(weights, threads=threads, how=how)  # type: ignore[arg-type]
    np.testing.assert_array_equal(predictions(network, text), expected)


def extreme(seed: int, shape: Shape) -> IntegerWeights:
    """Weights and scales at the ends of what a file may hold."""
    generator, arrays = np.random.default_rng(seed), {}
    for name, (size, kind) in expected_arrays(shape).items():
        if name == "table.scales":
            values = generator.choice([0, 1, (1 << 20) - 1], size)
        elif name.endswith((".scale", ".scores")):
            values = generator.choice([0, 1 << 20, 1 << 27, (1 << 31) - 1], size)
        elif name.endswith(".distance"):
            values = generator.choice([1 - (1 << 26), -5000, 0, (1 << 26) - 1], size)
        elif name.endswith((".gains", ".gain")):
            values = generator.choice([1, 1 << 33, 1 << 40, (1 << 52) - 1], size)
        elif name.startswith("table."):
            values = generator.choice([-128, -1, 0, 127], size)
        else:
            values = generator.choice([-63, 63], size) if seed % 2 else np.full(size, 63)
        arrays[name] = values.astype(kind)
    return IntegerWeights(shape=shape, arrays=arrays, provenance={})


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_no_sum_overflows_whatever_the_weights(seed: int) -> None:
    shape = Shape(width=512, layers=1, heads=1, head_width=256, hidden=2048, window=32, table_bits=(3, 3, 3, 3, 3))
    worst = extreme(seed, shape)
    check(worst, "extreme")
    text = rows(2, 40)
    expected = predictions(IntegerNetwork(worst, how="reference"), text)
    for how in ("native", "portable"):
        np.testing.assert_array_equal(predictions(IntegerNetwork(worst, how=how), text), expected)  # type: ignore[arg-type]


def test_streams_and_their_number_do_not_matter(weights: IntegerWeights) -> None:
    network, text = IntegerNetwork(weights), rows(5, 60)
    together = predictions(network, text)
    for stream, alone in zip(together, text, strict=True):
        np.testing.assert_array_equal(predictions(network, alone[None])[0], stream)


def test_two_states_do_not_touch_each_other(weights: IntegerWeights) -> None:
    network, text = IntegerNetwork(weights, threads=2), rows(2, 40)
    a, b = network.open(1), network.open(1)
    for first, second in text.T:
        network.advance(a, np.array([first]))
        network.advance(b, np.array([second]))
    expected = network.open(2)
    for column in text.T:
        network.advance(expected, np.ascontiguousarray(column))
    wanted = network.probabilities(expected)
    np.testing.assert_array_equal(np.concatenate([network.probabilities(a), network.probabilities(b)]), wanted)


def test_integers_predict_what_the_float_model_predicts(model: ByteModel, weights: IntegerWeights) -> None:
    text = rows(4, 120, start=3000)
    counts = predictions(IntegerNetwork(weights), text).astype(np.float64)
    ids = np.concatenate([np.full((4, 1), NEWLINE), text[:, :-1]], 1)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).log_softmax(-1).double().numpy()
    entropy = -(np.exp(expected) * expected).sum(-1).mean()
    assert entropy < 4.5  # nats; a uniform guess has 5.5, so there is something to be wrong about
    divergence = (np.exp(expected) * (expected - np.log(counts / counts.sum(-1, keepdims=True)))).sum(-1)
    assert divergence.mean() < 0.01
    shuffled = np.log((counts / counts.sum(-1, keepdims=True))[:, ::-1])
    assert (np.exp(expected) * (expected - shuffled)).sum(-1).mean() > 0.1


def test_the_float_model_hashes_the_same_contexts() -> None:
    text = rows(3, 150)
    history = History.start(3)
    of_model = context_rows(torch.from_numpy(text), CONFIG.table_bits)
    for t, column in enumerate(text.T):
        history = history.after(column)
        for found, key, bits in zip(of_model, history.keys(), CONFIG.table_bits, strict=True):
            np.testing.assert_array_equal(found[:, t].numpy(), hashed(key, bits))


def test_the_float_model_sees_the_past_only_and_its_length_does_not_matter(model: ByteModel) -> None:
    ids = torch.from_numpy(rows(2, 70)).long()
    changed = ids.clone()
    changed[:, 40] = 7
    with torch.no_grad():
        whole, other, part = model(ids), model(changed), model(ids[:, :33])
    torch.testing.assert_close(whole[:, :40], other[:, :40])
    assert (whole[:, 40] - other[:, 40]).abs().max() > 1e-3
    torch.testing.assert_close(whole[:, :33], part, atol=1e-5, rtol=1e-5)


def test_attention_reaches_as_far_as_the_window_and_no_further() -> None:
    config = ByteModelConfig(
        width=32, layers=1, heads=2, head_width=16, hidden=32, window=16, table_bits=(4, 4, 4, 4, 4)
    )
    model = ByteModel(config)
    model.initialize(0)
    with torch.no_grad():
        model.blocks[0].attention.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        ids = torch.full((1, 48), 46)  # not letters: only attention can carry a byte further than four places
        changed = ids.clone()
        changed[0, 10] = 45
        moved = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert moved[10:26].min() > 0
    assert moved[:10].max() == 0
    assert moved[26:].max() == 0


def test_power_is_exact_at_whole_bits_and_never_grows() -> None:
    below = np.arange(40 * 4096)
    values = power(below, high=23)
    np.testing.assert_array_equal(values[::4096][:24], 1 << np.arange(23, -1, -1))
    assert (np.diff(values) <= 0).all()
    assert np.abs(values[:4096] / 2.0 ** (23 - below[:4096] / 4096) - 1).max() < 1.2e-4
    assert values[-1] == 0


def test_probabilities_are_positive_and_their_total_fits() -> None:
    logits = np.stack([np.zeros(256, np.int64), np.arange(256) * 100_000])
    counts = probabilities_of(logits)
    assert counts.dtype == np.uint32
    assert counts.min() == 1
    assert counts.sum(1, dtype=np.int64).tolist() == [256 * ((1 << 23) + 1), 255 + (1 << 23) + 1]


def test_a_file_keeps_the_network(weights: IntegerWeights, tmp_path: Path) -> None:
    save(weights, tmp_path / "network.bin")
    network = IntegerNetwork.load(tmp_path / "network.bin")
    assert network.sha256 == weights.sha256
    assert network.context == CONFIG.window
    assert network.weights.provenance == {"recipe": "random"}
    text = rows(2, 30)
    np.testing.assert_array_equal(predictions(network, text), predictions(IntegerNetwork(weights), text))


def test_damaged_files_are_refused(weights: IntegerWeights, tmp_path: Path) -> None:
    file = tmp_path / "network.bin"
    save(weights, file)
    whole = file.read_bytes()
    for place in [*range(70), *np.random.default_rng(0).integers(0, len(whole), 150).tolist()]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load(file)
    for length in (0, 1, 40, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "nothing.bin")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head", lambda array: array[:, :-1]),
        ("head", lambda array: array.astype(np.int16)),
        ("0.up", lambda array: np.full_like(array, 64)),
        ("1.out.scale", lambda array: -array),
        ("0.gains", lambda array: array * 0),
        ("1.distance", lambda array: array + (1 << 26)),
    ],
)
def test_arrays_that_are_no_network_are_refused(weights: IntegerWeights, name: str, change, tmp_path: Path) -> None:
    arrays = {**weights.arrays, name: change(weights.arrays[name])}
    wrong = IntegerWeights(shape=weights.shape, arrays=arrays, provenance={})
    with pytest.raises(CheckpointError, match=name):
        save(wrong, tmp_path / "wrong.bin")
    del arrays[name]
    with pytest.raises(CheckpointError, match=name):
        check(IntegerWeights(shape=weights.shape, arrays=arrays, provenance={}), "missing")


def test_the_digest_covers_numbers_and_provenance(weights: IntegerWeights) -> None:
    arrays = dict(weights.arrays)
    arrays["0.scores"] = arrays["0.scores"] + 1
    changed = IntegerWeights(shape=weights.shape, arrays=arrays, provenance=weights.provenance)
    other = IntegerWeights(shape=weights.shape, arrays=weights.arrays, provenance={})
    assert len({weights.sha256, changed.sha256, other.sha256}) == 3


def test_wrong_bytes_and_settings_are_refused(weights: IntegerWeights) -> None:
    network = IntegerNetwork(weights)
    state = network.open(2)
    for wrong in (np.zeros(3, np.uint8), np.zeros(2, np.int64), np.zeros((1, 2), np.uint8)):
        with pytest.raises(DataError, match="expected uint8"):
            network.advance(state, wrong)
    with pytest.raises(ConfigError, match="streams"):
        network.open(0)
    if network.means.startswith("compiled"):
        with pytest.raises(DataError, match="another network"):
            IntegerNetwork(weights).advance(state, np.zeros(2, np.uint8))
    with pytest.raises(ConfigError, match="threads"):
        IntegerNetwork(weights, threads=0)


def test_without_a_compiler_the_reference_is_used_and_said(
    weights: IntegerWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictions(IntegerNetwork(weights), rows(2, 20))
    monkeypatch.setenv("LUTHIER_NATIVE", "0")
    compiled.cache_clear()
    try:
        network = IntegerNetwork(weights)
        assert "LUTHIER_NATIVE=0" in network.means
        np.testing.assert_array_equal(predictions(network, rows(2, 20)), expected)
        with pytest.raises(ConfigError, match="LUTHIER_NATIVE=0"):
            IntegerNetwork(weights, how="native")
    finally:
        compiled.cache_clear()


def test_rows_are_cut_where_the_error_is_least() -> None:
    matrix = np.random.default_rng(0).normal(size=(20, 400)) * np.logspace(-2, 2, 20)[:, None]
    matrix[3, 7] = 60 * matrix[3].std()
    whole, units = quantized_rows(matrix)
    error = np.square(whole * units[:, None] - matrix).mean(1) / np.square(matrix).mean(1)
    plain = np.abs(matrix).max(1, keepdims=True) / 63
    worst = np.square(np.rint(matrix / plain) * plain - matrix).mean(1) / np.square(matrix).mean(1)
    assert np.abs(whole).max() == 63
    assert (error <= worst + 1e-12).all()
    assert np.delete(error, 3).max() < 2e-3
    assert best_clip(np.append(np.full(1000, 0.1), 1.0), 7) < 1.0


def test_sizes_that_have_no_integer_form_are_refused() -> None:
    with pytest.raises(ConfigError, match="width"):
        ByteModelConfig(width=40)
    with pytest.raises(ConfigError, match="table_bits"):
        ByteModelConfig(table_bits=(12, 13))

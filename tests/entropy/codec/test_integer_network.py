"""The integer network: C equals the numpy reference bit for bit, is close to the float model, and refuses bad files."""

from __future__ import annotations

from dataclasses import replace
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
from luthier.entropy.codec.quantize_network import best_clip, observe, quantize, quantized_rows
from luthier.entropy.codec.segment_code import Code
from luthier.entropy.quantizer import fsq_code

TEXT = " ".join(f"Line {n}: the {'quick ' * (n % 3)}brown fox isn't {n * n} na\u00efve;\n" for n in range(120)).encode()
GOLDEN = Path(__file__).with_name("golden_network.bin")
CONFIG = ByteModelConfig(width=32, layers=2, heads=3, head_width=16, hidden=80, window=16, table_bits=(5, 6, 4, 7, 5))


def rows(streams: int, length: int, start: int = 0) -> np.ndarray:
    """Different pieces of the text, (streams, length) uint8."""
    return np.stack([np.frombuffer(TEXT, np.uint8)[start + 97 * i :][:length] for i in range(streams)])


def random_model(config: ByteModelConfig) -> ByteModel:
    """A network whose blocks, tables and codes all matter, with random weights."""
    model = ByteModel(config)
    model.initialize(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                weight.normal_(std=0.7 * weight.shape[1] ** -0.5, generator=generator)
            elif name.startswith("tables."):
                weight.normal_(std=0.5, generator=generator)
        model.head.weight.mul_(4)  # certain of some bytes, as trained networks are
        if model.segment is not None:
            model.segment.direction.normal_(std=0.7, generator=generator)
            model.segment.presence.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> ByteModel:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def coded_model() -> ByteModel:
    return random_model(replace(CONFIG, code_dims=3, code_levels=4))


@pytest.fixture(scope="module")
def coded(coded_model: ByteModel) -> IntegerWeights:
    return quantize(coded_model, torch.from_numpy(rows(8, 200)).long(), {"recipe": "random"})


@pytest.fixture(scope="module")
def weights(model: ByteModel) -> IntegerWeights:
    return quantize(model, torch.from_numpy(rows(4, 200)).long(), {"recipe": "random"})


def predictions(network: IntegerNetwork, text: np.ndarray, code: Code = ()) -> np.ndarray:
    """Probabilities before each byte of (B, T), (B, T, 256)."""
    state, out = network.open(len(text), code), []
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


@needs_compiler
@pytest.mark.parametrize("how", ["native", "portable"])
@pytest.mark.parametrize("code", [(), (0,), (3, 1), (2, 0, 3)])
def test_c_equals_the_reference_given_a_code(coded: IntegerWeights, how: str, code: Code) -> None:
    text = rows(3, CONFIG.window + 5)
    expected = predictions(IntegerNetwork(coded, how="reference"), text, code)
    for threads in (1, 2):
        network = IntegerNetwork(coded, threads=threads, how=how)  # type: ignore[arg-type]
        np.testing.assert_array_equal(predictions(network, text, code), expected)


def test_blocks_that_write_large_numbers_have_an_integer_form() -> None:
    """The unit of the residual stream is as coarse as their scales need, also where the stream itself would fit."""
    model = random_model(CONFIG)
    with torch.no_grad():
        for block in model.layers:
            block.down.weight.mul_(40)
    sample = torch.from_numpy(rows(4, 200)).long()
    seen = observe(model, sample)
    assert max(np.abs(seen[f"{layer}.residual"]).max() for layer in range(2)) < 400  # 2^23 of the finest unit in 4
    weights = quantize(model, sample, {})
    assert max(weights.arrays[f"{layer}.down.scale"].max() for layer in range(2)) >= 1 << 29
    text = rows(2, 100, start=3000)
    ids = torch.from_numpy(np.concatenate([np.full((2, 1), NEWLINE), text[:, :-1]], 1)).long()
    with torch.no_grad():
        expected = model(ids).log_softmax(-1).double().numpy()
    counts = predictions(IntegerNetwork(weights), text).astype(np.float64)
    found = np.log(counts / counts.sum(-1, keepdims=True))
    assert (np.exp(expected) * (expected - found)).sum(-1).mean() < 0.05


def test_every_level_of_every_dimension_counts(coded: IntegerWeights) -> None:
    network, text = IntegerNetwork(coded), rows(1, 20)
    found = [predictions(network, text, code) for code in [(), (0,), (3,), (0, 0), (0, 3), (0, 3, 0), (0, 3, 3)]]
    assert len({one.tobytes() for one in found}) == len(found)


def test_integers_predict_what_the_float_model_predicts_under_a_code(
    coded_model: ByteModel, coded: IntegerWeights
) -> None:
    """The codes that the encoder makes of the texts, two of three dimensions of them, as numbers to the integers."""
    text = rows(4, 120, start=3000)
    ids = torch.from_numpy(np.concatenate([np.full((4, 1), NEWLINE), text[:, :-1]], 1)).long()
    segment, numbers = coded_model.segment, list[torch.Tensor]()
    assert segment is not None
    hook = segment.numbers.register_forward_hook(lambda layer, inputs, output: numbers.append(output))
    with torch.no_grad():
        expected = coded_model(ids, torch.full((4,), 2)).log_softmax(-1).double().numpy()
        without = coded_model(ids).log_softmax(-1).double().numpy()
    hook.remove()
    network = IntegerNetwork(coded)
    for row, levels in enumerate(fsq_code(numbers[0], segment.levels)[:, :2].tolist()):
        counts = predictions(network, text[row : row + 1], tuple(levels))[0].astype(np.float64)
        log_found = np.log(counts / counts.sum(-1, keepdims=True))
        divergence = (np.exp(expected[row]) * (expected[row] - log_found)).sum(-1).mean()
        assert divergence < 0.01
        assert (np.exp(without[row]) * (without[row] - log_found)).sum(-1).mean() > 5 * divergence


def test_a_network_with_codes_begins_as_one_without() -> None:
    """Both draw the same weights, so that they can be compared, and compute the same when no code is given."""
    plain, with_codes = ByteModel(CONFIG), ByteModel(replace(CONFIG, code_dims=2))
    plain.initialize(5)
    with_codes.initialize(5)
    ids = torch.from_numpy(rows(2, 40)).long()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), with_codes(ids), rtol=0, atol=0)
        torch.testing.assert_close(plain(ids), with_codes(ids, torch.zeros(2, dtype=torch.long)), rtol=0, atol=0)
        assert (plain(ids) - with_codes(ids, torch.tensor([1, 2]))).abs().amax((1, 2)).min() > 1e-3


def test_the_encoder_learns_through_the_rounding() -> None:
    model = ByteModel(replace(CONFIG, code_dims=2))
    model.initialize(5)
    assert model.segment is not None
    model(torch.from_numpy(rows(2, 40)).long(), torch.tensor([1, 1])).logsumexp(-1).sum().backward()
    gradient = model.segment.numbers.weight.grad
    assert gradient is not None
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0  # the second dimension was not sent


def test_the_encoder_uses_all_levels_from_the_start() -> None:
    model = ByteModel(replace(CONFIG, code_dims=2, code_levels=4))
    model.initialize(5)
    assert model.segment is not None
    ids = torch.from_numpy(rows(24, 60)).long()
    model.segment.center(ids)
    numbers = model.segment.encode(ids)
    torch.testing.assert_close(numbers.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(numbers.std(0), torch.ones(2), atol=1e-4, rtol=0)
    assert len(fsq_code(numbers, 4).unique()) == 4


def extreme(seed: int, shape: Shape) -> IntegerWeights:
    """Weights and scales at the ends of what a file may hold."""
    generator, arrays = np.random.default_rng(seed), {}
    for name, (size, kind) in expected_arrays(shape).items():
        if name in ("table.scales", "code.scale"):
            values = generator.choice([0, 1, (1 << 20) - 1], size)
        elif name.endswith((".scale", ".scores")):
            values = generator.choice([0, 1 << 20, 1 << 27, (1 << 31) - 1], size)
        elif name.endswith(".distance"):
            values = generator.choice([1 - (1 << 26), -5000, 0, (1 << 26) - 1], size)
        elif name.endswith((".gains", ".gain")):
            values = generator.choice([1, 1 << 33, 1 << 40, (1 << 52) - 1], size)
        elif name.startswith("table.") or name == "code":
            values = generator.choice([-128, -1, 0, 127], size)
        else:
            values = generator.choice([-63, 63], size) if seed % 2 else np.full(size, 63)
        arrays[name] = values.astype(kind)
    return IntegerWeights(shape=shape, arrays=arrays, provenance={})


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_no_sum_overflows_whatever_the_weights(seed: int) -> None:
    sizes = {"width": 512, "layers": 1, "heads": 1, "head_width": 256, "hidden": 2048, "window": 32}
    shape = Shape(**sizes, table_bits=(3, 3, 3, 3, 3), code_dims=8, code_levels=2)
    worst, code = extreme(seed, shape), (0, 1, 1, 0, 1, 0, 0, 1)
    check(worst, "extreme")
    text = rows(2, 40)
    expected = predictions(IntegerNetwork(worst, how="reference"), text, code)
    for how in ("native", "portable"):
        network = IntegerNetwork(worst, how=how)  # type: ignore[arg-type]
        np.testing.assert_array_equal(predictions(network, text, code), expected)


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


def test_a_file_keeps_the_rows_of_codes(coded: IntegerWeights, tmp_path: Path) -> None:
    save(coded, tmp_path / "network.bin")
    network = IntegerNetwork.load(tmp_path / "network.bin")
    assert (network.dims, network.levels, network.sha256) == (3, 4, coded.sha256)
    text = rows(1, 20)
    np.testing.assert_array_equal(predictions(network, text, (1, 2)), predictions(IntegerNetwork(coded), text, (1, 2)))


def test_an_older_network_is_what_it_was(tmp_path: Path) -> None:
    """golden_network.bin was written before there were codes; neither its digest nor its file may change."""
    weights = load(GOLDEN)
    assert weights.sha256 == "69d85f178d58864544a4ab37073927b636d8b150415911fcf22b4f620225c094"
    assert IntegerNetwork(weights).dims == 0
    save(weights, tmp_path / "again.bin")
    assert load(tmp_path / "again.bin").sha256 == weights.sha256
    assert b"code" not in (tmp_path / "again.bin").read_bytes()


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
    with pytest.raises(DataError, match="expected at most 0 levels"):
        network.open(1, (0,))
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


def test_codes_that_the_network_has_not_are_refused(coded: IntegerWeights) -> None:
    for code in ((4,), (-1,), (0, 0, 0, 0)):
        with pytest.raises(DataError, match="expected at most 3 levels below 4"):
            IntegerNetwork(coded).open(1, code)
    for change in ({"code_dims": 9}, {"code_levels": 17}, {"code_dims": 2}):
        wrong = IntegerWeights(shape=replace(coded.shape, **change), arrays=coded.arrays, provenance={})
        with pytest.raises(CheckpointError):
            check(wrong, "wrong")


def test_sizes_that_have_no_integer_form_are_refused() -> None:
    with pytest.raises(ConfigError, match="code_levels: got 1, expected 2 to 16"):
        ByteModelConfig(code_levels=1)
    with pytest.raises(ConfigError, match="width"):
        ByteModelConfig(width=40)
    with pytest.raises(ConfigError, match="table_bits"):
        ByteModelConfig(table_bits=(12, 13))

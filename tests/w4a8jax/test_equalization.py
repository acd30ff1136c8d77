"""Equalization: the scaled model is the model, and its quantized weights lose no more."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from flax import nnx
from text_checkpoint import text_checkpoint
from toy import edited_checkpoint, toy_checkpoint
from typer.testing import CliRunner

import w4a8jax
from models.families import FAMILIES, family
from models.weights import load_decoder
from pallas_kernels import W4A8Error
from w4a8jax import quantize_weight
from w4a8jax.calibration import CalibrationData, Sample
from w4a8jax.checkpoints.folds import FOLDS, Fold, FoldedReader, read_folds
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorInfo
from w4a8jax.cli import app
from w4a8jax.quantization import equalization
from w4a8jax.quantization.channel_folds import LayerFolds, Readers
from w4a8jax.quantization.equalization import find_folds
from w4a8jax.quantization.pipeline import ROUTER, Item, select


def _records(count=4, length=60):
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(3, 256, length).tolist()} for _ in range(count)]


def _modules(reader):
    return [item.module for item in select(reader.tensors)[0] if item.module]


def _templates(reader):
    members = family(reader.config)
    config = members.decoder_config(reader.config)
    layers = range(config.num_layers)
    return [fold for layer in layers for fold, _ in LayerFolds(config, members.names, reader.tensors, layer)]


def _add_biases(tensors, config):
    rng = np.random.default_rng(1)
    config |= {"attention_bias": True, "mlp_bias": True}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name.replace("weight", "bias")] = rng.standard_normal(len(tensors[name])).astype(twin.BF16)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_scaled_model_is_the_model(kind, tmp_path):
    """To the bit with powers of two, else to fp32's precision; every fold of the family is scaled at random."""
    path = toy_checkpoint(tmp_path, model_type=kind, layers=2 if kind == "cohere2_moe" else 1)
    if kind == "llama":
        path = edited_checkpoint(path, tmp_path / "biases", _add_biases)
    reader, rng = CheckpointReader(path), np.random.default_rng(0)
    members = family(reader.config)
    config = members.decoder_config(reader.config)
    tokens = jnp.asarray(rng.integers(0, 256, (2, 9)))

    @partial(jax.jit, static_argnames="graph")
    def logits(graph, state):
        return nnx.merge(graph, state)(tokens)[0]

    def run(source):
        return np.asarray(logits(*nnx.split(load_decoder(config, members.names, source, dtype="float32"))))

    def scaled(unit):
        draw = {
            len(f.steps): rng.integers(-16 // unit, 16 // unit + 1, len(f.steps)) * unit for f in _templates(reader)
        }
        return [dataclasses.replace(f, steps=draw[len(f.steps)].astype(np.int8)) for f in _templates(reader)]

    plain = run(reader)
    np.testing.assert_array_equal(run(FoldedReader(reader, list(scaled(8)))), plain)
    np.testing.assert_allclose(run(FoldedReader(reader, list(scaled(1)))), plain, atol=2e-5 * np.abs(plain).max())


class Tensors:
    """A checkpoint in memory."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def read(self, name):
        return self.tensors[name]


def test_norms_are_rounded_before_the_scales():
    """What a norm's stored weight lacks of its scale, the columns make up for."""
    rng = np.random.default_rng(0)
    norm = (1 + 0.1 * rng.standard_normal(256)).astype(twin.BF16)
    norm[7] = 0
    steps = rng.integers(-20, 21, 256).astype(np.int8)
    rows, columns = Fold(steps, ("norm",), ("w",), norm=True).factors(Tensors(norm=norm))
    wide = norm.astype(np.float64)
    stored = (norm.astype(np.float32) * rows).astype(twin.BF16).astype(np.float64)
    np.testing.assert_allclose(stored * columns, wide, rtol=1e-6)
    np.testing.assert_allclose(columns, np.exp2(steps / 8), rtol=2**-8)
    assert np.abs(wide * np.exp2(-steps / 8) * columns - wide).max() > 1e-4  # which rounding afterwards would leave


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_search_never_loses(spread):
    """By the float64 twin's errors, and gains much where inputs and weights differ in size; heads share channels."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = np.exp2(2 * spread * rng.standard_normal(128)).reshape(2, 1, 64).repeat(2, axis=1).reshape(-1)
        x = (rng.standard_normal((200, 256)) * sizes).astype(twin.BF16)
        w = (0.02 * rng.standard_normal((96, 256)) / sizes).astype(np.float32)
        counts = rng.random(200).astype(np.float32)
        fold = Fold(np.zeros(128, np.int8), ("v.weight",), ("o.weight",), repeat=2, block=64)

        class Sample:
            def inputs(self, group, x=x):
                return x

            def weights(self, group, counts=counts):
                return [counts]

        reader = Tensors(**{"o.weight": w})
        search = equalization._Search(reader, frozenset({"v", "o"}), "w4a8", "lut", -7, "full", lambda *_: None)
        found, error, plain = search(fold, [Readers(("o",), "attention.output")], Sample())
        ours, theirs = (_error(x, w, f.factors(reader)[1], counts) for f in (found, fold))
        assert error == pytest.approx(ours, rel=2e-3)
        assert plain == pytest.approx(theirs, rel=2e-3)
        assert error <= plain
        if spread:
            assert error < 0.6 * plain


def _error(x, w, scales, counts):
    """Squared relative output error of a weight whose columns are scaled, float64."""
    importance = np.average((x.astype(np.float64) / scales) ** 2, axis=0, weights=counts)
    tensor = quantize_weight(w * scales, search="fast", importance=importance + 0.01 * importance.mean())
    x8, token_scale = twin.quantize_activations(x.astype(np.float32) / scales)
    y = (twin.e4m3_values(x8) * token_scale) @ twin.weight(twin.unpack(tensor.packed), tensor.scale, "lut").T
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    return np.sum(counts[:, None] * (y - exact) ** 2) / np.sum(counts[:, None] * exact**2)


def test_scales_that_are_stored_are_powers_of_two():
    """A router's columns, or a bias, would be rounded."""
    exponents = np.array([-20, -1.2, 0.1, 0.4, 0.7, 20])
    assert equalization.round_scales(exponents, exact=True).tolist() == [-64, -8, 0, 0, 8, 64]
    assert equalization.round_scales(exponents, exact=False).tolist() == [-64, -10, 1, 3, 6, 64]
    half = TensorInfo("model.layers.0.mlp.gate.weight", np.dtype(np.float16), (4, 256), Path("x"), 0)
    assert Item(half, None, ROUTER).copied_dtype == np.float16
    assert Item(half, None, ROUTER, wide=True).copied_dtype == np.float32


def test_the_sample_is_of_tokens_that_count(tmp_path, monkeypatch):
    source = toy_checkpoint(tmp_path, layers=1)
    reader, rng, seen = CheckpointReader(source), np.random.default_rng(0), []
    samples = tuple(Sample(rng.integers(0, 256, 50).astype(np.int32), rng.random(50) > 0.7, 1) for _ in range(4))

    class Stop(Exception):
        pass

    def stop(block, stream, chosen, *_):
        seen.append((chosen, stream.mask))
        raise Stop

    monkeypatch.setattr(equalization, "_Sample", stop)
    for size, expected in ((10, 10), (10**6, sum(s.loss_mask.sum() for s in samples))):
        monkeypatch.setattr(equalization, "SAMPLE", size)
        with pytest.raises(Stop):
            find_folds(reader, _modules(reader), CalibrationData(samples))
        chosen, mask = seen.pop()
        assert chosen.sum() == expected
        assert not (chosen & ~mask).any()


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """A checkpoint with experts, some of whose channels are far larger than others."""
    folder = tmp_path_factory.mktemp("outliers")
    source = text_checkpoint(folder / "plain", model_type="cohere2_moe")
    rng = np.random.default_rng(0)
    folds = [
        dataclasses.replace(f, steps=(-8 * rng.choice([0, 3], len(f.steps), p=[0.9, 0.1])).astype(np.int8))
        for f in _templates(CheckpointReader(source))
    ]

    def scale(tensors, config):
        folded = FoldedReader(CheckpointReader(source), folds)
        for name in tensors:
            tensors[name] = folded.read(name).astype(twin.BF16)

    path = edited_checkpoint(source, folder / "bf16", scale)
    return path, w4a8jax.load_calibration(path, _records())


def test_outliers_are_found(outliers, tmp_path, monkeypatch):
    """Errors of outputs fall where channels differ; the checkpoint verifies against its original."""
    source, data = outliers
    options = {"calibration": data, "equalize": True, "search": "fast", "progress": False}
    seen = []
    monkeypatch.setattr(equalization, "find_folds", lambda *a, **o: seen.append(find_folds(*a, **o)) or seen[0])
    summary = w4a8jax.quantize(source, tmp_path / "out", **options)
    error = [float(part) for part in re.findall(r"0\.\d{4}", summary.equalization)]
    assert error[1] < 0.9 * error[0]
    folds = read_folds(tmp_path / "out")
    routers = [name for fold in folds for name in fold.columns if name.endswith("gate.weight")]
    assert routers
    reader, made = FoldedReader(CheckpointReader(source), folds), CheckpointReader(tmp_path / "out")
    for module in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.2.down_proj"):
        expected = quantize_weight(
            reader.read(f"{module}.weight"), search="fast", importance=seen[0].importance[module]
        )
        np.testing.assert_array_equal(made.read(f"{module}.weight_packed"), expected.packed)
    for fold in folds:
        if set(routers) & set(fold.columns):
            assert not (fold.steps % 8).any()
    report = w4a8jax.verify(tmp_path / "out", source, max_tokens=0)
    checks = {check.name: check.status for check in report.checks}
    assert (checks["quantized weights"], checks["other weights"]) == ("ok", "ok")
    assert max(report.layer_errors.values()) < 0.2
    (tmp_path / "out" / FOLDS).unlink()
    broken = w4a8jax.verify(tmp_path / "out", source, max_tokens=0)
    assert {check.name: check.status for check in broken.checks}["quantized weights"] == "failed"


def test_composes_with_gptq(tmp_path):
    source = toy_checkpoint(tmp_path, layers=1, intermediate=256)
    (source / "tokenizer.json").unlink()
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in _records()))
    arguments = ["quantize", source, tmp_path / "out", "--method", "gptq", "--calibration", file, "--search", "none"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--equalize", "-q"])
    assert result.exit_code == 0, result.output
    assert "equalization: " in result.stdout
    record = json.loads((tmp_path / "out" / "quantization_summary.json").read_text())
    assert re.match(r"[1-4] of 4 folds scale", record["equalization"])
    assert all(layer["output_error"] <= layer["rtn_output_error"] for layer in record["layers"])
    report = w4a8jax.verify(tmp_path / "out", source, max_tokens=0)
    assert {c.status for c in report.checks if c.name in ("quantized weights", "other weights")} == {"ok"}


def test_refusals(tmp_path):
    source = toy_checkpoint(tmp_path, layers=1)
    with pytest.raises(W4A8Error, match="calibration: equalize needs data"):
        w4a8jax.quantize(source, tmp_path / "out", equalize=True, progress=False)
    with pytest.raises(W4A8Error, match="uses none; choose method gptq, or equalize"):
        w4a8jax.quantize(source, tmp_path / "out", calibration="x.jsonl", progress=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").touch()
    data = CalibrationData((Sample(np.zeros(9, np.int32), np.ones(9, bool), 1),))
    with pytest.raises(W4A8Error, match="there: exists; give another name"):
        w4a8jax.quantize(source, tmp_path / "there", equalize=True, calibration=data, progress=False)
    reader, name = CheckpointReader(source), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(W4A8Error, match=r"up_proj.weight: is \[512, 256\], but a fold scales 128 channels"):
        FoldedReader(reader, [Fold(np.zeros(128, np.int8), (name,), ())])
    with pytest.raises(W4A8Error, match="has no tensor x"):
        FoldedReader(reader, [Fold(np.zeros(128, np.int8), ("x",), ())])
    long = CalibrationData((Sample(np.zeros(513, np.int32), np.ones(513, bool), 1),))
    with pytest.raises(W4A8Error, match="a sample of 513 tokens, but the model's context is 512"):
        find_folds(reader, _modules(reader), long)
    record = Fold(np.arange(-4, 4, dtype=np.int8), ("a",), ("b",), block=4).record()
    for change, message in (({"steps": "?"}, "damaged"), ({"block": 3}, "blocks of 3"), ({"rows": None}, "TypeError")):
        (tmp_path / FOLDS).write_text(json.dumps({"folds": [record | change]}))
        with pytest.raises(W4A8Error, match=message):
            read_folds(tmp_path)
    (tmp_path / FOLDS).write_text(json.dumps({"folds": [record]}))
    assert read_folds(tmp_path)[0].steps.tolist() == list(range(-4, 4))

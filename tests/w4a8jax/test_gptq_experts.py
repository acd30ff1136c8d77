"""GPTQ of experts: what each is calibrated on, in how much memory, and whole checkpoints of every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from text_checkpoint import text_checkpoint
from toy import EXPERT_SIZE, EXPERTS, HIDDEN, edited_checkpoint, toy_checkpoint

import w4a8jax
from models.config import MoEConfig
from models.families import family
from models.weights import load_block
from pallas_kernels import W4A8Error, W4Weight
from w4a8jax import quantize_weight
from w4a8jax.calibration import Sample
from w4a8jax.calibration.expert_statistics import expert_groups, expert_hessians, expert_inputs
from w4a8jax.calibration.statistics import ResidualStream, TokenFile, advance
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.quantization import gptq_layers
from w4a8jax.quantization.gptq import factorize

MLP = "model.layers.1.mlp"
CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=128, sparse_layers=(True,))


def _records(count=6, length=100):
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(3, 256, length).tolist()} for _ in range(count)]


def _layer(tokens=300, hidden=256, seed=0):
    """A router fp32 [E, D] that never picks expert 3, inputs in a file, and quantized gate_up for each expert."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    x[:, 0] = 4
    router = rng.standard_normal((4, hidden)).astype(np.float32) / 16
    router[3, 0] = -100
    file = TokenFile(tokens, hidden, "float32")
    file.write(0, x)
    made = [quantize_weight(rng.standard_normal((256, hidden)) * 0.05, search="none") for _ in range(4)]
    return x, router, file, made


def _hessian(x, weight):
    """float64: sum weight * x x^T of FP8 inputs."""
    x8, token_scale = twin.quantize_activations(x)
    value = twin.e4m3_values(x8) * token_scale
    return (value * weight[:, None]).T @ value


def _sent(x, router):
    """bool [T, E]: the two experts of the greatest logits."""
    logits = x.astype(np.float64) @ router.T.astype(np.float64)
    return logits >= np.sort(logits, axis=1)[:, -2:-1]


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_equals_float64(monkeypatch, weight):
    """Hessians of gate_up's and of down's inputs, summed over chunks."""
    monkeypatch.setattr("w4a8jax.calibration.expert_statistics.CHUNK", 128)
    x, router, file, made = _layer()
    weights = np.where(_sent(x, router), 1.0, weight)
    options = {"scheme": "w4a8", "unrouted_weight": weight}
    found = expert_hessians(CONFIG, jnp.asarray(router), file, dict.fromkeys(range(4)), **options)
    for e in range(4):
        np.testing.assert_allclose(found[e], _hessian(x, weights[:, e]), rtol=1e-4, atol=1e-2)
    gate_up = {e: W4Weight.from_checkpoint(jnp.asarray(t.packed), jnp.asarray(t.scale)) for e, t in enumerate(made)}
    found = expert_hessians(CONFIG, jnp.asarray(router), file, gate_up, **options)
    for e, tensor in enumerate(made):
        gate, up = np.split(twin.matmul(x, twin.unpack(tensor.packed), tensor.scale), 2, axis=-1)
        expected = _hessian(gate / (1 + np.exp(-gate)) * up, weights[:, e])
        # A value near the middle of two FP8 values may be rounded otherwise after a sum in fp32.
        np.testing.assert_allclose(found[e], expected, atol=2e-3 * np.abs(expected).max())


def test_an_expert_that_is_never_picked():
    """It has the Hessian of all tokens, of full rank, times their weight."""
    x, router, file, _ = _layer()
    assert not _sent(x, router)[:, 3].any()
    found = expert_hessians(CONFIG, jnp.asarray(router), file, {3: None, 1: None}, scheme="w4a16", unrouted_weight=0.1)
    x = x.astype(np.float64)
    np.testing.assert_allclose(found[3], 0.1 * x.T @ x, rtol=1e-4, atol=1e-3)
    assert np.linalg.matrix_rank(np.asarray(found[3], np.float64)) == 256
    sent = _sent(x, router)[:, 1].astype(float)
    assert 0 < sent.sum() < len(x)
    np.testing.assert_allclose(found[1], (x * np.maximum(sent, 0.1)[:, None]).T @ x, rtol=1e-4, atol=1e-2)


def test_groups():
    one = 4 * 256**2
    assert expert_groups(CONFIG, 256, 2 * one) == [range(2), range(2, 4)]
    assert expert_groups(CONFIG, 256, 3 * one) == [range(3), range(3, 4)]
    assert expert_groups(CONFIG, 256, one - 1) == [range(e, e + 1) for e in range(4)]
    wide = dataclasses.replace(CONFIG, intermediate_size=512)
    assert len(expert_groups(wide, 256, 4 * one)) == 4


def test_masked_tokens_do_not_count(tmp_path):
    """Inputs are those of the tokens that count; masked samples change no bit of them."""
    reader = CheckpointReader(text_checkpoint(tmp_path, model_type="mixtral"))
    members = family(reader.config)
    config = members.decoder_config(reader.config)
    block = load_block(config, members.names, reader, 0, dtype="float32")
    embedding, rng = reader.read("model.embed_tokens.weight"), np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 259, n).astype(np.int32), rng.random(n) > 0.5, 1) for n in (50, 30)]

    def collect(samples):
        with ResidualStream(samples, embedding, config, "float32") as stream, expert_inputs(block, stream) as file:
            return file.read(0, file.tokens).copy()

    plain = collect(samples)
    assert len(plain) == sum(s.loss_mask.sum() for s in samples)
    end = len(samples[1].tokens) - int(np.argmax(samples[1].loss_mask[::-1]))
    longer = Sample(np.append(samples[1].tokens[:end], [7, 8]), np.append(samples[1].loss_mask[:end], [False] * 2), 1)
    np.testing.assert_array_equal(collect([samples[0], longer]), plain)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint whose router never picks expert 2 of layer 1, its data, and its W4A8 GPTQ with the summary."""
    folder = tmp_path_factory.mktemp("made")

    def never(tensors, config):
        direction = np.tile([1, -1], HIDDEN // 2)  # that all tokens share
        embedding, router = tensors["model.embed_tokens.weight"], tensors[f"{MLP}.gate.weight"]
        embedding[:] = embedding + 0.3 * direction
        router[2] = -4 * direction
        dense = "model.layers.0.mlp"  # as wide as an expert, so that less is compiled
        for leaf in ("gate_proj", "up_proj"):
            tensors[f"{dense}.{leaf}.weight"] = tensors[f"{dense}.{leaf}.weight"][:EXPERT_SIZE]
        tensors[f"{dense}.down_proj.weight"] = tensors[f"{dense}.down_proj.weight"][:, :EXPERT_SIZE].copy()
        config["prefix_dense_intermediate_size"] = EXPERT_SIZE

    source = edited_checkpoint(text_checkpoint(folder / "plain", model_type="cohere2_moe"), folder / "bf16", never)
    data = w4a8jax.load_calibration(source, _records())
    summary = w4a8jax.quantize(source, folder / "gptq", method="gptq", calibration=data, search="none", progress=False)
    return source, data, folder / "gptq", summary


def test_all_experts_gain(made):
    """Also one that no token meets; the router is left alone."""
    source, _, target, summary = made
    assert all(x.output_error <= x.rtn_output_error and not x.fallback for x in summary.layers)
    error, nearest = summary.output_errors
    assert error < 0.95 * nearest
    assert len([x.name for x in summary.layers if x.name.startswith(f"{MLP}.experts.")]) == 3 * EXPERTS
    assert len([x.name for x in summary.layers if x.name.startswith(f"{MLP}.shared_experts.")]) == 3
    routers = [CheckpointReader(path).read(f"{MLP}.gate.weight") for path in (source, target)]
    np.testing.assert_array_equal(*routers)


def test_inputs_come_from_the_quantized_model(made):
    """Inputs of the last layer's experts, taken from the finished checkpoint, give the errors that were reported."""
    source, data, target, summary = made
    model, original, found = w4a8jax.load(target, kernels=False), CheckpointReader(source), CheckpointReader(target)
    first, last = model.decoder.layers
    embedding, config = original.read("model.embed_tokens.weight"), model.decoder.config
    with ResidualStream(data.samples, embedding, config, "bfloat16") as stream:
        advance(first, stream)
        with expert_inputs(last, stream) as file:
            x = np.asarray(file.read(0, file.tokens), np.float32)
    sent = _sent(x, np.asarray(last.mlp.router.get_value()))
    assert not sent[:, 2].any()

    def quantized(module):
        return twin.unpack(found.read(f"{module}.weight_packed")), found.read(f"{module}.weight_scale")

    for e in (0, 2):
        parent = f"{MLP}.experts.{e}"
        gate, up = (twin.matmul(x, *quantized(f"{parent}.{leaf}")) for leaf in ("gate_proj", "up_proj"))
        inner = (gate / (1 + np.exp(-gate)) * up).astype(twin.BF16)
        for leaf, inputs in (("up_proj", x), ("down_proj", inner)):
            h = _hessian(inputs, np.where(sent[:, e], 1.0, gptq_layers.UNROUTED_WEIGHT))
            w = original.read(f"{parent}.{leaf}.weight").astype(np.float64)
            difference = twin.weight(*quantized(f"{parent}.{leaf}"), "lut") - w
            expected = np.sqrt(np.sum((difference @ h) * difference) / np.sum((w @ h) * w))
            reported = next(layer.output_error for layer in summary.layers if layer.name == f"{parent}.{leaf}")
            assert reported == pytest.approx(expected, rel=0.05)  # activations in bf16


def test_few_hessians_are_held(tmp_path, monkeypatch):
    """As many as the memory is for, whatever the number of experts; the result is the same to the bit."""
    source = toy_checkpoint(tmp_path, model_type="mixtral", layers=1)
    (source / "tokenizer.json").unlink()
    data = w4a8jax.load_calibration(source, _records(4))
    held = []

    def live():
        return sum(a.shape == (HIDDEN, HIDDEN) and a.dtype == jnp.float32 for a in jax.live_arrays())

    def count(hessian, **options):
        if "expert" in options["name"]:
            held.append(live() - before)
        return factorize(hessian, **options)

    monkeypatch.setattr(gptq_layers, "factorize", count)
    most, results = [], []
    for experts in (EXPERTS, 1):
        monkeypatch.setattr(gptq_layers, "EXPERT_MEMORY", experts * 4 * HIDDEN * EXPERT_SIZE)
        held.clear()
        before = live()
        target = tmp_path / str(experts)
        summary = w4a8jax.quantize(source, target, method="gptq", calibration=data, search="none", progress=False)
        assert all(x.output_error < x.rtn_output_error for x in summary.layers)
        most.append(max(held))
        results.append((target / "model-00001-of-00001.safetensors").read_bytes())
    assert most == [EXPERTS, 1]
    assert results[0] == results[1]


def test_refusals(made, tmp_path):
    source, data, *_ = made
    options = {"method": "gptq", "calibration": data, "progress": False, "allow_unservable": True}
    for weight in (0, 1.5, float("nan")):
        with pytest.raises(W4A8Error, match="unrouted_weight: expected a number above 0, at most 1"):
            w4a8jax.quantize(source, tmp_path / "out", unrouted_weight=weight, **options)
    with pytest.raises(W4A8Error, match=r"experts\.3\.\w+: ignored, but .*experts\.0\.\w+ is not"):
        w4a8jax.quantize(source, tmp_path / "out", ignore=[r"re:.*layers\.1\..*experts\.3\."], **options)

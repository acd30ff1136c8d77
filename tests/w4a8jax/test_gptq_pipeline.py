"""GPTQ of whole checkpoints: each layer on what the quantized ones before it give; the commands."""

import json
import re
import warnings

import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from text_checkpoint import text_checkpoint
from typer.testing import CliRunner

import w4a8jax
from models.families import family
from models.weights import load_block
from pallas_kernels import W4A8Error
from w4a8jax import quantize_weight
from w4a8jax.calibration import DEFAULT_MASK, Sample
from w4a8jax.calibration.show import mask_pieces
from w4a8jax.calibration.statistics import ResidualStream, hessians
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.cli import app
from w4a8jax.quantization import gptq_layers
from w4a8jax.quantization.gptq import factorize, gptq_quantize_weight

MESSAGES = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it"}]


def _records(count=6, length=60, seed=0):
    rng = np.random.default_rng(seed)
    return [{"tokens": rng.integers(3, 259, length).tolist()} for _ in range(count)]


def _tensor(path, module):
    reader = CheckpointReader(path)
    return reader.read(f"{module}.weight_packed"), reader.read(f"{module}.weight_scale")


@pytest.fixture(scope="module", params=["cohere2"])
def made(request, tmp_path_factory):
    """A checkpoint, its calibration data, and its W4A8 GPTQ with the summary."""
    folder = tmp_path_factory.mktemp(request.param)
    source = text_checkpoint(folder / "bf16", model_type=request.param)
    data = w4a8jax.load_calibration(source, _records())
    summary = w4a8jax.quantize(source, folder / "gptq", method="gptq", calibration=data, search="fast", progress=False)
    return source, data, folder / "gptq", summary


def test_the_first_modules(made):
    """Queries of layer 0 are what the solver gives for the embedding's norm."""
    source, data, target, _ = made
    reader = CheckpointReader(source)
    members = family(reader.config)
    config = members.decoder_config(reader.config)
    block = load_block(config, members.names, reader, 0, dtype=jnp.bfloat16)
    embedding = reader.read("model.embed_tokens.weight")
    with ResidualStream(data.samples, embedding, config, jnp.bfloat16) as stream:
        h = hessians(block, stream, ["attention.qkv"], fp8=True)["attention.qkv"]
    module = "model.layers.0.self_attn.q_proj"
    expected = gptq_quantize_weight(reader.read(f"{module}.weight"), factorize(h), search="fast")
    packed, scale = _tensor(target, module)
    np.testing.assert_array_equal(packed, expected.tensor.packed)
    np.testing.assert_array_equal(scale, expected.tensor.scale)


def test_all_layers_gain_and_the_result_loads(made):
    _, _, target, summary = made
    assert len(summary.layers) == 14
    assert all(x.output_error < x.rtn_output_error and not x.fallback for x in summary.layers)
    error, nearest = summary.output_errors
    assert error < 0.95 * nearest
    assert "6 samples, 360 tokens" in summary.calibration
    assert summary.calibration_tokens == 360
    assert 0 < summary.seconds["calibrate"] < summary.seconds["total"]
    record = json.loads((target / "quantization_summary.json").read_text())
    assert record["method"] == "gptq"
    assert w4a8jax.verify(target).servable
    assert w4a8jax.load(target).generate("ab", max_new_tokens=2).tokens


def test_inputs_come_from_the_quantized_model(made):
    """The last module's inputs, taken from the finished checkpoint, give the error that was reported."""
    source, data, target, summary = made
    module = "model.layers.1.mlp.down_proj"
    model = w4a8jax.load(target, kernels=False)
    seen = []
    mlp = model.decoder.layers[1].mlp
    for sample in data.samples:
        x = _mlp_input(model.decoder, sample.tokens)
        gate, up = jnp.split(mlp.gate_up(x), 2, axis=-1)
        seen.append(np.asarray((gate / (1 + jnp.exp(-gate)) * up).astype(jnp.bfloat16), np.float64)[0])
    x = np.concatenate(seen)
    w = CheckpointReader(source).read(f"{module}.weight").astype(np.float64)
    packed, scale = _tensor(target, module)
    value = twin.weight(twin.unpack(packed), scale, "lut")
    x8, token_scale = twin.quantize_activations(x)
    x = twin.e4m3_values(x8) * token_scale
    found = np.linalg.norm(x @ (value - w).T) / np.linalg.norm(x @ w.T)
    reported = next(layer.output_error for layer in summary.layers if layer.name == module)
    assert reported == pytest.approx(found, rel=0.05)  # activations in bf16


def _mlp_input(decoder, tokens):
    """The input of layer 1's MLP, [1, T, D], by the decoder's own layers."""
    from models.layers.rope import rope_table

    config = decoder.config
    position = jnp.arange(len(tokens))[None]
    table = rope_table(config.rope, config.head_dim, config.max_context, position)
    start = jnp.zeros((1,), jnp.int32)
    x = decoder.embedding.get_value()[jnp.asarray(tokens)][None]
    x, _ = decoder.layers[0](x, table, start, None, None, True)
    block = decoder.layers[1]
    normed = block.input_norm(x)
    attended, _ = block.attention(normed, table, start, None, None, True)
    return normed if block.mlp_norm is None else block.mlp_norm(x + attended)


def test_a_hessian_without_a_factor_falls_back_loudly(tmp_path, monkeypatch):
    source = text_checkpoint(tmp_path / "bf16")

    def refuse(hessian, *, name, **options):
        if name == "model.layers.1, input of mlp.down":
            raise W4A8Error("no factor")
        return factorize(hessian, name=name, **options)

    monkeypatch.setattr(gptq_layers, "factorize", refuse)
    data = w4a8jax.load_calibration(source, _records())
    with pytest.warns(UserWarning, match=r"layers.1.mlp.down_proj: rounded to nearest instead of GPTQ: no factor"):
        summary = w4a8jax.quantize(
            source, tmp_path / "out", method="gptq", calibration=data, search="fast", progress=False
        )
    assert [x.name for x in summary.layers if x.fallback] == ["model.layers.1.mlp.down_proj"]
    module = "model.layers.1.mlp.down_proj"
    packed, _ = _tensor(tmp_path / "out", module)
    expected = quantize_weight(CheckpointReader(source).read(f"{module}.weight"))
    np.testing.assert_array_equal(packed, expected.packed)


def test_refusals(tmp_path):
    source = text_checkpoint(tmp_path / "bf16")
    for options, message in (
        ({"method": "gptq"}, "gptq needs data"),
        ({"calibration": "x.jsonl"}, "rounding to nearest uses none"),
        ({"method": "awq"}, "method: must be rtn or gptq"),
        ({"method": "gptq", "calibration": tmp_path / "none.jsonl"}, "cannot be read"),
    ):
        with pytest.raises(W4A8Error, match=message):
            w4a8jax.quantize(source, tmp_path / "out", progress=False, **options)
    data = w4a8jax.load_calibration(source, _records(1))
    with pytest.raises(W4A8Error, match=r"k_proj: ignored, but .*q_proj is not"):
        w4a8jax.quantize(
            source, tmp_path / "out", method="gptq", calibration=data, progress=False, ignore=["re:.*k_proj"],
            allow_unservable=True,
        )  # fmt: skip


def test_commands(tmp_path):
    source = text_checkpoint(tmp_path / "bf16")
    file = tmp_path / "data.jsonl"
    lines = [{"messages": MESSAGES}, {"text": "abcdefgh" * 8}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CliRunner().invoke(app, [str(a) for a in arguments])

    shown = run("calibrate", source, file, "--show-mask")
    assert shown.exit_code == 0, shown.output
    assert "⟦<bos>user: ⟧Say it.⟦" in shown.stdout
    assert "2 samples" in shown.stdout
    counts = json.loads(run("calibrate", source, file, "--json", "-o", tmp_path / "ids.jsonl").stdout)
    assert (counts["samples"], counts["dropped"]) == (2, 0)
    again = json.loads(run("calibrate", source, tmp_path / "ids.jsonl", "--json").stdout)
    assert (again["tokens"], again["counted"]) == (counts["tokens"], counts["counted"])
    everything = json.loads(run("calibrate", source, file, "--json", "--mask", "none").stdout)
    assert everything["counted"] == everything["tokens"] > counts["counted"]
    refused = run("calibrate", source, file, "--mask", "tool")
    assert refused.exit_code == 1
    assert re.match(r"error: mask: 'tool' is unknown", refused.stderr)
    result = run(
        "quantize", source, tmp_path / "out", "--method", "gptq", "--calibration", file, "--search", "fast", "-q"
    )
    assert result.exit_code == 0, result.output
    assert "error of layers' outputs" in result.stdout
    assert run("calibrate", source, file, "--show-mask", "--line", "7").exit_code == 1


def test_pieces_of_a_mask(tmp_path):
    """A character of several tokens goes to the token that completes it."""
    source = text_checkpoint(tmp_path / "bf16")
    tokenizer = w4a8jax.Tokenizer.from_directory(source)
    ids = tokenizer.encode("aéb", add_special_tokens=False)
    sample = Sample(np.array(ids, np.int32), np.array([False, False, True, True]), 1)
    assert mask_pieces(sample, tokenizer) == [(False, "a"), (True, "éb")]
    assert DEFAULT_MASK == ("system", "tools", "template")

"""Mixtures of experts from checkpoint to text: layouts in and out, the command line, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from text_checkpoint import text_checkpoint
from toy import EXPERT_SIZE, EXPERTS, HIDDEN, MOE, Edit, edited_checkpoint, save_checkpoint, toy_config, toy_shapes
from typer.testing import CliRunner

import w4a8jax
from pallas_kernels import W4A8Error, W4Weight, tuning
from w4a8jax.checkpoints.contents import expected_shapes
from w4a8jax.checkpoints.experts import split_experts
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorInfo
from w4a8jax.cli import app

# The names of a layer's experts: gate, up, down.
LEAVES = {kind: ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj") for kind in MOE}


def parent(kind: str) -> str:
    return "model.layers.1." + ("block_sparse_moe" if kind == "mixtral" else "mlp")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 and W4A8 checkpoints of each family, and a W4A16 one, all of which take text."""
    folder = tmp_path_factory.mktemp("experts")
    for kind in MOE:
        text_checkpoint(folder / kind, model_type=kind)
        w4a8jax.quantize(folder / kind, folder / f"{kind}-w4a8", search="none", code_min=-8, progress=False)
    w4a8jax.quantize(folder / "mixtral", folder / "mixtral-w4a16", scheme="w4a16", search="none", progress=False)
    return folder


@pytest.fixture
def changed(checkpoints: Path, tmp_path: Path) -> Callable[[str, Edit], Path]:
    """A copy of a checkpoint with its tensors and config changed."""
    return lambda name, edit: edited_checkpoint(checkpoints / name, tmp_path / name, edit)


def fuse(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The checkpoint as transformers has it in memory."""
    result = {k.replace("block_sparse_moe", "mlp"): v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(2):
        experts = f"{parent(kind)}.experts".replace("layers.1", f"layers.{layer}")
        if f"{experts}.0.{LEAVES[kind][0]}.weight" not in tensors:
            continue
        gate, up, down = ([tensors[f"{experts}.{e}.{x}.weight"] for e in range(EXPERTS)] for x in LEAVES[kind])
        name = f"model.layers.{layer}.mlp.experts"
        result[f"{name}.gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
        result[f"{name}.down_proj"] = np.stack(down)
    return result


@pytest.mark.parametrize("kind", MOE)
def test_every_tensor_is_expected(kind: str):
    config = toy_config(kind)
    assert expected_shapes(config) == toy_shapes(config)


@pytest.mark.parametrize("kind", MOE)
def test_every_expert_has_its_place(checkpoints: Path, kind: str):
    reader = CheckpointReader(checkpoints / kind)
    mlp = w4a8jax.load(checkpoints / kind).decoder.layers[1].mlp
    router = mlp.router.get_value()
    assert router.dtype == jnp.float32
    np.testing.assert_array_equal(router, reader.read(f"{parent(kind)}.gate.weight").astype(np.float32))
    gate, up, down = LEAVES[kind]
    for e in range(EXPERTS):
        gate_up = [reader.read(f"{parent(kind)}.experts.{e}.{leaf}.weight") for leaf in (gate, up)]
        np.testing.assert_array_equal(mlp.experts.gate_up[...][e], np.concatenate(gate_up))
        np.testing.assert_array_equal(
            mlp.experts.down[...][e], reader.read(f"{parent(kind)}.experts.{e}.{down}.weight")
        )


def test_quantized_experts_are_one_weight(checkpoints: Path):
    reader = CheckpointReader(checkpoints / "qwen3_moe-w4a8")
    experts = w4a8jax.load(checkpoints / "qwen3_moe-w4a8").decoder.layers[1].mlp.experts
    weight = experts.gate_up.get_value()
    assert (experts.scheme, weight.shape, weight.numerics) == ("w4a8", (EXPERTS, 2 * EXPERT_SIZE, HIDDEN), "lut")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    up = W4Weight.from_checkpoint(jnp.asarray(reader.read(f"{name}_packed")), jnp.asarray(reader.read(f"{name}_scale")))
    np.testing.assert_array_equal(weight.dequantize()[2, EXPERT_SIZE:], up.dequantize())
    experts = w4a8jax.load(checkpoints / "mixtral-w4a16").decoder.layers[0].mlp.experts
    assert (experts.scheme, experts.down.get_value().numerics) == ("w4a16", "exact")


def test_the_expert_with_a_negative_scale_is_named(changed: Callable[[str, Edit], Path]):
    name = "model.layers.1.mlp.experts.2.down_proj.weight_scale"
    path = changed("qwen3_moe-w4a8", lambda tensors, config: tensors[name].__setitem__((3, 0), -0.25))
    with pytest.raises(W4A8Error, match=f"{re.escape(name)}: 1 of .* are negative.* row 3, group 0: -0.25"):
        w4a8jax.load(path)


@pytest.mark.parametrize(("scheme", "form"), [("w4a8", "two_tables"), ("w4a16", "bf16")])
def test_experts_for_kernels(checkpoints: Path, scheme: str, form: str, monkeypatch: pytest.MonkeyPatch):
    """As each scheme's kernel takes them, whatever the checkpoint was made for."""
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    experts = w4a8jax.load(checkpoints / "qwen3_moe-w4a8", scheme=scheme).decoder.layers[1].mlp.experts
    assert experts.scheme == scheme
    for weight in (experts.gate_up.get_value(), experts.down.get_value()):
        assert (weight.scheme, weight.form, weight.shape[0]) == (scheme, form, EXPERTS)


@pytest.mark.parametrize("kind", MOE)
def test_the_fused_layout_is_the_same_checkpoint(checkpoints: Path, tmp_path: Path, kind: str):
    reader = CheckpointReader(checkpoints / kind)
    tensors = {name: reader.read(name) for name in reader.tensors}
    fused = save_checkpoint(tmp_path / "fused", reader.config, fuse(tensors, kind), sharded=True)
    for name in reader.sidecars():
        (fused / name).write_bytes((reader.path / name).read_bytes())
    read = CheckpointReader(fused)
    assert read.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(read.read(name), array)
    w4a8jax.quantize(fused, tmp_path / "w4a8", search="none", code_min=-8, progress=False)
    written, expected = (CheckpointReader(path) for path in (tmp_path / "w4a8", checkpoints / f"{kind}-w4a8"))
    assert written.tensors.keys() == expected.tensors.keys()
    assert all(np.array_equal(written.read(name), expected.read(name)) for name in expected.tensors)


def test_routers_stay_as_they_are(checkpoints: Path):
    for kind in MOE:
        reader, source = CheckpointReader(checkpoints / f"{kind}-w4a8"), CheckpointReader(checkpoints / kind)
        name = f"{parent(kind)}.gate.weight"
        assert reader.tensors[name].dtype == source.tensors[name].dtype
        np.testing.assert_array_equal(reader.read(name), source.read(name))
        packed = {n.rpartition(".")[0] for n in reader.tensors if n.endswith("weight_packed")}
        assert f"{parent(kind)}.experts.3.{LEAVES[kind][2]}" in packed
        assert ("model.layers.1.mlp.shared_experts.up_proj" in packed) == (kind == "cohere2_moe")


@pytest.mark.parametrize(
    ("shape", "leaf", "message"),
    [
        ((4, 513, 256), "gate_up_proj", r"expected \[experts, 2 \* intermediate, hidden\], found \[4, 513, 256\]"),
        ((4, 256), "down_proj", r"expected \[experts, hidden, intermediate\], found \[4, 256\]"),
    ],
)
def test_fused_experts_of_other_shapes_are_refused(shape: tuple, leaf: str, message: str):
    name = f"model.layers.0.mlp.experts.{leaf}"
    with pytest.raises(W4A8Error, match=message):
        split_experts({name: TensorInfo(name, np.dtype(np.float16), shape, Path("x"), 0)}, "qwen3_moe")


def test_experts_given_twice_are_refused():
    infos = {
        name: TensorInfo(name, np.dtype(np.float16), shape, Path("x"), 0)
        for name, shape in (
            ("model.layers.0.mlp.experts.1.down_proj.weight", (4, 4)),
            ("model.layers.0.mlp.experts.down_proj", (2, 4, 4)),
        )
    }
    with pytest.raises(W4A8Error, match=r"experts\.1\.down_proj\.weight, which is there by itself too"):
        split_experts(infos, "qwen3_moe")


def _drop(*names: str) -> Edit:
    return lambda tensors, config: [tensors.pop(name) for name in list(tensors) if name.startswith(names)]


def _narrow(name: str) -> Edit:
    return lambda tensors, config: tensors.update({name: tensors[name][: EXPERT_SIZE // 2]})


def _set(key: str, value: object) -> Edit:
    return lambda tensors, config: config.update({key: value})


def _quantize_router(kind: str) -> Edit:
    def edit(tensors: dict[str, np.ndarray], config: dict) -> None:
        gate = f"{parent(kind)}.gate"
        del tensors[f"{gate}.weight"]
        tensors[f"{gate}.weight_packed"] = np.zeros((EXPERTS, HIDDEN // 8), np.int32)
        tensors[f"{gate}.weight_scale"] = np.ones((EXPERTS, HIDDEN // 128), np.float16)
        tensors[f"{gate}.weight_shape"] = np.array([EXPERTS, HIDDEN])
        config["quantization_config"]["ignore"] = ["lm_head"]

    return edit


EXPERT = "model.layers.1.mlp.experts.2"
BAD = [
    ("cohere2_moe-w4a8", _quantize_router("cohere2_moe"), r"mlp\.gate.*is a router, which must not be quantized"),
    ("mixtral-w4a8", _quantize_router("mixtral"), r"block_sparse_moe\.gate.*is a router, which must not be quantized"),
    ("qwen3_moe", _drop(f"{EXPERT}.down_proj"), r"experts\.2\.down_proj\.weight.*missing"),
    ("qwen3_moe", _drop(EXPERT), r"experts\.2\..*missing"),
    ("qwen3_moe-w4a8", _drop(EXPERT), r"experts\.2\..*missing"),
    ("qwen3_moe", _narrow(f"{EXPERT}.up_proj.weight"), r"experts\.2\.up_proj\.weight.*\[256, 256\].*\[128, 256\]"),
    ("qwen3_moe-w4a8", _narrow(f"{EXPERT}.up_proj.weight_packed"), r"experts\.2\.up_proj\.weight_"),
    ("qwen3_moe", _set("num_experts", 3), r"mlp\.gate\.weight: expected \[3, 256\] by config\.json, found \[4, 256\]"),
    (
        "qwen3_moe",
        _set("num_experts_per_tok", 5),
        r"num_experts_per_tok must be 1 \.\. 4, the number of experts, found 5",
    ),
    ("mixtral", _set("num_experts_per_tok", 0), r"num_experts_per_tok must be 1 \.\. 4"),
]


@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_what_does_not_fit_is_refused(changed: Callable[[str, Edit], Path], name: str, edit: Edit, message: str):
    path = changed(name, edit)
    with pytest.raises(W4A8Error, match=message) as caught:
        w4a8jax.load(path)
    assert "\n" not in str(caught.value)
    if not name.endswith("w4a8"):  # and before anything is written
        with pytest.raises(W4A8Error):
            w4a8jax.quantize(path, path.with_name("out"), search="none", progress=False)
        assert not path.with_name("out").exists()


def test_experts_quantized_in_part_are_refused(changed: Callable[[str, Edit], Path]):
    def edit(tensors: dict[str, np.ndarray], config: dict) -> None:
        _drop(f"{EXPERT}.up_proj")(tensors, config)
        tensors[f"{EXPERT}.up_proj.weight"] = np.zeros((EXPERT_SIZE, HIDDEN), np.float16)
        config["quantization_config"]["ignore"].append(f"{EXPERT}.up_proj")

    with pytest.raises(W4A8Error, match=r"experts\.2\.up_proj: not quantized, but its siblings are; 8 matrices"):
        w4a8jax.load(changed("qwen3_moe-w4a8", edit))


def output(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", ["cohere2_moe", "qwen3_moe-w4a8"])
def test_inspect_shows_the_experts(checkpoints: Path, name: str):
    found = json.loads(output("inspect", checkpoints / name, "--json", "--quiet"))
    reader = CheckpointReader(checkpoints / name)
    experts = {key: info for key, info in reader.tensors.items() if ".experts." in key}
    layers = 1 if name == "cohere2_moe" else 2
    parameters = 3 * HIDDEN * EXPERT_SIZE
    assert found["experts"] == {
        "layers": layers,
        "per_layer": EXPERTS,
        "top_k": 2,
        "parameters": parameters,
        "nbytes": sum(info.nbytes for info in experts.values()) // (layers * EXPERTS),
        "total_bytes": sum(info.nbytes for info in experts.values()),
        "active_parameters": found["parameters"] - layers * (EXPERTS - 2) * parameters,
    }
    text = " ".join(output("inspect", checkpoints / name, "--by-kind", "--quiet").split())
    assert f"{EXPERTS} in each of {layers} layers, {parameters:,} parameters" in text
    assert "a token meets 2 a layer" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["cohere2_moe", "mixtral"])
def test_routers_keep_their_dtype(changed: Callable[[str, Edit], Path], tmp_path: Path, kind: str, dtype: type):
    """And nothing else does: the other floats are written in bf16."""
    values = np.random.default_rng(0).standard_normal((EXPERTS, HIDDEN)).astype(dtype)
    router, norm = f"{parent(kind)}.gate.weight", "model.norm.weight"

    def edit(tensors: dict[str, np.ndarray], config: dict) -> None:
        tensors[router], tensors[norm] = values, tensors[norm].astype(dtype)

    w4a8jax.quantize(changed(kind, edit), tmp_path / "w4a8", search="none", progress=False)
    reader = CheckpointReader(tmp_path / "w4a8")
    assert reader.tensors[router].dtype == dtype
    np.testing.assert_array_equal(reader.read(router), values)
    assert reader.tensors[norm].dtype.name == "bfloat16"
    loaded = w4a8jax.load(tmp_path / "w4a8").decoder.layers[1].mlp.router.get_value()
    np.testing.assert_array_equal(loaded, values.astype(np.float32))


@pytest.mark.parametrize("kind", MOE)
def test_the_command_line(checkpoints: Path, tmp_path: Path, kind: str):
    """quantize, verify, eval and generate."""
    source, target = checkpoints / kind, tmp_path / "w4a8"
    output("quantize", source, target, "--search", "none", "--quiet")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    report = json.loads(output("verify", target, "--against", source, "--text", text, "--json", "--quiet"))
    assert report["ok"], report
    perplexity = json.loads(output("eval", target, "--text", text, "--json", "--quiet"))
    assert np.isfinite(perplexity["perplexity"])
    assert len(output("generate", target, "--prompt", "The quick", "--max-tokens", "8")) > 0

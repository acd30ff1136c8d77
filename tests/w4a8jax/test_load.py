"""`load`: a checkpoint's tensors reach their places, and what does not fit its config is refused by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toy import Edit, edited_checkpoint, save_checkpoint, toy_config, toy_tensors

import w4a8jax
from pallas_kernels import W4A8Error, W4Weight, tuning
from w4a8jax.checkpoints.reader import CheckpointReader

FAMILIES = ("cohere2", "llama", "qwen3")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    for family in FAMILIES:
        config = toy_config(family)
        source = save_checkpoint(folder / family, config, toy_tensors(config))
        (source / "tokenizer.json").unlink()
        for scheme in ("w4a8", "w4a16"):
            target = folder / f"{family}-{scheme}"
            w4a8jax.quantize(source, target, scheme=scheme, search="none", code_min=-8, progress=False)
    return folder


@pytest.fixture
def changed(checkpoints: Path, tmp_path: Path) -> Callable[[str, Edit], Path]:
    """A copy of a checkpoint with its tensors and config changed."""
    return lambda name, edit: edited_checkpoint(checkpoints / name, tmp_path / name, edit)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_place(checkpoints: Path, family: str) -> None:
    reader = CheckpointReader(checkpoints / family)
    decoder = w4a8jax.load(checkpoints / family).decoder
    block = decoder.layers[0]
    rows = [reader.read(f"{ATTENTION}.{name}_proj.weight") for name in "qkv"]
    np.testing.assert_array_equal(block.attention.qkv.weight[...], np.concatenate(rows))
    rows = [reader.read(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up")]
    np.testing.assert_array_equal(block.mlp.gate_up.weight[...], np.concatenate(rows))
    np.testing.assert_array_equal(decoder.embedding[...], reader.read("model.embed_tokens.weight"))
    assert (decoder.lm_head is None) == (family == "cohere2")


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_are_fused_by_rows(checkpoints: Path, family: str) -> None:
    path = checkpoints / f"{family}-w4a8"
    reader = CheckpointReader(path)
    exact = w4a8jax.load(path, numerics="exact").decoder.layers[0].attention.qkv
    lut = w4a8jax.load(path).decoder.layers[0].attention.qkv
    parts = [
        W4Weight.from_checkpoint(
            jnp.asarray(reader.read(f"{ATTENTION}.{name}_proj.weight_packed")),
            jnp.asarray(reader.read(f"{ATTENTION}.{name}_proj.weight_scale")),
        )
        for name in "qkv"
    ]
    fused = lut.weight.get_value()
    assert (lut.scheme, fused.numerics, fused.code_min) == ("w4a8", "lut", -8)
    np.testing.assert_array_equal(fused.dequantize(), jnp.concatenate([part.dequantize() for part in parts]))
    assert exact.weight.get_value().numerics == "exact"
    np.testing.assert_array_equal(exact.weight.get_value().codes, fused.codes)


def test_the_lowest_code_is_found(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "symmetric"
    w4a8jax.quantize(checkpoints / "llama", path, search="none", code_min=-7, progress=False)
    assert w4a8jax.load(path).decoder.layers[0].mlp.down.weight.get_value().code_min == -7


def test_schemes(checkpoints: Path) -> None:
    down = w4a8jax.load(checkpoints / "llama-w4a16").decoder.layers[0].mlp.down
    assert (down.scheme, down.weight.get_value().numerics) == ("w4a16", "exact")
    tokens = np.arange(20)
    logits = {
        scheme: w4a8jax.load(checkpoints / "llama-w4a8", scheme=scheme, dtype="float32").logits(tokens)
        for scheme in ("w4a8", "w4a16")
    }
    assert not np.array_equal(logits["w4a8"], logits["w4a16"])


@pytest.mark.parametrize(("scheme", "form"), [("w4a8", "two_tables"), ("w4a16", "bf16")])
def test_weights_for_kernels(checkpoints: Path, scheme: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    for stored in ("w4a8", "w4a16"):
        layers = w4a8jax.load(checkpoints / f"llama-{stored}", scheme=scheme, kernels=True).decoder.layers
        for linear in (layers[0].attention.qkv, layers[1].mlp.down):
            assert (linear.scheme, linear.weight.get_value().form) == (scheme, form)


def test_group_sizes_of_others_are_read(changed: Callable[[str, Edit], Path]) -> None:
    def halve(tensors: dict[str, np.ndarray], config: dict) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = np.repeat(tensors[name], 2, axis=1)
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64

    assert w4a8jax.load(changed("llama-w4a8", halve)).decoder.layers[0].mlp.down.weight.get_value().group_size == 64


def _remove(name: str) -> Edit:
    return lambda tensors, config: tensors.pop(name)


def _set(key: str, value: object) -> Edit:
    return lambda tensors, config: config.update({key: value})


def _put(name: str, value: np.ndarray) -> Edit:
    return lambda tensors, config: tensors.update({name: value})


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("llama", _remove(f"{MLP}.up_proj.weight"), f"{MLP}.up_proj.weight: missing from the checkpoint"),
        ("llama", _remove("lm_head.weight"), "lm_head.weight: missing"),
        ("llama", _put("model.layers.0.extra.weight", np.ones(3, np.float32)), "extra.weight: in the checkpoint, but"),
        ("llama", _put("model.layers.7.mlp.up_proj.weight", np.ones(3, np.float32)), "has no place for it"),
        ("llama", _set("hidden_size", 512), r"expected \[256, 512\] by config.json, found \[256, 256\]"),
        ("llama", _set("num_key_value_heads", 4), r"k_proj.weight: expected \[256, 256\] by config.json"),
        ("llama", _set("model_type", "mamba"), "model_type 'mamba' is unknown; known are cohere2, cohere2_moe, llama"),
        ("qwen3", _remove(f"{ATTENTION}.q_norm.weight"), "q_norm.weight: missing"),
        ("llama-w4a8", _remove(f"{ATTENTION}.k_proj.weight_scale"), "k_proj.weight_scale: is missing"),
        ("llama-w4a8", _set("intermediate_size", 256), "weight_packed: expected .* by config.json"),
        ("llama-w4a8", _set("quantization_config", None), "has no quantization_config"),
    ],
)
def test_what_does_not_fit_is_refused(
    changed: Callable[[str, Edit], Path], name: str, edit: Edit, message: str
) -> None:
    with pytest.raises(W4A8Error, match=message) as caught:
        w4a8jax.load(changed(name, edit))
    assert "\n" not in str(caught.value)


def test_a_fused_layer_quantized_in_part_is_refused(changed: Callable[[str, Edit], Path]) -> None:
    def plain(tensors: dict[str, np.ndarray], config: dict) -> None:
        for part in ("packed", "scale", "shape"):
            del tensors[f"{ATTENTION}.k_proj.weight_{part}"]
        tensors[f"{ATTENTION}.k_proj.weight"] = np.zeros((128, 256), np.float32)
        config["quantization_config"]["ignore"].append(f"{ATTENTION}.k_proj")

    with pytest.raises(W4A8Error, match=r"k_proj: not quantized, but its siblings are"):
        w4a8jax.load(changed("llama-w4a8", plain))


@pytest.mark.parametrize("name", ["llama-w4a8", "llama-w4a16"])
@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_scales_that_are_none_are_refused(changed: Callable[[str, Edit], Path], name: str, value: float) -> None:
    """Whatever computes with them: the tensor is named, and the first place."""
    damaged = f"{MLP}.up_proj.weight_scale"

    def damage(tensors: dict[str, np.ndarray], config: dict) -> None:
        tensors[damaged][[7, 9], 1] = value

    size = CheckpointReader(changed(name, lambda *_: None)).tensors[damaged].size
    message = f"{damaged}: 2 of {size} scales are negative, NaN or infinite, the first in row 7, group 1: {value}"
    with pytest.raises(W4A8Error, match=re.escape(message)):
        w4a8jax.load(changed(name, damage))


def test_minus_zero_is_a_scale(changed: Callable[[str, Edit], Path]) -> None:
    def zero(sign: float) -> Edit:
        return lambda tensors, config: tensors[f"{MLP}.up_proj.weight_scale"].__setitem__(7, sign * 0.0)

    logits = [w4a8jax.load(changed("llama-w4a8", zero(sign))).logits(np.arange(20)) for sign in (-1.0, 1.0)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"scheme": "w4a8"}, "is not quantized; run `w4a8jax quantize`"),
        ("llama-w4a8", {"scheme": "bf16"}, "can run as w4a8 or w4a16, not as bf16"),
        ("llama-w4a8", {"scheme": "w8a8"}, "expected bf16, w4a8, w4a16, found 'w8a8'"),
        ("llama-w4a8", {"numerics": "fast"}, "expected lut or exact, found 'fast'"),
        ("llama", {"dtype": "int8"}, "expected one of bfloat16, float16, float32, found 'int8'"),
        ("llama", {"max_context": 1024}, "1024"),
    ],
)
def test_options_are_checked(checkpoints: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(W4A8Error, match=re.escape(message)):
        w4a8jax.load(checkpoints / name, **options)


def test_a_damaged_generation_config_is_named(checkpoints: Path, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoints / "llama", tmp_path / "copy")
    (path / "generation_config.json").write_text("{")
    with pytest.raises(W4A8Error, match=r"generation_config\.json: is no JSON"):
        w4a8jax.load(path)

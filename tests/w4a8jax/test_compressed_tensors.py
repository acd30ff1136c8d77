"""The quantization_config of compressed-tensors: ours, other people's, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from toy import save_checkpoint, toy_config, toy_tensors

from pallas_kernels.errors import W4A8Error
from w4a8jax.checkpoints.compressed_tensors import (
    QuantizationGroup,
    QuantizedModule,
    build,
    fused_siblings,
    is_linear,
    matches,
    packed_specs,
    parse,
    quantized_modules,
)
from w4a8jax.checkpoints.reader import CheckpointReader

Q = "model.layers.0.self_attn.q_proj"


def theirs(**weights: Any) -> dict[str, Any]:
    """A config as llm-compressor writes it, with all its fields."""
    return {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 128,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                }
                | weights,
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }


FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}


def parsed(raw: dict[str, Any], key: str = "quantization_config"):
    result = parse({key: raw})
    assert result is not None
    return result


def test_builds_what_the_format_asks_for() -> None:
    config = build("w4a8", ["lm_head"])
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights, "input_activations": inputs}
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    assert "input_activations" not in build("w4a16")["config_groups"]["group_0"]
    with pytest.raises(W4A8Error, match="scheme: must be w4a8 or w4a16 for a quantized checkpoint, found 'w8a8'"):
        build("w8a8")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_reads_what_it_builds(scheme: Any) -> None:
    config = parsed(build(scheme))
    assert config.groups == (QuantizationGroup(("Linear",), scheme, 128),)
    assert config.scheme == scheme
    assert config.group_of(Q) == config.groups[0]
    assert config.group_of("lm_head") is None
    assert config.group_of("model.layers.3.mlp.gate") is None
    assert config.group_of("model.layers.3.mlp.gate_proj") is not None
    assert config.group_of("model.layers.3.block_sparse_moe.gate") is None


def test_building_twice_shares_nothing() -> None:
    build()["config_groups"]["group_0"]["input_activations"]["num_bits"] = 3
    assert build()["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8


def test_reads_other_peoples() -> None:
    assert parsed(theirs()).scheme == "w4a16"
    raw = theirs()
    raw["config_groups"]["group_0"]["input_activations"] = FP8
    assert parsed(raw).scheme == "w4a8"
    assert parsed(theirs(group_size=32)).groups[0].group_size == 32
    assert parsed(theirs(group_size=-1, strategy="channel")).groups[0].group_size is None
    assert parsed(theirs(actorder="weight")).scheme == "w4a16"
    del (raw := theirs())["config_groups"]["group_0"]["format"]
    assert parsed(raw).scheme == "w4a16"
    (raw := theirs())["format"] = "mixed-precision"
    assert parsed(raw).scheme == "w4a16"
    assert parse({"model_type": "llama"}) is None


def test_older_spellings() -> None:
    assert parsed(theirs(), key="compression_config").scheme == "w4a16"
    nested = {"quant_method": "compressed-tensors", "quantization_config": theirs(), "sparsity_config": None}
    assert parsed(nested).scheme == "w4a16"
    presets = {"config_groups": {"W4AFP8": ["Linear"]}, "format": "pack-quantized"}
    assert parsed(presets).groups == (QuantizationGroup(("Linear",), "w4a8", 128),)


def test_kv_cache_scheme_is_left_out_with_a_warning() -> None:
    config = parsed(theirs() | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert config.warnings == (
        "config.json: quantization_config.kv_cache_scheme is ignored: the KV cache stays in bf16",
    )


def test_targets_and_ignore() -> None:
    raw = theirs()
    raw["config_groups"]["group_0"]["targets"] = ["re:.*mlp\\..*"]
    second = copy.deepcopy(raw["config_groups"]["group_0"])
    second["targets"], second["weights"]["group_size"] = [Q, "re:.*mlp\\.up_proj$"], 64
    raw["config_groups"]["group_1"] = second
    raw["ignore"] = ["re:.*layers\\.1\\.", "model.layers.0.mlp.down_proj"]
    config = parsed(raw)
    sizes = {name: group and group.group_size for name in (
        Q, "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj",
    ) for group in [config.group_of(name)]}  # fmt: skip
    assert list(sizes.values()) == [64, None, 128, 128, None, None]


def test_mixed_schemes_have_no_single_one() -> None:
    raw = theirs()
    raw["config_groups"]["group_1"] = raw["config_groups"]["group_0"] | {"input_activations": FP8, "targets": [Q]}
    config = parsed(raw)
    assert config.group_of(Q).scheme == "w4a8"  # type: ignore[union-attr]
    with pytest.raises(W4A8Error, match="config_groups mix the schemes w4a16 and w4a8"):
        _ = config.scheme


def test_matching() -> None:
    assert matches("a.b", "a.b")
    assert not matches("a.b.c", "a.b")
    assert not matches("a.b", "b")
    assert matches("a.b.c", "re:a.b")  # from the start, not to the end
    assert not matches("x.a.b", "re:a.b")
    with pytest.raises(W4A8Error, match="pattern 're:\\(' is no regular expression"):
        matches("a", "re:(")


@pytest.mark.parametrize(
    ("names", "linear"),
    [
        (f"{Q} layers.0.mlp.down_proj model.layers.1.mlp.shared_experts.gate_proj", True),
        ("model.layers.1.mlp.experts.3.up_proj model.layers.1.block_sparse_moe.experts.3.w1", True),
        ("lm_head model.embed_tokens model.layers.0.input_layernorm multi_modal_projector.linear_proj", False),
        ("model.layers.0.mlp.gate model.layers.0.block_sparse_moe.gate", False),
    ],
)
def test_which_modules_are_linear(names: str, linear: bool) -> None:
    assert {name: is_linear(name) for name in names.split()} == dict.fromkeys(names.split(), linear)


GROUP = "config.json: quantization_config.config_groups.group_0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, f"{GROUP}.weights.num_bits: must be 4, found 8"),
        ({"type": "float"}, f"{GROUP}.weights.type: must be int, found float"),
        ({"symmetric": False}, f"{GROUP}.weights.symmetric: must be True, found False"),
        ({"dynamic": True}, f"{GROUP}.weights.dynamic: must be False, found True"),
        ({"strategy": "tensor"}, f"{GROUP}.weights.strategy: must be group or channel, found tensor"),
        ({"group_size": 0}, f"{GROUP}.weights.group_size: must be positive, found 0"),
        ({"actorder": "sideways"}, f"{GROUP}.weights.actorder: must be None or False or True"),
    ],
)
def test_refused_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(W4A8Error) as error:
        parse({"quantization_config": theirs(**change)})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 4}, "input_activations.num_bits: must be 8, found 4"),
        ({"type": "int"}, "input_activations.type: must be float, found int"),
        ({"dynamic": False}, "input_activations.dynamic: must be True, found False"),
        ({"strategy": "tensor"}, "input_activations.strategy: must be token, found tensor"),
        ({"symmetric": False}, "input_activations.symmetric: must be True, found False"),
    ],
)
def test_refused_activations(change: dict[str, Any], message: str) -> None:
    raw = theirs()
    raw["config_groups"]["group_0"]["input_activations"] = FP8 | change
    with pytest.raises(W4A8Error) as error:
        parse({"quantization_config": raw})
    assert str(error.value) == f"{GROUP}.{message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method: AWQ checkpoints are not read"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method: GPTQ checkpoints are not read"),
        ({"quant_method": "fp8"}, "quantization_config.quant_method: FP8 checkpoints are not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: sparse weights are not read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config: rotated or otherwise transformed"),
        ({"config_groups": {}}, "config_groups: must be a non-empty object"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "the preset W8A8 is not read, only W4A16 and W4AFP8"),
        ({"ignore": ["re:("]}, "pattern 're:(' is no regular expression"),
    ],
)
def test_refused_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(W4A8Error) as error:
        parse({"quantization_config": theirs() | change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_formats() -> None:
    raw = theirs()
    raw["config_groups"]["group_0"]["format"] = "int-quantized"
    with pytest.raises(W4A8Error, match=r"group_0\.format: must be pack-quantized, found int-quantized"):
        parse({"quantization_config": raw})
    raw = theirs()
    raw["config_groups"]["group_0"]["output_activations"] = FP8
    with pytest.raises(W4A8Error, match="output_activations: quantized outputs are not read"):
        parse({"quantization_config": raw})
    with pytest.raises(W4A8Error, match="quantization_config must be an object, found str"):
        parse({"quantization_config": "yes"})


def quantized_toy(path: Path, group_size: int = 128, **changes: np.ndarray | None) -> CheckpointReader:
    """A toy with every linear layer packed (random codes); `changes` replace tensors, None removes one."""
    config = toy_config()
    tensors: dict[str, np.ndarray] = {}
    for name, array in toy_tensors(config).items():
        module = name.removesuffix(".weight")
        if not is_linear(module):
            tensors[name] = array
            continue
        n, k = array.shape
        tensors[f"{module}.weight_packed"] = np.arange(n * k // 8, dtype=np.int32).reshape(n, -1)
        tensors[f"{module}.weight_scale"] = np.ones((n, k // group_size), ml_dtypes.bfloat16)
        tensors[f"{module}.weight_shape"] = np.array([n, k], np.int64)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    raw = build("w4a8")
    raw["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    return CheckpointReader(save_checkpoint(path / "quantized", config | {"quantization_config": raw}, tensors))


@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_finds_the_quantized_modules(tmp_path: Path, group_size: int) -> None:
    modules = quantized_modules(quantized_toy(tmp_path, group_size))
    assert len(modules) == 14
    down = "model.layers.1.mlp.down_proj"
    assert modules[down] == QuantizedModule(down, (256, 512), group_size, "w4a8")


def test_a_shape_may_lack_and_scales_may_be_wider(tmp_path: Path) -> None:
    scale = np.ones((256, 2), np.float32)
    reader = quantized_toy(tmp_path, **{f"{Q}.weight_shape": None, f"{Q}.weight_scale": scale})
    assert quantized_modules(reader)[Q].shape == (256, 256)


def test_trivial_g_idx_is_accepted(tmp_path: Path) -> None:
    trivial = (np.arange(256) // 128).astype(np.int32)
    assert Q in quantized_modules(quantized_toy(tmp_path, **{f"{Q}.weight_g_idx": trivial}))
    unused = np.full(256, -1, np.int32)
    assert Q in quantized_modules(quantized_toy(tmp_path, **{f"{Q}.weight_g_idx": unused}))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight_scale", None, "weight_scale: is missing"),
        ("weight_scale", np.ones((256, 3), np.float32), r"weight_scale: must be \[256, 2\] \(group size 128\), found"),
        (
            "weight_scale",
            np.ones((256, 2), np.int32),
            "weight_scale: must be bfloat16, float16 or float32, found int32",
        ),
        (
            "weight_shape",
            np.array([256, 128]),
            r"weight_shape: says \[256, 128\], but weight_packed holds \[256, 256\]",
        ),
        ("weight_zero_point", np.zeros((32, 2), np.int32), r"weight_zero_point: zero points \(asymmetric weights\)"),
        ("weight_g_idx", np.zeros(256, np.int32), r"weight_g_idx: reordered columns \(actorder\) are not read"),
        ("weight_packed", np.zeros((256, 32), np.uint8), r"weight_packed: must be int32 \[N, K/8\], found uint8"),
        ("weight_packed", np.zeros((256, 31), np.int32), "weight_packed: K = 248 is not a multiple of the group size"),
        ("weight_packed", None, f"weight_(scale|shape): {Q}.weight_packed is missing"),
        ("weight", np.zeros((256, 256), np.float32), "weight: quantization_config says .* but both"),
    ],
)
def test_contradictions(tmp_path: Path, tensor: str, value: np.ndarray | None, message: str) -> None:
    reader = quantized_toy(tmp_path, **{f"{Q}.{tensor}": value})
    with pytest.raises(W4A8Error, match=f"^{Q}\\.{message}"):
        quantized_modules(reader)


def test_config_against_tensors(tmp_path: Path) -> None:
    plain = dict.fromkeys((f"{Q}.weight_packed", f"{Q}.weight_scale", f"{Q}.weight_shape"))
    reader = quantized_toy(tmp_path, **plain, **{f"{Q}.weight": np.zeros((256, 256), np.float32)})
    with pytest.raises(W4A8Error, match=f"{Q}.weight: quantization_config says that {Q} is quantized, but its weight"):
        quantized_modules(reader)
    reader.config["quantization_config"]["ignore"].append(Q)
    assert len(quantized_modules(reader)) == 13
    reader.config["quantization_config"]["ignore"].append("re:.*k_proj")
    with pytest.raises(W4A8Error, match=r"k_proj.weight_packed: is quantized, but quantization_config does not target"):
        quantized_modules(reader)
    del reader.config["quantization_config"]
    with pytest.raises(W4A8Error, match=r"config.json: has no quantization_config, but model.layers.0.mlp.down_proj"):
        quantized_modules(reader)


def test_unquantized_has_none(tmp_path: Path) -> None:
    assert quantized_modules(CheckpointReader(save_checkpoint(tmp_path, toy_config(), toy_tensors(toy_config())))) == {}


def test_packed_specs() -> None:
    specs = {s.name: (s.dtype.name, s.shape) for s in packed_specs("m", 256, 512)}
    assert specs == {
        "m.weight_packed": ("int32", (256, 64)),
        "m.weight_scale": ("bfloat16", (256, 4)),
        "m.weight_shape": ("int64", (2,)),
    }


def test_fused_siblings() -> None:
    names = ["l.q_proj", "l.k_proj", "l.v_proj", "l.o_proj", "m.up_proj", "m.gate_proj", "e.w1", "e.w2", "e.w3"]
    assert fused_siblings(names) == [
        ("e.w1", "e.w3"),
        ("l.q_proj", "l.k_proj", "l.v_proj"),
        ("m.gate_proj", "m.up_proj"),
    ]


def test_config_survives_json() -> None:
    assert parsed(json.loads(json.dumps(build()))) == parsed(build())

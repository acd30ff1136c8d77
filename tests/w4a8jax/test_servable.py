"""What vLLM refuses or breaks, found from headers and config alone."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from toy import ARCHITECTURES, toy_config, toy_shapes

from pallas_kernels.errors import W4A8Error
from w4a8jax.checkpoints.compressed_tensors import DEFAULT_IGNORE, build, is_linear, packed_specs
from w4a8jax.checkpoints.safetensors_format import TensorSpec
from w4a8jax.checkpoints.servable import problems

BF16 = np.dtype(ml_dtypes.bfloat16)
Q = "model.layers.0.self_attn.q_proj"


def quantized(shapes: dict[str, tuple[int, ...]], plain: tuple[str, ...] = ()) -> dict[str, TensorSpec]:
    """The tensors of a quantized checkpoint; the modules `plain` stay as they are."""
    specs = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if is_linear(module) and module not in plain:
            specs += packed_specs(module, *shape)
        else:
            specs.append(TensorSpec(name, BF16, shape))
    return {spec.name: spec for spec in specs}


def dense(**sizes: int) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    config = toy_config(**sizes)  # type: ignore[arg-type]
    return config | {"quantization_config": build()}, quantized(toy_shapes(config))


def moe(hidden: int = 256, intermediate: int = 256, experts: int = 4) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """A Qwen3-MoE-shaped checkpoint with a shared expert, of two layers."""
    config = toy_config(hidden=hidden) | {"model_type": "qwen3_moe", "num_experts": experts}
    shapes = {name: shape for name, shape in toy_shapes(config).items() if ".mlp." not in name}
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        shapes[f"{mlp}.gate.weight"] = (experts, hidden)
        for expert in [f"experts.{e}" for e in range(experts)] + ["shared_experts"]:
            width = intermediate if "shared" not in expert else 256
            shapes[f"{mlp}.{expert}.gate_proj.weight"] = (width, hidden)
            shapes[f"{mlp}.{expert}.up_proj.weight"] = (width, hidden)
            shapes[f"{mlp}.{expert}.down_proj.weight"] = (hidden, width)
    return config | {"quantization_config": build()}, quantized(shapes)


def found(config: dict[str, Any], tensors: dict[str, TensorSpec], **options: int) -> list[str]:
    return [str(problem) for problem in problems(config, tensors, **options)]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_good_ones_have_none(model_type: str, scheme: Any) -> None:
    config = toy_config(model_type)
    assert found(config | {"quantization_config": build(scheme)}, quantized(toy_shapes(config))) == []


def test_good_moe_has_none() -> None:
    assert found(*moe()) == []
    assert found(*moe(intermediate=512), tensor_parallel=2) == [
        # the shared expert is a dense matrix, 256 wide
        "model.layers.0.mlp.shared_experts.down_proj: K = 128 on each of 2 GPUs is not a multiple of 256",
        "model.layers.0.self_attn.o_proj: K = 128 on each of 2 GPUs is not a multiple of 256",
        "model.layers.1.mlp.shared_experts.down_proj: K = 128 on each of 2 GPUs is not a multiple of 256",
        "model.layers.1.self_attn.o_proj: K = 128 on each of 2 GPUs is not a multiple of 256",
    ]


def test_good_mixtral_names() -> None:
    shapes = {name: shape for name, shape in toy_shapes(toy_config()).items() if ".mlp." not in name}
    config = toy_config() | {"model_type": "mixtral", "num_local_experts": 2}
    for i in range(2):
        moe_name = f"model.layers.{i}.block_sparse_moe"
        shapes[f"{moe_name}.gate.weight"] = (2, 256)
        for e in range(2):
            shapes[f"{moe_name}.experts.{e}.w1.weight"] = shapes[f"{moe_name}.experts.{e}.w3.weight"] = (512, 256)
            shapes[f"{moe_name}.experts.{e}.w2.weight"] = (256, 512)
    config |= {"quantization_config": build()}
    assert found(config, quantized(shapes)) == []
    for i in range(2):
        shapes[f"model.layers.{i}.block_sparse_moe.experts.1.w2.weight"] = (256, 384)
    assert found(config, quantized(shapes))[0] == (
        "model.layers.0.block_sparse_moe.experts.1.w2: expert intermediate size 384 is not a multiple of 256"
    )


def test_not_quantized() -> None:
    assert found(toy_config(), {}) == ["config.json: has no quantization_config: not a quantized checkpoint"]
    config, tensors = dense()
    config["quantization_config"]["quant_method"] = "awq"
    assert found(config, tensors) == [
        "quantization_config: config.json: quantization_config.quant_method: AWQ checkpoints are not read, "
        "only compressed-tensors ones"
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", None])
def test_dtype(dtype: str | None) -> None:
    config, tensors = dense()
    config["dtype"] = dtype
    assert found(config, tensors) == [
        f"config.json: dtype must be bfloat16, the kernels' only output type; found {dtype}"
    ]
    del config["dtype"]
    config["torch_dtype"] = "bfloat16"
    assert found(config, tensors) == []


@pytest.mark.parametrize(("size", "named"), [(64, "64"), (None, "the whole channel")])
def test_group_size(size: int | None, named: str) -> None:
    config, tensors = dense()
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["group_size"], weights["strategy"] = size or -1, "group" if size else "channel"
    assert f"config.json: quantization group size must be 128, found {named}" in found(config, tensors)


def test_dense_k() -> None:
    """K = 128 * 3 passes vLLM's own check, and corrupts memory."""
    config, tensors = dense(hidden=384, intermediate=512)
    layers = found(config, tensors)
    assert "model.layers.0.self_attn.q_proj: K = 384 is not a multiple of 256" in layers
    assert "model.layers.1.self_attn.o_proj: K = 384 is not a multiple of 256" in layers
    assert not any("down_proj" in line for line in layers)
    assert len(layers) == 2 * 6


def test_dense_n_counts_what_is_fused() -> None:
    config, tensors = dense(intermediate=2112)
    assert "model.layers.0.mlp.down_proj: K = 2112 is not a multiple of the group size 128" in found(config, tensors)
    # 3 query heads and a key and a value head of 64 make 320 rows.
    shapes = toy_shapes(config := toy_config())
    for i in range(2):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (192, 256)
        shapes[f"model.layers.{i}.self_attn.k_proj.weight"] = (64, 256)
        shapes[f"model.layers.{i}.self_attn.v_proj.weight"] = (64, 256)
    assert found(config | {"quantization_config": build()}, quantized(shapes)) == [
        f"model.layers.{i}.self_attn.q_proj: N = 320 (q_proj+k_proj+v_proj) is not a multiple of 128" for i in range(2)
    ]


def test_w4a16_has_other_kernels() -> None:
    config, tensors = dense(hidden=384)
    config["quantization_config"] = build("w4a16")
    assert found(config, tensors) == []


def test_tensor_parallel() -> None:
    config, tensors = dense(hidden=1024, intermediate=2048)
    assert found(config, tensors, tensor_parallel=2) == []
    assert found(config, tensors, tensor_parallel=4) == []
    at_8 = found(config, tensors, tensor_parallel=8)
    assert at_8 == [
        f"model.layers.{i}.self_attn.o_proj: K = 128 on each of 8 GPUs is not a multiple of 256" for i in range(2)
    ]
    at_3 = found(config, tensors, tensor_parallel=3)
    assert "config.json: num_attention_heads = 16 does not divide over 3 GPUs" in at_3
    at_32 = found(config, tensors, tensor_parallel=32)
    # 2048/32 rows of gate and of up make 128; one of 8 kv heads is replicated: no complaint about k_proj.
    assert not any("gate_proj" in line or "k_proj:" in line for line in at_32)
    with pytest.raises(W4A8Error, match="tensor_parallel: must be at least 1, found 0"):
        problems(config, tensors, tensor_parallel=0)


@pytest.mark.parametrize(("sizes", "what"), [
    ({"hidden": 384}, "hidden size 384 is not a multiple of 256"),
    ({"intermediate": 384}, "expert intermediate size 384 is not a multiple of 256"),
])  # fmt: skip
def test_experts(sizes: dict[str, int], what: str) -> None:
    config, tensors = moe(**sizes)
    lines = [line for line in found(config, tensors) if ".experts." in line]
    assert len(lines) == 2 * 4 * 3
    assert lines[0] == f"model.layers.0.mlp.experts.0.down_proj: {what}"


def test_experts_differ() -> None:
    config, tensors = moe()
    name = "model.layers.1.mlp.experts.2.down_proj"
    tensors |= {spec.name: spec for spec in packed_specs(name, 256, 512)}
    assert found(config, tensors) == [f"{name}: is [256, 512], other experts of its layer are [256, 256]"]


def test_routers() -> None:
    config, tensors = moe()
    router = "model.layers.0.mlp.gate"
    del tensors[f"{router}.weight"]
    tensors |= {spec.name: spec for spec in packed_specs(router, 4, 256)}
    lines = found(config, tensors)
    assert f"{router}: is a router, which vLLM never quantizes; ignore it" in lines
    config, tensors = moe()
    config["quantization_config"]["ignore"] = ["lm_head"]
    assert found(config, tensors) == [
        f"model.layers.{i}.mlp.gate: is a router, which quantization_config must ignore" for i in range(2)
    ]


def test_fused_siblings() -> None:
    config = toy_config()
    tensors = quantized(toy_shapes(config), plain=(Q, "model.layers.1.mlp.up_proj"))
    ignore = (*DEFAULT_IGNORE, Q, "model.layers.1.mlp.up_proj")
    assert found(config | {"quantization_config": build("w4a8", ignore)}, tensors) == [
        f"{Q}: vLLM fuses q_proj, k_proj, v_proj: all of them must be quantized, or none; this one is not",
        "model.layers.1.mlp.up_proj: vLLM fuses gate_proj, up_proj: all of them must be quantized, or none; "
        "this one is not",
    ]
    whole = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    tensors = quantized(toy_shapes(config), plain=whole)
    assert found(config | {"quantization_config": build("w4a8", (*DEFAULT_IGNORE, *whole))}, tensors) == []


def test_config_and_tensors_contradict() -> None:
    config = toy_config()
    down = "model.layers.0.mlp.down_proj"
    tensors = quantized(toy_shapes(config), plain=(down,))
    config |= {"quantization_config": build()}
    assert found(config, tensors) == [f"{down}: is not quantized, and quantization_config does not ignore it"]
    config["quantization_config"]["ignore"] += [r"re:.*down_proj"]
    assert found(config, tensors) == ["model.layers.1.mlp.down_proj: is quantized, but quantization_config ignores it"]


@pytest.mark.parametrize(
    "name",
    [f"{Q}.weight_packed", f"{Q}.weight_scale", f"{Q}.weight_shape", "model.layers.1.input_layernorm.weight",
     "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)  # fmt: skip
def test_every_missing_tensor_is_noticed(name: str) -> None:
    config, tensors = dense()
    del tensors[name]
    lines = found(config, tensors)
    assert lines
    assert any(line.startswith(name.rpartition(".")[0]) and "missing" in line for line in lines) or (
        lines[0].startswith(Q) and "no weight_packed" in lines[0]
    )


def test_leaving_out_any_one_tensor_is_noticed() -> None:
    for make in (dense, moe):
        config, tensors = make()
        for name in tensors:
            assert found(config, {k: v for k, v in tensors.items() if k != name}), name


def test_missing_and_extra_layers_and_experts() -> None:
    config, tensors = dense()
    assert found(config | {"num_hidden_layers": 3}, tensors) == ["layers.2: is missing, though num_hidden_layers is 3"]
    assert found(config | {"num_hidden_layers": 1}, tensors) == ["layers.1: is there, though num_hidden_layers is 1"]
    config, tensors = moe()
    assert found(config | {"num_experts": 3}, tensors) == [
        f"model.layers.{i}.mlp.experts.3: is there, though config.json says 3 experts" for i in range(2)
    ]
    lines = found(config | {"num_experts": 5}, tensors)
    assert "model.layers.0.mlp.experts.4.up_proj.weight: is missing, though other experts have it" in lines


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda: TensorSpec(f"{Q}.weight_scale", np.dtype(np.float32), (256, 2)), "weight_scale must be bfloat16"),
        (lambda: TensorSpec(f"{Q}.weight_scale", BF16, (256, 1)), "weight_scale must be bfloat16 [256, 2], found"),
        (lambda: TensorSpec(f"{Q}.weight_packed", np.dtype(np.uint32), (256, 32)), "weight_packed must be int32"),
        (lambda: TensorSpec(f"{Q}.weight_shape", np.dtype(np.int32), (2,)), "weight_shape must be int64 [2]"),
        (lambda: TensorSpec(f"{Q}.weight_zero_point", np.dtype(np.int32), (32, 2)), "has weight_zero_point beside"),
        (lambda: TensorSpec(f"{Q}.weight", BF16, (256, 256)), "has weight beside weight_packed"),
    ],
)
def test_wrong_tensors(change: Callable[[], TensorSpec], what: str) -> None:
    config, tensors = dense()
    spec = change()
    lines = found(config, tensors | {spec.name: spec})
    assert lines[0].startswith(f"{Q}: {what}")

"""vLLM's own loader on toy checkpoints: what it takes, what it refuses, and that the check notices damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_checkpoints import CONFIGS, SERVED_BY, copy_without, served, write_toy

from pallas_kernels.weight_format import convert_scales, unpack_codes
from w4a8jax.checkpoints import servable
from w4a8jax.checkpoints.reader import CheckpointReader

pytestmark = pytest.mark.vllm

ACCEPTED: dict[str, dict[str, Any]] = {
    # Only the fused N counts: q 256 + k 64 + v 64.
    "n_64_fused": {"num_key_value_heads": 1},
    # The kernel's reordering of such weights is out of bounds, but the loader does not say so: our export must.
    "k_384": {"hidden_size": 384},
}
CORRUPTED = ("k_384",)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "group_64": ({"group_size": 64}, "group size 128"),
    "n_2112": (
        {"num_attention_heads": 31, "num_key_value_heads": 1},
        "K and N must be divisible by 128, got (256, 2112)",
    ),
    "hidden_2880": ({"hidden_size": 2880}, "K and N must be divisible by 128, got (2880, 512)"),
    "half_precision": ({"dtype": "float16"}, "Only bfloat16 output"),
    "half_quantized_qkv": ({"ignore": ("model.layers.0.self_attn.q_proj",)}, "all to use the same scheme"),
}
LEFT_OUT = {
    "no_scale": ("qwen3", "model.layers.1.self_attn.k_proj.weight_scale"),
    "no_packed": ("cohere2", "model.layers.0.mlp.down_proj.weight_packed"),
    "no_expert": ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight_packed"),
    "no_norm": ("llama", "model.layers.1.input_layernorm.weight"),
}


@dataclass
class Loads:
    """Findings by checkpoint, and the folder of the checkpoints."""

    findings: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def accepted(load_check: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Loads:
    folder = tmp_path_factory.mktemp("accepted")
    checkpoints = [write_toy(folder / family, family) for family in CONFIGS]
    checkpoints += [write_toy(folder / name, "llama", **changes) for name, changes in ACCEPTED.items()]
    operands = folder / "operands.safetensors"
    return Loads(load_check("toy checkpoints that vLLM must load", *checkpoints, operands=operands), folder)


@pytest.fixture(scope="module")
def rejected(load_check: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Loads:
    folder = tmp_path_factory.mktemp("rejected")
    checkpoints = [write_toy(folder / name, "qwen3", **changes) for name, (changes, _) in REFUSED.items()]
    for name, (family, tensor) in LEFT_OUT.items():
        checkpoints.append(copy_without(write_toy(folder / f"whole_{name}", family), folder / name, tensor))
    checkpoints.append(write_toy(folder / "not_quantized", "llama", quantized=False))

    # A shard that the index does not know, with another value of a tensor: vLLM does not read it.
    stale = write_toy(folder / "stale_shard", "llama")
    tensor = "model.layers.0.mlp.up_proj.weight_packed"
    codes = load_file(stale / "model-00001-of-00002.safetensors")[tensor]
    save_file({tensor: codes ^ 1}, stale / "stale.safetensors")
    checkpoints.append(stale)
    return Loads(load_check("toy checkpoints that must fail", *checkpoints), folder)


@pytest.mark.parametrize("name", [*CONFIGS, *ACCEPTED])
def test_vllm_loads_every_bit(name: str, accepted: Loads) -> None:
    report = accepted.findings[name]
    assert report["ok"], report
    expected = served(CONFIGS.get(name, CONFIGS["llama"]))
    assert report["linears"] == expected
    assert report["equal"] == report["parameters"] > 3 * sum(expected.values())


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses(name: str, rejected: Loads) -> None:
    assert REFUSED[name][1] in rejected.findings[name]["refusal"], rejected.findings[name]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_missing_tensor_is_noticed(name: str, rejected: Loads) -> None:
    report, tensor = rejected.findings[name], LEFT_OUT[name][1]
    assert not report["refusal"], "vLLM itself has not noticed so far"
    assert any("never written" in problem for problem in report["problems"]), report
    assert any(f"the checkpoint has no {tensor}" in problem for problem in report["problems"]), report


def test_a_difference_is_noticed(rejected: Loads) -> None:
    expected = ["model.layers.0.mlp.gate_up_proj.weight_packed: differs from the checkpoint"]
    assert rejected.findings["stale_shard"]["problems"] == expected


def test_an_unquantized_checkpoint_is_noticed(rejected: Loads) -> None:
    assert rejected.findings["not_quantized"]["problems"] == ["no quantized linear"]


@pytest.mark.parametrize("name", [*CONFIGS, *ACCEPTED, *REFUSED, *LEFT_OUT, "not_quantized"])
def test_our_rules_say_what_vllm_says(name: str, accepted: Loads, rejected: Loads) -> None:
    loads = accepted if name in accepted.findings else rejected
    reader = CheckpointReader(loads.folder / name)
    problems = servable.problems(reader.config, reader.tensors)
    served = loads.findings[name]["ok"] and name not in CORRUPTED
    assert bool(problems) != served, problems


@pytest.mark.parametrize("family", CONFIGS)
def test_our_operands_are_vllms(family: str, accepted: Loads) -> None:
    """Codes and channel scales bit for bit; group scales but for the rounding of 1/x in vLLM's CPU code."""
    operands = load_file(accepted.folder / "operands.safetensors")
    names = [n.removesuffix(".codes") for n in operands if n.startswith(f"{family}/") and n.endswith(".codes")]
    assert len(names) == served(CONFIGS[family])[SERVED_BY]
    different = total = 0
    for name in names:
        codes = np.asarray(unpack_codes(operands[f"{name}.weight_packed"]))
        nibbles = operands[f"{name}.codes"].view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        np.testing.assert_array_equal(codes & 15, nibbles.reshape(codes.shape))
        group_scale, channel_scale = convert_scales(operands[f"{name}.weight_scale"])
        np.testing.assert_array_equal(channel_scale, operands[f"{name}.channel_scale"][:, 0])
        ours = np.asarray(group_scale).view(np.uint8)
        steps = ours.astype(int) - operands[f"{name}.group_scale"]
        assert np.abs(steps).max() <= 1
        different, total = different + np.count_nonzero(steps), total + steps.size
    assert different <= 0.002 * total

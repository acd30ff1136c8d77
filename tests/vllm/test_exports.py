"""vLLM's own loader on what `w4a8jax quantize` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_checkpoints import CONFIGS, copy_without, served, tensor_names, write_toy

pytestmark = pytest.mark.vllm

CLI = Path(sys.executable).with_name("w4a8jax")
LEFT_OUT = ("weight_scale", "weight_packed")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """W4A8 checkpoints made by the command line: of the reference models, and of a bf16 toy of every family."""
    import w4a8jax

    folder = tmp_path_factory.mktemp("exports")
    sources = {"reference_model": w4a8jax.reference_model("dense"), "reference_moe": w4a8jax.reference_model("moe")}
    sources |= {family: write_toy(folder / "bf16" / family, family, quantized=False) for family in CONFIGS}
    for name, source in sources.items():
        done = subprocess.run([CLI, "quantize", source, folder / name], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return [folder / name for name in sources]


@pytest.fixture(scope="module")
def findings(load_check: Callable[..., Any], exports: list[Path]) -> dict[str, Any]:
    return load_check("exports that vLLM must load", *exports)


@pytest.mark.parametrize("name", ["reference_model", "reference_moe", *CONFIGS])
def test_vllm_loads_every_bit(name: str, findings: dict[str, Any], exports: list[Path]) -> None:
    report = findings[name]
    config = json.loads((exports[0].with_name(name) / "config.json").read_text())
    assert report["ok"], report
    assert report["linears"] == served(config)
    assert report["equal"] == report["parameters"]
    assert report["tensors"] == len(tensor_names(exports[0].with_name(name)))


@pytest.fixture(scope="module")
def damaged(load_check: Callable[..., Any], exports: list[Path]) -> dict[str, Any]:
    """The findings on the export of the reference model, less one tensor each."""
    checkpoints = []
    for leaf in LEFT_OUT:
        tensor = next(name for name in tensor_names(exports[0]) if name.endswith(f"v_proj.{leaf}"))
        checkpoints.append(copy_without(exports[0], exports[0].with_name(f"no_{leaf}"), tensor))
    return load_check("the reference model's export, less one tensor: must fail", *checkpoints)


@pytest.mark.parametrize("leaf", LEFT_OUT)
def test_a_tensor_left_out_of_the_export_is_noticed(leaf: str, damaged: dict[str, Any]) -> None:
    problems = damaged[f"no_{leaf}"]["problems"]
    assert any("never written" in problem for problem in problems), problems
    assert any(f"v_proj.{leaf}" in problem for problem in problems), problems

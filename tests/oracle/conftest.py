"""Runs scripts in the environment of torch, transformers and compressed-tensors."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from quantized_cases import CONFIGS, FUSED, THEIRS
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-oracle"
SCRIPTS = Path(__file__).with_name("scripts")

TorchOracle = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.oracle)


@pytest.fixture(scope="session")
def torch_oracle() -> TorchOracle:
    """A function that runs `scripts/NAME` with arguments and returns what it printed.

    A process takes 5 s to import torch and transformers, so that each script does all of its cases at once.
    """
    if not (ENVIRONMENT / ".ready").exists():
        pytest.skip(f"no {ENVIRONMENT.name} with torch, transformers and compressed-tensors: make oracle-env builds it")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(script: str, *arguments: str | Path) -> str:
        command = [ENVIRONMENT / "bin" / "python", SCRIPTS / script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, f"{script} failed:\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def made(torch_oracle: TorchOracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that scripts/make_compressed.py filled: quantized checkpoints and their bf16 likes."""
    folder = tmp_path_factory.mktemp("made")
    plain = [
        {"name": f"{name}-bf16", "config": config, "preset": None, "fused": name in FUSED}
        for name, config in CONFIGS.items()
    ]
    (folder / "job.json").write_text(json.dumps({"cases": plain + [asdict(case) for case in THEIRS]}))
    torch_oracle("make_compressed.py", folder)
    return folder


@pytest.fixture(scope="session")
def numerics(made: Path) -> dict[str, np.ndarray]:
    """Operands and results of single operations."""
    return load_file(made / "numerics.safetensors")

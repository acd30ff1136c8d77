"""Products divided between two GPUs compile, kernels and all, and send what they must, no weights."""

import json
import subprocess
from pathlib import Path

import pytest
from audit import ENVIRONMENT, ready


def test_what_two_gpus_send() -> None:
    if not ready():
        pytest.skip(f"no {ENVIRONMENT.name} with CUDA's compiler: make sass-env builds it")
    script = Path(__file__).parent / "compile_divided.py"
    run = subprocess.run([ENVIRONMENT / "bin" / "python", script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    assert json.loads(run.stdout) == {
        "repack": [],
        "rows": [],
        "columns": ["all-reduce f32[64,1024]", "all-reduce f32[64,1]"],
        "experts": ["all-reduce f32[64,512]"],
        "width": ["all-reduce f32[128,1]", "all-reduce f32[64,512]"],
    }

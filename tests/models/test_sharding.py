"""Runs `eight_devices.py`: the number of simulated devices is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path


def run(file: str) -> None:
    """Runs a file of tests with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / file),
    ]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_eight_devices() -> None:
    run("eight_devices.py")

"""Runs the load check in vLLM's environment, and shows and keeps what it said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
LOG = ENVIRONMENT / "load_check.log"
SCRIPT = Path(__file__).with_name("load_check.py")

_outputs: list[tuple[str, str]] = []


@pytest.fixture(scope="session")
def load_check(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function that loads checkpoints through vLLM and returns its findings by the checkpoint's folder name.

    Call it as `load_check(title, *checkpoints, operands=None)`; with `operands` vLLM's own conversions are written
    there.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").exists():
        pytest.skip(f"no {ENVIRONMENT.name}: `make test-vllm` builds it (6 GB)")

    def run(title: str, *checkpoints: Path, operands: Path | None = None) -> dict[str, Any]:
        report = tmp_path_factory.mktemp("load_check") / "report.json"
        command: list[str | Path] = [python, SCRIPT, *checkpoints, "--report", report]
        if operands:
            command += ["--operands", operands]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        _outputs.append((title, done.stdout))
        assert report.exists(), done.stdout + done.stderr
        findings = {finding["checkpoint"]: finding for finding in json.loads(report.read_text())}
        assert done.returncode == (not all(finding["ok"] for finding in findings.values())), done.stderr
        return findings

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _outputs:
        return
    for title, output in _outputs:
        terminalreporter.section(title)
        terminalreporter.write_line(output.rstrip())
    LOG.write_text("\n".join(f"== {title}\n{output}" for title, output in _outputs))
    terminalreporter.write_line(f"\n(kept in {LOG.relative_to(ROOT)})")

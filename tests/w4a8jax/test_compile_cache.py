"""Programs that commands compiled are kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import w4a8jax
from pallas_kernels import backend


def run(home: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command, in a process of its own that keeps all programs, however quickly they compile."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment = kept | {"HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    command = [sys.executable, "-c", "from w4a8jax.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def quantize(home: Path, target: Path, **variables: str) -> bytes:
    """The weights that a command writes."""
    source = w4a8jax.reference_model("dense")
    options = ["--search", "none", "--quiet"]
    assert not run(home, "quantize", source, target, *options, JAX_PLATFORMS="cpu", **variables).stderr
    return b"".join(file.read_bytes() for file in sorted(target.glob("*.safetensors")))


def uses(folder: Path) -> dict[str, bytes]:
    """When each program was last written or read, as JAX notes it."""
    programs = {path.name.removesuffix("-cache") for path in folder.rglob("*-cache")}
    found = {path.name.removesuffix("-atime"): path.read_bytes() for path in folder.rglob("*-atime")}
    assert set(found) == programs
    return found


def test_a_command_finds_what_an_earlier_one_compiled(tmp_path: Path) -> None:
    folder = tmp_path / ".cache/w4a8jax"
    weights = quantize(tmp_path, tmp_path / "one")
    first = uses(folder)
    assert first
    assert quantize(tmp_path, tmp_path / "two") == weights
    second = uses(folder)
    assert set(second) == set(first)
    assert all(second[name] != first[name] for name in first)


def test_variables_that_are_set_stay(tmp_path: Path) -> None:
    quantize(tmp_path, tmp_path / "one", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert list((tmp_path / "own").glob("*-cache"))
    assert not (tmp_path / ".cache").exists()


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    quantize(tmp_path, tmp_path / "one", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not uses(tmp_path)


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert quantize(tmp_path, tmp_path / "one", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "one"}


@pytest.mark.gpu
@pytest.mark.skipif(backend() != "hopper", reason="no Hopper GPU")
def test_kernels_are_kept_too(tmp_path: Path) -> None:
    w4a8jax.quantize(w4a8jax.reference_model("dense"), tmp_path / "model", search="none", progress=False)
    folder = tmp_path / ".cache/w4a8jax"
    arguments = ["generate", tmp_path / "model", "--prompt", "def main():", "--max-tokens", "32", "--temperature", "0"]
    text = run(tmp_path, *arguments).stdout
    first = uses(folder)
    assert text
    assert first
    assert run(tmp_path, *arguments).stdout == text
    second = uses(folder)
    assert set(second) == set(first)
    assert all(second[name] != first[name] for name in first)

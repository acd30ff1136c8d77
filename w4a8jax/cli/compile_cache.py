"""Compiled programs are kept on disk, so that a command does not compile again what an earlier one did."""

import hashlib
import os
import platform
from pathlib import Path

MAX_BYTES = 2**30  # the programs that were not used for longest are removed
SHORTEST = 0.1  # seconds of compilation that are worth a file


def keep_compiled() -> None:
    """Turns JAX's compilation cache on, by environment variables: before JAX is imported.

    Its folder is `w4a8jax` in `$XDG_CACHE_HOME`, or in `~/.cache`. Variables of JAX that are set already stay: a folder
    of one's own, or JAX_ENABLE_COMPILATION_CACHE=false. Where the folder cannot be made, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "w4a8jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission; no home
        return
    for name, value in (
        ("JAX_COMPILATION_CACHE_DIR", folder),
        ("JAX_COMPILATION_CACHE_MAX_SIZE", MAX_BYTES),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", SHORTEST),
    ):
        os.environ.setdefault(name, str(value))


def _processor() -> str:
    """A name for the processor's kind: machines that share a home need not have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"

"""Measures in several processes: a process compiles its kernels one after another, and that takes longer than they run.

Threads would not do, since Mosaic GPU holds a lock while it compiles, for which launches wait too. What is timed does
not overlap: see `timing.exclusive`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from pallas_kernels.errors import W4A8Error

_SAVED_EVERY = 20  # seconds
# How lines of results begin, of single products and of experts.
RESULT = ("K ", "MoE ")


class Results(Protocol):
    """A `Record` or a `Table`."""

    def write(self, path: str | Path) -> None: ...
    def update(self, path: str | Path) -> None: ...


class OfShapes(Results, Protocol):
    """Results of which those of a shape can be taken."""

    def part(self, k: int, n: int, tokens: Collection[int]) -> Results: ...


def run[R: OfShapes](
    results: R,
    command: Sequence[str],
    shapes: Iterable[tuple[int, int]],
    tokens: Sequence[int],
    processes: int,
    *,
    save: Callable[[R], None],
    progress: Callable[[str], None],
) -> None:
    """Runs a command of `w4a8jax` for parts of shapes and tokens, so many at a time, and adds up what they found.

    Args:
        results: what is known; each process goes on from it. Is added to.
        command: words of the command; --shape, --tokens, --processes and --out are added.
        shapes: (K, N).
        tokens: values of M.
        processes: at most so many run at a time.
        save: called with the results after each process.
        progress: called with each line that is printed for a result.

    Raises:
        W4A8Error: see `run_jobs`.
    """
    jobs = [
        (results.part(k, n, some), ["--shape", f"{k},{n}", "--tokens", ",".join(map(str, some))])
        for (k, n), some in split(list(shapes), tokens, processes)
    ]
    run_jobs(results, [(part, [*command, *words]) for part, words in jobs], processes, save=save, progress=progress)


def run_jobs[R: Results](
    results: R,
    jobs: Sequence[tuple[Results, Sequence[str]]],
    processes: int,
    *,
    save: Callable[[R], None],
    progress: Callable[[str], None],
) -> None:
    """Runs commands of `w4a8jax`, so many at a time, and adds up what they found.

    Args:
        results: what is known. Is added to.
        jobs: of each process, the results that it goes on from, and the words of its command; --processes and --out
            are added.
        processes: at most so many run at a time.
        save: called with the results after each process, and with what the others have found so far every 20 seconds.
        progress: called with each line that is printed for a result.

    Raises:
        W4A8Error: processes failed; names the first, with its last line. What the others found is saved.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        running = {}
        for i, (part, words) in enumerate(jobs):
            path = Path(folder) / f"{i}.json"
            part.write(path)
            running[pool.submit(_run, [*words, "--processes", "1", "--out", str(path)], progress)] = path
        failures: list[str] = []
        pending = set(running)
        while pending:
            done, pending = wait(pending, _SAVED_EVERY, FIRST_COMPLETED)
            for path in running.values():
                results.update(path)
            save(results)
            failures += [failure for job in done for failure in job.result()]
    if failures:
        raise W4A8Error(f"{len(failures)} of {len(jobs)} processes failed; {failures[0]}")


def split(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], processes: int
) -> list[tuple[tuple[int, int], list[int]]]:
    """Parts of the work, a shape with some of the values of M each: as many as processes, or one for each shape."""
    each = min(len(tokens), max(1, processes // len(shapes)))
    return [(shape, list(tokens[i::each])) for i in range(each) for shape in shapes]


def default(shapes: Sequence[tuple[int, int]]) -> int:
    """Processes: two for each shape, or as many as there are cores."""
    return max(1, min(2 * len(shapes), os.cpu_count() or 1))


def _run(words: Sequence[str], progress: Callable[[str], None]) -> list[str]:
    """What went wrong, if anything."""
    last = ""
    command = [sys.executable, "-m", "w4a8jax", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            last = line.strip() or last
            if line.startswith(RESULT):
                progress(line.rstrip())
    return [f"{' '.join(words)}: {last}"] if process.returncode else []

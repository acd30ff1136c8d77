"""Measures dense products over shapes and numbers of tokens: ours, cuBLAS, torch's, plain Triton's and vLLM's."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.errors import W4A8Error

from . import floor, operands, timing
from .kernels import Kernel, our_kernels
from .operands import Tokens, Weights
from .record import Record
from .rows import LONG, Checked, fill, now, turns

# (K, N): Command A's qkv, o, gate_up and down; Llama 3 8B's qkv, gate_up and down; a square.
SHAPES = (
    (12288, 14336),
    (12288, 12288),
    (12288, 73728),
    (36864, 12288),
    (4096, 6144),
    (4096, 28672),
    (14336, 4096),
    (8192, 8192),
)
TOKENS = tuple(2**i for i in range(15))


def require_hopper(command: str) -> None:
    """Raises:
    W4A8Error: JAX's default device is not a Hopper GPU.
    """
    if not tuning.hopper():
        raise W4A8Error(f"{command}: needs a Hopper GPU (H100, H200); JAX's default device is {jax.devices()[0]}")


def describe_run(command: str) -> dict[str, Any]:
    """Date, device, versions and the command, as a record has them, without the copy rate."""
    device = jax.devices()[0]
    return {
        "date": now(),
        "device": device.device_kind,
        "driver": _driver(),
        "platform": " ".join(device.client.platform_version.split()),
        **{name: _version(name) for name in ("jax", "jaxlib", "torch", "triton", "jax-triton")},
        "command": command,
    }


def run(
    record: Record,
    kernels: Sequence[Kernel],
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    save: Callable[[Record], None] | None = None,
    progress: Callable[[str], None] | None = None,
    measure: Callable[..., timing.Timing] = timing.measure,
) -> Record:
    """Measures each kernel at each point that the record has not measured yet, and adds a row for it.

    A kernel that raises, or whose result is wrong, has a row that says so, and no time.

    Args:
        record: is added to.
        kernels: what to measure.
        shapes: (K, N).
        tokens: values of M.
        save: called after each point with the record.
        progress: called with a line of text for each row.
        measure: `timing.measure`, or what stands for it.
    """
    done = set(record.measured)
    for k, n in shapes:
        bench = Shape(k, n, tokens, measure)
        for m in tokens:
            wanted = [kernel for kernel in kernels if (k, n, m, kernel.name) not in done]
            for row in bench.rows(wanted, m):
                record.add(row)
                if progress:
                    record.derive()
                    progress(line(row))
            if save and wanted:
                save(record)
        del bench
        gc.collect()
        for kernel in kernels:
            kernel.release()
    return record


class Shape:
    """The operands of one (K, N), kept while its points are measured."""

    def __init__(
        self, k: int, n: int, tokens: Sequence[int], measure: Callable[..., timing.Timing] = timing.measure
    ) -> None:
        """tokens: the values of M that will be asked for."""
        self.k, self.n, self.measure = k, n, measure
        self._activations = operands.Activations(k, max(m * self._sets(m) for m in tokens))
        self._weights: dict[int, Weights] = {}
        self._prepared: dict[str, list[Any]] = {}
        self._tokens: Tokens | None = None
        self._expected: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, kernels: Sequence[Kernel], m: int) -> list[dict[str, Any]]:
        """Checks and times kernels with M tokens; a row of the record for each.

        Whatever ails one of them is a result of the benchmark, and not its end.
        """
        rows: list[dict[str, Any]] = []
        attempts = []
        for kernel in kernels:
            row: dict[str, Any] = {"K": self.k, "N": self.n, "M": m, "kernel": kernel.name}
            row["date"] = now()
            row["config"] = kernel.config(m, self.n, self.k)
            row["operand_bytes"] = floor.operand_bytes(m, self.n, self.k, kernel.weight_bytes, kernel.input_bytes)
            rows.append(row)
            attempts.append((partial(kernel.function, m, self.n, self.k), partial(self.check, kernel, m)))
        fill(rows, attempts, partial(self.time, m), turns(floor.flops(m, self.n, self.k)))
        return rows

    def check(self, kernel: Kernel, m: int, function: Callable[[Any, Any], Any]) -> Checked:
        """Compares two launches with float64, and with each other.

        Raises:
            W4A8Error: the result is wrong.
        """
        inputs, prepared = kernel.inputs(self.tokens(m)), self.prepared(kernel)

        def launch(i: int) -> Any:
            return function(inputs[i % len(inputs)], prepared[i % len(prepared)])

        first, second = launch(0), launch(0)
        kernel.synchronize(second)
        found, same = kernel.compare(first, second, *operands.sample_indices(m, self.n))
        del first, second
        error = operands.relative_error(found, self.expected(kernel, m))
        if not error <= kernel.tolerance:
            raise W4A8Error(f"wrong: relative error {error:.2e}, tolerance {kernel.tolerance:.0e}")
        return Checked(launch, kernel.synchronize, error, same)

    def time(self, m: int, checked: Checked) -> None:
        """Adds a timing."""
        launches = 24 if floor.flops(m, self.n, self.k) < LONG else 10
        checked.timings.append(self.measure(checked.launch, synchronize=checked.synchronize, launches=launches))

    def weights(self, kernel: Kernel) -> Weights:
        """The weights that a kernel's are made of: kernels with the same lowest code have the same."""
        return self._weights.setdefault(kernel.code_min, Weights(self.n, self.k, kernel.code_min))

    def prepared(self, kernel: Kernel) -> list[Any]:
        """So many sets of weights in the kernel's form that they exceed the cache."""
        if kernel.name not in self._prepared:
            sets = timing.rotations(self.n * self.k * kernel.weight_bytes)
            self._prepared[kernel.name] = [kernel.weight(self.weights(kernel), i) for i in range(sets)]
        return self._prepared[kernel.name]

    def expected(self, kernel: Kernel, m: int) -> np.ndarray:
        """What a kernel should find at the elements that are compared."""
        key, tokens = (kernel.reference, kernel.code_min), self.tokens(m)
        if key not in self._expected:
            indices = operands.sample_indices(m, self.n)
            self._expected[key] = operands.expected(kernel.reference, self.weights(kernel), tokens, *indices)
        return self._expected[key]

    def tokens(self, m: int) -> Tokens:
        """Sets of activations, for as many weights as the smallest have, or until they exceed the cache."""
        if self._tokens is None or self._tokens.m != m:
            self._tokens = None  # before the next are made: there may not be room for both
            self._expected.clear()
            self._tokens = Tokens(self._activations, m, self._sets(m))
        return self._tokens

    def _sets(self, m: int) -> int:
        return min(timing.rotations(self.n * self.k / 2), timing.rotations(m * self.k))


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    where = f"K {row['K']:6} N {row['N']:6} M {row['M']:6}  {row['kernel']:24}"
    if "failed" in row:
        return f"{where} failed: {row['failed']}"
    rates = f"{row['tflops']:7.1f} TFLOP/s {100 * row['fraction_of_floor']:5.1f}% of floor"
    same = "" if row["same_twice"] else "  not the same bits twice"
    return f"{where} {row['us']:9.2f} us  {rates}  error {row['error']:.1e}{same}"


def start(command: str, previous: str | Path | None = None) -> Record:
    """A record for this device: the one in a file, if it is there, else a new one with the copy rate measured.

    Raises:
        W4A8Error: the file cannot be read, or is of another device.
    """
    return Record.begin(describe_run(command), previous)


def kernels_for(vllm: str | Path | None) -> list[Kernel]:
    """All kernels: ours, JAX's, torch's and Triton's if they are there, vLLM's if a folder with its libraries is given.

    Raises:
        W4A8Error: vLLM's cannot be loaded.
    """
    from . import kernels, peers, triton_peer

    found = [*our_kernels(), *kernels.our_ops(), *kernels.jax_kernels()]
    if peers.torch_available():
        found += peers.torch_kernels()
    found += triton_peer.triton_kernels()
    if vllm is not None:
        found += peers.vllm_kernels(vllm)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None

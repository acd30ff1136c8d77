"""Measures products with experts, and their whole MLPs, over models, tokens and routings: ours, JAX's and vLLM's."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels import GROUP_SIZE
from pallas_kernels.errors import W4A8Error

from . import gemm, kernels, operands, peers, timing
from .moe_kernels import ExpertsKernel, jax_experts, our_experts
from .moe_marlin import VllmMarlinExperts
from .moe_operands import ExpertWeights, MlpInputs, expected_mlp, expected_rows, sample_tokens
from .moe_peers import VllmW4A8Experts
from .moe_points import MOST_ROWS, Point
from .moe_record import MoeRecord
from .operands import Activations, Tokens
from .record import Record
from .rows import LONG, Checked, fill, now, turns


def run(
    record: MoeRecord,
    kernels: Sequence[ExpertsKernel],
    points: Iterable[Point],
    *,
    save: Callable[[MoeRecord], None] | None = None,
    progress: Callable[[str], None] | None = None,
    measure: Callable[..., timing.Timing] = timing.measure,
) -> MoeRecord:
    """Measures each kernel at each point that the record has not measured yet, and adds a row for it.

    A kernel that raises, or whose result is wrong, has a row that says so, and no time.

    Args:
        record: is added to.
        kernels: what to measure.
        points: where, those of one model and product beside each other.
        save: called after each point with the record.
        progress: called with a line of text for each row.
        measure: `timing.measure`, or what stands for it.
    """
    done = set(record.measured)
    for _, group in itertools.groupby(points, key=lambda point: (point.model, point.product)):
        same = list(group)
        bench = Experts(same, measure)
        for point in same:
            wanted = [k for k in kernels if k.takes(point) and (*key_of(point), k.name) not in done]
            for row in bench.rows(wanted, point):
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


class Experts:
    """The operands of one model and product, kept while its points are measured."""

    def __init__(self, points: Sequence[Point], measure: Callable[..., timing.Timing] = timing.measure) -> None:
        """points: those that will be asked for, all of one model and product."""
        self.measure = measure
        self._rows = max(point.padded_rows * point.routes.sets for point in points)
        self._activations: Activations | None = None
        self._weights: dict[int, list[ExpertWeights]] = {}
        self._prepared: dict[str, list[Any]] = {}
        self._functions: dict[tuple[str, int], Callable[[Any, Any], Any]] = {}
        self._tokens: tuple[Point, Tokens | MlpInputs] | None = None
        self._expected: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, kernels: Sequence[ExpertsKernel], point: Point) -> list[dict[str, Any]]:
        """Checks and times kernels at a point; a row of the record for each."""
        rows: list[dict[str, Any]] = []
        attempts = []
        touched = point.routes.touched
        for kernel in kernels:
            row = dict(zip(MoeRecord.KEY, (*key_of(point), kernel.name), strict=True))
            row |= {"rows": point.rows, "date": now(), "touched": touched, "flops": point.flops}
            row |= {
                "touched_weight_bytes": touched * point.weights * kernel.weight_bytes,
                "bytes": point.bytes(touched),
            }
            rows.append(row)
            attempts.append((partial(self._function, kernel, point, row), partial(self.check, kernel, point)))
        fill(rows, attempts, partial(self.time, point), turns(point.flops))
        for expert_weights in itertools.chain(*self._weights.values()):
            expert_weights.forget()
        return rows

    def _function(self, kernel: ExpertsKernel, point: Point, row: dict[str, Any]) -> Callable[[Any, Any], Any]:
        row["config"] = kernel.config(point)
        kernel.prepare(self.weights(kernel, point))
        # Torch's functions hold buffers, and cost nothing to make; what is compiled serves all routings.
        key = kernel.name, point.tokens
        if key not in self._functions:
            self._functions = {k: v for k, v in self._functions.items() if k[1] == point.tokens}
            try:
                self._functions[key] = kernel.function(point)
            except Exception:
                # With more tokens it will hardly do better, and its weights may be gigabytes.
                self._prepared.pop(kernel.name, None)
                raise
        return self._functions[key]

    def check(self, kernel: ExpertsKernel, point: Point, function: Callable[[Any, Any], Any]) -> Checked:
        """Compares two launches with float64, and with each other.

        Raises:
            W4A8Error: the result is wrong.
        """
        inputs, prepared, routes = kernel.inputs(point, self.tokens(point)), self.prepared(kernel, point), point.routes

        def launch(i: int) -> Any:
            routing, copy = routes.launch(i)
            return function(inputs[routing], prepared[copy])

        first, second = launch(0), launch(0)
        kernel.synchronize(second)
        rows, columns = self.sample(point), operands.sample_indices(1, first.shape[1])[1]
        # Always as many rows, so that one program serves all routings.
        found, same = kernel.compare(first, second, np.resize(rows, MOST_ROWS), columns)
        del first, second
        error = operands.relative_error(found[: len(rows)], self.expected(kernel, point)[:, columns])
        if not error <= kernel.limit(point):
            raise W4A8Error(f"wrong: relative error {error:.2e}, tolerance {kernel.limit(point):.0e}")
        return Checked(launch, kernel.synchronize, error, same)

    def time(self, point: Point, checked: Checked) -> None:
        """Adds a timing."""
        launches = 24 if point.flops < LONG else 10
        checked.timings.append(self.measure(checked.launch, synchronize=checked.synchronize, launches=launches))

    def weights(self, kernel: ExpertsKernel, point: Point) -> list[ExpertWeights]:
        """What a kernel's weights are made of: kernels with the same lowest code have the same."""
        if kernel.code_min not in self._weights:
            self._weights[kernel.code_min] = [
                ExpertWeights(point.model.experts, n, k, kernel.code_min, seed)
                for seed, (n, k) in enumerate(point.shapes)
            ]
        return self._weights[kernel.code_min]

    def prepared(self, kernel: ExpertsKernel, point: Point) -> list[Any]:
        """So many copies of the weights in the kernel's form that launches exceed the cache."""
        held = self._prepared.setdefault(kernel.name, [])
        for i in range(len(held), point.routes.copies):
            held.append(kernel.weight(self.weights(kernel, point), i))
        return held

    def sample(self, point: Point) -> np.ndarray:
        """Rows of the result to compare."""
        if point.product == "mlp":
            return sample_tokens(point)
        return np.concatenate(list(point.routes.sample().values()))

    def expected(self, kernel: ExpertsKernel, point: Point) -> np.ndarray:
        """What a kernel should find in those rows, float64."""
        key, tokens = (kernel.reference, kernel.code_min), self.tokens(point)
        if key not in self._expected:
            weights = self.weights(kernel, point)
            if isinstance(tokens, MlpInputs):
                self._expected[key] = expected_mlp(kernel.reference, weights[0], weights[1], tokens, point)
            else:
                self._expected[key] = expected_rows(kernel.reference, weights[0], tokens, point.routes)
        return self._expected[key]

    def tokens(self, point: Point) -> Tokens | MlpInputs:
        """Activations for each set of the point's routes."""
        if self._tokens is None or self._tokens[0] != point:
            self._tokens = None  # before the next are made: there may not be room for both
            self._expected.clear()
            if point.product == "mlp":
                self._tokens = point, MlpInputs(point)
            else:
                if self._activations is None:
                    self._activations = Activations(point.shapes[0][1], self._rows)
                self._tokens = point, Tokens(self._activations, point.padded_rows, point.routes.sets)
        return self._tokens[1]


def key_of(point: Point) -> tuple[Any, ...]:
    """A point as rows have it: the record's key without the kernel."""
    return point.model.name, point.product, point.tokens, point.routing


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    where = f"MoE {row['model']:15} {row['product']:8} tokens {row['tokens']:6} {row['routing']:8} {row['kernel']:18}"
    if "failed" in row:
        return f"{where} failed: {row['failed']}"
    rates = f"{row['touched']:4} experts {row['gbps']:7.1f} GB/s {row['tflops']:7.1f} TFLOP/s"
    right = f"error {row['error']:.1e}{'' if row['same_twice'] else '  not the same bits twice'}"
    return f"{where} {row['us']:9.2f} us  {rates} {100 * row['fraction']:5.1f}% of floor  {right}"


def start(command: str, previous: str | Path | None = None, fp8: float | None = None) -> MoeRecord:
    """A record for this device: the one in a file, if it is there, else a new one with the device's rates measured.

    Args:
        command: as the record has it.
        previous: a record's file.
        fp8: TFLOP/s of cuBLAS in FP8; None: measure them.

    Raises:
        W4A8Error: the file cannot be read, or is of another device.
    """
    record = MoeRecord.begin(gemm.describe_run(command), previous)
    if fp8 is not None or "cublas_fp8_TFLOP_s" not in record.about:
        record.about["cublas_fp8_TFLOP_s"] = fp8 or _best_fp8()
    return record


def kernels_for(vllm: str | Path | None) -> list[ExpertsKernel]:
    """All kernels: ours, JAX's, tokamax's if it is there, vLLM's if a folder with its libraries is given.

    Raises:
        W4A8Error: vLLM's cannot be loaded.
    """
    found = [*our_experts(), *jax_experts()]
    if vllm is not None:
        peers.load_vllm(vllm)
        group = 0.5 + 2 / GROUP_SIZE
        found.append(VllmW4A8Experts("vllm cutlass w4a8", "w4a8", 0.5 + 1 / GROUP_SIZE, 1, tolerance=3e-2))
        found.append(VllmMarlinExperts("vllm marlin w4a16", "w4a16", group, 2))
    return found


def _best_fp8() -> float | None:
    """TFLOP/s of the best product of cuBLAS in FP8, 8192 x 8192 with 8192 tokens."""
    found = [k for k in kernels.jax_kernels() if k.input_bytes == 1]
    if peers.torch_available():
        found += [k for k in peers.torch_kernels() if k.input_bytes == 1]
    record = gemm.run(Record({"copy_TB_s": 1.0}), found, [(8192, 8192)], [8192])
    rate = record.device.fp8
    return None if rate is None else rate / 1e12

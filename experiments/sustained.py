"""What bounds a long product of experts: its time, the card's clock and its power while it runs for a second.

    python experiments/sustained.py mixtral-8x7b down 16384 zipf --config 256,1,2,4,1 --config 256,1,2,4,2 --vllm DIR

Configurations are tile_tokens, row_blocks, warpgroups, stages and cluster; kernels take turns. "pipe" is the part of
the tensor cores' cycles that the products' operations fill, at the clock that was seen: where it is near that of the
other kernels and the clock is lower, power is the limit; where it is lower, the kernel's own cycles are. `--once`
measures nothing, for ncu, which then sees five launches of each kernel.
"""

import argparse
import ctypes
import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pallas_kernels.dense_gemm import TuningConfig
from w4a8jax.benchmark import gemm, peers, timing
from w4a8jax.benchmark.moe import Experts
from w4a8jax.benchmark.moe_kernels import ExpertsKernel, OurExperts
from w4a8jax.benchmark.moe_peers import VllmW4A8Experts
from w4a8jax.benchmark.moe_points import MODELS, ROUTINGS, Point

# Operations in a clock of a Hopper SM in FP8, multiplications and additions.
FP8_OPERATIONS = 2 * 4096


@dataclasses.dataclass(frozen=True)
class InConfig(OurExperts):
    """`grouped_gemm` in a configuration."""

    chosen: TuningConfig | None = None

    def choose(self, point: Point, n: int, k: int) -> TuningConfig:
        return self.chosen or super().choose(point, n, k)


class Sampler:
    """Measures as `timing.measure` does, and samples clock and power while launches follow each other."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.found: list[dict[str, float]] = []

    def __call__(self, launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
        measured = timing.measure(launch, synchronize=synchronize, launches=launches)
        count = max(2, int(self.seconds * 1e6 / measured.us))
        start, result = time.perf_counter(), None
        with ThreadPoolExecutor(1) as thread:
            done = threading.Event()
            sampled = thread.submit(sample, done)
            try:
                for i in range(count):
                    result = launch(i)
                synchronize(result)
                us = (time.perf_counter() - start) / count * 1e6
            finally:
                done.set()
        # The clock of the second half; power is an average over the last second already.
        samples = sampled.result()[:-1]
        samples = samples[len(samples) // 2 :]
        clock, power = statistics.median(s[0] for s in samples), samples[-1][1]
        self.found.append({"us_sustained": us, "MHz": clock, "W": power, "samples": len(samples)})
        return timing.Timing.of([us], measured.kernels)


def sample(done: threading.Event) -> list[tuple[float, float]]:
    """MHz of the SMs and watts of the first card, every 20 ms, by NVML."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    device, clock, power = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(nvml, name)(*arguments):
            raise RuntimeError(f"{name}: error {code}")

    call("nvmlInit_v2")
    call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(device))
    found = []
    while not done.wait(0.02):
        call("nvmlDeviceGetClockInfo", device, 1, ctypes.byref(clock))
        call("nvmlDeviceGetPowerUsage", device, ctypes.byref(power))
        found.append((float(clock.value), power.value / 1e3))
    return found


def once(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
    """For profilers, which count CUPTI as their own."""
    synchronize(launch(0))
    return timing.Timing.of([1.0], ["not timed"])


def main(arguments: argparse.Namespace) -> None:
    import jax

    point = Point(MODELS[arguments.model], arguments.product, arguments.tokens, arguments.routing)
    kernels: list[ExpertsKernel] = []
    for text in arguments.config:
        tile_tokens, row_blocks, warpgroups, stages, cluster = map(int, text.split(","))
        config = TuningConfig(tile_tokens, row_blocks, warpgroups, stages, cluster=cluster)
        kernels.append(InConfig(f"ours {text}", "w4a8", 0.5 + 1 / 128, 1, -7, 5.5e-3, chosen=config))
    if arguments.vllm:
        peers.load_vllm(arguments.vllm)
        kernels.append(VllmW4A8Experts("vllm cutlass w4a8", "w4a8", 0.5 + 1 / 128, 1, tolerance=3e-2))
    sampler = Sampler(arguments.seconds)
    bench = Experts([point], once if arguments.once else sampler)
    rows = bench.rows(kernels, point)
    measured = [row for row in rows if "failed" not in row]
    rate_at = jax.devices()[0].core_count * FP8_OPERATIONS * 1e6
    # Kernels took turns: of each, the turns' medians.
    for i, row in enumerate([] if arguments.once else measured):
        turns = sampler.found[i :: len(measured)]
        row |= {name: statistics.median(turn[name] for turn in turns) for name in turns[0]} | {"turns": len(turns)}
        row["pipe"] = row["flops"] / row["us_sustained"] * 1e6 / (rate_at * row["MHz"])
    names = ("kernel", "failed", "error", "us_sustained", "MHz", "W", "pipe", "turns")
    for row in rows:
        print(json.dumps({name: row[name] for name in names if name in row}), flush=True)
    if arguments.out:
        record = json.loads(arguments.out.read_text()) if arguments.out.exists() else gemm.describe_run("sustained.py")
        record.setdefault("rows", []).extend(rows)
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("product", choices=("gate_up", "down"))
    parser.add_argument("tokens", type=int)
    parser.add_argument("routing", choices=ROUTINGS)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())

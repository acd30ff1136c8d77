"""What ends of experts' rows cost: one product, with groups that fill tiles and with others.

    python experiments/ends_of_groups.py --out experiments/results/ends_of_groups_h200.json

128 experts' weights [8192, 4096], 131,072 rows. "dense" is one weight's product; in "exact" each expert has four tiles
of 256 rows; "uniform" is rows sent evenly by chance; in "off4" each expert has a tile of 4 rows. A kernel runs 200
times at a stretch, twice; cycles are the better time at the clock that NVML showed meanwhile.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sustained import sample

from pallas_kernels import W4Weight, prepare_weight
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.grouped_gemm import grouped_gemm
from w4a8jax.benchmark import gemm

EXPERTS, N, K, ROWS = 128, 8192, 4096, 131072
RUNS = 200


def weight(*shape: int) -> Any:
    """Random codes, equal scales: the time does not depend on them."""
    *rows, k = shape
    words = jax.random.randint(jax.random.key(1), (*rows, k // 8), -(2**31), 2**31 - 1, jnp.int32)
    scale = jnp.full((*rows, k // 128), 0.05, jnp.float8_e4m3fn)
    return prepare_weight(W4Weight(words | 0x11111111, scale, jnp.full(rows, 0.1, jnp.float32), "lut", -7))


def timed(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    found = []
    for _ in range(2):
        done = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            sampled = thread.submit(sample, done)
            start = time.perf_counter()
            for _ in range(RUNS):
                result = compiled(*arguments)
            jax.block_until_ready(result)
            us = (time.perf_counter() - start) / RUNS * 1e6
            done.set()
        samples = sampled.result()
        clock = float(np.median([mhz for mhz, _ in samples[len(samples) // 2 :]]))
        found.append({"us": us, "MHz": clock, "W": samples[-1][1], "Mcycles": us * clock / 1e6})
    return min(found, key=lambda x: x["us"])


def main(arguments: argparse.Namespace) -> None:
    x = (jax.random.normal(jax.random.key(3), (ROWS, K)) * 50).astype(jnp.float8_e4m3fn)
    token_scale = jnp.full((ROWS, 1), 0.01, jnp.float32)
    even = ROWS // EXPERTS
    groups = {
        "exact": np.full(EXPERTS, even),
        "uniform": np.random.default_rng(0).multinomial(ROWS, np.full(EXPERTS, 1 / EXPERTS)),
        "off4": np.array([even - 4, *[even] * (EXPERTS - 2), even + 4]),
    }
    one, many = weight(N, K), weight(EXPERTS, N, K)
    record = gemm.describe_run("ends_of_groups.py") | {"rows": []}
    for cluster in (2, 1):
        config = TuningConfig(256, 1, 2, 4, cluster=cluster)
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "dense": lambda config=config: timed(lambda x, s, w: dense_gemm(x, s, w, config), x, token_scale, one)
        }
        for name, sizes in groups.items():
            runs[name] = lambda sizes=sizes, config=config: timed(
                lambda x, s, w, g: grouped_gemm(x, s, w, g, config),
                x,
                token_scale,
                many,
                jnp.asarray(sizes, jnp.int32),
            )
        for name, run in runs.items():
            record["rows"].append({"rows": name, "cluster": cluster, **run()})
            print(json.dumps(record["rows"][-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())

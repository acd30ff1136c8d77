"""First measurements of the dense kernel on a GPU: is it right, and how fast is each tile shape?

    python experiments/gemm_probe.py OUT.json

Checks every dequantized operand bit for bit and products against float64, then times configurations with CUPTI beside
XLA's FP8 and bf16 products (cuBLAS, without scales) on random data. Our weights exceed the L2 cache or are rotated past
it; the operands of the others are one set, larger than the cache.
"""

import datetime
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import W4Weight, pack_codes, quantize_activations
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.fragments import FragmentWeight, fragment_tables

SHAPES = ((12288, 14336), (12288, 73728), (8192, 8192))  # (K, N)
CHECKED = [  # (M, config)
    (1, (16, 2, 2, 4)),
    (8, (8, 2, 3, 4)),
    (16, (16, 2, 2, 8)),
    (24, (16, 2, 1, 4)),
    (136, (128, 2, 2, 4)),
    (1000, (160, 2, 2, 3)),
    (504, (96, 2, 3, 3)),
    (64, (64, 3, 2, 4)),
]
CONFIGS = {
    16: [(16, 2, 1, 8), (16, 2, 2, 8), (16, 2, 3, 6)],
    64: [(64, 2, 1, 8), (64, 2, 2, 6), (64, 2, 3, 4)],
    512: [(128, 2, 2, 4), (128, 2, 2, 5), (64, 3, 2, 4)],
    4096: [(128, 2, 2, 4), (128, 2, 2, 5), (160, 2, 2, 3), (96, 2, 3, 3)],
    16384: [(128, 2, 2, 4), (160, 2, 2, 3)],
}


def random_weight(rng: np.random.Generator, n: int, k: int, code_min: int) -> W4Weight:
    codes = rng.integers(code_min, 8, (n, k))

    scale = np.exp(rng.uniform(-9, 0, (n, k // 128)))
    scale[3], scale[5, 0], scale[7] = 0, 0, 1e-12
    words = pack_codes(jnp.asarray(codes))
    return W4Weight.from_checkpoint(words, jnp.asarray(scale, jnp.bfloat16), code_min=code_min)


def check(rng: np.random.Generator) -> list[str]:
    """Bit-exact operands, and products against float64 of the same operands."""
    lines = []
    for code_min in (-7, -8):
        w = random_weight(rng, 768, 512, code_min)
        f = FragmentWeight.from_weight(w)
        unscaled = FragmentWeight(f.words, f.tables, jnp.ones(768), f.form)
        eye = jnp.eye(512, dtype=jnp.float8_e4m3fn)
        found = dense_gemm(eye, jnp.ones((512, 1)), unscaled, TuningConfig(128, 2, 2, 4))
        expected = w.operand().astype(jnp.float32).T
        wrong = int(jnp.sum(found.astype(jnp.float32) != expected))
        lines.append(f"operands, codes {code_min}..7: {wrong} of {expected.size} differ")
        for m, config in CHECKED:
            x8, token_scale = quantize_activations(jnp.asarray(rng.standard_normal((m, 512)), jnp.bfloat16))
            out = np.asarray(dense_gemm(x8, token_scale, f, TuningConfig(*config)), np.float64)
            a, b = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x8, w.operand()))
            want = np.asarray(w.channel_scale, np.float64) * np.asarray(token_scale, np.float64) * (a @ b.T)
            again = np.asarray(dense_gemm(x8, token_scale, f, TuningConfig(*config)), np.float64)
            error = np.linalg.norm(out - want) / np.linalg.norm(want)
            same = np.array_equal(out, again)
            lines.append(f"  M {m} {config}: {error:.2e} from float64 (bf16 rounding included), same twice: {same}")
    return lines


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """bf16 [M, N] of a [M, K] and b [N, K], by cuBLAS."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def timed(f, inputs: list, repeats: int = 5) -> float:
    """Median microseconds of f over rotating inputs, by CUPTI."""
    f = jax.jit(f)
    jax.block_until_ready(f(*inputs[0]))
    times = []
    for i in range(repeats * max(len(inputs), 2)):
        _, ms = profiler.measure(f)(*inputs[i % len(inputs)])
        times.append(1e3 * ms)
    return statistics.median(times)


def main(path: str) -> None:
    rng = np.random.default_rng(0)
    print(jax.devices()[0].device_kind, flush=True)
    lines = check(rng)
    print("\n".join(lines), flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "command": "python experiments/gemm_probe.py OUT.json",
    }
    record |= {"device": jax.devices()[0].device_kind, "checks": lines, "times": []}
    key = jax.random.key(0)
    source = jnp.asarray(rng.standard_normal(2**28), jnp.float32)
    copy = timed(lambda v: v + 1, [(source,)])
    record["copy_TB_s"] = 2 * source.nbytes / copy / 1e6
    print(f"copy {record['copy_TB_s']:.2f} TB/s", flush=True)
    del source
    for k, n in SHAPES:
        sets = 1 if n * k > 1e8 else 4
        weights = []
        for i in range(sets):
            words = jax.random.bits(jax.random.fold_in(key, i), (n // 64, k // 128, 4, 256), jnp.uint32)
            scale = jax.random.uniform(jax.random.fold_in(key, i), (n, k // 128), minval=1.0, maxval=56.0)
            tables = fragment_tables(scale.astype(jnp.float8_e4m3fn), "sign_magnitude")
            weights.append(FragmentWeight(words, tables, jnp.full(n, 1e-3), "sign_magnitude"))
        dense = jax.random.normal(key, (n, k), jnp.bfloat16) if n * k < 3e8 else None
        dense8 = None if dense is None else dense.astype(jnp.float8_e4m3fn)
        for m, configs in CONFIGS.items():
            if n > 20000 and m > 4096:
                continue
            x8, token_scale = quantize_activations(jax.random.normal(key, (m, k), jnp.bfloat16))
            row = {"K": k, "N": n, "M": m, "configs": {}}
            for c in configs:
                config = TuningConfig(*c)
                if n % config.tile_rows or config.shared_memory > 227 * 1024:
                    continue
                try:
                    us = timed(
                        lambda w, x, s, c=config: dense_gemm(x, s, w, c), [(w, x8, token_scale) for w in weights]
                    )
                    row["configs"][str(c)] = us
                except Exception as error:
                    row["configs"][str(c)] = str(error)[:80]
            if dense is not None:
                x = jax.random.normal(key, (m, k), jnp.bfloat16)
                row["bf16"], row["fp8"] = timed(dot, [(x, dense)]), timed(dot, [(x8, dense8)])
            best = min((v for v in row["configs"].values() if isinstance(v, float)), default=float("nan"))
            size = n * k / 2 + n * k / 16 + m * k + 2 * m * n
            row |= {"best": best, "GB_s": size / best / 1e3, "TFLOP_s": 2 * m * n * k / best / 1e6}
            record["times"].append(row)
            print(json.dumps(row), flush=True)
            with open(path, "w") as file:
                json.dump(record, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])

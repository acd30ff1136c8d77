"""Which kernels an MLP of experts spends its time in, on a Hopper GPU: microseconds a run, by CUPTI.

    python experiments/moe_profile.py 128 2048 768 8 16384 1024 1

Experts, hidden size, inner size and experts a token, then numbers of tokens; weights are random.
"""

import collections
import sys

import jax
import jax.numpy as jnp
from jax._src.lib import mosaic_gpu

from pallas_kernels import FragmentWeight, W4Weight, prepare_weight, w4a8_moe_mlp

RUNS = 5
SHOWN = 12


def random_weight(seed: int, *shape: int) -> W4Weight | FragmentWeight:
    *rows, k = shape
    words = jax.random.randint(jax.random.key(seed), (*rows, k // 8), -(2**31), 2**31 - 1, jnp.int32)
    scale = jnp.full((*rows, k // 128), 0.05, jnp.float8_e4m3fn)
    # Code -8, a nibble of zero, becomes -7.
    return prepare_weight(W4Weight(words | 0x11111111, scale, jnp.full(rows, 0.1, jnp.float32), "lut", -7))


def main(experts: int, hidden: int, inner: int, top_k: int, *tokens: int) -> None:
    cupti = mosaic_gpu._mosaic_gpu_ext
    weights = random_weight(0, experts, 2 * inner, hidden), random_weight(1, experts, hidden, inner)
    router = jax.random.normal(jax.random.key(2), (experts, hidden), jnp.float32)
    mlp = jax.jit(lambda x, router, *weights: w4a8_moe_mlp(x, router, *weights, top_k=top_k))
    for count in tokens:
        x = jax.random.normal(jax.random.key(3), (count, hidden), jnp.bfloat16)
        for _ in "12":
            jax.block_until_ready(mlp(x, router, *weights))
        cupti._cupti_init()
        jax.block_until_ready([mlp(x, router, *weights) for _ in range(RUNS)])
        found: collections.Counter[str] = collections.Counter()
        for name, milliseconds in cupti._cupti_get_timings(True):
            found[name] += 1e3 * milliseconds / RUNS
        print(f"{count} tokens: {sum(found.values()):.1f} us")
        for name, us in found.most_common(SHOWN):
            print(f"{us:10.1f}  {name[:90]}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

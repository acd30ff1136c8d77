"""Repacking Command A's weights for the kernels, on one GPU: seconds, and memory beyond the weights.

python experiments/repack.py --out experiments/results/repack_h200.json

The 64 layers' four fused projections, 105 of its 111 B parameters; the embedding stays bf16. Codes are random and are
made on the device before the clock starts.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import W4Weight, prepare_weight

LAYERS = 64
SHAPES = [(14336, 12288), (12288, 12288), (73728, 12288), (12288, 36864)]  # N, K of qkv, o, gate_up, down


@jax.jit(static_argnums=(1, 2))
def random_codes(key: jax.Array, n: int, k: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (n, k // 8), jnp.uint32), jnp.int32)


def main(layers: int, shapes: list[tuple[int, int]]) -> dict[str, object]:
    device = jax.devices()[0]
    weights = []
    for i in range(layers):
        for j, (n, k) in enumerate(shapes):
            codes = random_codes(jax.random.key(len(shapes) * i + j), n, k)
            scale = jnp.full((n, k // 128), 8, jnp.float8_e4m3fn)
            weights.append(W4Weight(codes, scale, jnp.ones(n, jnp.float32), "lut", -8))
    jax.block_until_ready(weights)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    before = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    start = time.perf_counter()
    for i in range(len(weights)):
        weights[i] = prepare_weight(weights[i])
        jax.block_until_ready(weights[i])
    seconds = time.perf_counter() - start
    stats = device.memory_stats() or {}
    layer = held // layers
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "command": "python experiments/repack.py",
        "parameters": layers * sum(n * k for n, k in shapes),
        "seconds": seconds,
        "bytes_held": held,
        "bytes_of_a_layer": layer,
        "peak_before": before,
        "peak_after": stats.get("peak_bytes_in_use"),
        "peak_beyond_weights": stats.get("peak_bytes_in_use", 0) - held,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = main(arguments.layers, SHAPES)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

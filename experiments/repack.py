"""Repacking Command A's weights for the kernels, on one GPU: seconds, and memory beyond the weights.

python experiments/repack.py --out experiments/results/repack_h100.json

The 64 layers' four fused projections, 108 of its 111 B parameters; the embedding stays bf16. Codes are random and are
made on the device before the clock starts. The first layer is repacked before the others exist, smallest weights first,
so that the peak that JAX's allocator reports tells what each took beyond what was there; its seconds count. The
allocator's blocks are larger than what is in them: those of 64 layers by more than a repack needs.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import FragmentWeight, W4Weight, prepare_weight

LAYERS = 64
SHAPES = [(12288, 12288), (14336, 12288), (12288, 36864), (73728, 12288)]  # N, K of o, qkv, down, gate_up


@jax.jit(static_argnums=(1, 2))
def random_codes(key: jax.Array, n: int, k: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (n, k // 8), jnp.uint32), jnp.int32)


def random_layer(seed: int, shapes: list[tuple[int, int]]) -> list[W4Weight | FragmentWeight]:
    layer: list[W4Weight | FragmentWeight] = []
    for j, (n, k) in enumerate(shapes):
        codes = random_codes(jax.random.key(len(shapes) * seed + j), n, k)
        scale = jnp.full((n, k // 128), 8, jnp.float8_e4m3fn)
        layer.append(W4Weight(codes, scale, jnp.ones(n, jnp.float32), "lut", -8))
    return jax.block_until_ready(layer)


def repack(weights: list[W4Weight | FragmentWeight]) -> tuple[float, int]:
    """Replaces each weight that is not repacked yet; seconds, and the most bytes that one took beyond those there.

    The bytes are known where each weight is larger than those before it, and nothing was before it that took more.
    """
    start, most = time.perf_counter(), 0
    for i in range(len(weights)):
        w = weights[i]
        if isinstance(w, W4Weight):
            held = memory("bytes_in_use")
            weights[i] = prepare_weight(w)
            del w
            jax.block_until_ready(weights[i])
            most = max(most, memory("peak_bytes_in_use") - held)
    return time.perf_counter() - start, most


def memory(name: str) -> int:
    """A figure of the device's allocator."""
    return (jax.devices()[0].memory_stats() or {}).get(name, 0)


def main(layers: int, shapes: list[tuple[int, int]]) -> dict[str, object]:
    device = jax.devices()[0]
    weights = random_layer(0, shapes)
    first_seconds, extra = repack(weights)
    for i in range(1, layers):
        weights += random_layer(i, shapes)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    seconds = first_seconds + repack(weights)[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "command": "python experiments/repack.py",
        "parameters": layers * sum(n * k for n, k in shapes),
        "seconds": seconds,
        "seconds_of_first_layer": first_seconds,
        "bytes_held": held,
        "bytes_of_a_layer": held // layers,
        "most_bytes_beyond_those_held": extra,
        "allocator_in_use_after": memory("bytes_in_use"),
        "allocator_peak": memory("peak_bytes_in_use"),
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

"""Small products of the dense and the grouped kernel, to be run under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python experiments/sanitize.py

The same with racecheck and synccheck. One process, a minute: under pytest the sanitizer ends with a fault of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import W4Weight, pack_codes, quantize_activations
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.fragments import FragmentWeight
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.weight_format import Numerics

# Tokens, lowest code, numerics: few tokens, shared tiles, owners' leads, clusters, all sizes of tiles.
DENSE: list[tuple[int, int, Numerics, TuningConfig]] = [
    (1, -7, "lut", TuningConfig(8, 2, 2, 8, stream_k=True)),
    (8, -8, "lut", TuningConfig(8, 2, 1, 8, stream_k=True, lead=2)),
    (136, -7, "lut", TuningConfig(64, 2, 1, 8, stream_k=True)),
    (304, -7, "lut", TuningConfig(256, 1, 2, 4)),
    (304, -7, "lut", TuningConfig(256, 1, 2, 4, cluster=2)),
    (24, -7, "lut", TuningConfig(32, 2, 2, 4, slot_steps=2)),
    (40, -7, "lut", TuningConfig(64, 1, 2, 4, stream_k=True, lead=2, slot_steps=2)),
    (304, -8, "lut", TuningConfig(128, 2, 1, 4, stream_k=True)),
    (24, -7, "exact", TuningConfig(16, 2, 2, 4)),
    (136, -7, "lut", TuningConfig(64, 2, 2, 4, cluster=2)),
]
GROUPS = [[3, 0, 21, 0, 40], [0, 0, 1, 0, 0], [100, 0, 60, 8, 33]]
GROUPED = [TuningConfig(16, 2, 2, 4), TuningConfig(16, 1, 2, 4, slot_steps=2, stream_k=True)]


def operands(
    m: int, shape: tuple[int, ...], code_min: int, numerics: Numerics
) -> tuple[jax.Array, jax.Array, FragmentWeight]:
    """Random activations float8_e4m3fn [M, K], their scales fp32 [M, 1], and a weight [..., N, K]; made on the CPU."""
    rng = np.random.default_rng(m)
    with jax.default_device(jax.devices("cpu")[0]):
        packed = pack_codes(jnp.asarray(rng.integers(code_min, 8, shape)))
        scale = jnp.asarray(np.exp2(rng.uniform(-11, -5, (*shape[:-1], shape[-1] // 128))), jnp.bfloat16)
        w = W4Weight.from_checkpoint(packed, scale, numerics=numerics, code_min=code_min)
        x8, token_scale = quantize_activations(jnp.asarray(rng.standard_normal((m, shape[-1])), jnp.bfloat16))
        made = jax.device_get((x8, token_scale, FragmentWeight.from_weight(w)))
    return jax.device_put(made)  # type: ignore[no-any-return]


def main() -> None:
    for m, code_min, numerics, config in DENSE:
        x8, token_scale, w = operands(m, (1024, 512), code_min, numerics)
        first, second = (np.asarray(dense_gemm(x8, token_scale, w, config)) for _ in range(2))
        print(
            f"dense, {m} tokens, codes {code_min}..7, {numerics}: same twice {np.array_equal(first, second)}",
            flush=True,
        )
    for sizes in GROUPS:
        x8, token_scale, w = operands(-(-sum(sizes) // 8) * 8, (len(sizes), 256, 512), -7, "lut")
        for config in GROUPED:
            product = grouped_gemm(x8, token_scale, w, jnp.asarray(sizes, jnp.int32), config)
            print(f"grouped, {sizes}, {config}: {jax.block_until_ready(product).shape}", flush=True)


if __name__ == "__main__":
    main()

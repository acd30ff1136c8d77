"""The portable baseline: a plain Triton kernel for W4A16, called through jax-triton, as a kernel of the benchmark.

Needs triton and jax-triton (w4a8jax[triton]) only when it is called.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import GROUP_SIZE
from pallas_kernels.errors import W4A8Error
from pallas_kernels.weight_format import CODES_PER_WORD

from .kernels import Kernel
from .operands import Weights

NAME = "triton w4a16"
_MULTIPROCESSORS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the product is cut.

    Attributes:
        m: tokens of a tile.
        n: outputs of a tile.
        warps: of a program.
        stages: tiles of operands in flight.
        resident: programs that a multiprocessor holds at once.
    """

    m: int
    n: int
    warps: int
    stages: int
    resident: int


# The smallest that hold M, else the last. What a multiprocessor holds follows from shared memory.
BLOCKS = (Blocks(16, 64, 4, 6, 4), Blocks(64, 128, 8, 4, 2), Blocks(128, 128, 8, 3, 1), Blocks(256, 128, 8, 3, 1))


def unavailable() -> str | None:
    """Why the kernel cannot be called; None if what it needs is installed."""
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(module) is None:
            return f"{NAME}: needs {package}, which is not installed; w4a8jax[triton] has it"
    return None


def triton_kernels() -> list[Kernel]:
    """The baseline, or nothing where it is unavailable."""
    return [] if unavailable() else [TritonW4A16(NAME, "w4a16", 0.5 + 2 / GROUP_SIZE, 2)]


def choose(m: int) -> Blocks:
    """The blocks for M tokens."""
    return next((blocks for blocks in BLOCKS if m <= blocks.m), BLOCKS[-1])


def splits(m: int, n: int, k: int, blocks: Blocks) -> int:
    """In how many parts K is summed: a power of two that divides its groups, while all programs run at once."""
    count, programs = 1, -(-m // blocks.m) * -(-n // blocks.n)
    while k // GROUP_SIZE % (2 * count) == 0 and 2 * count * programs <= blocks.resident * _MULTIPROCESSORS:
        count *= 2
    return count


def matmul(
    x: Float[Array, "M K"], packed: Int[Array, "N K/8"], scale: Float[Array, "K/128 N"], blocks: Blocks | None = None
) -> Float[Array, "M N"]:
    """bf16 `x @ w.T`, [M, N], of `reference.matmul_w4a16` for a weight in "exact" numerics; sums in fp32.

    The result is the same in every bit each time: parts of K are summed apart, and added in order.

    Args:
        x: bf16 [M, K].
        packed: int32 [N, K/8], `W4Weight.packed`.
        scale: bf16 [K/128, N], `W4Weight.group_scale` transposed: two bytes at a time, Triton copies nothing ahead.
        blocks: default: as `choose` gives.

    Raises:
        W4A8Error: shapes or dtypes do not fit, an operand is too large, or a package is missing.
    """
    _check(x, packed, scale)
    if reason := unavailable():
        raise W4A8Error(reason)
    import jax_triton

    from .triton_w4a16 import w4a16_kernel

    (m, k), n = x.shape, packed.shape[0]
    blocks = blocks or choose(m)
    parts = splits(m, n, k, blocks)
    sums = jax_triton.triton_call(
        x,
        packed,
        scale,
        m,
        kernel=w4a16_kernel,
        out_shape=jax.ShapeDtypeStruct((parts, m, n), jnp.float32 if parts > 1 else jnp.bfloat16),
        grid=(-(-m // blocks.m) * -(-n // blocks.n), parts),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        N=n,
        K=k,
        SPLIT_GROUPS=k // GROUP_SIZE // parts,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
    )
    return sums[0] if parts == 1 else sums.sum(0).astype(jnp.bfloat16)


class TritonW4A16(Kernel):
    """`matmul`, with the blocks that `choose` gives."""

    def config(self, m: int, n: int, k: int) -> dict[str, Any] | None:
        blocks = choose(m)
        return dataclasses.asdict(blocks) | {"splits": splits(m, n, k, blocks)}

    def weight(self, weights: Weights, i: int) -> Any:
        w, scale = weights.quantized(i)
        return w.packed, scale.T

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        packed = jax.ShapeDtypeStruct((n, k // CODES_PER_WORD), jnp.int32)
        scale = jax.ShapeDtypeStruct((k // GROUP_SIZE, n), jnp.bfloat16)
        return jax.jit(lambda x, w: matmul(x, *w)).lower(x, (packed, scale)).compile()


def _check(x: Any, packed: Any, scale: Any) -> None:
    """Raises:
    W4A8Error: the kernel cannot take them.
    """
    if x.dtype != jnp.bfloat16 or x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0 or x.shape[1] % GROUP_SIZE:
        raise W4A8Error(f"x: expected bf16 [M, K], K a multiple of {GROUP_SIZE}, found {_describe(x)}")
    (m, k), n = x.shape, packed.shape[0] if packed.ndim else 0
    for name, found, dtype, shape in (
        ("packed", packed, jnp.int32, (n, k // CODES_PER_WORD)),
        ("scale", scale, jnp.bfloat16, (k // GROUP_SIZE, n)),
    ):
        if found.dtype != dtype or found.shape != shape or n == 0:
            raise W4A8Error(f"{name}: expected {jnp.dtype(dtype)}{list(shape)}, found {_describe(found)}")
    if max(m * k, m * n, n * k // CODES_PER_WORD) >= 2**31:
        raise W4A8Error(f"M {m}, N {n}, K {k}: too large, the kernel counts elements in 32 bits")


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"

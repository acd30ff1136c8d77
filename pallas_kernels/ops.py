"""The matrix products that models call: they check, choose an implementation and define gradients."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import divided, reference, tuning
from .activations import quantize_activations
from .dense_gemm import dense_gemm
from .errors import W4A8Error
from .fragments import FragmentWeight, Scheme, takes_scales
from .group_schedule import ALIGNMENT
from .grouped_gemm import MOST_GROUPS, grouped_gemm
from .partition import Partition
from .quantize_kernel import quantize_gated, quantize_tokens
from .rounding import round_to
from .weight_format import GROUP_SIZE, W4Weight


def backend() -> Literal["hopper", "reference"]:
    """What computes W4A8 products on JAX's default device: kernels for Hopper GPUs, or the reference in plain jnp."""
    return "hopper" if tuning.hopper() else "reference"


def prepare_weight(
    w: W4Weight, scheme: Scheme = "w4a8", partition: Partition | None = None
) -> W4Weight | FragmentWeight:
    """The weight in the layout that the default device's kernel takes; as it is where none takes it.

    Converted are weights for which `kernel_takes` is true. Worth doing once, when a model is loaded.

    Args:
        w: [N, K], or [E, N, K] of experts.
        scheme: the product that it is for.
        partition: how w is divided among several devices; each converts its part.
    """
    if not (tuning.hopper() and kernel_takes(w, scheme, partition)):
        return w
    return _to_fragments(w, scheme) if partition is None else divided.repack(w, scheme, partition)


def kernel_takes(w: W4Weight, scheme: Scheme = "w4a8", partition: Partition | None = None) -> bool:
    """Whether there is a kernel for a weight, or for each device's part of one that is divided.

    It is for weights [N, K], and [E, N, K] of experts, in groups of 128, N and K multiples of 128; for `w4a16_matmul`
    and `w4a16_ragged_matmul` ("w4a16") only in "exact" numerics with bf16 scales; with code -8 in "lut" numerics, only
    if no group scale is negative or NaN.
    """
    *experts, n, k = w.shape if partition is None else partition.part(w.shape)
    fits = w.group_size == GROUP_SIZE and tuning.takes(n, k)
    fits = fits and (not experts or (len(experts) == 1 and experts[0] <= MOST_GROUPS))
    if scheme == "w4a16":
        fits = fits and w.numerics == "exact" and w.group_scale.dtype == jnp.bfloat16
    return fits and takes_scales(w)


# Under jit, so that the codes are never unpacked in memory as a whole.
_to_fragments = jax.jit(FragmentWeight.from_weight, static_argnums=1)
# Under jit, so that a kernel is traced and lowered once for all layers of a model that have the same shapes.
_dense_gemm = jax.jit(dense_gemm, static_argnums=3)
_grouped_gemm = jax.jit(grouped_gemm, static_argnums=4)


def w4a8_matmul(
    x: Float[Array, "... K"], w: W4Weight | FragmentWeight, *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "... N"]:
    """`x @ w.T` with INT4 weights and FP8 activations, accumulated in fp32.

    Args:
        x: [..., K], any float dtype; quantized to FP8 per token.
        w: [N, K], in "lut" or "exact" numerics; a `FragmentWeight`, from `prepare_weight`, runs on the kernel, on
            several devices as `divided` says.
        out_dtype: dtype of the result, rounded once from fp32.

    Returns:
        [..., N] `channel_scale[n] * (token_scale[m] * sum_k w8[n, k] * x8[m, k])`.

    Raises:
        W4A8Error: shapes or dtypes do not fit.

    The gradient is straight-through: x receives `g @ (w8 * channel_scale)` as if it had not been quantized, and
    channel_scale its true gradient; codes and group scales are constants. A `FragmentWeight` has no gradient.
    """
    _check(x, w, 2, "w4a8")
    if isinstance(w, FragmentWeight):
        return _kernel(x, w).astype(out_dtype)
    return round_to(_w4a8(x, w), out_dtype)


def w4a8_gated_matmul(
    gate_up: Float[Array, "... 2K"], w: W4Weight | FragmentWeight, *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "... N"]:
    """`w4a8_matmul(gated(gate_up), w)`, the second product of an MLP; before a kernel, one pass gates and quantizes.

    Arguments, result and errors are those of `w4a8_matmul`, but for `gate_up` [..., 2K], gate's columns before up's.
    """
    one_pass = isinstance(w, FragmentWeight) and w.partition is None and gate_up.dtype in (jnp.bfloat16, jnp.float16)
    if not (one_pass and tuning.hopper()):
        return w4a8_matmul(gated(gate_up), w, out_dtype=out_dtype)
    _check(gate_up[..., : gate_up.shape[-1] // 2], w, 2, "w4a8")
    return _gated_kernel(gate_up, w).astype(out_dtype)


def w4a16_matmul(
    x: Float[Array, "... K"], w: W4Weight | FragmentWeight, *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "... N"]:
    """`x @ w.T` with INT4 weights dequantized to bf16 and bf16 activations, accumulated in fp32.

    Arguments, result and errors are those of `w4a8_matmul`; a `FragmentWeight` is from `prepare_weight(w, "w4a16")`.
    The gradient is that of the rounded operands.
    """
    _check(x, w, 2, "w4a16")
    if isinstance(w, FragmentWeight):
        return _kernel(x, w).astype(out_dtype)
    return round_to(reference.matmul_w4a16(x, w), out_dtype)


def w4a8_ragged_matmul(
    x: Float[Array, "M K"],
    w: W4Weight | FragmentWeight,
    group_sizes: Int[Array, "E"],
    *,
    out_dtype: Any = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """`w4a8_matmul` of consecutive groups of rows, each with its own weight, as `jax.lax.ragged_dot`.

    Args:
        x: [M, K]; rows are sorted by group.
        w: [E, N, K]; a `FragmentWeight`, from `prepare_weight`, runs on the grouped kernel, and has no gradient.
        group_sizes: int [E], rows of each group; their sum may be less than M, and rows past it give zeros.
        out_dtype: dtype of the result, rounded once from fp32.

    Raises:
        W4A8Error: shapes or dtypes do not fit.
    """
    _check_ragged(x, w, group_sizes, "w4a8")
    if isinstance(w, FragmentWeight):
        if w.partition is not None:
            raise W4A8Error("w: experts divided among devices have no product of their own; use moe_mlp")
        return w4a8_ragged_rows(x, None, w, group_sizes.astype(jnp.int32)).astype(out_dtype)
    return round_to(reference.ragged_matmul(x, w, group_sizes), out_dtype)


def w4a16_ragged_matmul(
    x: Float[Array, "M K"],
    w: W4Weight | FragmentWeight,
    group_sizes: Int[Array, "E"],
    *,
    out_dtype: Any = jnp.bfloat16,
) -> Float[Array, "M N"]:
    """`w4a16_matmul` of consecutive groups of rows, each with its own weight.

    Arguments, result and errors are those of `w4a8_ragged_matmul`; a `FragmentWeight` is from
    `prepare_weight(w, "w4a16")`.
    """
    _check_ragged(x, w, group_sizes, "w4a16")
    if isinstance(w, FragmentWeight):
        return _w4a16_ragged(x, w, group_sizes.astype(jnp.int32)).astype(out_dtype)
    return round_to(reference.ragged_matmul_w4a16(x, w, group_sizes), out_dtype)


def _check_ragged(x: Array, w: W4Weight | FragmentWeight, group_sizes: Array, scheme: Scheme) -> None:
    _check(x, w, 3, scheme)
    if x.ndim != 2:
        raise W4A8Error(f"x: expected [M, K], found {list(x.shape)}")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        found = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise W4A8Error(f"group_sizes: expected integers [{w.shape[0]}], one for each expert, found {found}")


def _check(x: Array, w: W4Weight | FragmentWeight, rank: int, scheme: Scheme) -> None:
    if not isinstance(w, W4Weight | FragmentWeight):
        raise W4A8Error(f"w: expected a W4Weight, found {type(w).__name__}")
    if isinstance(w, FragmentWeight) and w.scheme != scheme:
        raise W4A8Error(f"w: expected a weight prepared for {scheme}, found one for {w.scheme}")
    if len(w.shape) != rank:
        raise W4A8Error(f"w: expected {['[N, K]', '[E, N, K]'][rank - 2]}, found {list(w.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise W4A8Error(f"x: expected a float dtype, found {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise W4A8Error(f"x: expected [..., {w.shape[-1]}] to fit w {list(w.shape)}, found {list(x.shape)}")


@jax.custom_vjp
def _kernel(x: Array, w: FragmentWeight) -> Array:
    return _product(x, w) if w.partition is None else divided.product(_product, x, w)


@jax.custom_vjp
def _gated_kernel(gate_up: Array, w: FragmentWeight) -> Array:
    *lead, width = gate_up.shape
    m = math.prod(lead)
    operands = quantize_gated(gate_up.reshape(m, width), _rows(m))
    return _dense(*operands, w, m).reshape(*lead, w.shape[0])


def _product(x: Array, w: FragmentWeight, axis_name: str | None = None) -> Array:
    """bf16 [..., N] of x [..., K] on this device; `axis_name` as for `quantize_activations`."""
    *lead, k = x.shape
    m = math.prod(lead)
    x, rows = x.reshape(m, k), _rows(m)
    if w.scheme == "w4a8":
        x, token_scale = _quantized(x, rows, axis_name=axis_name)
    else:
        x, token_scale = jnp.pad(round_to(x, jnp.bfloat16), ((0, rows - m), (0, 0))), None
    return _dense(x, token_scale, w, m).reshape(*lead, w.shape[0])


def _rows(m: int) -> int:
    """Of the dense kernel's operands for M tokens: the copy engine's tiles are of 8."""
    return m if m <= 8 else -(-m // 8) * 8


def _dense(x: Array, token_scale: Array | None, w: FragmentWeight, m: int) -> Array:
    """The first m rows of a product."""
    n, k = w.shape
    return _dense_gemm(x, token_scale, w, tuning.choose(m, n, k, w.form))[:m]


def _quantized(x: Array, rows: int, place: Array | None = None, axis_name: str | None = None) -> tuple[Array, Array]:
    """FP8 [rows, K] and scales of x [M, K], each token in its own row, or in those of `place` [M, top_k].

    What rows of no token hold is not defined. `axis_name` as for `quantize_activations`.
    """
    if tuning.hopper() and axis_name is None:
        narrow = x.dtype in (jnp.bfloat16, jnp.float16)
        return quantize_tokens(x if narrow else x.astype(jnp.float32), rows, place)
    x8, token_scale = quantize_activations(x, axis_name)
    if place is None:
        return tuple(jnp.pad(v, ((0, rows - x.shape[0]), (0, 0))) for v in (x8, token_scale))  # type: ignore[return-value]
    top_k = place.shape[1]
    return tuple(  # type: ignore[return-value]
        jnp.zeros((rows, v.shape[1]), v.dtype).at[place.reshape(-1)].set(jnp.repeat(v, top_k, axis=0))
        for v in (x8, token_scale)
    )


def _kernel_forward(x: Array, w: FragmentWeight) -> tuple[Array, None]:
    raise W4A8Error("w: a FragmentWeight has no gradient; use the W4Weight that it was made from")


_kernel.defvjp(_kernel_forward, lambda saved, g: (g, saved))
_gated_kernel.defvjp(_kernel_forward, lambda saved, g: (g, saved))


@jax.custom_vjp
def w4a8_ragged_rows(x: Array, place: Array | None, w: FragmentWeight, group_sizes: Array) -> Array:
    """`w4a8_ragged_matmul` on the grouped kernel, of x, or of rows that its tokens are sent to.

    Args:
        x: [T, K], each token quantized once.
        place: int32 [T, top_k], where in M = T * top_k rows, sorted by group, each token goes; None for x as it is.
        w: [E, N, K], for "w4a8".
        group_sizes: int32 [E].

    Returns:
        bf16 [M, N].

    Raises:
        W4A8Error: a gradient is asked for.
    """
    m = x.shape[0] if place is None else place.size
    if m == 0:
        return jnp.zeros((0, w.shape[1]), jnp.bfloat16)
    return _grouped(*_quantized(x, m + -m % ALIGNMENT, place), w, group_sizes, m)


w4a8_ragged_rows.defvjp(lambda x, place, w, _: _kernel_forward(x, w), lambda saved, g: (g, None, saved, g))


@jax.custom_vjp
def _w4a16_ragged(x: Array, w: FragmentWeight, group_sizes: Array) -> Array:
    m = x.shape[0]
    if m == 0:
        return jnp.zeros((0, w.shape[1]), jnp.bfloat16)
    return _grouped(jnp.pad(round_to(x, jnp.bfloat16), ((0, -m % ALIGNMENT), (0, 0))), None, w, group_sizes, m)


_w4a16_ragged.defvjp(lambda x, w, _: _kernel_forward(x, w), lambda saved, g: (g, saved, g))


@jax.custom_vjp
def w4a8_gated_rows(gate_up: Array, w: FragmentWeight, group_sizes: Array) -> Array:
    """`w4a8_ragged_rows` of `gated(gate_up)`, bf16 [M, 2K], sorted by group, for w [E, N, K]; bf16 [M, N]."""
    m = gate_up.shape[0]
    if m == 0 or not tuning.hopper():  # as what comes before a kernel is computed where there is none
        return w4a8_ragged_rows(gated(gate_up), None, w, group_sizes)
    return _grouped(*quantize_gated(gate_up, m + -m % ALIGNMENT), w, group_sizes, m)


w4a8_gated_rows.defvjp(lambda gate_up, w, _: _kernel_forward(gate_up, w), lambda saved, g: (g, saved, g))


def _grouped(x: Array, token_scale: Array | None, w: FragmentWeight, group_sizes: Array, m: int) -> Array:
    """The first m rows of a product; x has rows beyond them, of no group, up to a multiple of the kernel's 8."""
    experts, n, k = w.shape
    config = tuning.choose_grouped(m, experts, n, k, w.form)
    return _grouped_gemm(x, token_scale, w, group_sizes, config)[:m]


def gated(gate_up: Float[Array, "... 2F"]) -> Float[Array, "... F"]:
    """`silu(gate) * up` of the columns of gate and those of up, each rounded to their dtype, as in vLLM's kernel."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    silu = round_to(jax.nn.silu(gate.astype(jnp.float32)), gate.dtype)
    return round_to(silu.astype(jnp.float32) * up.astype(jnp.float32), gate.dtype)


@jax.custom_vjp
def _w4a8(x: Array, w: W4Weight) -> Array:
    return reference.matmul(x, w)


def _w4a8_forward(x: Array, w: W4Weight) -> tuple[Array, tuple[Array, W4Weight]]:
    return _w4a8(x, w), (x, w)


def _w4a8_backward(saved: tuple[Array, W4Weight], g: Array) -> tuple[Array, W4Weight]:
    x, w = saved
    dot = partial(jnp.dot, precision="highest")
    dx = dot(g * w.channel_scale, w.operand().astype(jnp.float32)).astype(x.dtype)
    unscaled = reference.matmul(x, W4Weight(w.packed, w.group_scale, jnp.ones_like(w.channel_scale), w.numerics))
    d_channel_scale = jnp.sum((g * unscaled).reshape(-1, g.shape[-1]), axis=0)
    no_tangent = np.zeros(w.packed.shape, jax.dtypes.float0)
    return dx, W4Weight(no_tangent, jnp.zeros_like(w.group_scale), d_channel_scale, w.numerics, w.code_min)


_w4a8.defvjp(_w4a8_forward, _w4a8_backward)

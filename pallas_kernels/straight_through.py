"""Training through the W4A8 arithmetic: the forward pass is the kernel's, the backward pass ignores its roundings.

With weights `w = channel_scale * w8`, `w8 = e4m3(nearest code * group_scale)` of master weights W, and activations
`x~ = token_scale * x8` of x, the product is `y = x~ w^T`. The straight-through estimator (Bengio et al., 2013,
arXiv:1308.3432) takes dx~/dx and dw/dW as the identity:

    dx = dy w        dW = dy^T x~

This is the gradient of the surrogate `(x + (x~ - x)) (W + (w - W))^T`, in which the rounding errors are constants.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import reference
from .activations import quantize_activations
from .dequantize import lut_magnitudes, nearest_codes
from .errors import W4A8Error
from .rounding import round_to
from .weight_format import W4Weight, convert_scales, pack_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MasterWeight:
    """A weight in high precision that computes as the `W4Weight` nearest to it on a given grid.

    Attributes:
        master: fp32 or bf16 [..., N, K], what is trained.
        scale: bf16 [..., N, G], the group scales of a checkpoint; a constant.
        code_min: the lowest code, -7 or -8; static.
    """

    master: Any
    scale: Any
    code_min: int = dataclasses.field(default=-7, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return tuple(self.master.shape)

    def quantize(self) -> W4Weight:
        """The weight that it computes as, in "lut" numerics."""
        group_scale, channel_scale = convert_scales(self.scale)
        *lead, k = self.master.shape
        groups = self.master.astype(jnp.float32).reshape(*lead, group_scale.shape[-1], -1)
        magnitudes = lut_magnitudes(group_scale) * channel_scale[..., None, None]
        codes = nearest_codes(groups, magnitudes, self.code_min).reshape(*lead, k)
        return W4Weight(pack_codes(codes), group_scale, channel_scale, "lut", self.code_min)


def straight_through_matmul(
    x: Float[Array, "... K"], w: MasterWeight, *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "... N"]:
    """`w4a8_matmul(x, w.quantize())`, with straight-through gradients for x and the master weight.

    Args:
        x: [..., K], any float dtype.
        w: [N, K].
        out_dtype: dtype of the result, rounded once from fp32.

    Raises:
        W4A8Error: shapes do not fit.
    """
    _check(x, w, 2)
    return round_to(_matmul(x, w.master, w.scale, w.code_min), out_dtype)


def straight_through_ragged_matmul(
    x: Float[Array, "M K"], w: MasterWeight, group_sizes: Int[Array, "E"], *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "M N"]:
    """`w4a8_ragged_matmul(x, w.quantize(), group_sizes)` of experts [E, N, K], with straight-through gradients.

    Raises:
        W4A8Error: shapes do not fit.
    """
    _check(x, w, 3)
    return round_to(_ragged(x, w.master, w.scale, group_sizes, w.code_min), out_dtype)


def _check(x: Array, w: MasterWeight, rank: int) -> None:
    if len(w.shape) != rank or x.shape[-1:] != w.shape[-1:]:
        expected = ["[N, K]", "[E, N, K]"][rank - 2]
        raise W4A8Error(f"w: expected {expected} to fit x {list(x.shape)}, found {list(w.shape)}")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, master: Array, scale: Array, code_min: int) -> Array:
    return _matmul_forward(x, master, scale, code_min)[0]


def _matmul_forward(x: Array, master: Array, scale: Array, code_min: int) -> tuple[Array, Any]:
    x8, token_scale = quantize_activations(x)
    w = MasterWeight(master, scale, code_min).quantize()
    w8 = w.operand()
    # FP8 values are exact in bf16 too, whose products GPUs sum in fp32.
    total = _dot(x8, w8, ((x.ndim - 1,), (1,)), _fast_dtype(jnp.bfloat16))
    saved = x8, token_scale, w8, w.channel_scale, scale, *(jnp.zeros(0, like.dtype) for like in (x, master))
    return w.channel_scale * (token_scale * total), saved


def _matmul_backward(code_min: int, saved: Any, g: Array) -> tuple[Array, Array, Array]:
    x8, token_scale, w8, channel_scale, scale, like_x, like_master = saved
    dtype = _fast_dtype(like_x.dtype)
    dx = _dot(g * channel_scale, w8, ((g.ndim - 1,), (0,)), dtype)
    tokens = tuple(range(g.ndim - 1))
    d_master = _dot(g, x8.astype(jnp.float32) * token_scale, (tokens, tokens), dtype)
    return dx.astype(like_x.dtype), d_master.astype(like_master.dtype), jnp.zeros_like(scale)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ragged(x: Array, master: Array, scale: Array, group_sizes: Array, code_min: int) -> Array:
    return reference.ragged_matmul(x, MasterWeight(master, scale, code_min).quantize(), group_sizes)


def _ragged_forward(
    x: Array, master: Array, scale: Array, group_sizes: Array, code_min: int
) -> tuple[Array, tuple[Array, ...]]:
    return _ragged(x, master, scale, group_sizes, code_min), (x, master, scale, group_sizes)


def _ragged_backward(code_min: int, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, np.ndarray]:
    x, master, scale, group_sizes = saved
    x8, token_scale = quantize_activations(x)
    values = x8.astype(jnp.float32) * token_scale, MasterWeight(master, scale, code_min).quantize().dequantize()
    dx, d_master = jax.vjp(lambda x, w: reference.ragged_dot(x, w, group_sizes), *values)[1](g)
    no_tangent = np.zeros(group_sizes.shape, jax.dtypes.float0)
    return dx.astype(x.dtype), d_master.astype(master.dtype), jnp.zeros_like(scale), no_tangent


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _fast_dtype(dtype: Any) -> Any:
    """What operands are cast to: bf16 if they are no wider and the device multiplies it fast, else fp32."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 and jax.default_backend() != "cpu" else jnp.float32


def _dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> Array:
    """fp32 sums over the contracted axes of operands in `dtype`."""
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (contract, ((), ())), precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip

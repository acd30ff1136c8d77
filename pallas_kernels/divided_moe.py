"""The products of a mixture of experts on several devices: experts divided, or their width F, or both.

Every device has all tokens and knows where each is sent; rows are sorted by expert as on one device. With experts
divided, a device's rows are consecutive: they are moved to the front, the groups are those of its own experts, and the
grouped kernel computes no others. With F divided, a device has the gates and ups of its columns of `down`, and tokens
between the two products have the scale of the whole token, as in `divided`. At the end each device adds up, for each
token, what it has, in fp32, and one sum over the devices, in fp32 too, makes it whole.

What differs from one device: sums of fp32 are in another order; with F divided, kernels round each part of a row to
bf16, and where one device rounds a row to bf16, its parts are added unrounded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from . import tuning
from .activations import quantize_activations
from .divided import specs
from .errors import W4A8Error
from .expert_rows import sort_by_expert
from .fragments import FragmentWeight, Scheme
from .group_schedule import ALIGNMENT
from .grouped_gemm import grouped_gemm
from .ops import gated
from .partition import Partition
from .quantize_kernel import quantize_gated, quantize_tokens
from .rounding import round_to


@jax.custom_vjp
def _total(x: Array, weights: Array, experts: Array, gate_up: FragmentWeight, down: FragmentWeight) -> Array:
    partition = down.partition
    assert partition is not None
    assert gate_up.partition is not None
    count, whole = down.shape[0], PartitionSpec()

    def part(x: Array, weights: Array, experts: Array, gate_up: FragmentWeight, down: FragmentWeight) -> Array:
        gate_up, down = (dataclasses.replace(w, partition=None) for w in (gate_up, down))
        order, place, sizes = sort_by_expert(experts, count)
        order = order // experts.shape[1]
        if partition.experts is not None:
            own = down.shape[0]
            first = own * jax.lax.axis_index(partition.experts)
            before = jnp.sum(jnp.where(jnp.arange(count) < first, sizes, 0), dtype=jnp.int32)
            sizes = jax.lax.dynamic_slice(sizes, (first,), (own,))
            order, place = jnp.roll(order, -before), (place - before) % order.size
            order = jnp.where(jnp.arange(order.size) < jnp.sum(sizes), order, 0)  # of others, one token for all
        inner = _products(*_quantized(x, gate_up), order, gate_up, sizes, partition).astype(x.dtype)
        rows = _products(*_quantized_gated(inner, down, partition.columns), None, down, sizes, partition)
        total = jnp.zeros(x.shape, jnp.float32)
        for k in range(experts.shape[1]):
            # Rows of other devices' experts are zeros.
            total += weights[:, k, None] * rows[place[:, k]].astype(jnp.float32)
        axes = tuple(axis for axis in (partition.experts, partition.columns) if axis is not None)
        return jax.lax.psum(total, axes) if axes else total

    return jax.shard_map(
        part,
        mesh=partition.mesh,
        in_specs=(whole, whole, whole, specs(gate_up, gate_up.partition), specs(down, partition)),
        out_specs=whole,
        check_vma=False,
    )(x, weights, experts, gate_up, down)


def _no_gradient(*_: Any) -> tuple[Array, None]:
    raise W4A8Error("w: a FragmentWeight has no gradient; use the W4Weight that it was made from")


_total.defvjp(_no_gradient, lambda saved, g: (g, saved, saved, saved, saved))


def divided_total(
    x: Float[Array, "T D"],
    weights: Float[Array, "T top_k"],
    experts: Int[Array, "T top_k"],
    gate_up: Any,
    down: Any,
    scheme: Scheme,
) -> Float[Array, "T D"]:
    """fp32 sums over each token's experts, the same on every device.

    Args:
        x: [T, D].
        weights, experts: of `route`.
        gate_up: [E, 2F, D], its rows divided by the mesh axis that divides `down`'s columns: each device has the rows
            of gate that it has of up, gate first.
        down: [E, D, F].
        scheme: as of `moe_mlp`.

    Raises:
        W4A8Error: the weights are not both divided and prepared for the scheme, or not divided alike; or a gradient is
            asked for.
    """
    for name, w in (("gate_up", gate_up), ("down", down)):
        if not isinstance(w, FragmentWeight) or w.partition is None or w.scheme != scheme:
            raise W4A8Error(f"{name}: expected a weight divided and prepared for {scheme}, as the other is")
    expected = dataclasses.replace(down.partition, rows=down.partition.columns, columns=None)
    if down.partition.rows is not None or gate_up.partition != expected:
        raise W4A8Error("experts: gate_up must be divided by rows and down by columns, over the same axes of a mesh")
    if x.shape[0] == 0:
        return jnp.zeros(x.shape, jnp.float32)
    return _total(x, weights, experts, gate_up, down)


def _quantized(x: Array, w: FragmentWeight, axis_name: str | None = None) -> tuple[Array, Array | None]:
    """x as w's kernel takes it, and its scales if that is FP8; `axis_name` as for `quantize_activations`."""
    if w.scheme == "w4a16":
        return round_to(x, jnp.bfloat16), None
    if tuning.hopper() and axis_name is None:
        return quantize_tokens(x, x.shape[0])
    return quantize_activations(x, axis_name)


def _quantized_gated(gate_up: Array, w: FragmentWeight, axis_name: str | None) -> tuple[Array, Array | None]:
    one_kernel = tuning.hopper() and axis_name is None and gate_up.dtype == jnp.bfloat16
    if w.scheme == "w4a8" and one_kernel:
        return quantize_gated(gate_up, gate_up.shape[0])
    return _quantized(gated(gate_up), w, axis_name)


def _products(
    x: Array, token_scale: Array | None, rows: Array | None, w: FragmentWeight, sizes: Array, partition: Partition
) -> Array:
    """bf16 [M, N]: rows of x, or all, sorted by expert, times this device's part w; zeros past the groups."""
    m = (x if rows is None else rows).shape[0]

    def laid_out(values: Array) -> Array:
        """Padded to the kernel's tiles of 8 rows; those added belong to no group."""
        if rows is None:
            return jnp.pad(values, ((0, -m % ALIGNMENT), (0, 0)))
        return values[jnp.pad(rows, (0, -m % ALIGNMENT))]

    experts, n, k = w.shape
    # This device has its share of all rows, if they are spread evenly.
    config = tuning.choose_grouped(-(-m // partition.shards(partition.experts)), experts, n, k, w.form)
    token_scale = None if token_scale is None else laid_out(token_scale)
    return _grouped_gemm(laid_out(x), token_scale, w, sizes, config)[:m]


# Under jit, so that a kernel is traced and lowered once for all layers of a model that have the same shapes.
_grouped_gemm = jax.jit(grouped_gemm, static_argnums=4)

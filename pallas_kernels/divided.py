"""Kernels on several devices: each runs the kernel on its part of a weight, inside `jax.shard_map`.

XLA's partitioner cannot divide a kernel, so that what it would do is written here. Rows of a weight divided (column
parallel): each device has all of x and computes its own outputs, and nothing is sent. Columns divided (row parallel):
each device has its columns of x and computes a part of every sum:

    part_d[m, n] = bf16(channel_scale[n] * (token_scale[m] * sum_{k of d} w8[n, k] * x8[m, k]))
    out[m, n]    = bf16(sum_d part_d[m, n])                                                          in fp32

The token scale is that of the whole token: the greatest values of the parts are compared between devices before a part
is quantized, so that operands are one device's, bit for bit. What differs from one device is the rounding of each part
to bf16, the only type that kernels store; parts are sent and added in fp32, and their sum is rounded once.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from .fragments import FragmentWeight, Scheme
from .partition import Partition
from .rounding import round_to
from .weight_format import W4Weight


@partial(jax.jit, static_argnums=(1, 2))
def repack(w: W4Weight, scheme: Scheme, partition: Partition) -> FragmentWeight:
    """`FragmentWeight.from_weight`, by each device of its part. The whole is what one device would make of the whole.

    Args:
        w: [N, K] or [E, N, K], divided as `partition` says.
        scheme: see `FragmentWeight.from_weight`.
        partition: of the result.

    Raises:
        W4A8Error: a part is not one that the kernel takes.
    """

    def part(w: W4Weight) -> FragmentWeight:
        return dataclasses.replace(FragmentWeight.from_weight(w, scheme), partition=partition)

    return jax.shard_map(
        part,
        mesh=partition.mesh,
        in_specs=(specs(w, partition),),
        out_specs=specs(jax.eval_shape(part, w), partition),
        check_vma=False,
    )(w)


def specs(w: Any, partition: Partition) -> Any:
    """A `W4Weight` or `FragmentWeight` with the `PartitionSpec` of each array in its place."""
    lead = (partition.experts,) if len(w.shape) == 3 else ()
    matrix, vector = PartitionSpec(*lead, partition.rows, partition.columns), PartitionSpec(*lead, partition.rows)
    if isinstance(w, W4Weight):
        return dataclasses.replace(w, packed=matrix, group_scale=matrix, channel_scale=vector)
    # Blocks signal to others of the same device: each has flags of its own.
    return dataclasses.replace(w, words=matrix, scales=matrix, channel_scale=vector, flags=PartitionSpec())


def product(
    local: Callable[[Array, FragmentWeight, str | None], Array], x: Float[Array, "... K"], w: FragmentWeight
) -> Float[Array, "... N"]:
    """The dense product of a weight that has a partition.

    Args:
        local: the product on one device, of columns of x and a part of w; given the mesh axis that divides K, or None.
        x: [..., K].
        w: [N, K].

    Returns:
        [..., N] in local's dtype, divided over the mesh axis of w's rows.
    """
    partition = w.partition
    assert partition is not None
    lead, columns = [None] * (x.ndim - 1), partition.columns

    def part(x: Array, w: FragmentWeight) -> Array:
        y = local(x, dataclasses.replace(w, partition=None), columns)
        return y if columns is None else round_to(jax.lax.psum(y.astype(jnp.float32), columns), y.dtype)

    return jax.shard_map(
        part,
        mesh=partition.mesh,
        in_specs=(PartitionSpec(*lead, columns), specs(w, partition)),
        out_specs=PartitionSpec(*lead, partition.rows),
        check_vma=False,
    )(x, w)

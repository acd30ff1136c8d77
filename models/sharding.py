"""Tensor and expert parallelism: parameters, cache and computation divided among the devices of a mesh.

A parameter's axes have logical names, and rules say which mesh axis each name is divided over. XLA's partitioner does
the rest, so that the model's code is the same on one device and on many. It cannot divide kernels: a weight laid out
for one has a `Partition`, by which each device runs the kernel on its part (`pallas_kernels.divided`).

The two fused projections are laid out in as many pieces as there are shards, each with its own share of queries, keys
and values (or gate and up), so that splitting them moves nothing between devices.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import FragmentWeight, Partition, W4A8Error, W4Weight, backend, kernel_takes, prepare_weight

from .config import DecoderConfig
from .decoder import Decoder
from .layers.attention import Attention
from .layers.mlp import MLP
from .parameters import module_at

# Logical axis -> mesh axis. A mesh without that axis, or None, leaves it whole.
RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
    "embed": None,
}
# The end of a parameter's path -> its logical axes; other parameters are on every device.
_AXES = {
    r"embedding|lm_head\.weight": ("vocab", "embed"),
    r"attention\.qkv\.weight": ("heads", "embed"),
    r"attention\.qkv\.bias": ("heads",),
    r"attention\.output\.weight": ("embed", "heads"),
    r"experts\.gate_up": ("experts", "expert_mlp", "embed"),
    r"experts\.down": ("experts", "embed", "expert_mlp"),
    r"gate_up\.weight": ("mlp", "embed"),
    r"gate_up\.bias": ("mlp",),
    r"down\.weight": ("embed", "mlp"),
}


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a decoder is divided.

    Args:
        mesh: the devices.
        config: of the decoder.
        rules: logical axis -> mesh axis.

    Raises:
        W4A8Error: heads, key-value heads, an MLP's width or the experts cannot be divided so.
    """

    mesh: Mesh
    config: DecoderConfig
    rules: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: RULES)

    def __post_init__(self) -> None:
        config = self.config
        sizes = [("heads", "num_heads", config.num_heads), ("heads", "num_kv_heads", config.num_kv_heads)]
        for moe in {config.experts(layer) for layer in range(config.num_layers)}:
            if moe is None:
                sizes += [("mlp", "intermediate_size", config.intermediate_size)]
            else:
                sizes += [("experts", "num_experts", moe.num_experts)]
                sizes += [("expert_mlp", "the experts' intermediate_size", moe.intermediate_size)]
                sizes += [("mlp", "the shared experts' intermediate_size", moe.shared_intermediate_size or 0)]
        for axis, name, size in sizes:
            if size % self.shards(axis):
                raise W4A8Error(f"mesh: {name} {size} cannot be divided among {self.shards(axis)} devices")

    def shards(self, axis: str) -> int:
        """In how many parts a logical axis is divided."""
        name = self.rules.get(axis)
        return int(self.mesh.shape[name]) if name in self.mesh.shape else 1

    @property
    def cache(self) -> NamedSharding:
        """Of the cache's keys and values [B, S, H, D]."""
        return self._named(None, None, "heads", None)

    def batch(self, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        """Of an array whose leading axes are divided over these axes of the mesh, as far as it has them.

        Raises:
            W4A8Error: an axis of the array does not divide.
        """
        names = [axis if axis in self.mesh.shape else None for axis in axes]
        for size, name in zip(shape, names, strict=False):
            if name is not None and size % self.mesh.shape[name]:
                raise W4A8Error(f"mesh: {size} sequences cannot be divided among {self.mesh.shape[name]} devices")
        return NamedSharding(self._auto_mesh, PartitionSpec(*names))

    def apply(self, decoder: Decoder, *, kernels: bool = False) -> Decoder:
        """Divides a whole decoder, in place; `kernels` as for `place`."""
        for path, _ in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
            self.place(decoder, path, kernels=kernels)
        return self.finish(decoder)

    def finish(self, decoder: Decoder) -> Decoder:
        """Tells the modules of a decoder, whose parameters have been placed, how they are divided."""
        decoder.cache_sharding = self.cache
        for _, module in nnx.iter_modules(decoder):
            if isinstance(module, Attention | MLP):
                module.shards = self.shards("heads" if isinstance(module, Attention) else "mlp")
        return decoder

    def place(self, decoder: Decoder, path: tuple[Any, ...], *, kernels: bool = False) -> None:
        """Puts one parameter on the devices, each its part.

        Args:
            decoder: has the parameter, whole, on the host or on one device.
            path: of the parameter.
            kernels: each device lays its part of a quantized weight out for its kernels, if it has any. Where they do
                not take the parts, but would take the whole, a warning says so, and the reference computes.

        Raises:
            W4A8Error: a quantized weight's groups do not divide.
        """
        *parents, attribute = path
        module = module_at(decoder, tuple(parents))
        parameter = getattr(module, str(attribute))
        where = ".".join(map(str, path))
        axes = next((axes for end, axes in _AXES.items() if re.search(f"(^|\\.)({end})$", where)), None)
        value = parameter.get_value()
        if axes is None:
            parameter.set_value(jax.device_put(value, self._named()))
        elif isinstance(value, FragmentWeight):
            raise W4A8Error(f"{where}: a kernel's weight cannot be divided; divide the W4Weight, with kernels=True")
        elif isinstance(value, W4Weight):
            parameter.set_value(self._quantized(where, value, axes, path, module.scheme if kernels else None))
        else:
            parameter.set_value(self._put(value, axes, self.order(path, value.shape[0])))

    def _quantized(
        self, where: str, value: W4Weight, axes: tuple[str, ...], path: tuple[Any, ...], scheme: Any
    ) -> W4Weight | FragmentWeight:
        """A quantized weight in its parts, laid out for the kernels of a scheme, or for none."""
        k = value.shape[-1]
        if k % (self.shards(axes[-1]) * value.group_size):
            of = f"{k // value.group_size} groups of {value.group_size}"
            raise W4A8Error(f"{where}: {of} cannot be divided among {self.shards(axes[-1])} devices")
        partition = self._partition(axes, value.shape)
        wanted = scheme is not None and backend() == "hopper" and kernel_takes(value, scheme)
        kernel = wanted and kernel_takes(value, scheme, partition)
        if wanted and not kernel and partition is not None:
            parts = f"parts {list(partition.part(value.shape))} of weights {list(value.shape)}"
            warnings.warn(f"mesh: no kernel takes {parts}; the reference computes them", stacklevel=2)
        order, rows = self.order(path, value.shape[0]), 0
        if kernel and where.endswith("experts.gate_up"):
            # Kernels of each device compute the gates and ups of its columns of down.
            order, rows = _pieces([value.shape[1] // 2] * 2, self.shards("expert_mlp")), 1
        arrays = value.packed, value.group_scale, value.channel_scale
        packed, group_scale, channel_scale = (self._put(v, axes[: v.ndim], order, rows) for v in arrays)
        placed = W4Weight(packed, group_scale, channel_scale, value.numerics, value.code_min)
        return prepare_weight(placed, scheme, partition) if kernel else placed

    def _partition(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Partition | None:
        """Of a weight with these logical axes; None on one device."""
        if self.mesh.size == 1:
            return None
        named = self._named(*self._divided(axes, shape))
        names = dict(zip(("columns", "rows", "experts"), reversed(named.spec), strict=False))
        return Partition(self._auto_mesh, **names)

    def _put(self, value: Any, axes: tuple[str, ...], order: np.ndarray | None, rows: int = 0) -> jax.Array:
        """An array in its parts; `order` is of its axis `rows`."""
        value = value if order is None else value[(slice(None),) * rows + (order,)]
        return jax.device_put(value, self._named(*self._divided(axes, value.shape)))

    def _divided(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """The logical axes over which an array is divided: a vocabulary that does not divide is on every device."""
        whole = any(size % self.shards(axis) for size, axis in zip(shape, axes, strict=True))
        return (None,) * len(axes) if whole else axes

    def _named(self, *axes: str | None) -> NamedSharding:
        names = [None if axis is None or self.shards(axis) == 1 else self.rules[axis] for axis in axes]
        return NamedSharding(self._auto_mesh, PartitionSpec(*names))

    @property
    def _auto_mesh(self) -> Mesh:
        # Explicit axes would ask the model's code for shardings; here XLA finds them.
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * self.mesh.devices.ndim)

    def order(self, path: tuple[Any, ...], total: int) -> np.ndarray | None:
        """The rows of a fused projection in the order in which devices hold them; None if they stay as they are."""
        config, where = self.config, ".".join(map(str, path))
        if ".qkv." in where:
            rows = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
            shards = self.shards("heads")
        elif ".gate_up." in where:
            rows, shards = [total // 2] * 2, self.shards("mlp")
        else:
            return None
        return _pieces(rows, shards)


def _pieces(rows: list[int], shards: int) -> np.ndarray | None:
    """Rows of matrices that follow each other, in the order of devices that each have a piece of every one."""
    starts = np.cumsum([0, *rows[:-1]])
    pieces = [
        start + part * (n // shards) + np.arange(n // shards)
        for part in range(shards)
        for start, n in zip(starts, rows, strict=True)
    ]
    return None if shards == 1 else np.concatenate(pieces)


def device_bytes(decoder: Decoder) -> dict[jax.Device, int]:
    """Bytes of parameters on each device."""
    found: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)):
        for shard in leaf.addressable_shards:
            size = math.prod(shard.data.shape) * shard.data.dtype.itemsize
            found[shard.device] = found.get(shard.device, 0) + size
    return found

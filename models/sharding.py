"""Tensor and expert parallelism: parameters, cache and computation divided among the devices of a mesh.

A parameter's axes have logical names, and rules say which mesh axis each name is divided over. XLA's partitioner does
the rest, so that the model's code is the same on one device and on many. The two fused projections are laid out in as
many pieces as there are shards, each with its own share of queries, keys and values (or gate and up), so that splitting
them moves nothing between devices.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import FragmentWeight, W4A8Error, W4Weight

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
        return NamedSharding(self._named().mesh, PartitionSpec(*names))

    def apply(self, decoder: Decoder) -> Decoder:
        """Divides a whole decoder, in place."""
        for path, _ in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
            self.place(decoder, path)
        return self.finish(decoder)

    def finish(self, decoder: Decoder) -> Decoder:
        """Tells the modules of a decoder, whose parameters have been placed, how they are divided."""
        decoder.cache_sharding = self.cache
        for _, module in nnx.iter_modules(decoder):
            if isinstance(module, Attention | MLP):
                module.shards = self.shards("heads" if isinstance(module, Attention) else "mlp")
        return decoder

    def place(self, decoder: Decoder, path: tuple[Any, ...]) -> None:
        """Puts one parameter on the devices, each its part.

        Raises:
            W4A8Error: a quantized weight's groups do not divide.
        """
        *parents, attribute = path
        parameter = getattr(module_at(decoder, tuple(parents)), str(attribute))
        where = ".".join(map(str, path))
        axes = next((axes for end, axes in _AXES.items() if re.search(f"(^|\\.)({end})$", where)), None)
        value = parameter.get_value()
        if axes is None:
            parameter.set_value(jax.device_put(value, self._named()))
            return
        order = self.order(path, value.shape[0])
        if isinstance(value, FragmentWeight):
            raise W4A8Error(f"{where}: a kernel's weight cannot be divided; load with kernels=False")
        if isinstance(value, W4Weight):
            k = value.shape[-1]
            if k % (self.shards(axes[-1]) * value.group_size):
                of = f"{k // value.group_size} groups of {value.group_size}"
                raise W4A8Error(f"{where}: {of} cannot be divided among {self.shards(axes[-1])} devices")
            parts = value.packed, value.group_scale, value.channel_scale
            packed, group_scale, channel_scale = (self._put(part, axes[: part.ndim], order) for part in parts)
            parameter.set_value(W4Weight(packed, group_scale, channel_scale, value.numerics, value.code_min))
        else:
            parameter.set_value(self._put(value, axes, order))

    def _put(self, value: Any, axes: tuple[str, ...], order: np.ndarray | None) -> jax.Array:
        value = value if order is None else value[order]
        # A vocabulary that does not divide is on every device.
        whole = any(size % self.shards(axis) for size, axis in zip(value.shape, axes, strict=True))
        return jax.device_put(value, self._named(*([None] * len(axes) if whole else axes)))

    def _named(self, *axes: str | None) -> NamedSharding:
        # Explicit axes would ask the model's code for shardings; here XLA finds them.
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * self.mesh.devices.ndim)
        names = [None if axis is None or self.shards(axis) == 1 else self.rules[axis] for axis in axes]
        return NamedSharding(mesh, PartitionSpec(*names))

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

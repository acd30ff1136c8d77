"""Which tensors go into which shard: decided from names, dtypes and shapes alone, before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.errors import W4A8Error

from .safetensors_format import TensorSpec, layout

MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Shard:
    """One planned safetensors file. `units` are tensors made together, and never spread over two shards."""

    file: str
    units: tuple[tuple[TensorSpec, ...], ...]

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for unit in self.units for spec in unit]

    def layout(self) -> tuple[bytes, dict[str, int], int]:
        """The file's header bytes, each tensor's offset, the file's size."""
        return layout(self.specs)


def plan_shards(units: Sequence[Sequence[TensorSpec]], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Cuts the units, in their order, into shards of at most `max_shard_bytes` of data (or one unit, if larger).

    Raises:
        W4A8Error: no tensors, a name twice, or `max_shard_bytes` not positive.
    """
    if max_shard_bytes <= 0:
        raise W4A8Error(f"max_shard_bytes: must be positive, found {max_shard_bytes}")
    names = [spec.name for unit in units for spec in unit]
    if not names:
        raise W4A8Error("a checkpoint without tensors cannot be written")
    if len(set(names)) != len(names):
        twice = next(name for name in sorted(names) if names.count(name) > 1)
        raise W4A8Error(f"{twice}: would be written twice")
    shards: list[list[tuple[TensorSpec, ...]]] = []
    room = 0
    for unit in map(tuple, units):
        nbytes = sum(spec.nbytes for spec in unit)
        if not shards or nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(unit)
        room -= nbytes
    count = len(shards)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(shard)) for i, shard in enumerate(shards, start=1)]

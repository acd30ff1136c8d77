"""How a weight is divided among the devices of a mesh."""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which axes of a weight [N, K], or [E, N, K], are divided over which axes of a mesh. Hashable.

    Attributes:
        mesh: the devices.
        experts, rows, columns: the mesh axes that divide E, N and K; None: whole on every device.
    """

    mesh: Mesh
    experts: str | None = None
    rows: str | None = None
    columns: str | None = None

    def shards(self, axis: str | None) -> int:
        """In how many parts an axis of the mesh divides; 1 for None."""
        return 1 if axis is None else int(self.mesh.shape[axis])

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a device's part of a weight."""
        axes = (self.experts, self.rows, self.columns)[-len(shape) :]
        return tuple(size // self.shards(axis) for size, axis in zip(shape, axes, strict=True))

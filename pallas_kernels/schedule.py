"""Which tiles, and which K steps of them, each block of the grid computes.

Tiles are dealt out whole, one to each block a wave. The waves at the end that would not fill the grid become the tail:
its K steps are divided evenly (stream-K: Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense
Matrix-Matrix Multiplication on the GPU", 2023), so that blocks share tiles and finish together. A block does its part
of the tail from the last tile to the first. So a tile's first K steps, which a lower block does, are done first by that
block; the block with the last steps owns the tile, and waits for lower blocks only. As blocks start in order, nothing
can wait for a block that has not started.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The work of a grid; its methods take and return ints, traced or not.

    Attributes:
        tiles: tiles of the output.
        k_steps: steps of a tile.
        blocks: blocks of the grid (clusters, if there are such) that exist at most.
        stream_k: whether to divide the tail.
    """

    tiles: int
    k_steps: int
    blocks: int
    stream_k: bool

    @property
    def grid(self) -> int:
        """Blocks that have work."""
        return min(self.blocks, self.tiles * (self.k_steps if self.splits else 1))

    @property
    def waves(self) -> int:
        """Full waves of whole tiles. With a tail, one full wave joins it, so that few blocks share a tile."""
        if not self.stream_k or self.tiles % self.blocks == 0:
            return -(-self.tiles // self.blocks)
        return max(self.tiles // self.blocks - 1, 0)

    @property
    def splits(self) -> bool:
        """Whether any tile is shared."""
        return self.tail > 0

    @property
    def tail(self) -> int:
        """Tiles that are divided; they come last."""
        return max(self.tiles - self.waves * self.blocks, 0)

    def _share(self, block: Any) -> Any:
        return block * (self.tail * self.k_steps) // self.grid

    def segments(self, block: Any) -> Any:
        """How many (tile, K steps) a block has."""
        if not self.splits:
            return (self.tiles - 1 - block) // self.grid + 1
        first, last = self._share(block) // self.k_steps, (self._share(block + 1) - 1) // self.k_steps
        return self.waves + last - first + 1

    def segment(self, block: Any, index: Any) -> tuple[Any, Any, Any]:
        """Tile, first K step and end of the K steps of a block's segment."""
        if not self.splits:
            return block + index * self.grid, 0, self.k_steps
        start, end = self._share(block), self._share(block + 1)
        tile = (end - 1) // self.k_steps - (index - self.waves)
        low = jnp.maximum(start - tile * self.k_steps, 0)
        high = jnp.minimum(end - tile * self.k_steps, self.k_steps)
        whole = index < self.waves
        return (
            jnp.where(whole, block + index * self.blocks, self.waves * self.blocks + tile),
            jnp.where(whole, 0, low),
            jnp.where(whole, self.k_steps, high),
        )

    def first_peer(self, tile: Any) -> Any:
        """The block with the first K step of a tile of the tail."""
        return self._block_of((tile - self.waves * self.blocks) * self.k_steps)

    def owner(self, tile: Any) -> Any:
        """The block with the last K step of a tile of the tail."""
        return self._block_of((tile - self.waves * self.blocks + 1) * self.k_steps - 1)

    def _block_of(self, step: Any) -> Any:
        return ((step + 1) * self.grid - 1) // (self.tail * self.k_steps)

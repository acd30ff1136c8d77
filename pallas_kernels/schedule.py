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
from jax import lax

# Of the tokens that tiles which follow each other share, so that they stay in the cache.
_STRIP_BYTES = 2**24


def strip_tokens(row_bytes: int) -> int:
    """Tokens, of so many bytes each, whose tiles share rows of weights before the next rows: 2048, 1024 or 512."""
    return next((tokens for tokens in (2048, 1024) if tokens * row_bytes <= _STRIP_BYTES), 512)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The work of a grid; its methods take and return ints, traced or not.

    Attributes:
        tiles: tiles of the output.
        k_steps: steps of a tile.
        blocks: blocks of the grid (clusters, if there are such) that exist at most.
        stream_k: whether to divide the tail.
        lead: K steps that an owner does more than a block that owns no tile, as far as shares allow; 0 for even shares.
    """

    tiles: int
    k_steps: int
    blocks: int
    stream_k: bool
    lead: int = 0

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

    @property
    def apart(self) -> bool:
        """Whether some blocks own no tile."""
        return self.lead > 0 and self.splits and self.tiles < self.grid

    @property
    def helpers(self) -> int:
        """Blocks that share steps and own no tile, the first of the grid; where there are none, all blocks share."""
        return self.grid - self.tiles if self.apart else self.grid

    @property
    def shared_steps(self) -> int:
        """Of each tile of the tail, the first steps, which the sharing blocks divide."""
        if not self.apart:
            return self.k_steps
        own = round((self.tiles * self.k_steps + self.lead * self.helpers) / self.grid)
        return max(self.k_steps - max(own, 1), -(-self.helpers // self.tiles))

    def _share(self, block: Any) -> Any:
        return block * (self.tail * self.shared_steps) // self.helpers

    def segments(self, block: Any) -> Any:
        """How many (tile, K steps) a block has."""
        if not self.splits:
            return (self.tiles - 1 - block) // self.grid + 1
        first, last = self._share(block) // self.shared_steps, (self._share(block + 1) - 1) // self.shared_steps
        segments = self.waves + last - first + 1
        return jnp.where(block >= self.helpers, 1, segments) if self.apart else segments

    def segment(self, block: Any, index: Any) -> tuple[Any, Any, Any]:
        """Tile, first K step and end of the K steps of a block's segment."""
        if not self.splits:
            return block + index * self.grid, 0, self.k_steps
        shared = self.shared_steps
        start, end = self._share(block), self._share(block + 1)
        tile = (end - 1) // shared - (index - self.waves)
        low = jnp.maximum(start - tile * shared, 0)
        high = jnp.minimum(end - tile * shared, shared)
        if self.apart:
            owns = block >= self.helpers
            return (
                jnp.where(owns, block - self.helpers, tile),
                jnp.where(owns, shared, low),
                jnp.where(owns, self.k_steps, high),
            )
        whole = index < self.waves
        return (
            jnp.where(whole, block + index * self.blocks, self.waves * self.blocks + tile),
            jnp.where(whole, 0, low),
            jnp.where(whole, self.k_steps, high),
        )

    def peers(self, tile: Any) -> tuple[Any, Any]:
        """The first and the last block with shared steps of a tile of the tail; the last may be its owner."""
        first = (tile - self.waves * self.blocks) * self.shared_steps
        return self._block_of(first), self._block_of(first + self.shared_steps - 1)

    def owner(self, tile: Any) -> Any:
        """The block with the last K step of a tile of the tail."""
        return self.helpers + tile if self.apart else self.peers(tile)[1]

    @property
    def slots(self) -> int:
        """Places for partial sums."""
        return self.tiles * self._most_peers if self.apart else self.grid

    def slot(self, tile: Any, peer: Any) -> Any:
        """The place for a peer's partial sums of a tile."""
        return tile * self._most_peers + peer - self.peers(tile)[0] if self.apart else peer

    @property
    def _most_peers(self) -> int:
        return max(last - first + 1 for first, last in map(self.peers, range(self.tiles)))

    def _block_of(self, step: Any) -> Any:
        return ((step + 1) * self.helpers - 1) // (self.tail * self.shared_steps)


@dataclasses.dataclass(frozen=True)
class DeviceSchedule:
    """The work of a grid of which only the device knows how many tiles there are: `Schedule` with even shares.

    What is worked out is int32, as long as the K steps of two waves times the blocks fit it.

    Attributes:
        tiles: tiles of the output, traced.
        k_steps: steps of a tile.
        blocks: blocks of the grid (clusters, if there are such).
    """

    tiles: Any
    k_steps: int
    blocks: int

    @property
    def waves(self) -> Any:
        """Full waves of whole tiles."""
        full = lax.div(self.tiles, self.blocks)
        return jnp.where(full * self.blocks == self.tiles, full, jnp.maximum(full - 1, 0))

    @property
    def _steps(self) -> Any:
        """Of all tiles of the tail."""
        return (self.tiles - self.waves * self.blocks) * self.k_steps

    @property
    def _sharers(self) -> Any:
        """Blocks that have steps of the tail, the first of the grid."""
        return jnp.minimum(self._steps, self.blocks)

    def _share(self, block: Any) -> Any:
        return lax.div(jnp.minimum(block, self._sharers) * self._steps, jnp.maximum(self._sharers, 1))

    def _last(self, block: Any) -> Any:
        """The last tile of the tail of which a block has steps, counted from the first of the tail."""
        return lax.div(self._share(block + 1) - 1, self.k_steps)

    def segments(self, block: Any) -> Any:
        """How many (tile, K steps) a block has."""
        start, end = self._share(block), self._share(block + 1)
        shared = self._last(block) - lax.div(start, self.k_steps) + 1
        return self.waves + jnp.where(end > start, shared, 0)

    def tile(self, block: Any, index: Any) -> Any:
        """Tile of a block's segment; index may be of several, and beyond the last."""
        tail = self.waves * self.blocks + self._last(block) - (index - self.waves)
        return jnp.where(index < self.waves, block + index * self.blocks, tail)

    def steps(self, block: Any, index: Any) -> tuple[Any, Any]:
        """First K step and end of the K steps of a block's segment."""
        first = (self._last(block) - (index - self.waves)) * self.k_steps
        low = jnp.maximum(self._share(block) - first, 0)
        high = jnp.minimum(self._share(block + 1) - first, self.k_steps)
        whole = index < self.waves
        return jnp.where(whole, 0, low), jnp.where(whole, self.k_steps, high)

    def first_peer(self, tile: Any) -> Any:
        """The block with the first K step of a tile of the tail."""
        return self._block_of((tile - self.waves * self.blocks) * self.k_steps)

    def owner(self, tile: Any) -> Any:
        """The block with the last K step of a tile of the tail."""
        return self._block_of((tile - self.waves * self.blocks + 1) * self.k_steps - 1)

    def _block_of(self, step: Any) -> Any:
        return lax.div((step + 1) * self._sharers - 1, jnp.maximum(self._steps, 1))

"""Which tiles of a grouped product exist, worked out on the device from the groups' sizes.

Rows of the product are sorted by group. A group's tiles of tokens begin at the multiple of 8 at or before its first
row, which is where the copy engine's tiles can begin; of their rows, those of other groups are computed and dropped.
Tiles are numbered group by group; within a group, a few tiles of tokens follow each other for the same rows of weights,
for all of these, before the next few: so operands come from memory once, if the cache holds the tokens of a few tiles.
A group without rows has no tiles.

Tables say it all, each of a power of two of entries, the last of which is the total: how many rows, and how many tiles
of tokens, come before each group. Where a group's last tile may be half of one, and tiles are so few that blocks would
end at different times, halves are left for the end, and have a table of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

ALIGNMENT = 8  # rows
# Tiles that are looked up at a time, by a thread each, and places for what is found: a block's warpgroups are no
# further apart than its slots, of which shared memory holds 22 at most.
LOOKED_UP = 32
PLACES = 2 * LOOKED_UP
_THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class GroupSchedule:
    """The tiles of a grouped product.

    Attributes:
        groups: how many there are.
        n_tiles: tiles of a group along the rows of its weight.
        tile_tokens: rows of a tile of tokens.
        halves_last: whether last tiles of groups that are at most half full come after all others.
        strip_tokens: tokens whose tiles share rows of weights before the next rows.
    """

    groups: int
    n_tiles: int
    tile_tokens: int
    halves_last: bool = False
    strip_tokens: int = 2048

    @property
    def strip(self) -> int:
        """Tiles of tokens that share rows of weights before the next rows."""
        return max(1, self.strip_tokens // self.tile_tokens)

    @property
    def table_size(self) -> int:
        """More than `groups`, and at least one entry a thread."""
        return max(128, 1 << self.groups.bit_length())

    def tile(self, tile: Any, rows: Any, before: Any, take: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
        """Where tiles are: group, tile of its weight's rows, first token, and the rows, low to high, that are its own.

        Args:
            tile: int32, less than `tiles`.
            rows: the table of rows before each group.
            before: the table of tiles of tokens before each group, and after it, with `halves_last`, that of halves.
            take: a table's entries at indices of the shape of `tile`.
        """
        table, late = 0 * tile, False
        if self.halves_last:
            others = take(before, 0 * tile + (self.table_size - 1)) * self.n_tiles
            late = tile >= others
            table, tile = jnp.where(late, self.table_size, 0), jnp.where(late, tile - others, tile)
        entry = lax.div(tile, self.n_tiles)
        at = table
        step = self.table_size // 2
        while step:  # the last group with no more before it
            at = jnp.where(take(before, at + step) <= entry, at + step, at)
            step //= 2
        group = at - table
        first, row, end = take(before, at), take(rows, group), take(rows, group + 1)
        m_tiles = take(before, at + 1) - first
        local = tile - first * self.n_tiles
        strip = lax.div(local, self.strip * self.n_tiles) * self.strip
        local = local - strip * self.n_tiles
        width = jnp.minimum(m_tiles - strip, self.strip)
        n_tile = lax.div(local, width)
        m_tile = strip + local - n_tile * width
        if self.halves_last:
            m_tile = m_tile + jnp.where(late, take(before, group + 1) - take(before, group), 0)
        token = (row & -ALIGNMENT) + m_tile * self.tile_tokens
        return group, n_tile, token, jnp.maximum(row, token), jnp.minimum(end, token + self.tile_tokens)

    def tiles(self, before: Any) -> Any:
        """How many there are."""
        count = total(before, self.table_size - 1)
        if self.halves_last:
            count = count + total(before, 2 * self.table_size - 1)
        return count * self.n_tiles


def look_up(
    tile_of: Callable[[Any], Any], rows: Any, before: Any, places: Any, at: Any, schedule: GroupSchedule
) -> None:
    """Finds the tiles with numbers `tile_of(0)`, `tile_of(1)`, ..., `LOOKED_UP` of them, one a thread.

    Args:
        tile_of: takes and returns int32 of any shape; what is no tile's number counts as the nearest that is.
        rows: as `scan` makes it.
        before: as `scan` makes it.
        places: int32 [4, PLACES], in shared memory: group, tile of its weight's rows, first token, and how far its own
            rows are from that, low in the upper and high in the lower 16 bits.
        at: the first place; a multiple of LOOKED_UP.
        schedule: what the tables are of.
    """
    tiles = schedule.tiles(before)

    @pl.when(tiles > 0)
    def _() -> None:
        number = jnp.minimum(plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=_THREADS), LOOKED_UP - 1)
        tile = jnp.clip(tile_of(number), 0, tiles - 1)
        group, n_tile, token, low, high = schedule.tile(tile, rows, before, take)
        keep((group, n_tile, token, (low - token) * 2**16 + (high - token)), places, at)


def take(table: Any, at: Any) -> Any:
    """A table's entries, in shared memory, at a warpgroup's indices, one a thread."""
    return_type = plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=_THREADS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _THREADS), return_type=return_type)
    def taken(_: Any, table: Any, at: Any) -> Any:
        value = memref.load(table, [_index(_of_thread(at))])
        registers = np.full(at.registers.shape, vector.broadcast(at.registers.item().type, value), object)
        return mgpu.FragmentedArray(_registers=registers, _layout=at.layout, _is_signed=True)

    return taken(table, plgpu.layout_cast(at, _THREADS))


def keep(values: tuple[Any, ...], places: Any, at: Any) -> None:
    """Stores what the first `LOOKED_UP` threads have in the places from `at` on."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, [_THREADS] * len(values)))
    def kept(_: Any, places: Any, at: Any, values: Any) -> None:
        thread = arith.remui(mgpu.utils.thread_idx(), _c(128))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _c(LOOKED_UP))):
            place = _index(arith.addi(at.registers.item(), thread))
            for i, value in enumerate(values):
                memref.store(_of_thread(value), places, [_index(_c(i)), place])
        mgpu.utils.warpgroup_barrier()

    kept(places, jnp.asarray(at, jnp.int32), list(values))


def _of_thread(values: Any) -> Any:
    return vector.extract(values.registers.item(), [], [0])


def scan(sizes: Any, rows: Any, before: Any, sums: Any, schedule: GroupSchedule, m: int) -> None:
    """Makes the tables, in the order of a warpgroup's threads. Rows past M are left out, whatever the sizes say.

    Args:
        sizes: int32 [groups], in global memory.
        rows: int32 [table_size], in shared memory.
        before: int32 [table_size], or twice as many with `halves_last`, in shared memory.
        sums: int32 [12], in shared memory, for the scan's own use.
        schedule: what they are for.
        m: rows of the product.
    """
    each = schedule.table_size // 128

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def scanned(_: Any, sizes: Any, rows: Any, before: Any, sums: Any) -> None:
        thread = arith.remui(mgpu.utils.thread_idx(), _c(128))
        groups = [arith.addi(arith.muli(thread, _c(each)), _c(i)) for i in range(each)]
        sized = []
        for group in groups:
            size = memref.load(sizes, [_index(arith.minsi(group, _c(schedule.groups - 1)))])
            exists = arith.cmpi(arith.CmpIPredicate.slt, group, _c(schedule.groups))
            sized.append(arith.select(exists, arith.maxsi(size, _c(0)), _c(0)))
        firsts = _exclusive_sums(sized, sums, 0, thread)
        tiles, halves = [], []
        for i, (size, first) in enumerate(zip(sized, firsts, strict=True)):
            end = arith.minsi(arith.addi(first, size), _c(m))
            firsts[i] = first = arith.minsi(first, _c(m))
            aligned = arith.andi(first, _c(-ALIGNMENT))
            rounded = arith.addi(arith.subi(end, aligned), _c(schedule.tile_tokens - 1))
            some = arith.cmpi(arith.CmpIPredicate.slt, first, end)
            whole = arith.select(some, arith.divui(rounded, _c(schedule.tile_tokens)), _c(0))
            if schedule.halves_last:
                past = arith.remui(rounded, _c(schedule.tile_tokens))  # the last tile's tokens, less one
                half = arith.cmpi(arith.CmpIPredicate.slt, past, _c(schedule.tile_tokens // 2))
                halves.append(arith.select(arith.andi(some, half), _c(1), _c(0)))
                whole = arith.subi(whole, halves[-1])
            tiles.append(whole)
        tables = [(rows, firsts, 0), (before, _exclusive_sums(tiles, sums, 4, thread), 0)]
        if halves:
            tables.append((before, _exclusive_sums(halves, sums, 8, thread), schedule.table_size))
        for table, values, at in tables:
            for group, value in zip(groups, values, strict=True):
                memref.store(value, table, [_index(arith.addi(group, _c(at)))])
        mgpu.utils.warpgroup_barrier()

    scanned(sizes, rows, before, sums)


def total(table: Any, at: int) -> Any:
    """The entry at `at`, the last of a table, so that the compiler knows that it is the same for all threads of a warp.

    Loops up to it then count slots in registers of the warp.
    """
    return_type = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=return_type)
    def last(_: Any, table: Any) -> Any:
        value = memref.load(table, [_index(_c(at))])
        text = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
        value = llvm.inline_asm(value.type, [value], text, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return last(table)


def _exclusive_sums(values: list[Any], sums: Any, at: int, thread: Any) -> list[Any]:
    """Of each thread's values, in the order of threads; four words of `sums` from `at` hold those of warps."""
    lane, warp = arith.remui(thread, _c(32)), arith.divui(thread, _c(32))
    mine = _fold(arith.addi, values)
    total = mine
    for distance in (1, 2, 4, 8, 16):
        up = llvm.inline_asm(
            mine.type,
            [total, _c(distance)],
            "shfl.sync.up.b32 $0, $1, $2, 0x0, 0xffffffff;",
            "=r,r,r",
            has_side_effects=True,
        )
        has = arith.cmpi(arith.CmpIPredicate.uge, lane, _c(distance))
        total = arith.addi(total, arith.select(has, up, _c(0)))
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, _c(31))):
        memref.store(total, sums, [_index(arith.addi(warp, _c(at)))])
    mgpu.utils.warpgroup_barrier()
    running = arith.subi(total, mine)
    for w in range(3):
        of_warp = memref.load(sums, [_index(_c(at + w))])
        later = arith.cmpi(arith.CmpIPredicate.ugt, warp, _c(w))
        running = arith.addi(running, arith.select(later, of_warp, _c(0)))
    results = []
    for value in values:
        results.append(running)
        running = arith.addi(running, value)
    return results


def _fold(add: Callable[[Any, Any], Any], values: list[Any]) -> Any:
    total = values[0]
    for value in values[1:]:
        total = add(total, value)
    return total


def _c(value: int) -> Any:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)

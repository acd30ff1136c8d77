"""Which tiles of a grouped product exist, worked out on the device from the groups' sizes.

Rows of the product are sorted by group. A group's tiles of tokens begin at the multiple of 8 at or before its first
row, which is where the copy engine's tiles can begin; of their rows, those of other groups are computed and dropped.
Tiles are numbered group by group; within a group, tiles of tokens follow each other for the same rows of weights, so
that weights come from memory once. A group without rows has no tiles.

Two tables say it all, each of a power of two of entries, the last of which is the total: how many rows, and how many
tiles of tokens, come before each group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

ALIGNMENT = 8  # rows


@dataclasses.dataclass(frozen=True)
class GroupSchedule:
    """The tiles of a grouped product.

    Attributes:
        groups: how many there are.
        n_tiles: tiles of a group along the rows of its weight.
        tile_tokens: rows of a tile of tokens.
    """

    groups: int
    n_tiles: int
    tile_tokens: int

    @property
    def table_size(self) -> int:
        """More than `groups`, and at least one entry a thread."""
        return max(128, 1 << self.groups.bit_length())

    def tile(self, tile: Any, rows: Any, before: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Where a tile is: group, tile of its weight's rows, first token, and the rows, low to high, that are its own.

        Args:
            tile: less than `tiles`.
            rows: the table of rows before each group.
            before: the table of tiles of tokens before each group.
        """
        entry = lax.div(tile, self.n_tiles)
        group = 0 * tile
        step = self.table_size // 2
        while step:  # the last group with no more before it
            group = jnp.where(before[group + step] <= entry, group + step, group)
            step //= 2
        first, row, end = before[group], rows[group], rows[group + 1]
        m_tiles = before[group + 1] - first
        local = tile - first * self.n_tiles
        n_tile = lax.div(local, m_tiles)
        token = (row & -ALIGNMENT) + (local - n_tile * m_tiles) * self.tile_tokens
        return group, n_tile, token, jnp.maximum(row, token), jnp.minimum(end, token + self.tile_tokens)


def scan(sizes: Any, rows: Any, before: Any, sums: Any, schedule: GroupSchedule, m: int) -> None:
    """Makes the tables, in the order of a warpgroup's threads. Rows past M are left out, whatever the sizes say.

    Args:
        sizes: int32 [groups], in global memory.
        rows: int32 [table_size], in shared memory.
        before: int32 [table_size], in shared memory.
        sums: int32 [8], in shared memory, for the scan's own use.
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
        tiles = []
        for i, (size, first) in enumerate(zip(sized, firsts, strict=True)):
            end = arith.minsi(arith.addi(first, size), _c(m))
            firsts[i] = first = arith.minsi(first, _c(m))
            aligned = arith.andi(first, _c(-ALIGNMENT))
            rounded = arith.addi(arith.subi(end, aligned), _c(schedule.tile_tokens - 1))
            some = arith.cmpi(arith.CmpIPredicate.slt, first, end)
            tiles.append(arith.select(some, arith.divui(rounded, _c(schedule.tile_tokens)), _c(0)))
        for table, values in ((rows, firsts), (before, _exclusive_sums(tiles, sums, 4, thread))):
            for group, value in zip(groups, values, strict=True):
                memref.store(value, table, [_index(group)])
        mgpu.utils.warpgroup_barrier()

    scanned(sizes, rows, before, sums)


def total(table: Any) -> Any:
    """The last entry, so that the compiler knows that it is the same for all threads of a warp.

    Loops up to it then count slots in registers of the warp.
    """
    return_type = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=return_type)
    def last(_: Any, table: Any) -> Any:
        value = memref.load(table, [_index(_c(ir.MemRefType(table.type).shape[0] - 1))])
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

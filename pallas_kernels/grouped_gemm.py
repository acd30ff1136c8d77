"""The grouped W4A8 and W4A16 kernel for Hopper: consecutive groups of tokens, each times its own INT4 weight.

    out[m, n] = bf16(channel_scale[g, n] * (token_scale[m] * sum_k w8[g, n, k] * x8[m, k])), g the group of m

It is the dense kernel with another schedule and other stores; its pipeline and main loop are those of `main_loop`:

    memory warpgroup                              compute warpgroups
    scans the groups' sizes: tables of tiles
    for each tile of this block:                  for each tile of this block:
      looks up groups, rows and tokens of 32        wait for what was found
        tiles, where it is the first of them
      for each K step: TMA -> slot, tables          for each K step: dequantize, wgmma
                                                    scale, transpose, store the group's own rows
                                                  zeros to rows of no group

Tiles begin at multiples of 8 tokens, groups anywhere (`group_schedule`). A tile that is all its group's leaves in large
copies by TMA; another one in 32s and eights of tokens, but for eights that it shares with another group, of which its
own rows are stored by threads. So no row is written twice, nothing is padded in memory, and a group without tokens
costs nothing. Of a large tile, as many 64s of tokens are computed as hold its own. Tiles are dealt out to blocks in
turn; of small ones, blocks may share those that do not fill the grid, as in the dense kernel (`stream_k`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from .dense_gemm import TuningConfig
from .device_sums import add_partials, signal, store_partial, wait
from .errors import W4A8Error
from .fragments import TILE_COLUMNS, TILE_ROWS, FragmentWeight
from .group_schedule import ALIGNMENT, LOOKED_UP, PLACES, GroupSchedule, look_up, scan, total
from .main_loop import Pipeline, Staging, cluster_rank, row_scales, scratch_types, set_registers
from .register_dequantize import F8
from .row_stores import store_rows
from .schedule import DeviceSchedule, strip_tokens

# Bytes of shared memory beside the dense kernel's, for the tables of up to 1023 groups.
MOST_GROUPS = 1023
MOST_SHARED = 64  # tokens of a tile that blocks share
# With fewer tiles a block, halves of tiles come last. Weights are then read once more for them.
_WAVES = 16


def check(config: TuningConfig, groups: int, n: int, k: int, form: str) -> None:
    """Raises W4A8Error if the config cannot take a weight [groups, N, K] in a form."""
    if config.stream_k and (config.tile_tokens > MOST_SHARED or config.lead):
        raise W4A8Error(f"grouped kernel: of tiles of up to {MOST_SHARED} tokens even shares only; found {config}")
    if not 1 <= groups <= MOST_GROUPS:
        raise W4A8Error(f"grouped kernel: 1 to {MOST_GROUPS} groups, found {groups}")
    table = -(-4 * GroupSchedule(groups, 1, 8).table_size // 1024) * 1024  # as shared memory is given out
    config.check(n, k, form, more=3 * table + 2048)


def grouped_gemm(
    x: Float[Array, "M K"],
    token_scale: Float[Array, "M 1"] | None,
    w: FragmentWeight,
    group_sizes: Int32[Array, "E"],
    config: TuningConfig,
) -> BFloat16[Array, "M N"]:
    """The product on a Hopper GPU; rows past the sum of `group_sizes` are zeros.

    Args:
        x: `float8_e4m3fn` [M, K], bf16 for weights in form "bf16", rows sorted by group; M a multiple of 8.
        token_scale: fp32 [M, 1]; None for weights in form "bf16".
        w: [E, N, K]; N must be a multiple of the config's `tile_rows * cluster`.
        group_sizes: int32 [E].
        config: how to divide the work; without `lead`, and `stream_k` for tiles of up to 64 tokens only.

    Raises:
        W4A8Error: shapes, dtypes or the config do not fit.
    """
    if len(w.shape) != 3 or w.shape[2] != x.shape[1] or group_sizes.shape != w.shape[:1]:
        found = f"x {list(x.shape)}, w {list(w.shape)} and group_sizes {list(group_sizes.shape)}"
        raise W4A8Error(f"grouped kernel: {found} do not fit")
    (m, k), (groups, n, _) = x.shape, w.shape
    if m % ALIGNMENT or m == 0:
        raise W4A8Error(f"grouped kernel: M must be a multiple of {ALIGNMENT}, found {m}")
    if x.dtype != (jnp.bfloat16 if w.form == "bf16" else F8) or (token_scale is None) != (w.form == "bf16"):
        raise W4A8Error(f"grouped kernel: x {x.dtype} and its scales do not fit weights in form {w.form}")
    if group_sizes.dtype != jnp.int32:
        raise W4A8Error(f"grouped kernel: group_sizes must be int32, found {group_sizes.dtype}")
    check(config, groups, n, k, w.form)
    blocks = config.row_blocks * config.warpgroups
    # Blocks of a cluster compute neighbouring rows of the same tokens.
    grid = config.ctas // config.cluster
    n_tiles = n // config.tile_rows // config.cluster
    # Of a large tile, no more is copied and computed than holds its tokens.
    least = next((part for part in (64, config.tile_tokens // 2) if config.tile_tokens % part == 0 == part % 8), 0)
    large = config.tile_tokens >= 128 and least > 0
    sizes = list(range(least, config.tile_tokens + 1, least)) if large else [config.tile_tokens]
    few = m * n_tiles < _WAVES * grid * config.tile_tokens
    strip = strip_tokens(k * x.dtype.itemsize)
    schedule = GroupSchedule(groups, n_tiles, config.tile_tokens, large and few, strip)
    steps = k // TILE_COLUMNS // config.steps_at_once
    slots_at_once = config.steps_at_once // config.slot_steps
    # Partial sums of several blocks are loaded at a time, where registers allow.
    unroll = max(1, min(4, 64 // (config.tile_tokens * config.row_blocks // 2)))
    zeros = next(c for c in (1024, 512, 256, 128) if n % c == 0)  # columns at a time

    def by_size(tokens: Any, do: Callable[[int], None], sizes: Sequence[int] = sizes) -> None:
        """Does it for the least of the sizes that holds so many tokens."""
        if len(sizes) == 1:
            do(sizes[0])
            return
        middle = len(sizes) // 2
        pl.when(tokens <= sizes[middle - 1])(lambda: by_size(tokens, do, sizes[:middle]))
        pl.when(tokens > sizes[middle - 1])(lambda: by_size(tokens, do, sizes[middle:]))

    def body(
        words_gmem: Any,
        scales_gmem: Any,
        x_gmem: Any,
        channel_scale_gmem: Any,
        token_scale_gmem: Any,
        sizes_gmem: Any,
        flags: Any,
        out_gmem: Any,
        partials: Any,
        rows_smem: Any,
        before_smem: Any,
        sums_smem: Any,
        places_smem: Any,
        found: Any,
        **scratch: Any,
    ) -> None:
        # Indices are worked out where they are needed: held from the start of the kernel, they were spilled.
        def cta() -> Any:
            return lax.axis_index("cta")

        def rank() -> Any:
            return cluster_rank() if config.cluster > 1 else 0

        pipeline = Pipeline.of(config, w.form, scratch)

        def unknown_zero() -> Any:
            """0, but not for the compiler, which holds the address of a barrier with a known index, and spills it."""
            return lax.axis_index("warpgroup") >> 8

        def work() -> DeviceSchedule:
            return DeviceSchedule(schedule.tiles(before_smem), steps, grid)

        def my_segments() -> Any:
            if config.stream_k:
                return work().segments(cta())
            return lax.div(schedule.tiles(before_smem) + (grid - 1) - cta(), grid)

        def my_steps(index: Any) -> tuple[Any, Any]:
            return work().steps(cta(), index) if config.stream_k else (0, steps)

        def tile_of(index: Any) -> Any:
            return work().tile(cta(), index) if config.stream_k else cta() + index * grid

        def my_tile(index: Any) -> tuple[Any, ...]:
            """Of all experts' row blocks the first, of its expert's, its first token, and its own rows: low to high."""
            group, n_tile, token, own = [places_smem[i, lax.rem(index, PLACES)] for i in range(4)]
            block = (n_tile * config.cluster + rank()) * blocks
            own_rows = token + (own >> 16), token + (own & 0xFFFF)
            return group * (n // TILE_ROWS) + block, block, pl.multiple_of(token, ALIGNMENT), *own_rows

        def found_at(index: Any) -> Any:
            """Which barrier says that a tile was looked up."""
            return lax.rem(lax.div(index, LOOKED_UP), 2)

        @pl.when(lax.axis_index("warpgroup") < config.warpgroups)
        def _() -> None:
            set_registers(config, compute=True)
            warpgroup = lax.axis_index("warpgroup")
            staging = Staging.of(config, scratch, warpgroup)
            my_blocks = [warpgroup * config.row_blocks + b for b in range(config.row_blocks)]
            plgpu.barrier_wait(found.at[unknown_zero()])

            def compute(index: Any, done: Any) -> Any:
                next_found = (index > 0) & (lax.rem(index, LOOKED_UP) == 0)
                pl.when(next_found)(lambda: plgpu.barrier_wait(found.at[found_at(index)]))
                expert_block, _, first_token, _, high = my_tile(index)
                staging.fetch_token_scales(token_scale_gmem, first_token)
                scales = row_scales(channel_scale_gmem, expert_block, my_blocks)

                def tile(count: int) -> None:
                    results = pipeline.products(my_blocks, *my_steps(index), done, count)
                    staging.await_token_scales()
                    if config.stream_k:
                        add_up(index, scales, results)
                    else:
                        store(index, scales, results)

                by_size(high - first_token, tile)
                first, end = my_steps(index)
                return done + (end - first) * slots_at_once

            def add_up(index: Any, scales: Any, results: Any) -> None:
                """Stores a tile when all of its sums are there, or this block's partial sums for its owner."""
                low, high = my_steps(index)

                def flag(block: Any) -> Any:
                    return flags.at[(block * config.cluster + rank()) * config.warpgroups + warpgroup]

                @pl.when(high < steps)
                def contribute() -> None:
                    for b, result in enumerate(results):
                        store_partial(result, partials.at[cta() * config.cluster + rank(), warpgroup, b])
                    signal(flag(work().owner(tile_of(index))))

                @pl.when(high == steps)
                def finish() -> None:
                    first = work().first_peer(tile_of(index))
                    peers = jnp.where(low > 0, cta() - first, 0)
                    pl.when(low > 0)(lambda: wait(flag(cta()), peers))

                    def add(i: Any, sums: Any) -> Any:
                        numbers = [i * unroll + u for u in range(unroll)]
                        there = [(number < peers).astype(jnp.float32) for number in numbers]
                        slots = [
                            (first + jnp.minimum(number, peers - 1)) * config.cluster + rank() for number in numbers
                        ]
                        return tuple(
                            add_partials(s, [partials.at[slot, warpgroup, b] for slot in slots], there)
                            for b, s in enumerate(sums)
                        )

                    store(index, scales, lax.fori_loop(0, (peers + unroll - 1) // unroll, add, tuple(results)))

            def store(index: Any, scales: Any, results: Any) -> None:
                # Read again, which is cheaper than to hold it in registers meanwhile.
                _, first_block, first_token, low, high = my_tile(index)

                def copy(block: Any, first: int, piece: int) -> None:
                    columns = pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS)
                    start = jnp.maximum(low - first_token - first, 0)
                    end = jnp.minimum(high - first_token - first, piece)

                    def tokens(start: Any, count: int) -> None:
                        plgpu.copy_smem_to_gmem(
                            staging.out_smem.at[block, pl.ds(start, count)],
                            out_gmem.at[pl.ds(first_token + first + start, count), columns],
                        )

                    def eight_of_several(eight: Any) -> None:
                        staged = staging.out_smem.at[block, pl.ds(eight * ALIGNMENT, ALIGNMENT)].T
                        values = plgpu.load(staged, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                        store_rows(values, out_gmem, first_token + first + eight * ALIGNMENT, columns.start, low, high)

                    def run(place: Any, count: int, i: Any) -> None:
                        tokens(place + i * count, count)

                    pl.when(end - start == piece)(lambda: tokens(0, piece))

                    @pl.when((start < end) & (end - start < piece))
                    def own_rows() -> None:
                        place = (start + 7) & -ALIGNMENT
                        past = jnp.maximum(end & -ALIGNMENT, place)
                        for count in (32, ALIGNMENT) if piece > 32 else (ALIGNMENT,):
                            steps = (past - place) // count
                            pl.loop(0, steps)(functools.partial(run, place, count))
                            place += steps * count

                        @pl.loop(0, 2)
                        def ends(last: Any) -> None:
                            at, other = jnp.where(last == 1, end, start), jnp.where(last == 1, start, end)
                            once = (last == 0) | (at >> 3 != other >> 3) | (other & 7 == 0)
                            pl.when((at & 7 != 0) & once)(lambda: eight_of_several(at >> 3))

                staging.store(my_blocks, scales, results, copy)

            lax.fori_loop(0, my_segments(), compute, 0)

            me = (cta() * config.cluster + rank()) * config.warpgroups + warpgroup

            @pl.loop(total(rows_smem, schedule.table_size - 1) + me, m, step=grid * config.cluster * config.warpgroups)
            def clear_row(row: Any) -> None:
                @pl.loop(0, n // zeros)
                def clear_part(i: Any) -> None:
                    layout = plgpu.Layout.WG_STRIDED((zeros,), vec_size=zeros // 128)
                    nothing = plgpu.layout_cast(jnp.zeros((zeros,), jnp.bfloat16), layout)
                    out_gmem[row, pl.ds(i * zeros, zeros)] = nothing

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(lax.axis_index("warpgroup") == config.warpgroups)
        def _() -> None:
            set_registers(config, compute=False)
            scan(sizes_gmem, rows_smem, before_smem, sums_smem, schedule, m)

            def find(index: Any) -> None:
                look_up(
                    lambda i: tile_of(index + i), rows_smem, before_smem, places_smem, lax.rem(index, PLACES), schedule
                )
                plgpu.barrier_arrive(found.at[found_at(index)])

            find(unknown_zero())

            def load(index: Any, done: Any) -> Any:
                pl.when((index > 0) & (lax.rem(index, LOOKED_UP) == 0))(lambda: find(index))
                expert_block, _, first_token, _, high = my_tile(index)
                rows = pl.ds(expert_block, blocks)

                first, end = (step * slots_at_once for step in my_steps(index))

                def some(count: int) -> None:
                    @pl.loop(first, end)
                    def step(i: Array) -> None:
                        x_rows = x_gmem.at[pl.ds(first_token, count)]
                        pipeline.fill(done + i - first, i, words_gmem.at[rows], scales_gmem.at[rows], x_rows)

                by_size(high - first_token, some)
                return done + end - first

            pipeline.finish(lax.fori_loop(0, my_segments(), load, 0))

    cluster: dict[str, Any] = {"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}
    partial = (config.warpgroups, config.row_blocks, TILE_ROWS * config.tile_tokens)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
            jax.ShapeDtypeStruct((config.ctas if config.stream_k else 1, *partial), jnp.float32),
        ),
        grid=(grid,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "rows_smem": plgpu.SMEM((schedule.table_size,), jnp.int32),
            "before_smem": plgpu.SMEM((schedule.table_size * (1 + schedule.halves_last),), jnp.int32),
            "sums_smem": plgpu.SMEM((12,), jnp.int32),
            "places_smem": plgpu.SMEM((4, PLACES), jnp.int32),
            "found": plgpu.Barrier(num_barriers=2),
            **scratch_types(config, w.form, w.scales.dtype, x.dtype),
        },
        **cluster,
    )
    per_token = None if token_scale is None else token_scale[:, 0]
    words, scales = (v.reshape(-1, *v.shape[2:]) for v in (w.words, w.scales))
    out, _ = kernel(words, scales, x, w.channel_scale.reshape(-1), per_token, group_sizes, w.flags)
    return out

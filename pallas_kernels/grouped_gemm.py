"""The grouped W4A8 and W4A16 kernel for Hopper: consecutive groups of tokens, each times its own INT4 weight.

    out[m, n] = bf16(channel_scale[g, n] * (token_scale[m] * sum_k w8[g, n, k] * x8[m, k])), g the group of m

It is the dense kernel with another schedule and other stores; its pipeline and main loop are those of `main_loop`:

    memory warpgroup                              compute warpgroups
    scans the groups' sizes: tables of tiles      wait for the tables
    for each tile of this block:                  for each tile of this block:
      look up its group, rows and tokens            wait for what was found
      for each K step: TMA -> slot, tables          for each K step: dequantize, wgmma
                                                    scale, transpose, store the group's own rows
                                                  zeros to rows of no group

Tiles begin at multiples of 8 tokens, groups anywhere (`group_schedule`). A tile that is all its group's leaves as one
copy by TMA; another one in eights of tokens, but for those that it shares with another group, of which its own rows
are stored by threads. So no row is written twice, nothing is padded in memory, and a group without tokens costs
nothing. Of a large tile with few tokens, half is computed. Tiles are dealt out to blocks in turn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from .dense_gemm import TuningConfig
from .errors import W4A8Error
from .fragments import TILE_COLUMNS, TILE_ROWS, FragmentWeight
from .group_schedule import ALIGNMENT, GroupSchedule, scan, total
from .main_loop import Pipeline, Staging, row_scales, scratch_types, set_registers
from .register_dequantize import F8
from .row_stores import store_rows

# Bytes of shared memory beside the dense kernel's, for the tables of up to 1023 groups.
MOST_GROUPS = 1023
# With fewer tiles a block, halves of tiles come last. Weights are then read once more for them.
_WAVES = 16
# Bytes of a strip's tokens, above which fewer are taken: 8 tiles of 256 tokens, 4 where K is large.
_STRIP_BYTES = 2**24


def check(config: TuningConfig, groups: int, n: int, k: int, form: str) -> None:
    """Raises W4A8Error if the config cannot take a weight [groups, N, K] in a form."""
    if config.stream_k:
        raise W4A8Error(f"grouped kernel: tiles are not shared; found {config}")
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
        config: how to divide the work, without `stream_k`.

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
    large = config.tile_tokens >= 128 and config.tile_tokens % 16 == 0
    sizes = [config.tile_tokens // 2, config.tile_tokens] if large else [config.tile_tokens]
    few = m * n_tiles < _WAVES * grid * config.tile_tokens
    strip_tokens = 2048 if 2048 * k * x.dtype.itemsize <= _STRIP_BYTES else 1024
    schedule = GroupSchedule(groups, n_tiles, config.tile_tokens, large and few, strip_tokens)
    k_steps = k // TILE_COLUMNS
    zeros = next(c for c in (1024, 512, 256, 128) if n % c == 0)  # columns at a time
    # The memory warpgroup looks up a tile while compute warpgroups store another, as many K steps behind as there are
    # slots, and read what was found of that one.
    described_tiles = config.stages + 2

    def by_size(tokens: Any, do: Callable[[int], None]) -> None:
        """Does it for half of a large tile, if that is all of the tile's tokens, or for the whole tile."""
        *half, whole = sizes
        if not half:
            do(whole)
            return
        pl.when(tokens <= half[0])(lambda: do(half[0]))
        pl.when(tokens > half[0])(lambda: do(whole))

    def body(
        words_gmem: Any,
        scales_gmem: Any,
        x_gmem: Any,
        channel_scale_gmem: Any,
        token_scale_gmem: Any,
        sizes_gmem: Any,
        out_gmem: Any,
        rows_smem: Any,
        before_smem: Any,
        sums_smem: Any,
        scanned: Any,
        tiles_smem: Any,
        described: Any,
        **scratch: Any,
    ) -> None:
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index("rank") if config.cluster > 1 else 0
        pipeline = Pipeline.of(config, w.form, scratch)

        def my_tiles() -> Any:
            return lax.div(schedule.tiles(before_smem) + (grid - 1) - cta, grid)

        def describe(index: Any) -> tuple[Any, ...]:
            """Looks a tile up, for the compute warpgroups too."""
            group, n_tile, *tokens = schedule.tile(cta + index * grid, rows_smem, before_smem)
            block = (n_tile * config.cluster + rank) * blocks
            found, entry = (group * (n // TILE_ROWS) + block, block, *tokens), lax.rem(index, described_tiles)
            for i, value in enumerate(found):
                tiles_smem[entry, i] = value
            plgpu.barrier_arrive(described.at[entry])
            return found

        def my_tile(index: Any) -> tuple[Any, ...]:
            """Of all experts' row blocks the first, of its expert's, its first token, and its own rows: low to high."""
            values = [tiles_smem[lax.rem(index, described_tiles), i] for i in range(5)]
            return *values[:2], pl.multiple_of(values[2], ALIGNMENT), *values[3:]

        @pl.when(warpgroup < config.warpgroups)
        def _() -> None:
            set_registers(config, compute=True)
            staging = Staging.of(config, scratch, warpgroup)
            my_blocks = [warpgroup * config.row_blocks + b for b in range(config.row_blocks)]
            plgpu.barrier_wait(scanned)

            def compute(index: Any, done: Any) -> Any:
                plgpu.barrier_wait(described.at[lax.rem(index, described_tiles)])
                expert_block, _, first_token, _, high = my_tile(index)
                staging.fetch_token_scales(token_scale_gmem, first_token)
                scales = row_scales(channel_scale_gmem, expert_block, my_blocks)

                def tile(count: int) -> None:
                    results = pipeline.products(my_blocks, 0, k_steps // config.steps_at_once, done, count)
                    staging.await_token_scales()
                    store(index, scales, results)

                by_size(high - first_token, tile)
                return done + k_steps

            def store(index: Any, scales: Any, results: Any) -> None:
                # Read again, which is cheaper than to hold it in registers meanwhile.
                _, first_block, first_token, low, high = my_tile(index)
                whole = (low == first_token) & (high == first_token + results[0].shape[1])

                def copy(block: Any, first: int, piece: int) -> None:
                    columns = pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS)

                    def tokens(start: Any, count: int) -> None:
                        plgpu.copy_smem_to_gmem(
                            staging.out_smem.at[block, pl.ds(start, count)],
                            out_gmem.at[pl.ds(first_token + first + start, count), columns],
                        )

                    pl.when(whole)(lambda: tokens(0, piece))

                    @pl.when(jnp.logical_not(whole))
                    def own_rows() -> None:
                        start = jnp.maximum(low - first_token - first, 0)
                        end = jnp.minimum(high - first_token - first, piece)

                        @pl.loop(start >> 3, (end + 7) >> 3)
                        def eight(i: Any) -> None:
                            token = first_token + first + i * ALIGNMENT
                            inside = (low <= token) & (token + ALIGNMENT <= high)
                            pl.when(inside)(lambda: tokens(i * ALIGNMENT, ALIGNMENT))

                            @pl.when(jnp.logical_not(inside))
                            def shared() -> None:
                                staged = staging.out_smem.at[block, pl.ds(i * ALIGNMENT, ALIGNMENT)].T
                                values = plgpu.load(staged, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                                store_rows(values, out_gmem, token, columns.start, low, high)

                staging.store(my_blocks, scales, results, copy)

            lax.fori_loop(0, my_tiles(), compute, 0)

            me = (cta * config.cluster + rank) * config.warpgroups + warpgroup

            @pl.loop(total(rows_smem, schedule.table_size - 1) + me, m, step=grid * config.cluster * config.warpgroups)
            def clear_row(row: Any) -> None:
                @pl.loop(0, n // zeros)
                def clear_part(i: Any) -> None:
                    layout = plgpu.Layout.WG_STRIDED((zeros,), vec_size=zeros // 128)
                    nothing = plgpu.layout_cast(jnp.zeros((zeros,), jnp.bfloat16), layout)
                    out_gmem[row, pl.ds(i * zeros, zeros)] = nothing

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == config.warpgroups)
        def _() -> None:
            set_registers(config, compute=False)
            scan(sizes_gmem, rows_smem, before_smem, sums_smem, schedule, m)
            plgpu.barrier_arrive(scanned)

            def load(index: Any, done: Any) -> Any:
                expert_block, _, first_token, _, high = describe(index)
                rows = pl.ds(expert_block, blocks)

                def some(count: int) -> None:
                    @pl.loop(0, k_steps)
                    def step(ki: Array) -> None:
                        columns = pl.ds(ki * TILE_COLUMNS, TILE_COLUMNS)
                        x_tile = x_gmem.at[pl.ds(first_token, count), columns]
                        pipeline.fill(done + ki, words_gmem.at[rows, ki], scales_gmem.at[rows, ki], x_tile)

                by_size(high - first_token, some)
                return done + k_steps

            pipeline.finish(lax.fori_loop(0, my_tiles(), load, 0))

    cluster: dict[str, Any] = {"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        grid=(grid,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "rows_smem": plgpu.SMEM((schedule.table_size,), jnp.int32),
            "before_smem": plgpu.SMEM((schedule.table_size * (1 + schedule.halves_last),), jnp.int32),
            "sums_smem": plgpu.SMEM((12,), jnp.int32),
            "scanned": plgpu.Barrier(),
            "tiles_smem": plgpu.SMEM((described_tiles, 8), jnp.int32),
            "described": plgpu.Barrier(num_barriers=described_tiles),
            **scratch_types(config, w.form, w.scales.dtype, x.dtype),
        },
        **cluster,
    )
    per_token = None if token_scale is None else token_scale[:, 0]
    words, scales = (v.reshape(-1, *v.shape[2:]) for v in (w.words, w.scales))
    return kernel(words, scales, x, w.channel_scale.reshape(-1), per_token, group_sizes)

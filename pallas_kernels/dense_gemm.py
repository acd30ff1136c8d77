"""The dense W4A8 and W4A16 kernel for Hopper: INT4 weights, FP8 or bf16 activations, tensor cores of the same type.

    out[m, n] = bf16(channel_scale[n] * (token_scale[m] * sum_k w8[n, k] * x8[m, k]))

Weights are wgmma's A operand and go through registers, where a table lookup makes them e4m3; activations are its B
operand, in shared memory. So a tile of the output is computed transposed, rows of weights by tokens.

    memory warpgroup                          compute warpgroups, each 64 * row_blocks rows of the tile
    for each K step of 128:                   for each K step:
      wait until the slot is consumed           wait until the slot is full
      TMA: words, scales, x -> slot             for each row block: words -> registers -> e4m3, wgmma (asynchronous)
      scales of an earlier step, which have     release the slot of the step before
        arrived -> lookup tables -> slot      scale, transpose through shared memory, TMA to the output

One wgmma is always in flight while the next block is dequantized: each waits for all but itself (`wgmma_wait(1)`). The
first step is peeled, so that the release in the loop needs no condition, which ptxas would serialize for. A warpgroup
with one row block alternates between two K steps instead of two blocks, so that it never writes registers which a wgmma
in flight reads: its steps go in pairs.

For W4A16 (form "bf16") it is the same without tables and token scales: weights are multiplied by their group's scale in
registers, rounded to bf16.

`schedule` says which tiles a block computes. Blocks that share a tile add up through global memory in a fixed order:
each but the last stores its partial sums in fp32 and counts up, the last waits for the count and adds, lowest block
first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from .device_sums import add_partials, signal, store_partial, wait
from .errors import W4A8Error
from .fragments import FLAGS, TILE_COLUMNS, TILE_ROWS, FragmentWeight
from .register_dequantize import F8, WORDS, build_tables, dequantize_tile, load_tables, scale_layout, table_words
from .schedule import Schedule

_SHARED_MEMORY = 227 * 1024
# Registers of a thread in compute and memory warpgroups, by the number of compute warpgroups. One has all it can use.
_REGISTERS = {2: (232, 40), 3: (160, 32)}
# Their codes do not hold the groups' scales, which multiply sums in fp32.
_SUMS_BY_GROUP = ("subnormal", "subnormal_8")


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernel divides the work.

    Attributes:
        tile_tokens: tokens of a tile, a multiple of 8 up to 256.
        row_blocks: blocks of 64 rows that each compute warpgroup holds. With 1, tiles can have 256 tokens.
        warpgroups: compute warpgroups, 1 to 3.
        stages: slots of the pipeline.
        stream_k: whether blocks share the tiles that do not fill the grid.
        cluster: blocks, 1 or 2, that compute neighbouring rows in step and receive x together.
        ctas: blocks of the grid; one per multiprocessor.
    """

    tile_tokens: int
    row_blocks: int = 2
    warpgroups: int = 2
    stages: int = 4
    stream_k: bool = False
    cluster: int = 1
    ctas: int = 132

    @property
    def tile_rows(self) -> int:
        """Output channels of a tile."""
        return TILE_ROWS * self.row_blocks * self.warpgroups

    @property
    def steps_at_once(self) -> int:
        """K steps, of 128 columns, that go together."""
        return 2 if self.row_blocks == 1 else 1

    @property
    def staged_tokens(self) -> int:
        """Tokens of the output that shared memory holds at a time: half of a large tile."""
        return self.tile_tokens // 2 if self.tile_tokens > 128 and self.tile_tokens % 16 == 0 else self.tile_tokens

    def shared_memory(self, form: str) -> int:
        """Bytes, for weights in a form."""
        blocks = self.row_blocks * self.warpgroups
        x_bytes = 2 if form == "bf16" else 1
        scale_bytes = {"bf16": 2, "subnormal": 4, "subnormal_8": 4}.get(form, 1) + 4 * table_words(form)
        slot = blocks * TILE_ROWS * (TILE_COLUMNS // 2 + scale_bytes) + self.tile_tokens * TILE_COLUMNS * x_bytes
        fixed = blocks * self.staged_tokens * TILE_ROWS * 2 + self.warpgroups * 1024
        return self.stages * slot + fixed + 1024

    def check(self, n: int, k: int, form: str) -> None:
        """Raises W4A8Error if the config cannot take a weight [N, K] in a form."""
        blocks = self.row_blocks * self.warpgroups
        if not (8 <= self.tile_tokens <= 256 and self.tile_tokens % 8 == 0):
            raise W4A8Error(f"kernel: tile_tokens must be a multiple of 8 up to 256, found {self}")
        if self.row_blocks < 1 or blocks % 2:
            raise W4A8Error(f"kernel: row_blocks must be positive, and even for odd warpgroups, found {self}")
        if self.row_blocks == 1 and (k % (2 * TILE_COLUMNS) or form in _SUMS_BY_GROUP):
            raise W4A8Error(f"kernel: row_blocks 1 is for K a multiple of 256, not {k}, and not for exact numerics")
        if n % (self.tile_rows * self.cluster):
            raise W4A8Error(f"kernel: N {n} is no multiple of {self.tile_rows * self.cluster} rows, those of {self}")
        if (needed := self.shared_memory(form)) > _SHARED_MEMORY:
            raise W4A8Error(f"kernel: {self} needs {needed} bytes of shared memory; {_SHARED_MEMORY} exist")
        if self.stages < 3 or self.warpgroups not in (1, 2, 3) or self.cluster not in (1, 2):
            raise W4A8Error(f"kernel: at least 3 stages, 1 to 3 warpgroups and clusters of 1 or 2, found {self}")
        if self.ctas * self.warpgroups > FLAGS:
            raise W4A8Error(f"kernel: ctas * warpgroups is at most {FLAGS}, found {self}")


def dense_gemm(
    x: Float[Array, "M K"], token_scale: Float[Array, "M 1"] | None, w: FragmentWeight, config: TuningConfig
) -> BFloat16[Array, "M N"]:
    """The product on a Hopper GPU.

    Args:
        x: `float8_e4m3fn` [M, K], bf16 for weights in form "bf16"; M above 8 must be a multiple of 8.
        token_scale: fp32 [M, 1]; None for weights in form "bf16".
        w: [N, K]; N must be a multiple of the config's `tile_rows * cluster`.
        config: how to divide the work.

    Raises:
        W4A8Error: shapes, dtypes or the config do not fit.
    """
    (m, k), (n, w_k) = x.shape, w.shape
    if k != w_k:
        raise W4A8Error(f"kernel: x [{m}, {k}] and w [{n}, {w_k}] do not fit")
    if x.dtype != (jnp.bfloat16 if w.form == "bf16" else F8) or (token_scale is None) != (w.form == "bf16"):
        raise W4A8Error(f"kernel: x {x.dtype} and its scales do not fit weights in form {w.form}")
    config.check(n, k, w.form)
    stages, blocks = config.stages, config.row_blocks * config.warpgroups
    # Steps between a copy and the making of its tables: so many are in flight. With stages - 1, what frees a slot would
    # wait for that slot; with fewer, tables are ready some steps before they are needed.
    lag = min(stages - 2, stages - min(4, (stages + 1) // 2))
    n_tiles, m_tiles = n // config.tile_rows // config.cluster, pl.cdiv(m, config.tile_tokens)
    at_once = config.steps_at_once
    schedule = Schedule(n_tiles * m_tiles, k // TILE_COLUMNS // at_once, config.ctas // config.cluster, config.stream_k)
    staged_tokens = config.staged_tokens
    part = next(p for p in (32, 24, 16, 8) if staged_tokens % p == 0)
    uses_tables = table_words(w.form) > 0
    sums_by_group = w.form in _SUMS_BY_GROUP
    x_bytes = x.dtype.itemsize
    accumulator_shapes = [plgpu.ACC((TILE_ROWS, config.tile_tokens))] * config.row_blocks
    # Partial sums of several blocks are loaded at a time, where registers allow.
    unroll = max(1, min(4, 64 // (config.tile_tokens * config.row_blocks // 2)))

    def following(slot: Any) -> Any:
        if stages & (stages - 1) == 0:
            return (slot + 1) & (stages - 1)
        return jnp.where(slot == stages - 1, 0, slot + 1)

    def body(
        words_gmem: Any,
        scales_gmem: Any,
        x_gmem: Any,
        channel_scale_gmem: Any,
        token_scale_gmem: Any,
        flags: Any,
        out_gmem: Any,
        partials: Any,
        words_smem: Any,
        scales_smem: Any,
        x_smem: Any,
        out_smem: Any,
        full: Any,
        consumed: Any,
        token_scale_smem: Any = None,
        token_scale_full: Any = None,
        tables_smem: Any = None,
        scales_full: Any = None,
    ) -> None:
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index("rank") if config.cluster > 1 else 0
        block_id = cta * config.cluster + rank

        def coordinates(tile: Any) -> tuple[Any, Any]:
            """First row block of the tile, and its first token."""
            # The token is never a Python number: slices beyond M are meant, and would be refused.
            n_tile, m_tile = plgpu.planar_snake(tile, (n_tiles, m_tiles), 1, 8) if m_tiles > 1 else (tile, 0 * tile)
            return (n_tile * config.cluster + rank) * blocks, m_tile * config.tile_tokens

        @pl.when(warpgroup < config.warpgroups)
        def _() -> None:
            if config.warpgroups > 1:
                plgpu.set_max_registers(_REGISTERS[config.warpgroups][0], action="increase")
            my_blocks = [warpgroup * config.row_blocks + b for b in range(config.row_blocks)]

            def multiply(accumulators: Any, slot: Any, before: Any) -> Any:
                """One step, or two; the slot of the last."""
                for ahead in range(at_once):
                    if ahead:
                        before, slot = slot, following(slot)
                    plgpu.barrier_wait(full.at[slot])
                    for i, (block, accumulator) in enumerate(zip(my_blocks, accumulators, strict=True)):
                        words = plgpu.load(words_smem.at[slot, block], layout=WORDS)
                        tables = load_tables((tables_smem if uses_tables else scales_smem).at[slot, block], w.form)
                        plgpu.wgmma(accumulator, dequantize_tile(words, tables, w.form), x_smem.at[slot].T)
                        plgpu.wgmma_wait(1)
                        if i == 0 and before is not None:
                            plgpu.barrier_arrive(consumed.at[before])
                return slot

            def multiply_exactly(sums: Any, slot: Any) -> list[Array]:
                """Adds a step's products times the scales of its groups, which codes do not hold."""
                plgpu.barrier_wait(full.at[slot])

                def products(*parts: Any) -> list[Array]:
                    for block, part in zip(my_blocks, parts, strict=True):
                        words = plgpu.load(words_smem.at[slot, block], layout=WORDS)
                        plgpu.wgmma(part, dequantize_tile(words, [], w.form), x_smem.at[slot].T)
                    return [part[...] for part in parts]

                parts = pl.run_scoped(products, *accumulator_shapes)
                layout = plgpu.Layout.WGMMA.reduce(1)
                scales = [plgpu.load(scales_smem.at[slot, block], layout=layout) for block in my_blocks]
                plgpu.barrier_arrive(consumed.at[slot])
                return [
                    total + part * lax.broadcast_in_dim(scale, part.shape, (0,))
                    for total, part, scale in zip(sums, parts, scales, strict=True)
                ]

            def row_scales(first_block: Any) -> list[Array]:
                layout = plgpu.Layout.WGMMA.reduce(1)
                rows = [pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS) for block in my_blocks]
                return [plgpu.load(channel_scale_gmem.at[r], layout=layout, optimized=False) for r in rows]

            def epilogue(first_block: Any, first_token: Any, scales: Any, results: Any) -> None:
                for first in range(0, config.tile_tokens, staged_tokens):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for block, scale_n, result in zip(my_blocks, scales, results, strict=True):
                        # In parts, so that few token scales are in registers at a time.
                        for start in range(first, first + staged_tokens, part):
                            out_smem.at[block, pl.ds(start - first, part)].T[...] = plgpu.layout_cast(
                                scaled(result[:, start : start + part], scale_n, start).astype(jnp.bfloat16),
                                plgpu.Layout.WGMMA_TRANSPOSED,
                            )
                    plgpu.commit_smem()
                    for block in my_blocks:
                        rows = pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS)
                        plgpu.copy_smem_to_gmem(
                            out_smem.at[block], out_gmem.at[pl.ds(first_token + first, staged_tokens), rows]
                        )

            def scaled(result: Any, scale_n: Any, start: Any) -> Any:
                if token_scale is not None:
                    scale_m = plgpu.load(
                        token_scale_smem.at[warpgroup, pl.ds(start, part)],
                        layout=plgpu.Layout.WGMMA.reduce(0),
                        optimized=False,
                    )
                    result = lax.broadcast_in_dim(scale_m, result.shape, (1,)) * result
                return lax.broadcast_in_dim(scale_n, result.shape, (0,)) * result

            def segment(index: Any, done: Any) -> Any:
                tile, low, high = schedule.segment(cta, index)
                first_block, first_token = coordinates(tile)
                if token_scale is not None:
                    plgpu.copy_gmem_to_smem(
                        token_scale_gmem.at[pl.ds(first_token, config.tile_tokens)],
                        token_scale_smem.at[warpgroup, pl.ds(0, config.tile_tokens)],
                        token_scale_full.at[warpgroup],
                    )

                scales = row_scales(first_block)

                def accumulate(*accumulators: Any) -> list[Array]:
                    def step(_: Any, before: Any) -> Any:
                        return multiply(accumulators, following(before), before)

                    slot = multiply(accumulators, lax.rem(done, stages), None)
                    slot = lax.fori_loop(low + 1, high, step, slot)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[slot])
                    return [accumulator[...] for accumulator in accumulators]

                if not sums_by_group:
                    results = pl.run_scoped(accumulate, *accumulator_shapes)
                else:
                    zero = jnp.zeros((TILE_ROWS, config.tile_tokens), jnp.float32)
                    zeros = [plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in my_blocks]
                    _, results = lax.fori_loop(
                        low,
                        high,
                        lambda _, carry: (following(carry[0]), multiply_exactly(carry[1], carry[0])),
                        (lax.rem(done, stages), zeros),
                    )
                if token_scale is not None:
                    plgpu.barrier_wait(token_scale_full.at[warpgroup])
                done += (high - low) * at_once
                if not schedule.splits:
                    epilogue(first_block, first_token, scales, results)
                    return done

                @pl.when(high < schedule.k_steps)
                def contribute() -> None:
                    for b, result in enumerate(results):
                        store_partial(result, partials.at[block_id, warpgroup, b])
                    signal(flags.at[(schedule.owner(tile) * config.cluster + rank) * config.warpgroups + warpgroup])

                @pl.when(high == schedule.k_steps)
                def finish() -> None:
                    first = jnp.where(low > 0, schedule.first_peer(tile), cta)
                    pl.when(low > 0)(lambda: wait(flags.at[block_id * config.warpgroups + warpgroup], cta - first))

                    def add(i: Any, sums: Any) -> Any:
                        peers = [first + i * unroll + u for u in range(unroll)]
                        there = [(peer < cta).astype(jnp.float32) for peer in peers]
                        slots = [jnp.minimum(peer, cta - 1) * config.cluster + rank for peer in peers]
                        return tuple(
                            add_partials(s, [partials.at[slot, warpgroup, b] for slot in slots], there)
                            for b, s in enumerate(sums)
                        )

                    steps = (cta - first + unroll - 1) // unroll
                    epilogue(first_block, first_token, scales, lax.fori_loop(0, steps, add, tuple(results)))

                return done

            lax.fori_loop(0, schedule.segments(cta), segment, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == config.warpgroups)
        def _() -> None:
            if config.warpgroups > 1:
                plgpu.set_max_registers(_REGISTERS[config.warpgroups][1], action="decrease")

            def tables(i: Any) -> None:
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(scales_full.at[slot])
                scales = plgpu.load(scales_smem.at[slot], layout=scale_layout(blocks))
                tables_smem[slot] = build_tables(scales, w.form)
                plgpu.barrier_arrive(full.at[slot])

            def segment(index: Any, done: Any) -> Any:
                tile, *steps = schedule.segment(cta, index)
                low, high = (step * at_once for step in steps)
                first_block, first_token = coordinates(tile)
                rows = pl.ds(first_block, blocks)

                @pl.loop(low, high)
                def _(ki: Array) -> None:
                    i = done + ki - low
                    slot = lax.rem(i, stages)
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                    plgpu.copy_gmem_to_smem(words_gmem.at[rows, ki], words_smem.at[slot], full.at[slot])
                    arrived = scales_full if uses_tables else full
                    plgpu.copy_gmem_to_smem(scales_gmem.at[rows, ki], scales_smem.at[slot], arrived.at[slot])
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[pl.ds(first_token, config.tile_tokens), pl.ds(ki * TILE_COLUMNS, TILE_COLUMNS)],
                        x_smem.at[slot],
                        full.at[slot],
                        collective_axes="rank" if config.cluster > 1 else None,
                    )
                    if uses_tables:
                        pl.when(i >= lag)(lambda: tables(i - lag))

                return done + high - low

            steps = lax.fori_loop(0, schedule.segments(cta), segment, 0)
            if uses_tables:
                pl.loop(jnp.maximum(steps - lag, 0), steps)(tables)
            if config.cluster > 1:
                # The other block of the cluster still signals this one's barriers.
                pl.loop(jnp.maximum(steps - stages, 0), steps)(
                    lambda i: plgpu.barrier_wait(consumed.at[lax.rem(i, stages)])
                )

    def tiled(minor: int) -> tuple[plgpu.Transform, ...]:
        return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]

    cluster: dict[str, Any] = {"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}
    arrivals: dict[str, Any] = {"num_barriers": stages, "num_arrivals": config.warpgroups}
    sharers = schedule.grid * config.cluster if schedule.splits else 1
    tables: dict[str, Any] = {
        "tables_smem": plgpu.SMEM((stages, blocks, TILE_ROWS, table_words(w.form)), jnp.uint32),
        "scales_full": plgpu.Barrier(num_barriers=stages),
    }
    token_scales: dict[str, Any] = {
        "token_scale_smem": plgpu.SMEM((config.warpgroups, pl.cdiv(config.tile_tokens, 32) * 32), jnp.float32),
        "token_scale_full": plgpu.Barrier(num_barriers=config.warpgroups),
    }
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
            jax.ShapeDtypeStruct(
                (sharers, config.warpgroups, config.row_blocks, TILE_ROWS * config.tile_tokens), jnp.float32
            ),
        ),
        grid=(schedule.grid,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "words_smem": plgpu.SMEM((stages, blocks, 4, 256), jnp.uint32),
            "scales_smem": plgpu.SMEM((stages, blocks, TILE_ROWS), w.scales.dtype),
            "x_smem": plgpu.SMEM((stages, config.tile_tokens, TILE_COLUMNS), x.dtype, transforms=tiled(128 // x_bytes)),
            **(token_scales if token_scale is not None else {}),
            "out_smem": plgpu.SMEM((blocks, staged_tokens, TILE_ROWS), jnp.bfloat16, transforms=tiled(64)),
            "full": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            "consumed": plgpu.ClusterBarrier(collective_axes=("rank",), **arrivals)
            if config.cluster > 1
            else plgpu.Barrier(**arrivals),
            **(tables if uses_tables else {}),
        },
        **cluster,
    )
    per_token = None if token_scale is None else token_scale[:, 0]
    out, _ = kernel(w.words, w.scales, x, w.channel_scale, per_token, w.flags)
    return out

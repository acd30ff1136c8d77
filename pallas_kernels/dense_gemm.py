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

Slots of the pipeline hold one K step, or two (`slot_steps`), which small tiles fill and empty in half as many waits.

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
from .main_loop import SUMS_BY_GROUP, Pipeline, Staging, row_scales, scratch_types, set_registers
from .register_dequantize import F8, table_words
from .schedule import Schedule, strip_tokens

SHARED_MEMORY = 227 * 1024


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
        lead: where tiles are fewer than blocks and shared, K steps of 128 that a tile's owner does more than others;
            0 for even shares.
        slot_steps: K steps of 128 that a slot of the pipeline holds, 1 or 2. With 2, the memory warpgroup has half as
            many waits, copies and passes over tables; it bounds small tiles.
    """

    tile_tokens: int
    row_blocks: int = 2
    warpgroups: int = 2
    stages: int = 4
    stream_k: bool = False
    cluster: int = 1
    ctas: int = 132
    lead: int = 0
    slot_steps: int = 1

    @property
    def tile_rows(self) -> int:
        """Output channels of a tile."""
        return TILE_ROWS * self.row_blocks * self.warpgroups

    @property
    def steps_at_once(self) -> int:
        """K steps, of 128 columns, that go together."""
        return 2 if self.row_blocks == 1 else self.slot_steps

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
        return self.stages * self.slot_steps * slot + fixed + 1024

    def check(self, n: int, k: int, form: str, more: int = 0) -> None:
        """Raises W4A8Error if the config cannot take a weight [N, K] in a form, and `more` shared memory."""
        blocks = self.row_blocks * self.warpgroups
        if not (8 <= self.tile_tokens <= 256 and self.tile_tokens % 8 == 0):
            raise W4A8Error(f"kernel: tile_tokens must be a multiple of 8 up to 256, found {self}")
        if self.row_blocks < 1 or blocks % 2:
            raise W4A8Error(f"kernel: row_blocks must be positive, and even for odd warpgroups, found {self}")
        if self.slot_steps not in (1, 2):
            raise W4A8Error(f"kernel: slot_steps must be 1 or 2, found {self}")
        if self.steps_at_once == 2 and (k % (2 * TILE_COLUMNS) or form in SUMS_BY_GROUP):
            raise W4A8Error(
                f"kernel: row_blocks 1 or slot_steps 2 are for K a multiple of 256, not {k}, and not for exact numerics"
            )
        if n % (self.tile_rows * self.cluster):
            raise W4A8Error(f"kernel: N {n} is no multiple of {self.tile_rows * self.cluster} rows, those of {self}")
        if (needed := self.shared_memory(form) + more) > SHARED_MEMORY:
            raise W4A8Error(f"kernel: {self} needs {needed} bytes of shared memory; {SHARED_MEMORY} exist")
        if self.stages < 3 or self.warpgroups not in (1, 2, 3) or self.cluster not in (1, 2):
            raise W4A8Error(f"kernel: at least 3 stages, 1 to 3 warpgroups and clusters of 1 or 2, found {self}")
        if self.lead < 0:
            raise W4A8Error(f"kernel: lead is not negative, found {self}")
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
    blocks = config.row_blocks * config.warpgroups
    n_tiles, m_tiles = n // config.tile_rows // config.cluster, pl.cdiv(m, config.tile_tokens)
    at_once = config.steps_at_once
    slots_at_once = at_once // config.slot_steps
    schedule = Schedule(
        n_tiles * m_tiles,
        k // TILE_COLUMNS // at_once,
        config.ctas // config.cluster,
        config.stream_k,
        config.lead // at_once,
    )
    strip = min(8, max(1, strip_tokens(k * x.dtype.itemsize) // config.tile_tokens))
    # Partial sums of several blocks are loaded at a time, where registers allow.
    unroll = max(1, min(4, 64 // (config.tile_tokens * config.row_blocks // 2)))

    def body(
        words_gmem: Any,
        scales_gmem: Any,
        x_gmem: Any,
        channel_scale_gmem: Any,
        token_scale_gmem: Any,
        flags: Any,
        out_gmem: Any,
        partials: Any,
        **scratch: Any,
    ) -> None:
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index("rank") if config.cluster > 1 else 0
        block_id = cta * config.cluster + rank
        pipeline = Pipeline.of(config, w.form, scratch)

        def coordinates(tile: Any) -> tuple[Any, Any]:
            """First row block of the tile, and its first token."""
            # The token is never a Python number: slices beyond M are meant, and would be refused.
            n_tile, m_tile = plgpu.planar_snake(tile, (n_tiles, m_tiles), 1, strip) if m_tiles > 1 else (tile, 0 * tile)
            return (n_tile * config.cluster + rank) * blocks, m_tile * config.tile_tokens

        @pl.when(warpgroup < config.warpgroups)
        def _() -> None:
            set_registers(config, compute=True)
            staging = Staging.of(config, scratch, warpgroup)
            my_blocks = [warpgroup * config.row_blocks + b for b in range(config.row_blocks)]

            def epilogue(first_block: Any, first_token: Any, scales: Any, results: Any) -> None:
                def copy(block: Any, first: int, count: int) -> None:
                    rows = pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS)
                    tokens = pl.ds(first_token + first, count)
                    plgpu.copy_smem_to_gmem(staging.out_smem.at[block], out_gmem.at[tokens, rows])

                staging.store(my_blocks, scales, results, copy)

            def segment(index: Any, done: Any) -> Any:
                tile, low, high = schedule.segment(cta, index)
                first_block, first_token = coordinates(tile)
                staging.fetch_token_scales(token_scale_gmem, first_token)
                scales = row_scales(channel_scale_gmem, first_block, my_blocks)
                results = pipeline.products(my_blocks, low, high, done)
                staging.await_token_scales()
                done += (high - low) * slots_at_once
                if not schedule.splits:
                    epilogue(first_block, first_token, scales, results)
                    return done

                @pl.when(high < schedule.k_steps)
                def contribute() -> None:
                    slot = schedule.slot(tile, cta) * config.cluster + rank
                    for b, result in enumerate(results):
                        store_partial(result, partials.at[slot, warpgroup, b])
                    signal(flags.at[(schedule.owner(tile) * config.cluster + rank) * config.warpgroups + warpgroup])

                @pl.when(high == schedule.k_steps)
                def finish() -> None:
                    first, last = schedule.peers(tile)
                    peers = jnp.where(low > 0, last - first + (last != cta), 0)
                    pl.when(low > 0)(lambda: wait(flags.at[block_id * config.warpgroups + warpgroup], peers))

                    def add(i: Any, sums: Any) -> Any:
                        numbers = [i * unroll + u for u in range(unroll)]
                        there = [(number < peers).astype(jnp.float32) for number in numbers]
                        slots = [schedule.slot(tile, first + jnp.minimum(number, peers - 1)) for number in numbers]
                        slots = [slot * config.cluster + rank for slot in slots]
                        return tuple(
                            add_partials(s, [partials.at[slot, warpgroup, b] for slot in slots], there)
                            for b, s in enumerate(sums)
                        )

                    steps = (peers + unroll - 1) // unroll
                    epilogue(first_block, first_token, scales, lax.fori_loop(0, steps, add, tuple(results)))

                return done

            lax.fori_loop(0, schedule.segments(cta), segment, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == config.warpgroups)
        def _() -> None:
            set_registers(config, compute=False)

            def segment(index: Any, done: Any) -> Any:
                tile, *steps = schedule.segment(cta, index)
                low, high = (step * slots_at_once for step in steps)
                first_block, first_token = coordinates(tile)
                rows = pl.ds(first_block, blocks)

                @pl.loop(low, high)
                def _(i: Array) -> None:
                    x_rows = x_gmem.at[pl.ds(first_token, config.tile_tokens)]
                    pipeline.fill(done + i - low, i, words_gmem.at[rows], scales_gmem.at[rows], x_rows)

                return done + high - low

            pipeline.finish(lax.fori_loop(0, schedule.segments(cta), segment, 0))

    cluster: dict[str, Any] = {"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}
    sharers = schedule.slots * config.cluster if schedule.splits else 1
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
        scratch_types=scratch_types(config, w.form, w.scales.dtype, x.dtype),
        **cluster,
    )
    per_token = None if token_scale is None else token_scale[:, 0]
    out, _ = kernel(w.words, w.scales, x, w.channel_scale, per_token, w.flags)
    return out

"""The dense W4A8 kernel for Hopper: INT4 weights, FP8 activations, FP8 tensor cores.

    out[m, n] = bf16(channel_scale[n] * (token_scale[m] * sum_k w8[n, k] * x8[m, k]))

Weights are wgmma's A operand and go through registers, where a table lookup makes them e4m3; activations are its B
operand, in shared memory. So a tile of the output is computed transposed, rows of weights by tokens.

    memory warpgroup                         compute warpgroups, each 64 * row_blocks rows of the tile
    for each K step of 128:                  for each K step:
      wait until the slot is consumed          wait until the slot is full
      TMA: words, tables, x -> slot            for each row block: words -> registers -> e4m3, wgmma (asynchronous)
                                               release the slot of the step before
                                             scale, transpose through shared memory, TMA to the output

One wgmma is always in flight while the next block is dequantized: each waits for all but itself (`wgmma_wait(1)`). The
first step is peeled, so that the release in the loop needs no condition, which ptxas would serialize for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from .errors import W4A8Error
from .fragments import TILE_COLUMNS, TILE_ROWS, FragmentWeight
from .register_dequantize import F8, TABLES, WORDS, dequantize_tile

_SHARED_MEMORY = 227 * 1024
# Registers of a thread in compute and memory warpgroups, by the number of compute warpgroups.
_REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernel divides the work.

    Attributes:
        tile_tokens: tokens of a tile, a multiple of 8 up to 256.
        row_blocks: blocks of 64 rows that each compute warpgroup holds; at least 2, so that two wgmmas can overlap.
        warpgroups: compute warpgroups, 1 to 3.
        stages: slots of the pipeline.
        ctas: blocks of the grid; one per multiprocessor.
    """

    tile_tokens: int
    row_blocks: int = 2
    warpgroups: int = 2
    stages: int = 4
    ctas: int = 132

    @property
    def tile_rows(self) -> int:
        """Output channels of a tile."""
        return TILE_ROWS * self.row_blocks * self.warpgroups

    @property
    def shared_memory(self) -> int:
        """Bytes."""
        blocks = self.row_blocks * self.warpgroups
        slot = blocks * (TILE_ROWS * TILE_COLUMNS // 2 + 32 * 16) + self.tile_tokens * TILE_COLUMNS
        return self.stages * slot + blocks * self.tile_tokens * TILE_ROWS * 2 + 1024


def dense_gemm(
    x8: Float[Array, "M K"], token_scale: Float[Array, "M 1"], w: FragmentWeight, config: TuningConfig
) -> BFloat16[Array, "M N"]:
    """The product on a Hopper GPU.

    Args:
        x8: `float8_e4m3fn` [M, K].
        token_scale: fp32 [M, 1].
        w: [N, K]; N must be a multiple of the config's `tile_rows`.
        config: how to divide the work.

    Raises:
        W4A8Error: shapes or the config do not fit.
    """
    (m, k), (n, w_k) = x8.shape, w.shape
    if k != w_k or n % config.tile_rows:
        raise W4A8Error(f"kernel: x [{m}, {k}] and w [{n}, {w_k}] do not fit, or not tiles of {config.tile_rows} rows")
    if config.row_blocks < 2:
        # With one, the next block's weights would be written to registers that a wgmma in flight still reads.
        raise W4A8Error(f"kernel: row_blocks must be at least 2, found {config}")
    if config.shared_memory > _SHARED_MEMORY:
        raise W4A8Error(f"kernel: {config} needs {config.shared_memory} bytes of shared memory; {_SHARED_MEMORY} exist")
    k_steps, blocks = k // TILE_COLUMNS, config.row_blocks * config.warpgroups
    n_tiles, m_tiles = n // config.tile_rows, pl.cdiv(m, config.tile_tokens)
    # A tile's scales are read whole.
    token_scale = jnp.pad(token_scale[:, 0], (0, m_tiles * config.tile_tokens - m))

    def body(
        words_gmem: Any,
        tables_gmem: Any,
        x_gmem: Any,
        channel_scale_gmem: Any,
        token_scale_gmem: Any,
        out_gmem: Any,
        words_smem: Any,
        tables_smem: Any,
        x_smem: Any,
        out_smem: Any,
        full: Any,
        consumed: Any,
    ) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @plgpu.nd_loop((n_tiles * m_tiles,), collective_axes="cta")
        def _(loop: plgpu.NDLoopInfo) -> None:
            n_tile, m_tile = plgpu.planar_snake(loop.index[0], (n_tiles, m_tiles), 1, 8)
            first = loop.local_index * k_steps
            tokens = pl.ds(m_tile * config.tile_tokens, config.tile_tokens)

            @pl.when(warpgroup < config.warpgroups)
            def _() -> None:
                plgpu.set_max_registers(_REGISTERS[config.warpgroups][0], action="increase")
                my_blocks = [warpgroup * config.row_blocks + b for b in range(config.row_blocks)]

                def accumulate(*accumulators: Any) -> list[Array]:
                    def step(ki: Any, release: bool) -> None:
                        slot = lax.rem(first + ki, config.stages)
                        plgpu.barrier_wait(full.at[slot])
                        for i, (block, accumulator) in enumerate(zip(my_blocks, accumulators, strict=True)):
                            words = plgpu.load(words_smem.at[slot, block], layout=WORDS)
                            tables = plgpu.load(tables_smem.at[slot, block], layout=TABLES)
                            plgpu.wgmma(accumulator, dequantize_tile(words, tables, w.form), x_smem.at[slot].T)
                            plgpu.wgmma_wait(1)
                            if i == 0 and release:
                                plgpu.barrier_arrive(consumed.at[lax.rem(first + ki - 1, config.stages)])

                    step(0, False)
                    pl.loop(1, k_steps)(lambda ki: step(ki, True))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[lax.rem(first + k_steps - 1, config.stages)])
                    return [accumulator[...] for accumulator in accumulators]

                shapes = [plgpu.ACC((TILE_ROWS, config.tile_tokens))] * config.row_blocks
                results = pl.run_scoped(accumulate, *shapes)
                scale_m = plgpu.load(token_scale_gmem, tokens, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for block, result in zip(my_blocks, results, strict=True):
                    rows = pl.ds(n_tile * config.tile_rows + block * TILE_ROWS, TILE_ROWS)
                    scale_n = plgpu.load(channel_scale_gmem, rows, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                    result = lax.broadcast_in_dim(scale_n, result.shape, (0,)) * (
                        lax.broadcast_in_dim(scale_m, result.shape, (1,)) * result
                    )
                    out_smem.at[block].T[...] = plgpu.layout_cast(
                        result.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                plgpu.commit_smem()
                for block in my_blocks:
                    rows = pl.ds(n_tile * config.tile_rows + block * TILE_ROWS, TILE_ROWS)
                    plgpu.copy_smem_to_gmem(out_smem.at[block], out_gmem.at[tokens, rows])

            @pl.when(warpgroup == config.warpgroups)
            def _() -> None:
                plgpu.set_max_registers(_REGISTERS[config.warpgroups][1], action="decrease")

                @pl.loop(0, k_steps)
                def _(ki: Array) -> None:
                    i = first + ki
                    slot = lax.rem(i, config.stages)
                    pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                    tiles = pl.ds(n_tile * blocks, blocks)
                    plgpu.copy_gmem_to_smem(words_gmem.at[tiles, ki], words_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(tables_gmem.at[ki, tiles], tables_smem.at[slot], full.at[slot])
                    columns = pl.ds(ki * TILE_COLUMNS, TILE_COLUMNS)
                    plgpu.copy_gmem_to_smem(x_gmem.at[tokens, columns], x_smem.at[slot], full.at[slot])

        pl.when(warpgroup < config.warpgroups)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))

    def tiled(minor: int) -> tuple[plgpu.Transform, ...]:
        return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "words_smem": plgpu.SMEM((config.stages, blocks, 4, 256), jnp.uint32),
            "tables_smem": plgpu.SMEM((config.stages, blocks, 32, 4), jnp.uint32),
            "x_smem": plgpu.SMEM((config.stages, config.tile_tokens, TILE_COLUMNS), F8, transforms=tiled(128)),
            "out_smem": plgpu.SMEM((blocks, config.tile_tokens, TILE_ROWS), jnp.bfloat16, transforms=tiled(64)),
            "full": plgpu.Barrier(num_barriers=config.stages, num_arrivals=3),
            "consumed": plgpu.Barrier(num_barriers=config.stages, num_arrivals=config.warpgroups),
        },
    )
    return kernel(w.words, w.tables, x8, w.channel_scale, token_scale)

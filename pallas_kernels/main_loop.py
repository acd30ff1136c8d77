"""What the dense and the grouped kernel share: the pipeline, the main loop, and the staging of a tile of the output.

A memory warpgroup fills slots of shared memory, one or two K steps of 128 each; compute warpgroups consume them.
`dense_gemm` says what each does when, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array

from .fragments import TILE_COLUMNS, TILE_ROWS, Form
from .register_dequantize import WORDS, build_tables, dequantize_tile, load_tables, scale_layout, table_words

if TYPE_CHECKING:
    from .dense_gemm import TuningConfig

# Registers of a thread in compute and memory warpgroups, by the number of compute warpgroups. One has all it can use.
_REGISTERS = {2: (232, 40), 3: (160, 32)}
# Tiles of more tokens have their tables a K step earlier.
_EARLY_TABLES = 128
# Their codes do not hold the groups' scales, which multiply sums in fp32.
SUMS_BY_GROUP = ("subnormal", "subnormal_8")
# Names of `scratch_types` that are `Pipeline`'s; the last two only where words need tables.
_PIPELINE = ("words_smem", "scales_smem", "x_smem", "full", "consumed", "tables_smem", "scales_full")


def scratch_types(config: TuningConfig, form: Form, scales_dtype: Any, x_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a kernel."""
    stages, blocks = config.stages, config.row_blocks * config.warpgroups
    arrivals: dict[str, Any] = {"num_barriers": stages, "num_arrivals": config.warpgroups}
    tables: dict[str, Any] = {
        "tables_smem": plgpu.SMEM((stages, blocks, config.slot_steps, TILE_ROWS, table_words(form)), jnp.uint32),
        "scales_full": plgpu.Barrier(num_barriers=stages),
    }
    token_scales: dict[str, Any] = {
        "token_scale_smem": plgpu.SMEM((config.warpgroups, pl.cdiv(config.tile_tokens, 32) * 32), jnp.float32),
        "token_scale_full": plgpu.Barrier(num_barriers=config.warpgroups),
    }
    x_tile = (stages, config.tile_tokens, config.slot_steps * TILE_COLUMNS)
    return {
        "words_smem": plgpu.SMEM((stages, blocks, config.slot_steps, 4, 256), jnp.uint32),
        "scales_smem": plgpu.SMEM((stages, blocks, config.slot_steps, TILE_ROWS), scales_dtype),
        "x_smem": plgpu.SMEM(x_tile, x_dtype, transforms=_tiled(128 // jnp.dtype(x_dtype).itemsize)),
        **(token_scales if form != "bf16" else {}),
        "out_smem": plgpu.SMEM((blocks, config.staged_tokens, TILE_ROWS), jnp.bfloat16, transforms=_tiled(64)),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        "consumed": plgpu.ClusterBarrier(collective_axes=("rank",), **arrivals)
        if config.cluster > 1
        else plgpu.Barrier(**arrivals),
        **(tables if table_words(form) else {}),
    }


def _tiled(minor: int) -> tuple[plgpu.Transform, ...]:
    return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]


def set_registers(config: TuningConfig, *, compute: bool) -> None:
    """Gives compute warpgroups the registers that the memory warpgroup does not need."""
    if config.warpgroups > 1:
        registers = _REGISTERS[config.warpgroups]
        plgpu.set_max_registers(registers[not compute], action="increase" if compute else "decrease")


def row_scales(channel_scale_gmem: Any, first_block: Any, my_blocks: list[Any]) -> list[Array]:
    """Channel scales of a warpgroup's row blocks."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    rows = [pl.ds((first_block + block) * TILE_ROWS, TILE_ROWS) for block in my_blocks]
    return [plgpu.load(channel_scale_gmem.at[r], layout=layout, optimized=False) for r in rows]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Slots of shared memory between the memory warpgroup and the compute warpgroups.

    `done`, of its methods, counts the slots filled before a tile's; `i` those before one.
    """

    config: TuningConfig
    form: Form
    words_smem: Any
    scales_smem: Any
    x_smem: Any
    full: Any
    consumed: Any
    tables_smem: Any = None
    scales_full: Any = None

    @classmethod
    def of(cls, config: TuningConfig, form: Form, scratch: dict[str, Any]) -> Pipeline:
        return cls(config, form, **{name: scratch[name] for name in _PIPELINE if name in scratch})

    @property
    def lag(self) -> int:
        """Slots between a copy and the making of its tables: so many are in flight.

        With stages - 1, what frees a slot would wait for that slot; with fewer, tables are ready some time before
        they are needed. Of large tiles, whose K steps take longer than copies, one fewer is in flight: tables would
        else be made when compute warpgroups wait for them already.
        """
        stages = self.config.stages
        lag = min(stages - 2, stages - min(4, (stages + 1) // 2))
        return max(1, lag - 1) if self.config.tile_tokens > _EARLY_TABLES else lag

    def _following(self, slot: Any) -> Any:
        stages = self.config.stages
        if stages & (stages - 1) == 0:
            return (slot + 1) & (stages - 1)
        return jnp.where(slot == stages - 1, 0, slot + 1)

    # The compute warpgroups' side

    def products(self, my_blocks: list[Any], low: Any, high: Any, done: Any, tokens: int | None = None) -> list[Array]:
        """A tile's sums over steps `low` to `high` (`steps_at_once` K steps each), fp32, one for each block.

        Of the tile's first tokens, where it has no more than so many.
        """
        config = self.config
        tokens = tokens or config.tile_tokens
        accumulators = [plgpu.ACC((TILE_ROWS, tokens))] * config.row_blocks
        if self.form in SUMS_BY_GROUP:
            zero = jnp.zeros((TILE_ROWS, tokens), jnp.float32)
            zeros = [plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in my_blocks]

            def step(_: Any, carry: Any) -> Any:
                slot, sums = carry
                return self._following(slot), self._multiply_exactly(my_blocks, accumulators, sums, slot)

            return lax.fori_loop(low, high, step, (lax.rem(done, config.stages), zeros))[1]

        def accumulate(*accumulators: Any) -> list[Array]:
            def step(_: Any, before: Any) -> Any:
                return self._multiply(my_blocks, accumulators, self._following(before), before)

            slot = self._multiply(my_blocks, accumulators, lax.rem(done, config.stages), None)
            slot = lax.fori_loop(low + 1, high, step, slot)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.consumed.at[slot])
            return [accumulator[...] for accumulator in accumulators]

        return pl.run_scoped(accumulate, *accumulators)

    def _multiply(self, my_blocks: list[Any], accumulators: Any, slot: Any, before: Any) -> Any:
        """The K steps that go together; the slot of the last."""
        for ahead in range(self.config.steps_at_once):
            step = ahead % self.config.slot_steps
            if ahead and step == 0:
                before, slot = slot, self._following(slot)
            if step == 0:
                plgpu.barrier_wait(self.full.at[slot])
            for i, (block, accumulator) in enumerate(zip(my_blocks, accumulators, strict=True)):
                words = plgpu.load(self.words_smem.at[slot, block, step], layout=WORDS)
                tables = load_tables(self._tables(slot, block, step), self.form)
                tokens = self._tokens(slot, accumulator, step)
                plgpu.wgmma(accumulator, dequantize_tile(words, tables, self.form), tokens)
                plgpu.wgmma_wait(1)
                if i == step == 0 and before is not None:
                    plgpu.barrier_arrive(self.consumed.at[before])
        return slot

    def _tables(self, slot: Any, block: Any, step: int) -> Any:
        """A block's lookup tables of a step of a slot, or its scales if there are no tables."""
        return (self.tables_smem if table_words(self.form) else self.scales_smem).at[slot, block, step]

    def _tokens(self, slot: Any, accumulator: Any, step: int = 0) -> Any:
        """The tokens of a step of a slot that an accumulator is for, transposed."""
        config, count = self.config, accumulator.shape[1]
        tokens = self.x_smem.at[slot]
        if count != config.tile_tokens:
            tokens = tokens.at[pl.ds(0, count)]
        if config.slot_steps > 1:
            tokens = tokens.at[:, pl.ds(step * TILE_COLUMNS, TILE_COLUMNS)]
        return tokens.T

    def _multiply_exactly(self, my_blocks: list[Any], accumulators: list[Any], sums: Any, slot: Any) -> list[Array]:
        """Adds a step's products times the scales of its groups, which codes do not hold.

        All but the first block are dequantized, and all but the last added, while a wgmma runs. ptxas would serialize
        one that runs on into the next step, since its sums are read within the loop.
        """
        plgpu.barrier_wait(self.full.at[slot])

        layout = plgpu.Layout.WGMMA.reduce(1)
        scales = [plgpu.load(self.scales_smem.at[slot, block, 0], layout=layout) for block in my_blocks]

        def products(*parts: Any) -> list[Array]:
            for block, part in zip(my_blocks, parts, strict=True):
                words = plgpu.load(self.words_smem.at[slot, block, 0], layout=WORDS)
                plgpu.wgmma(part, dequantize_tile(words, [], self.form), self._tokens(slot, part))
            results = []
            for i, (total, part, scale) in enumerate(zip(sums, parts, scales, strict=True)):
                value = plgpu.wgmma_accumulator_load(part, wait_n=len(parts) - 1 - i)
                results.append(total + value * lax.broadcast_in_dim(scale, value.shape, (0,)))
            plgpu.barrier_arrive(self.consumed.at[slot])
            return results

        return pl.run_scoped(products, *accumulators)

    # The memory warpgroup's side

    def fill(self, i: Any, part: Any, words: Any, scales: Any, x: Any) -> None:
        """Starts the copies of a slot, the part of these rows so many slots along K; makes tables of an earlier one.

        x may have fewer tokens than a tile.
        """
        config = self.config
        slot = lax.rem(i, config.stages)
        steps = pl.ds(part * config.slot_steps, config.slot_steps)
        columns = pl.ds(part * config.slot_steps * TILE_COLUMNS, config.slot_steps * TILE_COLUMNS)
        words, scales, x = words.at[:, steps], scales.at[:, steps], x.at[:, columns]
        uses_tables = table_words(self.form) > 0
        pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(self.consumed.at[slot]))
        plgpu.copy_gmem_to_smem(words, self.words_smem.at[slot], self.full.at[slot])
        arrived = self.scales_full if uses_tables else self.full
        plgpu.copy_gmem_to_smem(scales, self.scales_smem.at[slot], arrived.at[slot])
        together = "rank" if config.cluster > 1 else None
        tokens = (
            self.x_smem.at[slot] if x.shape[0] == config.tile_tokens else self.x_smem.at[slot, pl.ds(0, x.shape[0])]
        )
        plgpu.copy_gmem_to_smem(x, tokens, self.full.at[slot], collective_axes=together)
        if uses_tables:
            pl.when(i >= self.lag)(lambda: self._make_tables(i - self.lag))

    def finish(self, slots: Any) -> None:
        """After the last of so many slots."""
        stages = self.config.stages
        if table_words(self.form):
            pl.loop(jnp.maximum(slots - self.lag, 0), slots)(self._make_tables)
        if self.config.cluster > 1:
            # The other block of the cluster still signals this one's barriers.
            pl.loop(jnp.maximum(slots - stages, 0), slots)(
                lambda i: plgpu.barrier_wait(self.consumed.at[lax.rem(i, stages)])
            )

    def _make_tables(self, i: Any) -> None:
        slot = lax.rem(i, self.config.stages)
        plgpu.barrier_wait(self.scales_full.at[slot])
        layout = scale_layout(self.config.row_blocks * self.config.warpgroups, self.config.slot_steps)
        self.tables_smem[slot] = build_tables(plgpu.load(self.scales_smem.at[slot], layout=layout), self.form)
        plgpu.barrier_arrive(self.full.at[slot])


@dataclasses.dataclass(frozen=True)
class Staging:
    """A warpgroup's part of a tile on its way to the output, through shared memory."""

    config: TuningConfig
    out_smem: Any
    warpgroup: Any
    token_scale_smem: Any = None
    token_scale_full: Any = None

    @classmethod
    def of(cls, config: TuningConfig, scratch: dict[str, Any], warpgroup: Any) -> Staging:
        return cls(config, scratch["out_smem"], warpgroup, *(scratch.get(f"token_scale_{x}") for x in ("smem", "full")))

    def fetch_token_scales(self, token_scale_gmem: Any, first_token: Any) -> None:
        """Starts the copy of a tile's token scales, if there are such."""
        if self.token_scale_smem is not None:
            plgpu.copy_gmem_to_smem(
                token_scale_gmem.at[pl.ds(first_token, self.config.tile_tokens)],
                self.token_scale_smem.at[self.warpgroup, pl.ds(0, self.config.tile_tokens)],
                self.token_scale_full.at[self.warpgroup],
            )

    def await_token_scales(self) -> None:
        if self.token_scale_smem is not None:
            plgpu.barrier_wait(self.token_scale_full.at[self.warpgroup])

    def store(
        self,
        my_blocks: list[Any],
        scales: list[Array],
        results: Any,
        copy: Callable[[Any, int, int], None],
    ) -> None:
        """Scales a tile, and stages it, in pieces.

        `copy(block, first, count)` starts the copy of a piece's block, of so many tokens from the first on.
        """
        tokens, staged_tokens = results[0].shape[1], self.config.staged_tokens
        part = next(p for p in (32, 24, 16, 8) if tokens % p == staged_tokens % p == 0)
        # Where blocks are in shared memory, which would otherwise be held in registers during the main loop.
        places = [computed_here(block) for block in my_blocks]
        scale_m = self._token_scales(0, part)
        for first in range(0, tokens, staged_tokens):
            count = min(staged_tokens, tokens - first)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # In parts, so that few token scales are in registers at a time; those of the next are on their way.
            for start in range(first, first + count, part):
                following = self._token_scales(start + part, part) if start + part < tokens else None
                for place, scale_n, result in zip(places, scales, results, strict=True):
                    values = _scaled(result[:, start : start + part], scale_n, scale_m).astype(jnp.bfloat16)
                    self.out_smem.at[place, pl.ds(start - first, part)].T[...] = values  # by stmatrix
                scale_m = following
            plgpu.commit_smem()
            for block in my_blocks:
                copy(block, first, count)

    def _token_scales(self, start: int, count: int) -> Any:
        if self.token_scale_smem is None:
            return None
        scales = self.token_scale_smem.at[self.warpgroup, pl.ds(start, count)]
        return plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def computed_here(value: Any) -> Any:
    """An int32 scalar that the compiler does not see through, so that what depends on it stays where it is."""
    layout = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=layout))
    def copied(_: Any, value: Any) -> Any:
        (register,) = value.registers.flat
        text = "mov.b32 $0, $1;"
        register = llvm.inline_asm(register.type, [register], text, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(register, (), is_signed=True)

    return copied(jnp.asarray(value, jnp.int32))


def cluster_rank() -> Any:
    """Which block of its cluster this is; `lax.axis_index` divides in floating point for it."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def read(_: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        rank = llvm.inline_asm(i32, [], "mov.u32 $0, %cluster_ctarank;", "=r")
        return mgpu.FragmentedArray.splat(rank, (), is_signed=True)

    return read()


def _scaled(result: Any, scale_n: Any, scale_m: Any) -> Any:
    if scale_m is not None:
        result = lax.broadcast_in_dim(scale_m, result.shape, (1,)) * result
    return lax.broadcast_in_dim(scale_n, result.shape, (0,)) * result

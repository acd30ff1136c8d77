"""Stores of rows of the output that share their eight, the copy engine's unit, with rows of another group."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# No branch, within which threads of a warp would differ.
_STORE_IF = """{ .reg .pred mine;
        setp.ne.s32 mine, $2, 0;
        @mine st.global.b32 [$0], $1; }"""


def store_rows(values: jax.Array, out: Any, token: Any, column: Any, low: Any, high: Any) -> None:
    """Stores those of eight tokens that are at `low` to `high`.

    Args:
        values: bf16 [64, 8], in layout `WGMMA_TRANSPOSED`: the tokens transposed.
        out: bf16 [M, N], in global memory.
        token: int32, the first.
        column: int32, the first.
        low: int32.
        high: int32.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_TRANSPOSED, plgpu.RefType(), [plgpu.Layout.WG_SPLAT] * 4))
    def stored(_: Any, values: Any, out: Any, scalars: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        token, column, low, high = (s.registers.item() for s in scalars)
        address, width = mgpu.utils.memref_ptr(out), mgpu.utils.c(ir.MemRefType(out.type).shape[1], i64)
        layout, shape = values.layout, values.shape
        # Each register holds two neighbouring columns of a token.
        for (row, at), register in zip(layout.thread_idxs(shape), values.registers.flat, strict=True):
            mine, place = (
                arith.addi(first, arith.index_cast(i32, index)) for first, index in ((token, at), (column, row))
            )
            less, at_least = arith.CmpIPredicate.slt, arith.CmpIPredicate.sge
            own = arith.andi(arith.cmpi(at_least, mine, low), arith.cmpi(less, mine, high))
            offset = arith.addi(arith.muli(arith.extsi(i64, mine), width), arith.extsi(i64, place))
            pair = mgpu.utils.bitcast(register, i32)
            pointer = mgpu.utils.getelementptr(address, [offset], ir.BF16Type.get())
            operands = [pointer, pair, arith.extui(i32, own)]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, _STORE_IF, "l,r,r", has_side_effects=True)

    stored(values, out, [jnp.asarray(s, jnp.int32) for s in (token, column, low, high)])

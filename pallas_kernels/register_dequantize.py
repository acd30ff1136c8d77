"""INT4 to e4m3 in the registers of a warpgroup, ready to be the A operand of wgmma.

Seven instructions turn a word of eight codes -7..7 into eight bytes, nine do it for codes -8..7; vLLM's kernel spends
about twice that. The words and tables are those of `fragments`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from .fragments import Form

F8 = jnp.float8_e4m3fn
FRAGMENT = plgpu.Layout.WGMMA_8BIT
WORDS = plgpu.Layout.WG_STRIDED((4, 256), vec_size=4)  # a thread's 8 words, in two 16-byte loads
TABLES = plgpu.Layout.TILED(  # a thread's two rows' tables, in one 16-byte load
    plgpu.Tiling(((32, 4), (8, 4))), warp_dims=(-4,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
)

# Operands: $0, $1 the bytes of codes 0..3 and 4..7; $2 the word; then row r's registers, then row r + 8's.
# lop3's 0x78 is a ^ (b & c).
_WORD = {
    "sign_magnitude": """{ .reg .b32 index, index_high, a, b, signs;
        and.b32 index, $2, 0x77777777;
        shr.u32 index_high, index, 16;
        prmt.b32 a, $3, $4, index;
        prmt.b32 b, $5, $6, index_high;
        shl.b32 signs, $2, 4;
        lop3.b32 $0, a, $2, 0x80808080, 0x78;
        lop3.b32 $1, b, signs, 0x80808080, 0x78; }""",
    # value = T[n & 7] ^ (n < 8 ? S[n & 7] : 0). S has no sign bit, so PRMT's sign-replicating mode, which bit 3 of the
    # selector chooses, gives the zero.
    "two_tables": """{ .reg .b32 masked, high, masked_high, a, b, c, d;
        and.b32 masked, $2, 0x77777777;
        shr.u32 high, $2, 16;
        shr.u32 masked_high, masked, 16;
        prmt.b32 a, $3, $4, $2;
        prmt.b32 b, $5, $6, masked;
        xor.b32 $0, a, b;
        prmt.b32 c, $7, $8, high;
        prmt.b32 d, $9, $10, masked_high;
        xor.b32 $1, c, d; }""",
}
# Once a group and row, what the word form needs from the stored table L = (8, 1, 2, 3) s, H = (4, 5, 6, 7) s:
# S = ((L & 0xFFFFFF00) ^ H, L ^ H), T = (H, -H). lop3's 0x6a is (a & b) ^ c.
_ROW = {
    "two_tables": """{ mov.b32 $2, $5;
        xor.b32 $3, $5, 0x80808080;
        xor.b32 $1, $4, $5;
        lop3.b32 $0, $4, 0xffffff00, $5, 0x6a; }""",
}


def dequantize_tile(words: jax.Array, tables: jax.Array, form: Form) -> jax.Array:
    """uint32 [4, 256] in layout `WORDS` and uint32 [32, 4] in `TABLES` -> e4m3 [64, 128] in `FRAGMENT`."""

    @plgpu.inline_mgpu(arg_types=(WORDS, TABLES), return_type=plgpu.ShapeDtypeStruct((64, 128), F8, layout=FRAGMENT))
    def body(_: Any, words: Any, tables: Any) -> Any:
        i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        (table,) = tables.registers.flat
        table = [vector.extract(table, [], [i]) for i in range(4)]
        rows = [table[:2], table[2:]]
        if form in _ROW:
            rows = [_asm(row, 4, _ROW[form]) for row in rows]
        pairs = [
            _asm([vector.extract(four, [], [i]), *rows[0], *rows[1]], 2, _WORD[form])
            for four in words.registers.flat
            for i in range(4)
        ]
        layout = FRAGMENT.to_mgpu()
        shape = layout.registers_shape((64, 128))
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(shape):
            column_tile, half = (i for i, size in zip(index, shape, strict=True) if size > 1)
            value = vector.broadcast(ir.VectorType.get((1,), i32), pairs[column_tile][half])
            value = mgpu.utils.bitcast(value, ir.VectorType.get((4,), i8))
            registers[index] = mgpu.utils.bitcast(value, ir.VectorType.get((4,), ir.Float8E4M3FNType.get()))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return body(words, tables)


def _asm(operands: list[Any], results: int, text: str) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] * results + ["r"] * len(operands))
    value = llvm.inline_asm(llvm.StructType.get_literal([i32] * results), operands, text, constraints)
    return [llvm.extractvalue(i32, value, [i]) for i in range(results)]

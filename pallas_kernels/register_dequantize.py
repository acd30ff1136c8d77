"""INT4 to e4m3 or bf16 in the registers of a warpgroup, ready to be the A operand of wgmma.

Seven instructions turn a word of eight codes -7..7 into eight bytes, nine do it for codes -8..7; vLLM's kernel spends
about twice that. The words are those of `fragments`; the tables, of 8 bytes a row and group, are made from its scales.
To bf16, fifteen do it, which multiply by the scale itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .fragments import Form

F8 = jnp.float8_e4m3fn
FRAGMENT = plgpu.Layout.WGMMA_8BIT
WORDS = plgpu.Layout.WG_STRIDED((4, 256), vec_size=4)  # a thread's 8 words, in two 16-byte loads
TABLES = plgpu.Layout.TILED(  # a thread's two rows' tables, in one 16-byte load
    plgpu.Tiling(((32, 4), (8, 4))), warp_dims=(-4,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
)

ROW_SCALES = plgpu.Layout.TILED(  # a thread's two rows' bf16 scales, in one 4-byte load
    plgpu.Tiling(((32, 2), (8, 2))), warp_dims=(-4,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
)

# Operands: $0, $1 the bytes of codes 0..3 and 4..7; $2 the word; then row r's registers, then row r + 8's.
# For "bf16", $0..$3 are pairs of values, of rows r and r + 8 in turn; $4 the word.
# lop3's 0x78 is a ^ (b & c), its 0xea (a & b) | c.
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
    "subnormal": """{ .reg .b32 rotated;
        and.b32 $0, $2, 0x87878787;
        shf.l.wrap.b32 rotated, $2, $2, 4;
        and.b32 $1, rotated, 0x87878787; }""",
    # Adds one where the sign is set: sign | e becomes sign | e + 1.
    "subnormal_8": """{ .reg .b32 rotated, sign, byte;
        shf.l.wrap.b32 rotated, $2, $2, 4;
        and.b32 sign, $2, 0x80808080;
        and.b32 byte, $2, 0x87878787;
        shr.u32 sign, sign, 7;
        add.u32 $0, sign, byte;
        and.b32 sign, rotated, 0x80808080;
        and.b32 byte, rotated, 0x87878787;
        shr.u32 sign, sign, 7;
        add.u32 $1, sign, byte; }""",
    # As the low bits of bf16's 128, a nibble n makes 128 + n; less 136 it is the code, exactly. So the product is
    # rounded once, and is right for every scale: nothing is subnormal before it.
    "bf16": """{ .reg .b32 magic, offset, a, b, c, d;
        mov.b32 magic, 0x43004300;
        mov.b32 offset, 0xc308c308;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 8;
        shr.u32 d, $4, 12;
        lop3.b32 a, $4, 0x000f000f, magic, 0xea;
        lop3.b32 b, b, 0x000f000f, magic, 0xea;
        lop3.b32 c, c, 0x000f000f, magic, 0xea;
        lop3.b32 d, d, 0x000f000f, magic, 0xea;
        add.rn.bf16x2 a, a, offset;
        add.rn.bf16x2 b, b, offset;
        add.rn.bf16x2 c, c, offset;
        add.rn.bf16x2 d, d, offset;
        mul.rn.bf16x2 $0, a, $5;
        mul.rn.bf16x2 $1, b, $6;
        mul.rn.bf16x2 $2, c, $5;
        mul.rn.bf16x2 $3, d, $6; }""",
}
# From the scales of rows r and r + 8 in one register, each twice.
_SCALE_PAIRS = """{ prmt.b32 $0, $2, $2, 0x1010;
        prmt.b32 $1, $2, $2, 0x3232; }"""
# A row's products from its scale's e4m3 byte s ($2): in fp16, where they are exact, then rounded once to e4m3. The
# constants are codes in fp16, two a register.
_PRODUCTS = """{{ .reg .b32 s, a, b, c, d; .reg .b16 low, high, a8, b8, c8, d8;
        mov.b32 {{low, high}}, $2;
        cvt.rn.f16x2.e4m3x2 s, low;
        prmt.b32 s, s, s, 0x1010;
        mov.b32 a, {0};
        mul.rn.f16x2 a, s, a;
        mov.b32 b, {1};
        mul.rn.f16x2 b, s, b;
        mov.b32 c, {2};
        mul.rn.f16x2 c, s, c;
        mov.b32 d, {3};
        mul.rn.f16x2 d, s, d;
        cvt.rn.satfinite.e4m3x2.f16x2 a8, a;
        cvt.rn.satfinite.e4m3x2.f16x2 b8, b;
        cvt.rn.satfinite.e4m3x2.f16x2 c8, c;
        cvt.rn.satfinite.e4m3x2.f16x2 d8, d;
        mov.b32 $0, {{a8, b8}};
        mov.b32 $1, {{c8, d8}}; }}"""
_PRODUCT_CODES = {"sign_magnitude": (0, 1, 2, 3, 4, 5, 6, 7), "two_tables": (8, 1, 2, 3, 4, 5, 6, 7)}
# S and T from the products L = (8, 1, 2, 3) s and H = (4, 5, 6, 7) s: S = ((L & 0xFFFFFF00) ^ H, L ^ H), T = (H, -H).
# lop3's 0x6a is (a & b) ^ c.
_S_AND_T = """{ mov.b32 $2, $5;
        xor.b32 $3, $5, 0x80808080;
        xor.b32 $1, $4, $5;
        lop3.b32 $0, $4, 0xffffff00, $5, 0x6a; }"""


def table_words(form: str) -> int:
    """32-bit words of a row's table; 0 if codes need none."""
    return {"sign_magnitude": 2, "two_tables": 4}.get(form, 0)


def build_tables(scales: jax.Array, form: Form) -> jax.Array:
    """The lookup tables of a step: e4m3 bytes of products of the scale with the codes.

    Args:
        scales: uint8 [B, S, 64], of S K steps, in layout `scale_layout(B, S)`, in the order of `FragmentWeight.scales`;
            B even.
        form: of the words.

    Returns:
        uint32 [B, S, 64, table_words(form)].
    """
    shape = (*scales.shape, table_words(form))
    result = plgpu.Layout.WG_STRIDED(shape, vec_size=shape[-1])
    pairs = np.array(_PRODUCT_CODES[form], np.float16).view(np.uint32)
    text = _PRODUCTS.format(*(f"0x{pair:08x}" for pair in pairs))

    @plgpu.inline_mgpu(
        arg_types=(scale_layout(*shape[:2]),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=result)
    )
    def body(_: Any, scales: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty(result.to_mgpu().registers_shape(shape), dtype=object)
        for i, scale in enumerate(scales.registers.flat):
            words = _asm([arith.extui(i32, vector.extract(scale, [], [0]))], 2, text)
            if form == "two_tables":
                words = _asm(words, 4, _S_AND_T)
            registers.flat[i] = vector.from_elements(ir.VectorType.get((len(words),), i32), words)
        return mgpu.FragmentedArray(_registers=registers, _layout=result.to_mgpu(), _is_signed=False)

    return body(scales)


def scale_layout(blocks: int, steps: int) -> Any:
    """The layout in which threads read the scales of a slot: one byte at a time."""
    return plgpu.Layout.WG_STRIDED((blocks, steps, 64), vec_size=1)


def load_tables(tables: Any, form: Form) -> list[jax.Array]:
    """Each thread's tables of rows r and r + 8 from shared memory uint32 [64, table_words(form)], in 16-byte loads.

    For "bf16", their scales, from bf16 [64].
    """
    if form == "bf16":
        return [plgpu.load(tables.reshape(32, 2), layout=ROW_SCALES, optimized=False)]
    four = tables.reshape(32, 2 * table_words(form))
    return [
        plgpu.load(four.at[:, pl.ds(4 * i, 4)], layout=TABLES, optimized=False) for i in range(table_words(form) // 2)
    ]


def dequantize_tile(words: jax.Array, tables: list[jax.Array], form: Form) -> jax.Array:
    """uint32 [4, 256] in layout `WORDS` and what `load_tables` gave -> e4m3 [64, 128], bf16 for "bf16", for wgmma."""
    bf16 = form == "bf16"
    fragment, of_tables = (plgpu.Layout.WGMMA, ROW_SCALES) if bf16 else (FRAGMENT, TABLES)

    @plgpu.inline_mgpu(
        arg_types=(WORDS, [of_tables] * len(tables)),
        return_type=plgpu.ShapeDtypeStruct((64, 128), jnp.bfloat16 if bf16 else F8, layout=fragment),
    )
    def body(_: Any, words: Any, tables: Any) -> Any:
        i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        if bf16:
            scales = mgpu.utils.bitcast(tables[0].registers.flat[0], ir.VectorType.get((1,), i32))
            table = _asm([vector.extract(scales, [], [0])], 2, _SCALE_PAIRS)
        else:
            table = [vector.extract(t.registers.flat[0], [], [i]) for t in tables for i in range(4)]
        results = [
            value
            for four in words.registers.flat
            for i in range(4)
            for value in _asm([vector.extract(four, [], [i]), *table], 4 if bf16 else 2, _WORD[form])
        ]
        layout = fragment.to_mgpu()
        shape = layout.registers_shape((64, 128))
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(shape):
            column_tile, half = (i for i, size in zip(index, shape, strict=True) if size > 1)
            value = vector.broadcast(ir.VectorType.get((1,), i32), results[2 * column_tile + half])
            if bf16:
                registers[index] = mgpu.utils.bitcast(value, ir.VectorType.get((2,), ir.BF16Type.get()))
            else:
                value = mgpu.utils.bitcast(value, ir.VectorType.get((4,), i8))
                registers[index] = mgpu.utils.bitcast(value, ir.VectorType.get((4,), ir.Float8E4M3FNType.get()))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return body(words, tables)


def _asm(operands: list[Any], results: int, text: str) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] * results + ["r"] * len(operands))
    value = llvm.inline_asm(llvm.StructType.get_literal([i32] * results), operands, text, constraints)
    return [llvm.extractvalue(i32, value, [i]) for i in range(results)]

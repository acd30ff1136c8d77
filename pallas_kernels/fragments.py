"""The kernels' layout of a weight: codes in the order of the tensor core's registers, with lookup tables.

A tile of 64 x 128 weights is 1024 words of 8 codes. Thread t = 32 w + l of a warpgroup holds, for column tile c in 0..7
and half h in 0..1, the weights of row 16 w + l // 4 + 8 h and columns 16 c + 4 (l % 4) + 0..3: the A operand of
`wgmma m64nNk32` for 8-bit types. Word c of the thread holds the 4 codes of h = 0 and the 4 of h = 1. Words are stored
so that a thread reads its eight with two 16-byte loads.

How a word holds its codes (its form) is chosen so that few instructions turn it into e4m3 bytes:

- "sign_magnitude", codes -7..7: nibble i has |code i| in its low 3 bits; the signs of codes 0..3 are at bits 7, 15, 23
  and 31, where the first result needs them, and those of codes 4..7 at bits 3, 11, 19 and 27.
- "two_tables", codes -8..7: nibble i is `8 * (4 <= |q| <= 7) + 4 * (q < 0) + (|q| & 3)`.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from .dequantize import lut_levels
from .errors import W4A8Error
from .weight_format import W4Weight

TILE_ROWS, TILE_COLUMNS = 64, 128

Form = Literal["sign_magnitude", "two_tables"]

# Codes whose products with the group scale, without sign, make up a row's table of 8 bytes, looked up by PRMT.
TABLE_CODES = {"sign_magnitude": (0, 1, 2, 3, 4, 5, 6, 7), "two_tables": (-8, 1, 2, 3, 4, 5, 6, 7)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FragmentWeight:
    """A weight [N, K] for the dense kernel.

    Attributes:
        words: uint32 [N/64, K/128, 4, 256], codes in fragment order.
        tables: uint32 [K/128, N/64, 32, 4]; for each group and pair of rows (r, r + 8) of a tile, pair 8 w + r % 8 of
            warp w: the 8 bytes of row r and the 8 of row r + 8, magnitudes of the e4m3 products of the group scale
            with `TABLE_CODES`.
        channel_scale: fp32 [N].
        form: how words hold codes; static.
    """

    words: Any
    tables: Any
    channel_scale: Any
    form: Form = dataclasses.field(default="sign_magnitude", metadata={"static": True})

    @classmethod
    def from_weight(cls, w: W4Weight) -> Self:
        """Repacks a weight in "lut" numerics.

        Raises:
            W4A8Error: its numerics, group size or shape are not the kernel's.
        """
        if w.numerics != "lut" or len(w.shape) != 2 or w.group_size != TILE_COLUMNS:
            raise W4A8Error(f"kernel: expected lut numerics, [N, K], groups of 128; found {w.numerics}, {w.shape}")
        if w.shape[0] % TILE_ROWS or w.shape[1] % TILE_COLUMNS:
            raise W4A8Error(f"kernel: N must be a multiple of 64 and K of 128, found {list(w.shape)}")
        form: Form = "sign_magnitude" if w.code_min == -7 else "two_tables"
        return cls(fragment_words(w.codes, form), fragment_tables(w.group_scale, form), w.channel_scale, form)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return self.words.shape[0] * TILE_ROWS, self.words.shape[1] * TILE_COLUMNS


def fragment_words(codes: Int[Array, "N K"], form: Form) -> UInt[Array, "N/64 K/128 4 256"]:
    """Codes in fragment order, packed in `form`."""
    n, k = codes.shape
    # row = 16 warp + 8 half + lane row; column = 128 group + 64 vector + 16 word + 4 lane column + code
    tiles = codes.astype(jnp.int32).reshape(n // 64, 4, 2, 8, k // 128, 2, 4, 4, 4)
    # -> tile, group, vector, warp, lane row, lane column, word, (half, code)
    tiles = tiles.transpose(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(n // 64, k // 128, 4, 256, 8)
    magnitude, negative, i = jnp.abs(tiles), tiles < 0, jnp.arange(8)
    if form == "sign_magnitude":
        sign_bit = jnp.where(i < 4, 8 * i + 7, 8 * (i - 4) + 3)
        bits = magnitude.astype(jnp.uint32) << (4 * i) | negative.astype(jnp.uint32) << sign_bit
    else:
        large = (magnitude >= 4) & (magnitude <= 7)
        bits = (8 * large + 4 * negative + (magnitude & 3)).astype(jnp.uint32) << (4 * i)
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32)


def fragment_tables(group_scale: Float[Array, "N G"], form: Form) -> UInt[Array, "G N/64 32 4"]:
    """The lookup tables of all rows and groups, two words a row."""
    n, groups = group_scale.shape
    levels = lut_levels(group_scale)[..., jnp.asarray(TABLE_CODES[form]) + 8]
    levels = jnp.abs(levels.astype(jnp.float32)).astype(levels.dtype)
    words = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(levels, jnp.uint8).reshape(n, groups, 2, 4), jnp.uint32
    )
    # row = 64 tile + 16 warp + 8 half + lane row -> group, tile, (warp, lane row), (half, word)
    words = words.reshape(n // 64, 4, 2, 8, groups, 2).transpose(4, 0, 1, 3, 2, 5)
    return words.reshape(groups, n // 64, 32, 4)

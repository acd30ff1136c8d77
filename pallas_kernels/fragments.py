"""The kernels' layout of a weight: codes in the order of the tensor core's registers.

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

from .errors import W4A8Error
from .weight_format import W4Weight

TILE_ROWS, TILE_COLUMNS = 64, 128

Form = Literal["sign_magnitude", "two_tables"]

FLAGS = 1024  # more than blocks times warpgroups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FragmentWeight:
    """A weight [N, K] for the dense kernel.

    Attributes:
        words: uint32 [N/64, K/128, 4, 256], codes in fragment order.
        scales: uint8 [N/64, K/128, 64], the group scales' e4m3 bytes, not negative; row 16 w + 8 h + r of a tile (r in
            0..7) is at 16 w + 2 r + h.
        channel_scale: fp32 [N].
        flags: int32 [FLAGS], zeros: where blocks of the kernel that share a tile signal each other. The kernel leaves
            zeros, so that it needs no clearing before each run.
        form: how words hold codes; static.
    """

    words: Any
    scales: Any
    channel_scale: Any
    flags: Any
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
        flags = jnp.zeros(FLAGS, jnp.int32)
        return cls(fragment_words(w.codes, form), fragment_scales(w.group_scale), w.channel_scale, flags, form)

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


def fragment_scales(group_scale: Float[Array, "N G"]) -> UInt[Array, "N/64 G 64"]:
    """The bytes of `float8_e4m3fn` group scales, in the order of `FragmentWeight.scales`."""
    n, groups = group_scale.shape
    # row = 64 tile + 16 warp + 8 half + r -> tile, group, (warp, r, half)
    scale = jax.lax.bitcast_convert_type(group_scale, jnp.uint8).reshape(n // 64, 4, 2, 8, groups)
    return scale.transpose(0, 4, 1, 3, 2).reshape(n // 64, groups, 64)

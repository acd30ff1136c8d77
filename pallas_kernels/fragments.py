"""The kernels' layout of a weight: codes in the order of the tensor core's registers.

A tile of 64 x 128 weights is 1024 words of 8 codes. Thread t = 32 w + l of a warpgroup holds, for column tile c in 0..7
and half h in 0..1, the weights of row 16 w + l // 4 + 8 h and columns 16 c + 4 (l % 4) + 0..3: the A operand of
`wgmma m64nNk32` for 8-bit types. Word c of the thread holds the 4 codes of h = 0 and the 4 of h = 1. Words are stored
so that a thread reads its eight with two 16-byte loads.

How a word holds its codes (its form) is chosen so that few instructions turn it into e4m3 bytes:

- "sign_magnitude", codes -7..7: nibble i has |code i| in its low 3 bits; the signs of codes 0..3 are at bits 7, 15, 23
  and 31, where the first result needs them, and those of codes 4..7 at bits 3, 11, 19 and 27.
- "two_tables", codes -8..7: nibble i is `8 * (4 <= |q| <= 7) + 4 * (q < 0) + (|q| & 3)`. Alone of all forms it takes
  no negative scale: a table's sign bit would be taken for a code's.

Those are for "lut" numerics. For "exact", the byte `sign | i` is i * 2^-9 in e4m3, up to i = 8, so codes need no table:

- "subnormal", codes -7..7: codes 0..3 have |code| at bits 0, 8, 16 and 24 and their signs at bits 7, 15, 23 and 31;
  codes 4..7 the same after the word is rotated left by 4.
- "subnormal_8", codes -8..7: the same, with |code| - 1 where the code is negative.

For W4A16, weights become bf16, the A operand of `wgmma m64nNk16`: word c holds those of rows r = 16 w + l // 4 and
r + 8, columns 16 c + 2 (l % 4) + 0..1 and these + 8. Of a pair, the first code is in the word's low half:

- "bf16", codes -8..7: nibble 4 e + 2 p + h is code + 8 of row r + 8 h, column 16 c + 8 p + 2 (l % 4) + e.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from .errors import W4A8Error
from .partition import Partition
from .weight_format import W4Weight, unpack_codes

TILE_ROWS, TILE_COLUMNS = 64, 128

Scheme = Literal["w4a8", "w4a16"]
Form = Literal["sign_magnitude", "two_tables", "subnormal", "subnormal_8", "bf16"]
_FORMS: dict[tuple[str, int], Form] = {
    ("lut", -7): "sign_magnitude",
    ("lut", -8): "two_tables",
    ("exact", -7): "subnormal",
    ("exact", -8): "subnormal_8",
}

_REPACKED_TILES = 64  # at a time
_NAN, _MINUS_ZERO = 0x7F, 0x80  # in e4m3, where negative numbers and the other NaN have greater bits
FLAGS = 1024  # more than blocks times warpgroups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FragmentWeight:
    """A weight [N, K] for the dense kernel, or one for each expert, [E, N, K], for the grouped one.

    Attributes:
        words: uint32 [..., N/64, K/128, 4, 256], codes in fragment order.
        scales: [..., N/64, K/128, 64]. For "lut" numerics uint8, the group scales' e4m3 bytes, not negative, row
            16 w + 8 h + r of a tile (r in 0..7) at 16 w + 2 r + h; for "exact" fp32, scales times 2^9, row by row;
            for W4A16 bf16, in the order of "lut".
        channel_scale: fp32 [..., N].
        flags: int32 [FLAGS], zeros: where blocks of the kernel that share a tile signal each other. The kernel leaves
            zeros, so that it needs no clearing before each run.
        form: how words hold codes; static.
        partition: how the weight is divided among devices, its arrays with it; None on one device; static.
    """

    words: Any
    scales: Any
    channel_scale: Any
    flags: Any
    form: Form = dataclasses.field(default="sign_magnitude", metadata={"static": True})
    partition: Partition | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def from_weight(cls, w: W4Weight, scheme: Scheme = "w4a8") -> Self:
        """Repacks a weight.

        Args:
            w: [N, K] or [E, N, K], in groups of 128; for "w4a16" in "exact" numerics, its scales bf16.
            scheme: the product that it is for: FP8 activations ("w4a8") or bf16 ones ("w4a16").

        Raises:
            W4A8Error: its group size, shape, numerics or scales are not the kernel's. What scales hold (`takes_scales`)
                cannot be seen, and is not checked, under `jax.jit`.
        """
        *experts, n, k = w.shape
        if len(experts) > 1 or w.group_size != TILE_COLUMNS:
            expected = "[N, K] or [E, N, K], groups of 128"
            raise W4A8Error(f"kernel: expected {expected}; found {list(w.shape)}, groups of {w.group_size}")
        if n % TILE_ROWS or k % TILE_COLUMNS:
            raise W4A8Error(f"kernel: N must be a multiple of 64 and K of 128, found {list(w.shape)}")
        # Rows of experts follow each other, as if they were one weight's.
        packed, group_scale = (v.reshape(-1, v.shape[-1]) for v in (w.packed, w.group_scale))
        if scheme == "w4a16":
            if w.numerics != "exact" or w.group_scale.dtype != jnp.bfloat16:
                found = f"{w.numerics} numerics, {w.group_scale.dtype} scales"
                raise W4A8Error(f"kernel: w4a16 takes exact numerics with bf16 scales, found {found}")
            form: Form = "bf16"
            scales = fragment_scales(group_scale)
        elif w.numerics == "lut":
            form = _FORMS[w.numerics, w.code_min]
            if not takes_scales(w):
                raise W4A8Error('kernel: with code -8, "lut" numerics take no group scale that is negative or NaN')
            scales = jax.lax.bitcast_convert_type(fragment_scales(group_scale), jnp.uint8)
            scales = jnp.where(scales == _MINUS_ZERO, 0, scales)
        else:
            form = _FORMS[w.numerics, w.code_min]
            scales = 2.0**9 * group_scale.astype(jnp.float32)
            scales = scales.reshape(-1, TILE_ROWS, k // TILE_COLUMNS).transpose(0, 2, 1)
        words, scales = (v.reshape(*experts, n // TILE_ROWS, *v.shape[1:]) for v in (_repack(packed, form), scales))
        return cls(words, scales, w.channel_scale, jnp.zeros(FLAGS, jnp.int32), form)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] or [E, N, K]."""
        *experts, n_tiles, k_tiles, _, _ = self.words.shape
        return *experts, n_tiles * TILE_ROWS, k_tiles * TILE_COLUMNS

    @property
    def scheme(self) -> Scheme:
        """The product that it is for."""
        return "w4a16" if self.form == "bf16" else "w4a8"


def takes_scales(w: W4Weight) -> bool:
    """Whether the kernel takes what the group scales hold: all but negative ones and NaN in form "two_tables".

    True where that cannot be seen, because the weight is traced.
    """
    if (w.numerics, w.code_min) != ("lut", -8) or isinstance(w.group_scale, jax.core.Tracer):
        return True
    with jax.ensure_compile_time_eval():
        bits = jax.lax.bitcast_convert_type(jnp.asarray(w.group_scale), jnp.uint8)
        return not jnp.any((bits >= _NAN) & (bits != _MINUS_ZERO))


def _repack(packed: Int[Array, "N K/8"], form: Form) -> UInt[Array, "N/64 K/128 4 256"]:
    """`fragment_words` of packed codes, a few rows at a time: codes of the whole weight would be twice its size."""
    tiles = packed.shape[0] // TILE_ROWS
    some = next(t for t in range(min(tiles, _REPACKED_TILES), 0, -1) if tiles % t == 0)
    parts = jax.lax.map(
        lambda part: fragment_words(unpack_codes(part), form), packed.reshape(-1, some * TILE_ROWS, packed.shape[1])
    )
    return parts.reshape(tiles, *parts.shape[2:])


def fragment_words(codes: Int[Array, "N K"], form: Form) -> UInt[Array, "N/64 K/128 4 256"]:
    """Codes in fragment order, packed in `form`."""
    if form == "bf16":
        return _bf16_words(codes)
    n, k = codes.shape
    # row = 16 warp + 8 half + lane row; column = 128 group + 64 vector + 16 word + 4 lane column + code
    tiles = codes.astype(jnp.int32).reshape(n // 64, 4, 2, 8, k // 128, 2, 4, 4, 4)
    # -> tile, group, vector, warp, lane row, lane column, word, (half, code)
    tiles = tiles.transpose(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(n // 64, k // 128, 4, 256, 8)
    magnitude, negative, i = jnp.abs(tiles), tiles < 0, jnp.arange(8)
    if form == "sign_magnitude":
        sign_bit = jnp.where(i < 4, 8 * i + 7, 8 * (i - 4) + 3)
        bits = magnitude.astype(jnp.uint32) << (4 * i) | negative.astype(jnp.uint32) << sign_bit
    elif form in ("subnormal", "subnormal_8"):
        magnitude = magnitude - negative if form == "subnormal_8" else magnitude
        at, sign_bit = (jnp.where(i < 4, 8 * i + first, (8 * i + second) % 32) for first, second in ((0, 28), (7, 3)))
        bits = magnitude.astype(jnp.uint32) << at | negative.astype(jnp.uint32) << sign_bit
    else:
        large = (magnitude >= 4) & (magnitude <= 7)
        bits = (8 * large + 4 * negative + (magnitude & 3)).astype(jnp.uint32) << (4 * i)
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32)


def _bf16_words(codes: Int[Array, "N K"]) -> UInt[Array, "N/64 K/128 4 256"]:
    n, k = codes.shape
    # row = 16 warp + 8 half + lane row; column = 128 group + 64 vector + 16 word + 8 pair + 2 lane column + code
    tiles = (codes.astype(jnp.int32) + 8).reshape(n // 64, 4, 2, 8, k // 128, 2, 4, 2, 4, 2)
    # -> tile, group, vector, warp, lane row, lane column, word, (code, pair, half)
    tiles = tiles.transpose(0, 4, 5, 1, 3, 8, 6, 9, 7, 2).reshape(n // 64, k // 128, 4, 256, 8)
    return jnp.sum(tiles.astype(jnp.uint32) << 4 * jnp.arange(8, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def fragment_scales(group_scale: Float[Array, "N G"]) -> Float[Array, "N/64 G 64"]:
    """Group scales in the order of `FragmentWeight.scales` for "lut"."""
    n, groups = group_scale.shape
    # row = 64 tile + 16 warp + 8 half + r -> tile, group, (warp, r, half)
    scale = group_scale.reshape(n // 64, 4, 2, 8, groups)
    return scale.transpose(0, 4, 1, 3, 2).reshape(n // 64, groups, 64)

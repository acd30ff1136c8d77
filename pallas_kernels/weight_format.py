"""`W4Weight`: an INT4 weight in groups, with the scales in the form that the matrix product uses."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .activations import e4m3_unit
from .dequantize import dequantize_lut, expand_groups
from .errors import W4A8Error
from .rounding import divide, to_e4m3

GROUP_SIZE = 128
CODES_PER_WORD = 8

Numerics = Literal["lut", "exact"]


def pack_codes(codes: Int[Array, "... N K"]) -> Int[Array, "... N K/8"]:
    """Packs codes -8..7 eight to an int32 word: nibble i of word j is `code + 8` of column 8j + i, lowest first.

    This is the `weight_packed` of compressed-tensors' "pack-quantized" format.

    Raises:
        W4A8Error: K is not a multiple of 8.
    """
    *lead, k = codes.shape
    if k % CODES_PER_WORD:
        raise W4A8Error(f"pack: K must be a multiple of {CODES_PER_WORD}, found {k}")
    nibbles = (codes.astype(jnp.int32) + 8).astype(jnp.uint32).reshape(*lead, k // CODES_PER_WORD, CODES_PER_WORD)
    words = jnp.sum(nibbles << _shifts(), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack_codes(packed: Int[Array, "... N K/8"]) -> Int[Array, "... N K"]:
    """The inverse of `pack_codes`: int8 codes in -8..7, [..., N, K]."""
    words = jax.lax.bitcast_convert_type(packed, jnp.uint32)
    nibbles = (words[..., None] >> _shifts()) & 15
    codes = nibbles.astype(jnp.int8) - jnp.int8(8)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * CODES_PER_WORD)


def _shifts() -> Array:
    return 4 * jnp.arange(CODES_PER_WORD, dtype=jnp.uint32)


def unusable_scales(scale: np.ndarray) -> np.ndarray:
    """Which of a checkpoint's group scales are negative, NaN or infinite: bool, of the same shape; -0 is not negative.

    No quantizer of symmetric codes makes such, since a group's scale is made of its largest magnitude. Signs could not
    move to codes either: -8 has no opposite.
    """
    values = scale.astype(np.float32)
    return ~(np.isfinite(values) & (values >= 0))


def convert_scales(scale: Float[Array, "... N G"]) -> tuple[Float[Array, "... N G"], Float[Array, "... N"]]:
    """Splits a checkpoint's group scales into e4m3 group scales and an fp32 scale per output channel.

    Args:
        scale: [..., N, G], non-negative, usually bf16.

    Returns:
        group_scale: `float8_e4m3fn` [..., N, G], at most 448 / 8, so that no product with a code clips.
        channel_scale: fp32 [..., N], 8 times the channel's largest scale over 448.

    The definition is what vLLM computes when it loads a W4A8 checkpoint.
    """
    scale = scale.astype(jnp.float32)
    unit = e4m3_unit(jnp.max(jnp.abs(scale), axis=-1))
    group_scale = to_e4m3(to_e4m3(divide(scale, unit[..., None])).astype(jnp.float32) / 8)
    return group_scale, 8 * unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W4Weight:
    """A linear layer's weight [N, K] in INT4; leading axes, such as experts, are allowed.

    A pytree: it passes through jit, vmap, shardings, donation and checkpointing like any array. Its value is

        lut:    w[n, k] = channel_scale[n] * e4m3(codes[n, k] * group_scale[n, k // group_size])
        exact:  w[n, k] = codes[n, k] * group_scale[n, k // group_size]

    Make one with `from_checkpoint`, which checks its arguments; the constructor takes any leaves, since JAX
    rebuilds pytrees from placeholders.

    Attributes:
        packed: int32 [..., N, K/8], see `pack_codes`.
        group_scale: [..., N, G]; `float8_e4m3fn` for "lut", the checkpoint's own dtype for "exact".
        channel_scale: fp32 [..., N]; ones for "exact".
        numerics: "lut" or "exact"; static.
        code_min: the lowest code that occurs, -7 or -8: -7 admits the faster kernel; static.
    """

    packed: Any
    group_scale: Any
    channel_scale: Any
    numerics: Numerics = dataclasses.field(default="lut", metadata={"static": True})
    code_min: int = dataclasses.field(default=-8, metadata={"static": True})

    @classmethod
    def from_checkpoint(
        cls,
        weight_packed: Int[Array, "... N K/8"],
        weight_scale: Float[Array, "... N G"],
        *,
        numerics: Numerics = "lut",
        code_min: int = -8,
    ) -> Self:
        """Makes a weight from the tensors `weight_packed` and `weight_scale` of a checkpoint.

        Args:
            weight_packed: int32 [..., N, K/8].
            weight_scale: bf16, fp16 or fp32 [..., N, G], where G divides K; finite and not negative, which is not
                checked here: see `unusable_scales`.
            numerics: "lut", the arithmetic of vLLM's kernel, or "exact", without its scale and product roundings.
            code_min: -7 if code -8 is known not to occur, else -8.

        Raises:
            W4A8Error: shapes or dtypes do not fit, or an option is unknown.
        """
        if numerics not in ("lut", "exact"):
            raise W4A8Error(f'numerics: expected "lut" or "exact", found {numerics!r}')
        if code_min not in (-8, -7):
            raise W4A8Error(f"code_min: expected -8 or -7, found {code_min}")
        if weight_packed.dtype != jnp.int32 or weight_packed.ndim < 2:
            raise W4A8Error(f"weight_packed: expected int32 [..., N, K/8], found {_describe(weight_packed)}")
        k = weight_packed.shape[-1] * CODES_PER_WORD
        fits = weight_scale.ndim == weight_packed.ndim and weight_scale.shape[:-1] == weight_packed.shape[:-1]
        if not fits or weight_scale.shape[-1] == 0 or k % weight_scale.shape[-1]:
            expected = f"{[*weight_packed.shape[:-1], k // GROUP_SIZE]} for groups of {GROUP_SIZE}"
            raise W4A8Error(f"weight_scale: expected {expected}, found {_describe(weight_scale)}")
        if not jnp.issubdtype(weight_scale.dtype, jnp.floating):
            raise W4A8Error(f"weight_scale: expected a float dtype, found {_describe(weight_scale)}")
        if numerics == "lut":
            group_scale, channel_scale = convert_scales(weight_scale)
        else:
            group_scale = jnp.asarray(weight_scale)
            channel_scale = jnp.ones(weight_packed.shape[:-1], jnp.float32)
        return cls(jnp.asarray(weight_packed), group_scale, channel_scale, numerics, code_min)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * CODES_PER_WORD)

    @property
    def group_size(self) -> int:
        """Columns that share a group scale."""
        return self.shape[-1] // self.group_scale.shape[-1]

    @property
    def codes(self) -> Int[Array, "... N K"]:
        """int8 [..., N, K] in -8..7."""
        return unpack_codes(self.packed)

    def operand(self) -> Float[Array, "... N K"]:
        """The weight as the matrix product takes it, before the channel scale.

        `float8_e4m3fn` for "lut"; for "exact", `codes * group_scale` in fp32, which holds that product exactly.
        """
        if self.numerics == "lut":
            return dequantize_lut(self.codes, self.group_scale)
        scale = expand_groups(self.group_scale.astype(jnp.float32), self.shape[-1])
        return self.codes.astype(jnp.float32) * scale

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... N K"]:
        """The value as the kernels see it, [..., N, K]: what a quantizer should bring close to the original."""
        return (self.operand().astype(jnp.float32) * self.channel_scale[..., None]).astype(dtype)


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"

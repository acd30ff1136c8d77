"""Fills a decoder from a Hugging Face checkpoint by its family's name table, and refuses what does not fit."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from pallas_kernels import FragmentWeight, W4A8Error, W4Weight, prepare_weight
from pallas_kernels.weight_format import CODES_PER_WORD, GROUP_SIZE, Numerics

from .config import DecoderConfig
from .decoder import Decoder
from .families.common import Names
from .layers.linear import Linear, Scheme

# Derived from the config, a column order that the reader has found trivial, or scales of a quantized key-value cache,
# which this cache is not.
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|weight_g_idx$|self_attn\.[kvq]_scale$|self_attn\.(q|k|v|prob)_output_scale$"
)


class TensorInfo(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


def load_decoder(
    config: DecoderConfig,
    names: Names,
    source: TensorSource,
    *,
    dtype: Any = jnp.bfloat16,
    scheme: Scheme = "bf16",
    numerics: Numerics = "lut",
    kernels: bool = False,
) -> Decoder:
    """Makes a decoder and fills it, one module at a time.

    Args:
        config: the decoder.
        names: the family's table, see `models.families.Family`.
        source: the checkpoint's tensors.
        dtype: of activations and of parameters that are not quantized.
        scheme: how quantized layers compute, "w4a8" or "w4a16"; "bf16" if none is quantized.
        numerics: of quantized weights.
        kernels: lay weights out for this device's kernels, if it has any.

    Raises:
        W4A8Error: a tensor is missing, unknown, or of another shape than the config says; a fused layer is quantized
            in part; a layer is quantized that cannot be.
    """
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    reader = _Reader(source, dtype, numerics, prepare_for=scheme if kernels and scheme != "bf16" else None)
    for path, _ in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        *parents, attribute = path
        if parents and attribute == "bias":
            continue  # read with its weight
        module: Any = decoder
        for step in parents:
            module = module[step] if isinstance(step, int) else getattr(module, str(step))
        where = ".".join(map(str, parents or path))
        layer = next((str(step) for step in parents if isinstance(step, int)), "")
        sources = [name.format(i=layer) for name in names[re.sub(r"\d+", "{i}", where)]]
        if isinstance(module, Linear):
            _fill_linear(module, sources, _rows(config, where, module), reader, scheme)
        else:
            shape = getattr(module, str(attribute)).get_value().shape
            setattr(module, str(attribute), nnx.Param(reader.floats([f"{sources[0]}.weight"], [shape])))
    reader.check_all_used(tied=config.tie_embeddings)
    return decoder


def _rows(config: DecoderConfig, where: str, module: Linear) -> list[int]:
    """The rows that each Hugging Face module contributes to one of ours."""
    if where.endswith("attention.qkv"):
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    if where.endswith("gate_up"):
        return [config.intermediate_size] * 2
    return [module.weight.get_value().shape[0]]


def _fill_linear(
    module: Linear, sources: Sequence[str], rows: Sequence[int], reader: "_Reader", scheme: Scheme
) -> None:
    k = module.weight.get_value().shape[1]
    quantized = [f"{name}.weight_packed" in reader.tensors for name in sources]
    if all(quantized):
        if scheme == "bf16":
            raise W4A8Error(f"{sources[0]}.weight_packed: found, but config.json has no quantization_config for it")
        weight: Any = reader.quantized(sources, [(n, k) for n in rows])
        module.weight = nnx.Param(weight)
        module.scheme = scheme
    elif any(quantized):
        absent = sources[quantized.index(False)]
        raise W4A8Error(f"{absent}: not quantized, but its siblings are; {', '.join(sources)} are computed as one")
    else:
        module.weight = nnx.Param(reader.floats([f"{name}.weight" for name in sources], [(n, k) for n in rows]))
    if module.bias is not None:
        module.bias = nnx.Param(reader.floats([f"{name}.bias" for name in sources], [(n,) for n in rows]))


class _Reader:
    """Reads tensors by name, checks their shapes and remembers which were used."""

    def __init__(
        self, source: TensorSource, dtype: Any, numerics: Numerics, *, prepare_for: Literal["w4a8", "w4a16"] | None
    ):
        self.source, self.tensors = source, source.tensors
        self.dtype, self.numerics, self.prepare_for = dtype, numerics, prepare_for
        self.used: set[str] = set()

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.tensors:
            raise W4A8Error(f"{name}: missing from the checkpoint; expected {list(shape)}")
        if tuple(self.tensors[name].shape) != shape:
            found = list(self.tensors[name].shape)
            raise W4A8Error(f"{name}: expected {list(shape)} by config.json, found {found} in the checkpoint")
        self.used.add(name)
        return self.source.read(name)

    def floats(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Array:
        parts = [jnp.asarray(self.read(name, shape), self.dtype) for name, shape in zip(names, shapes, strict=True)]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def quantized(self, modules: Sequence[str], shapes: Sequence[tuple[int, int]]) -> W4Weight | FragmentWeight:
        packed, scales = [], []
        for name, (n, k) in zip(modules, shapes, strict=True):
            packed.append(self.read(f"{name}.weight_packed", (n, k // CODES_PER_WORD)))
            info = self.tensors.get(f"{name}.weight_scale")
            groups = info.shape[1:] if info else (k // GROUP_SIZE,)
            # One scale a channel may come without the axis of groups.
            scales.append(self.read(f"{name}.weight_scale", (n, *groups)).reshape(n, -1))
            if f"{name}.weight_shape" in self.tensors:
                found = self.read(f"{name}.weight_shape", (2,)).tolist()
                if found != [n, k]:
                    raise W4A8Error(f"{name}.weight_shape: expected {[n, k]} by config.json, found {found}")
            if f"{name}.weight_zero_point" in self.tensors:
                raise W4A8Error(f"{name}.weight_zero_point: asymmetric weights are not supported")
        if len({scale.shape[1] for scale in scales}) != 1:
            raise W4A8Error(f"{modules[0]}.weight_scale: {', '.join(modules)} must have the same group size")
        words = jnp.asarray(np.concatenate(packed))
        scale = jnp.asarray(np.concatenate(scales))
        try:
            weight = W4Weight.from_checkpoint(words, scale, numerics=self.numerics, code_min=_code_min(words))
        except W4A8Error as error:
            raise W4A8Error(f"{modules[0]}: {error}") from None
        return prepare_weight(weight, self.prepare_for) if self.prepare_for else weight

    def check_all_used(self, *, tied: bool) -> None:
        unknown = [name for name in self.tensors if name not in self.used and not IGNORED.search(name)]
        if tied:
            unknown = [name for name in unknown if name != "lm_head.weight"]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise W4A8Error(f"{min(unknown)}{more}: in the checkpoint, but this model has no place for it")


@jax.jit
def _has_lowest_code(words: Array) -> Array:
    nibbles = (words[..., None] >> (4 * jnp.arange(CODES_PER_WORD))) & 15
    return jnp.any(nibbles == 0)


def _code_min(words: Array) -> int:
    return -8 if _has_lowest_code(words) else -7

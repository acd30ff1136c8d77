"""Fills a decoder from a Hugging Face checkpoint by its family's name table, and refuses what does not fit."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from pallas_kernels import FragmentWeight, W4A8Error, W4Weight, prepare_weight
from pallas_kernels.weight_format import CODES_PER_WORD, GROUP_SIZE, Numerics, unusable_scales

from .config import DecoderConfig
from .decoder import Block, Decoder
from .families.common import Names
from .layers.linear import Scheme
from .parameters import Parameter, abstract_decoder, module_at, parameters
from .sharding import Sharding

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
    sharding: Sharding | None = None,
) -> Decoder:
    """Makes a decoder and fills it, one parameter at a time.

    Args:
        config: the decoder.
        names: the family's table, see `models.families.Family`.
        source: the checkpoint's tensors.
        dtype: of activations and of parameters that are not quantized.
        scheme: how quantized layers compute, "w4a8" or "w4a16"; "bf16" if none is quantized.
        numerics: of quantized weights.
        kernels: lay weights out for this device's kernels, if it has any; with a sharding, each device its part.
        sharding: puts each parameter on the devices, each its part, when it has been read.

    Raises:
        W4A8Error: a tensor is missing, unknown, or of another shape than the config says; a fused layer is quantized
            in part; a layer is quantized that cannot be, such as a router; scales are negative, NaN or infinite.
    """
    decoder = abstract_decoder(config, dtype)
    whole = sharding is None
    reader = _Reader(source, dtype, numerics, prepare_for=scheme if kernels and whole and scheme != "bf16" else None)
    for parameter in parameters(decoder, names):
        # What is divided goes from the host to each device, and is whole on none.
        with nullcontext() if sharding is None else jax.default_device(jax.local_devices(backend="cpu")[0]):
            _fill(decoder, parameter, reader, scheme)
        if sharding is not None:
            sharding.place(decoder, parameter.path, kernels=kernels)
    reader.check_all_used(tied=config.tie_embeddings)
    return decoder if sharding is None else sharding.finish(decoder)


def load_block(config: DecoderConfig, names: Names, source: TensorSource, layer: int, *, dtype: Any) -> Block:
    """One layer of an unquantized checkpoint; arguments and errors as of `load_decoder`."""
    decoder, reader = abstract_decoder(config, dtype), _Reader(source, dtype, "lut", prepare_for=None)
    for parameter in parameters(decoder, names):
        if parameter.path[:2] == ("layers", layer):
            _fill(decoder, parameter, reader, "bf16")
    return decoder.layers[layer]


def _fill(decoder: Decoder, parameter: Parameter, reader: "_Reader", scheme: Scheme) -> None:
    *parents, attribute = parameter.path
    module = module_at(decoder, tuple(parents))
    value, quantized = _value(parameter, reader, scheme)
    if quantized:
        module.scheme = scheme
    setattr(module, str(attribute), nnx.Param(value))


def _value(parameter: Parameter, reader: "_Reader", scheme: Scheme) -> tuple[Any, bool]:
    """A parameter from the checkpoint, and whether it is quantized."""
    modules = [name for stack in parameter.modules for name in stack]
    packed = [f"{name}.weight_packed" in reader.tensors for name in modules]
    if parameter.kind == "router":
        if any(packed):
            raise W4A8Error(f"{modules[0]}.weight_packed: is a router, which must not be quantized; ignore it")
        return reader.floats(parameter, jnp.float32), False
    if parameter.kind not in ("linear", "experts") or not any(packed):
        return reader.floats(parameter), False
    if scheme == "bf16":
        first = modules[packed.index(True)]
        raise W4A8Error(f"{first}.weight_packed: found, but config.json has no quantization_config for it")
    for name, found in zip(modules, packed, strict=True):
        if not found and f"{name}.weight" in reader.tensors:
            many = f"{len(modules)} matrices" if parameter.kind == "experts" else ", ".join(modules)
            raise W4A8Error(f"{name}: not quantized, but its siblings are; {many} are computed as one")
    return reader.quantized(parameter), True


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

    def floats(self, parameter: Parameter, dtype: Any = None) -> Array:
        dtype = jnp.dtype(dtype or self.dtype)
        if parameter.kind != "experts":
            parts = [jnp.asarray(self.read(name, shape), dtype) for name, shape in parameter.tensors()]
            return jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        # One matrix at a time goes to its place: beside the stack there is never more than one.
        stack = np.empty(parameter.shape, dtype)
        rows, start = stack.reshape(-1, parameter.shape[-1]), 0
        for name, shape in parameter.tensors():
            rows[start : start + shape[0]] = self.read(name, shape)
            start += shape[0]
        return jnp.asarray(stack)

    def quantized(self, parameter: Parameter) -> W4Weight | FragmentWeight:
        *_, n, k = parameter.shape
        modules = [
            (name, rows) for names in parameter.modules for name, rows in zip(names, parameter.rows, strict=True)
        ]
        first = modules[0][0]
        packed = np.empty((len(parameter.modules) * n, k // CODES_PER_WORD), np.int32)
        scale: np.ndarray | None = None
        start = 0
        for name, rows in modules:
            words, part = self._packed(name, rows, k)
            if scale is None:
                scale = np.empty((len(packed), part.shape[1]), part.dtype)
            elif part.shape[1] != scale.shape[1]:
                raise W4A8Error(
                    f"{name}.weight_scale: expected {scale.shape[1]} groups as in {first}, which it is "
                    f"computed with, found {part.shape[1]}"
                )
            packed[start : start + rows], scale[start : start + rows] = words, part
            start += rows
        assert scale is not None
        lead = parameter.shape[:-2]
        codes, scales = (jnp.asarray(part.reshape(*lead, n, -1)) for part in (packed, scale))
        try:
            weight = W4Weight.from_checkpoint(codes, scales, numerics=self.numerics, code_min=_code_min(codes))
        except W4A8Error as error:
            raise W4A8Error(f"{first}: {error}") from None
        return prepare_weight(weight, self.prepare_for) if self.prepare_for else weight

    def _packed(self, name: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes [n, K/8] and scales [n, G] of one module."""
        words = self.read(f"{name}.weight_packed", (n, k // CODES_PER_WORD))
        info = self.tensors.get(f"{name}.weight_scale")
        groups = info.shape[1:] if info else (k // GROUP_SIZE,)
        # One scale a channel may come without the axis of groups.
        scale = self.read(f"{name}.weight_scale", (n, *groups)).reshape(n, -1)
        if len(places := np.argwhere(unusable_scales(scale))):
            row, group = places[0].tolist()
            raise W4A8Error(
                f"{name}.weight_scale: {len(places)} of {scale.size} scales are negative, NaN or infinite, the first "
                f"in row {row}, group {group}: {scale[row, group]}; the checkpoint is damaged, or of another convention"
            )
        if f"{name}.weight_shape" in self.tensors:
            found = self.read(f"{name}.weight_shape", (2,)).tolist()
            if found != [n, k]:
                raise W4A8Error(f"{name}.weight_shape: expected {[n, k]} by config.json, found {found}")
        if f"{name}.weight_zero_point" in self.tensors:
            raise W4A8Error(f"{name}.weight_zero_point: asymmetric weights are not supported")
        return words, scale

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

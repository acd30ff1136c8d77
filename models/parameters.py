"""Which tensors of a Hugging Face checkpoint make up each parameter of a decoder, and their shapes.

The one source of both for everyone who reads, writes or checks a checkpoint.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .decoder import Decoder
from .families.common import Names
from .layers.linear import Linear
from .layers.moe import Experts, MoE

Kind = Literal["linear", "bias", "experts", "router", "float"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a decoder.

    Attributes:
        path: from the decoder to the parameter; numbers for layers.
        kind: "linear", the weight [N, K] of a `Linear`, and its "bias"; "experts", a stack [E, N, K]; "router"; any
            other is a "float". Only a "linear" and "experts" may be quantized.
        shape: of the parameter.
        modules: the Hugging Face modules that make it up: their tensors' rows are concatenated; for experts, a tuple
            for each of them, whose matrices are stacked.
        rows: how many rows (elements of a vector) each module of a tuple has.
    """

    path: tuple[str | int, ...]
    kind: Kind
    shape: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]

    @property
    def suffix(self) -> str:
        """What an unquantized tensor's name has behind the module's."""
        return "bias" if self.kind == "bias" else "weight"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each unquantized tensor."""
        trailing = self.shape[2:] if self.kind == "experts" else self.shape[1:]
        for modules in self.modules:
            for module, rows in zip(modules, self.rows, strict=True):
                yield f"{module}.{self.suffix}", (rows, *trailing)


def abstract_decoder(config: DecoderConfig, dtype: Any = jnp.bfloat16) -> Decoder:
    """A decoder whose parameters have shapes and dtypes, but no values."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))


def module_at(decoder: Decoder, path: tuple[str | int, ...]) -> Any:
    """The module that a path leads to."""
    module: Any = decoder
    for step in path:
        module = module[step] if isinstance(step, int) else getattr(module, step)
    return module


def parameters(decoder: Decoder, names: Names) -> list[Parameter]:
    """Every parameter of a decoder, abstract or not, by its family's table of names (see `models.families.Family`).

    In the order of the model, layer by layer, and within a layer in the order of the table.
    """
    result, place = [], {name: i for i, name in enumerate(names)}
    variables: Any = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    for path, variable in variables:
        *parents, attribute = path
        module = module_at(decoder, tuple(parents))
        where = ".".join(map(str, path))
        kind: Kind = "float"
        if isinstance(module, Linear):
            kind = "bias" if attribute == "bias" else "linear"
        elif isinstance(module, Experts):
            kind = "experts"
        elif isinstance(module, MoE):
            kind = "router"
        table = re.sub(
            r"\d+", "{i}", where if kind in ("experts", "router") or not parents else where.rpartition(".")[0]
        )
        layer = next((step for step in parents if isinstance(step, int)), 0)
        experts = variable.get_value().shape[0] if kind == "experts" else 1
        modules = tuple(tuple(name.format(i=layer, e=e) for name in names[table]) for e in range(experts))
        shape = tuple(variable.get_value().shape)
        rows = _rows(decoder.config, table, shape[1] if kind == "experts" else shape[0])
        part = 1 if table.startswith("layers.") else 0 if table == "embedding" else 2
        result.append(((part, layer, place[table]), Parameter(tuple(path), kind, shape, modules, rows)))
    return [parameter for _, parameter in sorted(result, key=lambda entry: entry[0])]


def expected_shapes(config: DecoderConfig, names: Names) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, before quantization."""
    return _expected_shapes(config, tuple(names.items()))


@functools.lru_cache(maxsize=8)
def _expected_shapes(config: DecoderConfig, names: tuple) -> Mapping[str, tuple[int, ...]]:
    found = parameters(abstract_decoder(config), dict(names))
    return MappingProxyType(dict(tensor for parameter in found for tensor in parameter.tensors()))


def _rows(config: DecoderConfig, table: str, total: int) -> tuple[int, ...]:
    """The rows that each Hugging Face module contributes to one of ours."""
    if table.endswith("attention.qkv"):
        return tuple(heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    return (total // 2, total // 2) if table.endswith("gate_up") else (total,)

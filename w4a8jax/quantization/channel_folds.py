"""Where a family's channels can be scaled between two layers without a change of what the model computes.

norm -> queries, keys, values; gate and up; router and experts   in a parallel block one scale serves all of them
values -> attention's output projection                          one scale for the query heads that share a head
up -> down                                                       silu(gate) * up is linear in up; in each expert too
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from models.config import DecoderConfig
from models.families.common import Names

from ..checkpoints.folds import Fold


@dataclasses.dataclass(frozen=True)
class Readers:
    """Modules of one kind that read the channels of a fold, such as all experts' gates.

    Attributes:
        modules: Hugging Face names.
        tap: path of the module of ours whose input they read; "mlp" for experts' gate and up.
        experts: whose they are, one a module; empty if they are no experts'.
    """

    modules: tuple[str, ...]
    tap: str
    experts: tuple[int, ...] = ()


class LayerFolds:
    """The folds of a layer.

    Args:
        config: of the decoder; names: of its family.
        tensors: names of the checkpoint's, which say where there is a bias.
        layer: its number.
    """

    def __init__(self, config: DecoderConfig, names: Names, tensors: Collection[str], layer: int):
        self._config, self._names, self._tensors, self._layer = config, names, tensors, layer

    def __iter__(self) -> Iterator[tuple[Fold, tuple[Readers, ...]]]:
        """Folds with scales of 1, and who reads their channels."""
        config, moe = self._config, self._config.experts(self._layer)
        dense = "mlp" if moe is None else "mlp.shared" if moe.shared_intermediate_size else None
        qkv, gate_up = self._readers("attention.qkv"), list[Readers]()
        router: tuple[str, ...] = ()
        experts = () if moe is None else tuple(range(moe.num_experts))
        if experts:
            router = tuple(f"{name}.weight" for name in self._modules("mlp.router"))
            for part in range(2):
                names = tuple(self._modules("mlp.experts.gate_up", e)[part] for e in experts)
                gate_up.append(Readers(names, "mlp", experts))
        if dense:
            gate_up += self._readers(f"{dense}.gate_up", "mlp")
        hidden = config.hidden_size
        if config.parallel_block:
            yield self._fold(hidden, self._norm("input_norm"), [*qkv, *gate_up], router, norm=True)
        else:
            yield self._fold(hidden, self._norm("input_norm"), qkv, norm=True)
            yield self._fold(hidden, self._norm("mlp_norm"), gate_up, router, norm=True)
        width, heads = config.head_dim, config.num_kv_heads
        values, output = self._rows(self._modules("attention.qkv")[2]), self._readers("attention.output")
        yield self._fold(width * heads, values, output, repeat=config.num_heads // heads, block=width)
        if dense:
            inner = config.intermediate_size if moe is None else moe.shared_intermediate_size
            up = self._rows(self._modules(f"{dense}.gate_up")[1])
            yield self._fold(inner, up, self._readers(f"{dense}.down"))
        for e in experts:
            up = self._rows(self._modules("mlp.experts.gate_up", e)[1])
            down = Readers((self._modules("mlp.experts.down", e)[0],), "mlp.experts.down", (e,))
            yield self._fold(moe.intermediate_size if moe else 0, up, [down])

    def _modules(self, path: str, expert: int = 0) -> list[str]:
        return [name.format(i=self._layer, e=expert) for name in self._names[f"layers.{{i}}.{path}"]]

    def _readers(self, path: str, tap: str = "") -> list[Readers]:
        return [Readers((name,), tap or path) for name in self._modules(path)]

    def _norm(self, path: str) -> tuple[str, ...]:
        return (f"{self._modules(path)[0]}.weight",)

    def _rows(self, module: str) -> tuple[str, ...]:
        return tuple(name for name in (f"{module}.weight", f"{module}.bias") if name in self._tensors)

    @staticmethod
    def _fold(
        channels: int, rows: tuple[str, ...], readers: Sequence[Readers], others: tuple[str, ...] = (), **options: Any
    ) -> tuple[Fold, tuple[Readers, ...]]:
        columns = (*(f"{name}.weight" for group in readers for name in group.modules), *others)
        return Fold(np.zeros(channels, np.int8), rows, columns, **options), tuple(readers)

"""How large the experts of a checkpoint are, and how many of its parameters a token meets."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inspection import LayerReport

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.\w+$")


@dataclasses.dataclass(frozen=True)
class ExpertSizes:
    """The routed experts of a checkpoint.

    Attributes:
        layers: how many layers have experts.
        per_layer: experts of one layer.
        top_k: experts that a token meets in a layer; None if config.json does not say.
        parameters: of one expert, the largest if they differ.
        nbytes: of one expert on disk, the largest if they differ.
        total_bytes: of all experts of all layers.
        active_parameters: of the whole model for one token: all that is no routed expert, embeddings included, and
            top_k experts of each layer.
    """

    layers: int
    per_layer: int
    top_k: int | None
    parameters: int
    nbytes: int
    total_bytes: int
    active_parameters: int | None


def expert_sizes(modules: Iterable[LayerReport], config: Mapping[str, Any]) -> ExpertSizes | None:
    """The sizes of experts, from one report for each module; None if there are no experts."""
    experts: dict[tuple[str, int], list[LayerReport]] = defaultdict(list)
    rest = 0
    for module in modules:
        if match := _EXPERT.match(module.name):
            experts[match[1], int(match[2])].append(module)
        else:
            rest += module.weights
    if not experts:
        return None
    layers = {parent for parent, _ in experts}
    parameters = max(sum(module.weights for module in group) for group in experts.values())
    sizes = [sum(module.nbytes for module in group) for group in experts.values()]
    top_k = config.get("num_experts_per_tok")
    return ExpertSizes(
        layers=len(layers),
        per_layer=max(sum(parent == layer for parent, _ in experts) for layer in layers),
        top_k=top_k,
        parameters=parameters,
        nbytes=max(sizes),
        total_bytes=sum(sizes),
        active_parameters=None if top_k is None else rest + len(layers) * top_k * parameters,
    )

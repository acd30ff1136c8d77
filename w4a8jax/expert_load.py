"""How a text's tokens divide among the experts of a model."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from models.functional import Structure, split
from models.routing import chosen_experts
from pallas_kernels import W4A8Error

from .evaluation import Plan, Progress

if TYPE_CHECKING:
    from .language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """Where the tokens of a text went in one layer.

    Attributes:
        layer: its number in the model, from 0.
        tokens: of the text.
        counts: how many of them each expert met.
    """

    layer: int
    tokens: int
    counts: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the tokens that each expert met; they add up to the experts that one token meets."""
        return tuple(count / self.tokens for count in self.counts)

    @property
    def mean_share(self) -> float:
        """Each expert's share if all were used alike."""
        return sum(self.shares) / len(self.counts)

    @property
    def unused(self) -> int:
        """How many experts met no token."""
        return self.counts.count(0)

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        shares = {"min_share": min(self.shares), "max_share": max(self.shares), "mean_share": self.mean_share}
        return {**dataclasses.asdict(self), "counts": list(self.counts), **shares, "unused": self.unused}


def expert_load(
    model: "LanguageModel",
    text: str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[ExpertLoad, ...]:
    """Counts the tokens that each expert meets, in each layer that has experts.

    The text is read in the windows of `evaluate`, and each token that it scores is counted once.

    Args:
        model: see `load`.
        text: of any length.
        context: tokens of a window; by default 1024 or what the model takes, if less.
        max_tokens: only the text's first tokens; all by default.
        progress: called with the windows done and their number.

    Raises:
        W4A8Error: the model has no experts, the text has no tokens to count, or an option is out of range.
    """
    config = model.decoder.config
    if config.moe is None:
        raise W4A8Error(f"{model.name}: has no experts, so that there is no load of theirs to count")
    plan = Plan.make(model, text, context, None, None, max_tokens)
    structure, leaves = split(model.decoder)
    layers = [i for i in range(config.num_layers) if config.experts(i) is not None]
    total, tokens = np.zeros((len(layers), config.moe.num_experts), np.int64), 0
    for windows in plan.batches(progress):
        # `scored` speaks of predictions: of the token at each position but the first.
        counted = np.pad(plan.scored(windows), ((0, 0), (1, 0)))
        tokens += int(counted.sum())
        total += np.asarray(_count(structure, leaves, windows.tokens, windows.lengths, counted))
    return tuple(ExpertLoad(i, tokens, tuple(counts)) for i, counts in zip(layers, total.tolist(), strict=True))


@partial(jax.jit, static_argnames="structure")
def _count(
    structure: Structure,
    leaves: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    counted: Bool[Array, "B T"],
) -> Int[Array, "S E"]:
    """How many of the counted tokens each expert of the S layers with experts meets, int32."""
    decoder = structure.merge(leaves)
    moe = decoder.config.moe
    assert moe is not None
    # A row of no tokens would attend to nothing; none of it is counted.
    chosen = chosen_experts(decoder, tokens, jnp.maximum(lengths, 1))
    weights = jnp.broadcast_to(counted[..., None], (*counted.shape, moe.top_k)).astype(jnp.int32).reshape(-1)
    # Sums of integers: a bincount's weights would be floats.
    zeros = jnp.zeros((moe.num_experts,), jnp.int32)
    return jnp.stack([zeros.at[experts.reshape(-1)].add(weights) for experts in chosen.values()])

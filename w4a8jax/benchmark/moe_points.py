"""What the benchmark of experts measures: models, products, and which experts tokens are sent to."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pallas_kernels.group_schedule import ALIGNMENT
from pallas_kernels.moe import Selection
from pallas_kernels.weight_format import GROUP_SIZE

from . import timing

Routing = Literal["uniform", "zipf"]
ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf")
# The products of an expert's MLP with rows sorted by expert, and the whole MLP, from a token's hidden state to its sum.
PRODUCTS = ("gate_up", "down", "mlp")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)

MOST_ROWS = 32  # that are compared

_BYTES = 0.5 + 1 / GROUP_SIZE  # of a weight: its code, and its part of a one-byte scale


@dataclasses.dataclass(frozen=True)
class Model:
    """The experts of one layer of a model.

    Attributes:
        name: as records have it.
        hidden: width of a token.
        inner: width of an expert.
        experts: how many there are.
        top_k: experts that a token meets.
        selection: how their weights follow from logits.
    """

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    selection: Selection = "softmax"

    def shape(self, product: str) -> tuple[int, int]:
        """N and K of an expert's weight."""
        return (2 * self.inner, self.hidden) if product == "gate_up" else (self.hidden, self.inner)


# The sizes of Command A+ follow from what is published of it: 218 B parameters, of which a token meets 25 B, with 8 of
# 128 experts and a shared one. Routed experts R and the rest are R + rest = 218 B and R * 8 / 128 + rest = 25 B, so
# R = 206 B, and an expert of all layers has 1.61 B = layers * 3 * hidden * inner. 32 layers with hidden and inner 4096
# have 1.611 B; the rest, 12 B, has room for the vocabulary (1 B), attention and the shared expert. Other divisions of
# the same number among layers and widths would do as well: the benchmark has one of its size, not its own.
MODELS = {
    model.name: model
    for model in (
        Model("command-a-plus", 4096, 4096, 128, 8, "sigmoid"),
        Model("mixtral-8x7b", 4096, 14336, 8, 2),
        Model("qwen3-30b-a3b", 2048, 768, 128, 8),
    )
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Where kernels are measured.

    Attributes:
        model: whose experts.
        product: one of `PRODUCTS`.
        tokens: before each is sent to several experts.
        routing: whether experts are as likely as each other, or follow Zipf's law.
    """

    model: Model
    product: str
    tokens: int
    routing: Routing

    @property
    def rows(self) -> int:
        """Rows of a product."""
        return self.tokens * self.model.top_k

    @property
    def padded_rows(self) -> int:
        """As many as our kernel takes."""
        return -(-self.rows // ALIGNMENT) * ALIGNMENT

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """N and K of the weights that are read."""
        products = ("gate_up", "down") if self.product == "mlp" else (self.product,)
        return [self.model.shape(product) for product in products]

    @property
    def weights(self) -> int:
        """Of an expert, that are read."""
        return sum(n * k for n, k in self.shapes)

    @property
    def flops(self) -> float:
        """Operations of the products, multiplications and additions."""
        return 2.0 * self.rows * self.weights

    def bytes(self, touched: int) -> float:
        """Bytes that must move in W4A8: codes and scales of the experts touched, what comes in, what goes out.

        A product takes FP8 rows; a whole MLP bf16 tokens, and what it keeps between its products counts as free.
        """
        weights = touched * self.weights * _BYTES
        if self.product == "mlp":
            return weights + 2 * 2 * self.tokens * self.model.hidden
        ((n, k),) = self.shapes
        return weights + self.rows * k + 2 * self.rows * n

    @functools.cached_property
    def routes(self) -> Routes:
        """Which experts the tokens are sent to."""
        return Routes(self)

    def __str__(self) -> str:
        return f"{self.model.name} {self.product} tokens {self.tokens} {self.routing}"


class Routes:
    """Sets of choices of experts, so many that what launches read exceeds the cache.

    Set 0 is random. The others are the same with other names for the experts, so that few tokens meet other experts
    each time: launch i + 1 reads the experts that follow those of launch i.

    Attributes:
        ranks: int [tokens, E], each token's experts from the greatest logit to the least.
        sets: how many.
        touched: experts that have a row, as many in each set.
        turnover: launches until experts are read again; then it is time for another copy of the weights.
        copies: of the weights, so that all of them exceed the cache.
    """

    def __init__(self, point: Point) -> None:
        model, tokens = point.model, point.tokens
        self.experts, self.top_k = model.experts, model.top_k
        self.ranks = _ranks(model.experts, tokens, point.routing)
        self._ids = self.ranks[:, : model.top_k]
        touched = np.unique(self._ids)
        self.touched = len(touched)
        self._ring = np.concatenate([touched, np.setdiff1d(np.arange(model.experts), touched)])
        self.turnover = max(1, model.experts // self.touched)
        self.sets = min(timing.rotations(self.touched * point.weights * _BYTES), self.turnover)
        self.copies = timing.rotations(model.experts * point.weights * _BYTES) if self.sets == self.turnover else 1

    def launch(self, i: int) -> tuple[int, int]:
        """The set and the copy of the weights of launch i."""
        return i % self.sets, i // self.sets % self.copies

    def names(self, i: int) -> np.ndarray:
        """int [E]: what set i calls each expert of set 0."""
        names = np.empty(self.experts, np.int32)
        names[self._ring] = np.roll(self._ring, -i * self.touched)
        return names

    def ids(self, i: int) -> np.ndarray:
        """int32 [tokens, top_k], greatest logit first."""
        return self.names(i)[self._ids]

    def sizes(self, i: int) -> np.ndarray:
        """int32 [E], rows of each expert."""
        return np.bincount(self.ids(i).ravel(), minlength=self.experts).astype(np.int32)

    def sample(self) -> dict[int, np.ndarray]:
        """Rows of set 0 to compare, of at most 8 experts, 4 each: the first and the last of a group among them.

        The experts are the first and the last that have rows, the one with the most, the one with the fewest, others.
        """
        sizes = self.sizes(0)
        ends = np.cumsum(sizes)
        some = np.flatnonzero(sizes)
        rng = np.random.default_rng(len(self._ids))
        first = [some[0], some[-1], some[np.argmax(sizes[some])], some[np.argmin(sizes[some])]]
        chosen = list(dict.fromkeys(int(e) for e in itertools.chain(first, rng.permutation(some))))[:8]
        rows = {}
        for e in sorted(chosen):
            inner = rng.integers(sizes[e], size=2) + ends[e] - sizes[e]
            rows[e] = np.unique([ends[e] - sizes[e], ends[e] - 1, *inner])
        return rows


@functools.lru_cache(maxsize=2)
def _ranks(experts: int, tokens: int, routing: Routing) -> np.ndarray:
    """Sampled without replacement, by Gumbel noise on the logarithms of probabilities; Zipf's exponent is 1."""
    rng = np.random.default_rng([experts, tokens, ROUTINGS.index(routing)])
    likely = np.zeros(experts) if routing == "uniform" else -np.log1p(rng.permutation(experts))
    return np.argsort(-(likely + rng.gumbel(size=(tokens, experts))), axis=1).astype(np.int32)


def points(
    models: Sequence[Model], products: Sequence[str], tokens: Sequence[int], routings: Sequence[Routing]
) -> list[Point]:
    """All points, those of one model and product beside each other."""
    return [Point(*point) for point in itertools.product(models, products, tokens, routings)]

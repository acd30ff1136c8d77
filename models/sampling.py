"""Choosing the next token: greedy, temperature, top-k, top-p, with one random stream a sequence."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import W4A8Error

# Below this, dividing differences of logits could overflow; the distribution is a point mass long before.
_MIN_TEMPERATURE = 1e-20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token, the lowest id among equals.
        top_k: draw from the k most likely tokens, the lowest ids among equals; 0 for no such limit.
        top_p: draw from the most likely tokens whose probabilities, after top_k, add up to top_p; at least one.
        seed: 0 .. 2**32 - 1; None draws one. Equal seeds give equal tokens, whatever else is in the batch.

    Raises:
        W4A8Error: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise W4A8Error(f"temperature: expected 0 (greedy) or a positive number, found {self.temperature!r}")
        if not (_is_integer(self.top_k) and self.top_k >= 0):
            raise W4A8Error(f"top_k: expected 0 (no limit) or a positive integer, found {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise W4A8Error(f"top_p: expected a number above 0 and at most 1, found {self.top_p!r}")
        if self.seed is not None and not (_is_integer(self.seed) and 0 <= self.seed < 2**32):
            raise W4A8Error(f"seed: expected an integer in 0 .. 2**32 - 1, found {self.seed!r}")

    def with_seed(self) -> "SamplingParams":
        """The same with a seed: its own, or one from the operating system's entropy."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=int(np.random.SeedSequence().generate_state(1)[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`SamplingParams` of a batch as arrays, so that a change of values compiles nothing.

    Attributes:
        temperature: fp32 [B].
        top_k: int32 [B].
        top_p: fp32 [B].
        seed: uint32 [B].
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: Int[Array, "B"]

    @classmethod
    def create(cls, params: Sequence[SamplingParams]) -> "SamplingArrays":
        """The parameters of each sequence; seeds must be set."""
        return cls(
            temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
            top_k=jnp.asarray([min(p.top_k, 2**31 - 1) for p in params], jnp.int32),
            top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
            seed=jnp.asarray(np.array([p.seed for p in params], np.uint32)),
        )


def sequence_keys(seed: Int[Array, "B"], index: Int[Array, "B"]) -> Array:
    """Random keys [B] that depend on each sequence's seed and token index alone.

    The generator is named, because others, such as "rbg", draw differently under vmap, that is, in a batch.
    """
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s, impl="threefry2x32"), i))(seed, index)


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    keys: Array,
) -> Int[Array, "B"]:
    """Draws a token for each row.

    Args:
        logits: [B, V]; -inf forbids a token.
        temperature, top_k, top_p: [B], as in `SamplingParams`.
        keys: random keys [B], of `sequence_keys`.

    Returns:
        int32 [B] token ids; -1 where a row holds NaN.

    A draw is the argmax of scaled logits plus Gumbel noise, which belongs to token ids: a filter that keeps the
    token that would have been drawn without it does not change the draw. A batch that needs no filter is not sorted,
    and a greedy one draws no noise.
    """
    logits = logits.astype(jnp.float32)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    draw = temperature > 0

    def random() -> Int[Array, "B"]:
        shifted = logits - jnp.where(jnp.isfinite(peak), peak, 0)
        scaled = shifted / jnp.maximum(temperature, _MIN_TEMPERATURE)[:, None]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        filtered = jnp.any(draw & ((top_k > 0) | (top_p < 1)))
        return jax.lax.cond(
            filtered,
            lambda: _filtered_argmax(scaled, noise, top_k, top_p),
            lambda: jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32),
        )

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(draw, jax.lax.cond(jnp.any(draw), random, lambda: greedy), greedy)
    return jnp.where(jnp.isnan(peak[:, 0]), -1, token)


def _filtered_argmax(
    scaled: Float[Array, "B V"], noise: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Int[Array, "B"]:
    """The argmax of `scaled + noise` among the tokens that top_k, then top_p, keep."""
    vocab = scaled.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scaled.shape)
    falling, ids = jax.lax.sort((-scaled, ids), num_keys=1, is_stable=True)
    falling = -falling
    rank = jnp.arange(vocab)
    kept = rank < jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    probability = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounding must neither drop the first token nor, at top_p = 1, the last ones.
    kept &= (before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0)
    score = jnp.where(kept, falling + jnp.take_along_axis(noise, ids, axis=-1), -jnp.inf)
    best = jnp.argmax(score, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, best, axis=-1)[:, 0]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

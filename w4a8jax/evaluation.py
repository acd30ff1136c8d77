"""How well a model predicts a text, and how far a quantized model is from its original on it.

The protocol. The text is one sequence of tokens. Windows of `context` tokens start every `stride` tokens; each begins
with the BOS token, if the tokenizer adds one, which counts as one of the `context`. A window scores the tokens that no
window before it did: so every token is scored once, given at least `context - stride` tokens (BOS included) or all
there are. Without a BOS token the text's first token is not scored. Sums are float64, in the order of the text.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.decoder import Decoder
from models.functional import Structure, split
from pallas_kernels import W4A8Error

if TYPE_CHECKING:
    from .language_model import LanguageModel

DEFAULT_CONTEXT = 1024
_LOGITS = 2**24  # of one chunk: 64 MiB in fp32
_SCORES = 2**27  # attention scores of one batch of windows, where attention is not fused
_MAX_BATCH = 8

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood per token.
        bits_per_byte: negative log2 likelihood of the text over its bytes in UTF-8; comparable between tokenizers.
        tokens: how many were scored.
        bytes: of UTF-8 that they stand for.
        accuracy: share of them that the model finds likeliest.
        context, stride: of the windows, in tokens.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    accuracy: float
    context: int
    stride: int

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a model is from its original, token by token of a text.

    Attributes:
        model, original: the evaluation of each.
        kl_mean, kl_max: KL(original || model) of the predicted distributions in nats, over the scored tokens.
        top1_agreement: share of the tokens where both find the same token likeliest.
    """

    model: Evaluation
    original: Evaluation
    kl_mean: float
    kl_max: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.02 if the model's perplexity is 2 % above its original's."""
        return self.model.perplexity / self.original.perplexity - 1

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(
            dataclasses.asdict(self) | {"perplexity_increase": self.perplexity_increase},
            indent=2,
        )


class Windows(NamedTuple):
    """A batch of windows: tokens int32 [B, T], length int32 [B] (0 for none), first scored position int32 [B]."""

    tokens: np.ndarray
    lengths: np.ndarray
    first: np.ndarray


def evaluate(
    model: "LanguageModel",
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and bits per byte of a text under a model, by the protocol of this module.

    Args:
        model: see `load`.
        text: of any length; memory does not grow with it beyond its tokens.
        context: tokens of a window; by default 1024 or what the model takes, if less.
        stride: tokens between windows; half the context by default. Smaller is slower and gives more context.
        batch: windows computed together; by default as many as are cheap.
        max_tokens: only the text's first tokens; all by default.
        progress: called with the windows done and their number.

    Raises:
        W4A8Error: the text has nothing to score, or an option is out of range.
    """
    plan = Plan.make(model, text, context, stride, batch, max_tokens)
    structure, leaves = split(model.decoder)
    sums = np.zeros(2)
    for windows in plan.batches(progress):
        scored = plan.scored(windows)
        values = _score(structure, leaves, *windows[:2], chunk=plan.chunk)
        sums += [np.sum(np.asarray(value)[scored], dtype=np.float64) for value in values]
    return plan.evaluation(*sums.tolist())


def compare(
    model: "LanguageModel",
    original: "LanguageModel",
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """KL divergence, top-1 agreement and both perplexities of a model and its original; arguments as of `evaluate`.

    Raises:
        W4A8Error: as `evaluate` does; or the two have different vocabularies or tokenizers.
    """
    sizes = model.decoder.config.vocab_size, original.decoder.config.vocab_size
    if sizes[0] != sizes[1]:
        raise W4A8Error(f"cannot compare: the model has a vocabulary of {sizes[0]} tokens, its original of {sizes[1]}")
    if context is None:
        context = min(DEFAULT_CONTEXT, model.decoder.config.max_context, original.decoder.config.max_context)
    plan = Plan.make(model, text, context, stride, batch, max_tokens)
    other = Plan.make(original, text, context, stride, batch, max_tokens)
    if not np.array_equal(plan.tokens, other.tokens) or plan.bos != other.bos:
        raise W4A8Error(
            "cannot compare: the tokenizers of the model and of its original give the text different tokens"
        )
    pair = *split(model.decoder), *split(original.decoder)
    sums = np.zeros(6)
    kl_max = 0.0
    for windows in plan.batches(progress):
        scored = plan.scored(windows)
        values = _compare(*pair, *windows[:2], chunk=plan.chunk)
        columns = [np.asarray(value)[scored].astype(np.float64) for value in values]
        sums += [column.sum() for column in columns]
        kl_max = max(kl_max, float(columns[2].max(initial=0.0)))
    nll, original_nll, kl, agreed, right, original_right = sums.tolist()
    evaluations = plan.evaluation(nll, right), plan.evaluation(original_nll, original_right)
    return Comparison(*evaluations, kl / plan.count, kl_max, agreed / plan.count)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The windows over a text."""

    tokens: np.ndarray
    nbytes: int
    bos: int | None
    context: int
    stride: int
    batch: int
    chunk: int

    @classmethod
    def make(
        cls,
        model: "LanguageModel",
        text: str,
        context: int | None,
        stride: int | None,
        batch: int | None,
        max_tokens: int | None,
    ) -> Self:
        config = model.decoder.config
        context = min(DEFAULT_CONTEXT, config.max_context) if context is None else context
        if not 2 <= context <= config.max_context:
            raise W4A8Error(f"context: expected 2 to {config.max_context} (what the model takes), found {context}")
        stride = max(1, context // 2) if stride is None else stride
        if not 1 <= stride < context:
            raise W4A8Error(f"stride: expected 1 to {context - 1} (less than the context), found {stride}")
        for name, value in (("batch", batch), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise W4A8Error(f"{name}: expected a positive number, found {value}")
        tokens, nbytes, bos = _encode(model, text, max_tokens)
        if len(tokens) < (1 if bos is not None else 2):
            raise W4A8Error(f"text: has {len(tokens)} tokens ({nbytes} bytes), which leaves nothing to score")
        body = context - (bos is not None)
        count = 1 + max(0, math.ceil((len(tokens) - body) / stride))
        if batch is None:
            batch = max(1, min(_MAX_BATCH, count, _SCORES // (config.num_heads * context**2)))
        chunk = max(1, min(context, _LOGITS // (batch * config.vocab_size)))
        return cls(tokens, nbytes, bos, context, stride, batch, chunk)

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - (self.bos is None)

    def windows(self) -> Iterator[tuple[list[int], int]]:
        """Each window's tokens, and the position in it of the first one that is scored."""
        lead = [] if self.bos is None else [self.bos]
        body = self.context - len(lead)
        start, first = 0, 1
        while True:
            yield lead + self.tokens[start : start + body].tolist(), first
            if start + body >= len(self.tokens):
                return
            start += self.stride
            first = self.context - self.stride

    def batches(self, progress: Progress | None) -> Iterator[Windows]:
        windows = list(self.windows())
        length = min(self.context, -(-max(len(tokens) for tokens, _ in windows) // 64) * 64)
        for begin in range(0, len(windows), self.batch):
            result = Windows(
                np.zeros((self.batch, length), np.int32), np.zeros(self.batch, np.int32), np.ones(self.batch, np.int32)
            )
            for row, (tokens, first) in enumerate(windows[begin : begin + self.batch]):
                result.tokens[row, : len(tokens)] = tokens
                result.lengths[row], result.first[row] = len(tokens), first
            yield result
            if progress is not None:
                progress(min(begin + self.batch, len(windows)), len(windows))

    @staticmethod
    def scored(windows: Windows) -> np.ndarray:
        """bool [B, T - 1]: whether the prediction at position t, of token t + 1, counts."""
        position = np.arange(1, windows.tokens.shape[1])
        return (position >= windows.first[:, None]) & (position < windows.lengths[:, None])

    def evaluation(self, nll: float, right: float) -> Evaluation:
        perplexity = math.exp(nll / self.count) if nll / self.count < 700 else math.inf
        bits = nll / math.log(2) / self.nbytes
        accuracy = right / self.count
        return Evaluation(perplexity, bits, self.count, self.nbytes, accuracy, self.context, self.stride)


def _encode(model: "LanguageModel", text: str, max_tokens: int | None) -> tuple[np.ndarray, int, int | None]:
    """The text's tokens, int32; the bytes that the scored ones stand for; the BOS token, if the tokenizer adds one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise W4A8Error("evaluate: the model has no tokenizer; put tokenizer.json into its directory")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else None
    kept = ids if max_tokens is None else ids[:max_tokens]

    def count(part: Sequence[int]) -> int:
        return len(tokenizer.decode(part, skip_special_tokens=False).encode("utf-8", "replace"))

    nbytes = len(text.encode("utf-8", "replace")) if len(kept) == len(ids) else count(kept)
    if bos is None:
        nbytes -= count(kept[:1])
    vocabulary = model.decoder.config.vocab_size
    if kept and max(kept) >= vocabulary:
        raise W4A8Error(f"evaluate: the tokenizer gives token {max(kept)}, but the model has {vocabulary} tokens")
    return np.asarray(kept, np.int32), max(nbytes, 1), bos


@partial(jax.jit, static_argnames=("structure", "chunk"))
def _score(
    structure: Structure, leaves: list[Array], tokens: Int[Array, "B T"], lengths: Int[Array, "B"], *, chunk: int
) -> tuple[Array, Array]:
    """Of tokens[:, 1:], fp32 [B, T - 1]: negative log likelihood, and whether it is found likeliest."""
    decoder = structure.merge(leaves)
    hidden, targets = _hidden(decoder, tokens, lengths, chunk), _chunks(tokens[:, 1:], chunk)

    def step(x: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = decoder.logits(x[0])
        return -_log_likelihood(logits, x[1])[0], _right(logits, x[1])

    nll, right = jax.lax.map(step, (hidden, targets))
    return _join(nll, tokens), _join(right, tokens)


@partial(jax.jit, static_argnames=("structure", "original_structure", "chunk"))
def _compare(
    structure: Structure,
    leaves: list[Array],
    original_structure: Structure,
    original_leaves: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    chunk: int,
) -> list[Array]:
    """Of tokens[:, 1:], fp32 [B, T - 1]: negative log likelihood of both, KL(original || model), same top-1, top-1
    right of both."""
    decoder, original = structure.merge(leaves), original_structure.merge(original_leaves)

    def step(x: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        logits, original_logits = decoder.logits(x[0]), original.logits(x[1])
        likelihood, log_p = _log_likelihood(logits, x[2])
        original_likelihood, original_log_p = _log_likelihood(original_logits, x[2])
        kl = jnp.sum(jnp.exp(original_log_p) * (original_log_p - log_p), axis=-1)
        agreed = jnp.argmax(logits, axis=-1) == jnp.argmax(original_logits, axis=-1)
        # Rounding may take the KL of near-equal distributions below 0.
        right = _right(logits, x[2]), _right(original_logits, x[2])
        return -likelihood, -original_likelihood, jnp.maximum(kl, 0), agreed.astype(jnp.float32), *right

    hidden = _hidden(decoder, tokens, lengths, chunk), _hidden(original, tokens, lengths, chunk)
    columns = jax.lax.map(step, (*hidden, _chunks(tokens[:, 1:], chunk)))
    return [_join(column, tokens) for column in columns]


def _hidden(decoder: Decoder, tokens: Array, lengths: Array, chunk: int) -> Float[Array, "C B chunk D"]:
    # A row of no tokens would attend to nothing; it is not scored, and one token keeps it finite.
    hidden, _ = decoder.hidden_states(tokens, lengths=jnp.maximum(lengths, 1))
    return _chunks(hidden[:, :-1], chunk)


def _log_likelihood(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> tuple[Array, Array]:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], log_p


def _right(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def _chunks(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [C, B, chunk, ...], padded at the end: logits are made for one chunk at a time."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(chunks: Float[Array, "C B chunk"], tokens: Array) -> Float[Array, "B T-1"]:
    return jnp.moveaxis(chunks, 0, 1).reshape(tokens.shape[0], -1)[:, : tokens.shape[1] - 1]

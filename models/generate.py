"""Text generation: jitted prefill and decode over a static, donated key-value cache.

Shapes are bucketed so that few programs are compiled. The length of prompts and the cache's capacity are rounded up to
powers of two, at most the context; prompts longer than a chunk are prefilled chunk by chunk, all of one shape. Within a
bucket nothing is compiled again, whatever the prompts, sampling parameters and stop tokens; a new batch size does
compile.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import W4A8Error

from .batching import MIN_BUCKET, bucket, check_prompts, chunk_size, chunks
from .config import DecoderConfig
from .decoder import Decoder
from .functional import Structure, split
from .kv_cache import KVCache
from .sampling import SamplingArrays, SamplingParams, sample, sequence_keys

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Timings:
    """Times of one generation. Compilation is not in them, except in `compile_seconds`.

    Attributes:
        prompt_tokens, new_tokens: of all sequences together.
        ttft: time to first token in seconds: prefill and the first draw.
        decode_seconds: from the first token to the last.
        tpot: seconds per decode step, each of which gives every unfinished sequence a token; 0 if there was none.
        tokens_per_second: of all sequences together, the first tokens left out; 0 if there were no others.
        compile_seconds: 0 unless this was the first generation in its bucket.
    """

    prompt_tokens: int
    new_tokens: int
    ttft: float
    decode_seconds: float
    tpot: float
    tokens_per_second: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sequence's continuation.

    Attributes:
        tokens: new token ids; a stop token that ended them is the last.
        finish_reason: "stop" at a stop token or by `Run.stop`, "length" at max_new_tokens or at the context's end.
        seed: of the random stream; generating again with it gives the same tokens.
    """

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    seed: int


class Generator:
    """Generates with a decoder, whose weights may change between calls.

    Args:
        decoder: the model.
        max_context: the longest prompt and continuation together, in tokens; the model's own by default.
        chunk: the longest piece of a prompt that is prefilled at once, in tokens, a power of two. Less is taken where
            attention scores, when XLA materializes them, would need more than about 1 GiB.
        steps_per_dispatch: decode steps that one call of the jitted loop makes at most.

    Raises:
        W4A8Error: an argument is out of range.
    """

    def __init__(
        self, decoder: Decoder, *, max_context: int | None = None, chunk: int = 2048, steps_per_dispatch: int = 16
    ):
        limit = decoder.config.max_context
        if max_context is not None and not 2 <= max_context <= limit:
            raise W4A8Error(f"max_context: expected 2 .. {limit}, the model's own, found {max_context}")
        if chunk < MIN_BUCKET or chunk & (chunk - 1):
            raise W4A8Error(f"chunk: expected a power of two of at least {MIN_BUCKET}, found {chunk}")
        if steps_per_dispatch < 1:
            raise W4A8Error(f"steps_per_dispatch: expected at least 1, found {steps_per_dispatch}")
        self.decoder = decoder
        self.max_context = max_context or limit
        self.chunk = chunk
        self.steps_per_dispatch = steps_per_dispatch
        self._warm: set[tuple] = set()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    ) -> tuple[list[Generation], Timings]:
        """Continues a batch of prompts; arguments and errors are those of `start`."""
        run = self.start(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens)
        for _ in run:
            pass
        return run.generations, run.timings

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
        latency: float | None = None,
    ) -> "Run":
        """Prepares a generation; iterate over the result to carry it out.

        Args:
            prompts: token ids of each sequence. An empty prompt stands for the model's bos token.
            max_new_tokens: for each sequence; fewer where the context ends before.
            sampling: greedy by default. If prompts share one, prompt i draws with seed + i.
            stop_tokens: ids that end a sequence: one list for all, or one for each.
            latency: seconds between deliveries of tokens to aim for, in streaming; by default, each dispatch of the
                decode loop makes all its steps. The tokens do not depend on it.

        Raises:
            W4A8Error: a prompt is longer than the context or empty, a token id is outside the vocabulary, or an
                argument does not fit.
        """
        return Run(self, prompts, max_new_tokens, sampling, stop_tokens, latency)


class Run:
    """A generation under way. Iterating gives, per dispatch, a list of new token ids for each sequence.

    Attributes:
        generations: one for each prompt, once the iteration is over.
        timings: likewise.
    """

    generations: list[Generation]
    timings: Timings

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        stop_tokens: Sequence[int] | Sequence[Sequence[int]],
        latency: float | None,
    ):
        config, context = generator.decoder.config, generator.max_context
        self._generator, self._latency = generator, latency
        self._prompts = check_prompts(prompts, config, context - 1)
        if max_new_tokens < 1:
            raise W4A8Error(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        batch = len(self._prompts)
        lengths = np.array([len(p) for p in self._prompts], np.int32)
        self._lengths = lengths
        self._limit = np.minimum(max_new_tokens, context - lengths).astype(np.int32)
        self._params = _spread(sampling, batch)
        self._sampling = SamplingArrays.create(self._params)
        self._stop = _stop_array(stop_tokens, batch)
        self._done = np.zeros(batch, bool)
        self._reasons: list[FinishReason] = ["stop"] * batch
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._slots = bucket(int((lengths + self._limit).max()) - 1, context)
        chunk = chunk_size(config, batch, generator.chunk)
        self._width = min(chunk, bucket(int(lengths.max()), context))

    def stop(self, sequence: int) -> None:
        """Ends a sequence now, with finish_reason "stop"; tokens of the same dispatch are kept."""
        self._done[sequence], self._reasons[sequence] = True, "stop"

    def __iter__(self) -> Iterator[list[list[int]]]:
        structure, leaves = split(self._generator.decoder)
        config, most = self._generator.decoder.config, self._generator.steps_per_dispatch
        batch = len(self._prompts)
        decoder = self._generator.decoder
        cache = _create_cache(config, batch, self._slots, decoder.dtype, decoder.cache_sharding)
        cache, compile_seconds = self._compile(structure, leaves, cache)

        began = time.perf_counter()
        last = jnp.zeros((batch, config.hidden_size), self._generator.decoder.dtype)
        for tokens, lengths, fresh in chunks(self._prompts, self._width):
            cache, last = _prefill(structure, leaves, cache, last, tokens, lengths, fresh=fresh)
        token = _first(structure, leaves, last, self._sampling)
        yield self._receive(np.asarray(token)[:, None])
        first = then = time.perf_counter()
        ttft = first - began

        steps, made, busy = (1 if self._latency else most), 0, 0.0
        while not self._done.all():
            then = time.perf_counter()
            count = np.array([len(t) for t in self._tokens], np.int32)
            arrays = (self._done.copy(), count, self._limit, self._stop, self._sampling)
            cache, token, out, taken = _decode(structure, leaves, cache, token, *arrays, steps, most=most)
            columns = int(taken)
            new = self._receive(np.asarray(out)[:, :columns])
            seconds = time.perf_counter() - then
            made, busy = made + columns, busy + seconds
            if self._latency:
                steps = int(np.clip(self._latency * columns / seconds, 1, most))
            yield new
        self._finish(ttft, busy, made, compile_seconds)

    def _compile(self, structure: Structure, leaves: list[Array], cache: KVCache) -> tuple[KVCache, float]:
        """Runs each program once, if this bucket is new, so that timings are free of compilation."""
        generator, batch = self._generator, len(self._prompts)
        long = int(self._lengths.max()) > self._width
        most = generator.steps_per_dispatch
        key = (structure, batch, self._width, self._slots, self._stop.shape, long, most)
        if key in generator._warm:
            return cache, 0.0
        began = time.perf_counter()
        tokens, lengths = np.zeros((batch, self._width), np.int32), np.ones(batch, np.int32)
        for fresh in (True, False)[: 1 + long]:
            last = jnp.zeros((batch, generator.decoder.config.hidden_size), generator.decoder.dtype)
            cache, last = _prefill(structure, leaves, cache, last, tokens, lengths, fresh=fresh)
        token = _first(structure, leaves, last, self._sampling)
        arrays = (self._done, lengths, self._limit, self._stop, self._sampling)
        cache, *_ = _decode(structure, leaves, cache, token, *arrays, 0, most=most)  # no step
        cache = dataclasses.replace(cache, length=jnp.zeros_like(cache.length))  # what was written is out of reach
        jax.block_until_ready(cache)
        generator._warm.add(key)
        return cache, time.perf_counter() - began

    def _receive(self, columns: np.ndarray) -> list[list[int]]:
        """Appends tokens [B, steps] up to each sequence's end."""
        new: list[list[int]] = [[] for _ in self._tokens]
        for row in range(len(columns)):
            for token in columns[row].tolist():
                if self._done[row]:
                    break
                if token < 0:
                    count = len(self._tokens[row])
                    raise W4A8Error(
                        f"prompt {row}: the logits after {count} new tokens are NaN: a weight is not finite, or "
                        "activations overflow their dtype"
                    )
                new[row].append(token)
                self._tokens[row].append(token)
                stopped = token in self._stop[row]
                if stopped or len(self._tokens[row]) >= self._limit[row]:
                    self._done[row], self._reasons[row] = True, "stop" if stopped else "length"
        return new

    def _finish(self, ttft: float, decode_seconds: float, steps: int, compile_seconds: float) -> None:
        total, batch = sum(map(len, self._tokens)), len(self._tokens)
        self.generations = [
            Generation(tuple(tokens), self._reasons[row], self._params[row].seed or 0)
            for row, tokens in enumerate(self._tokens)
        ]
        self.timings = Timings(
            prompt_tokens=int(self._lengths.sum()),
            new_tokens=total,
            ttft=ttft,
            decode_seconds=decode_seconds,
            tpot=decode_seconds / steps if steps else 0.0,
            tokens_per_second=(total - batch) / decode_seconds if steps else 0.0,
            compile_seconds=compile_seconds,
        )


def _spread(sampling: SamplingParams | Sequence[SamplingParams] | None, batch: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        shared = (sampling or SamplingParams(seed=0)).with_seed()
        return [dataclasses.replace(shared, seed=((shared.seed or 0) + row) % 2**32) for row in range(batch)]
    if len(sampling) != batch:
        raise W4A8Error(f"sampling: expected one or {batch}, as many as prompts, found {len(sampling)}")
    return [params.with_seed() for params in sampling]


def _stop_array(stop_tokens: Sequence[int] | Sequence[Sequence[int]], batch: int) -> Int[np.ndarray, "B S"]:
    """Stop ids of each sequence, padded with -1 to a power of two, so that their number seldom compiles anew."""
    each = [list(np.atleast_1d(np.asarray(s, np.int64))) for s in stop_tokens]
    nested = any(not isinstance(s, int | np.integer) for s in stop_tokens)
    if nested and len(each) != batch:
        raise W4A8Error(f"stop_tokens: expected one list for all or {batch}, as many as prompts, found {len(each)}")
    rows = each if nested else [[i for ids in each for i in ids]] * batch
    width = max(4, 1 << (max(map(len, rows)) - 1).bit_length() if max(map(len, rows)) else 0)
    return np.array([[*ids, *[-1] * (width - len(ids))] for ids in rows], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _create_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> KVCache:
    return KVCache.create(config, batch, slots, dtype, sharding)


@functools.partial(jax.jit, static_argnames=("structure", "fresh"), donate_argnames=("cache", "last"))
def _prefill(
    structure: Structure,
    leaves: list[Array],
    cache: KVCache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    fresh: bool,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Feeds a piece of the prompts; `last` holds the hidden state of each sequence's latest token."""
    hidden, filled = structure.merge(leaves).hidden_states(tokens, cache, lengths=lengths, fresh=fresh)
    assert filled is not None
    row = jnp.arange(tokens.shape[0])
    latest = hidden[row, jnp.maximum(lengths - 1, 0)]
    return filled, jnp.where((lengths > 0)[:, None], latest, last)


@functools.partial(jax.jit, static_argnames=("structure",))
def _first(
    structure: Structure, leaves: list[Array], last: Float[Array, "B D"], sampling: SamplingArrays
) -> Int[Array, "B"]:
    return _draw(structure.merge(leaves).logits(last), sampling, jnp.zeros(last.shape[0], jnp.int32))


@functools.partial(jax.jit, static_argnames=("structure", "most"), donate_argnames=("cache",))
def _decode(
    structure: Structure,
    leaves: list[Array],
    cache: KVCache,
    token: Int[Array, "B"],
    done: Bool[Array, "B"],
    count: Int[Array, "B"],
    limit: Int[Array, "B"],
    stop: Int[Array, "B S"],
    sampling: SamplingArrays,
    steps: Int[Array, ""],
    *,
    most: int,
) -> tuple[KVCache, Int[Array, "B"], Int[Array, "B most"], Int[Array, ""]]:
    """Makes up to `steps` <= `most` decode steps, fewer once all sequences are done.

    Args:
        token: the latest token of each sequence, not in the cache yet; count: how many were drawn so far.
        done: sequences that draw no more; limit: the count at which each ends; stop: ids at which each ends.

    Returns:
        The cache, the latest tokens, the new tokens [B, most] (meaningless after a sequence's end), the steps made.
    """
    model = structure.merge(leaves)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        step, _, _, done, _, _ = carry
        return (step < steps) & ~jnp.all(done)

    def body(carry: tuple) -> tuple:
        step, cache, token, done, count, out = carry
        hidden, cache = model.hidden_states(token[:, None], cache, lengths=(~done).astype(jnp.int32))
        token = jnp.where(done, token, _draw(model.logits(hidden[:, 0]), sampling, count))
        out = out.at[:, step].set(token)
        count += ~done
        done |= (token < 0) | (count >= limit) | jnp.any(token[:, None] == stop, axis=1)
        return step + 1, cache, token, done, count, out

    out = jnp.zeros((token.shape[0], most), jnp.int32)
    start = (jnp.int32(0), cache, token, done, count, out)
    step, cache, token, _, _, out = jax.lax.while_loop(unfinished, body, start)
    return cache, token, out, step


def _draw(logits: Float[Array, "B V"], sampling: SamplingArrays, index: Int[Array, "B"]) -> Int[Array, "B"]:
    keys = sequence_keys(sampling.seed, index)
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, keys)

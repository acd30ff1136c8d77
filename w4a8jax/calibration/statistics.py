"""What a layer's linear modules see on the calibration samples: Hessians, and the residual stream for the next layer.

One layer at a time. The residual stream of all samples stands in a temporary file; a pass over a layer reads it in
chunks of at most 2048 tokens, with the layer's key-value cache from chunk to chunk, so that memory does not grow with
the length of a trace (only the cache does, slowly). What enters the last module of attention and of the MLP is kept in
such files too while a layer is worked on, so that each is computed once. Only tokens that count go into a Hessian; what
follows the last of them in a trace is not even run.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.batching import bucket, chunk_size
from models.config import DecoderConfig
from models.decoder import Block
from models.kv_cache import LayerCache
from models.layers.rope import rope_table
from pallas_kernels.activations import activation_values

from ..one_ahead import one_ahead
from .data import Sample
from .hessian_sum import HessianSum

CHUNK = 2048  # tokens of a pass at once, over all samples of a batch

_OUTPUT = ""  # of a layer, among the names of its modules
_LAST = ("attention.output", "mlp.down")  # given what enters these, the layer's output takes little

Hessians = dict[str, Float[Array, "K K"]]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Samples that run together: the rows of the stream where each begins, and how they are cut."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: int
    width: int


class TokenFile:
    """A row for each of many tokens, in a file that vanishes with this object.

    Args:
        tokens: how many rows.
        width: D, of a row.
        dtype: of its values.
    """

    def __init__(self, tokens: int, width: int, dtype: Any):
        self.tokens, self.width, self.dtype = tokens, width, jnp.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="w4a8jax-tokens-")  # noqa: SIM115
        self._row_bytes = width * self.dtype.itemsize

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the file."""
        self._file.close()

    def read(self, start: int, count: int) -> Float[np.ndarray, "T D"]:
        """Rows start .. start + count - 1."""
        rows = np.empty((count, self.width), self.dtype)
        self._file.seek(start * self._row_bytes)
        self._file.readinto(rows.view(np.uint8))  # type: ignore[attr-defined]
        return rows

    def write(self, start: int, rows: Float[np.ndarray, "T D"]) -> None:
        self._file.seek(start * self._row_bytes)
        self._file.write(np.ascontiguousarray(rows).view(np.uint8).data)


class ResidualStream(TokenFile):
    """The residual stream of all samples before a layer, in a file that vanishes with this object.

    Args:
        samples: what to run.
        embedding: [V, D], rows are looked up.
        config: of the decoder.
        dtype: of its activations.
    """

    def __init__(self, samples: Sequence[Sample], embedding: np.ndarray, config: DecoderConfig, dtype: Any):
        self.config = config
        kept = [_until_last(sample) for sample in samples]
        kept.sort(key=lambda sample: len(sample.tokens))  # samples of like length run together
        self.mask = np.concatenate([sample.loss_mask for sample in kept])
        self.batches = _batches([len(sample.tokens) for sample in kept], config)
        super().__init__(len(self.mask), config.hidden_size, dtype)
        row = 0
        for sample in kept:
            for begin in range(0, len(sample.tokens), CHUNK):
                part = sample.tokens[begin : begin + CHUNK]
                self.write(row, np.asarray(embedding[part]).astype(self.dtype))
                row += len(part)


def hessians(
    block: Block,
    stream: ResidualStream,
    taps: Sequence[str],
    *,
    fp8: bool,
    kept: dict[str, TokenFile] | None = None,
    done: Callable[[int], None] | None = None,
) -> Hessians:
    """sum x x^T over the tokens that count, of the inputs x of some linear modules of a layer; fp32 [K, K] each.

    Args:
        block: the layer; modules that are quantized already compute as such.
        stream: before it.
        taps: paths of the modules, such as "attention.qkv".
        fp8: x as the W4A8 kernel multiplies it, rounded to FP8 by token, rather than as it comes.
        kept: files of what enters the last module of attention and of the MLP. Those that are there are read instead
            of computed; those of `taps` are added. So neither is computed twice for a layer.
        done: called with the number of tokens of each pass.
    """
    total = {tap: HessianSum(_input_size(block, tap)) for tap in taps}
    kept = {} if kept is None else kept
    new = {
        tap: TokenFile(stream.tokens, _input_size(block, tap), stream.dtype)
        for tap in taps
        if tap in _LAST and tap not in kept
    }
    for rows, values in _passes(block, stream, total, fp8=fp8, want=tuple(new), kept=kept, done=done):
        for tap, file in new.items():
            _write(file, rows, values[tap])
    kept |= new
    return {tap: total.pop(tap).result() for tap in taps}


def inputs(
    block: Block, stream: ResidualStream, taps: Sequence[str], tokens: Bool[np.ndarray, "T"]
) -> Iterator[dict[str, Float[np.ndarray, "C K"]]]:
    """The inputs of some modules of a layer at some tokens, chunk by chunk, in the stream's order.

    Args:
        block: the layer.
        stream: before it.
        taps: paths of the modules, such as "mlp".
        tokens: which of the stream's; its `mask` for those that count.
    """
    for rows, values in _passes(block, stream, {}, want=tuple(taps)):
        host = {tap: np.asarray(value) for tap, value in values.items()}
        for i, (start, count) in enumerate(rows):
            at = tokens[start : start + count]
            if at.any():
                yield {tap: value[i, :count][at] for tap, value in host.items()}


def advance(
    block: Block,
    stream: ResidualStream,
    *,
    kept: Mapping[str, TokenFile] | None = None,
    done: Callable[[int], None] | None = None,
) -> None:
    """Takes the stream from before the layer to behind it; `kept` as `hessians` left it."""
    for rows, found in _passes(block, stream, {}, want=(_OUTPUT,), kept=kept or {}, done=done):
        _write(stream, rows, found[_OUTPUT])


def _write(file: TokenFile, rows: list[tuple[int, int]], values: Float[Array, "B T K"]) -> None:
    host = np.asarray(values)
    for i, (start, count) in enumerate(rows):
        if count:
            file.write(start, host[i, :count])


def _until_last(sample: Sample) -> Sample:
    """Without what follows the last token that counts."""
    end = len(sample.tokens) - int(np.argmax(sample.loss_mask[::-1]))
    return Sample(sample.tokens[:end], sample.loss_mask[:end], sample.line)


def _batches(lengths: Sequence[int], config: DecoderConfig) -> list[_Batch]:
    """Consecutive samples whose lengths fall into the same bucket, as many as fill a chunk."""
    batches: list[_Batch] = []
    rows = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    index = 0
    while index < len(lengths):
        slots = bucket(lengths[index], 1 << 62)
        most = max(1, CHUNK // slots)
        end = index + 1
        while end < len(lengths) and end - index < most and bucket(lengths[end], 1 << 62) == slots:
            end += 1
        width = min(slots, chunk_size(config, most, CHUNK))
        # Rows of no tokens fill the batch, so that a bucket compiles once.
        missing = (0,) * (most - (end - index))
        batches.append(_Batch((*rows[index:end], *missing), (*lengths[index:end], *missing), slots, width))
        index = end
    return batches


def _passes(
    block: Block,
    stream: ResidualStream,
    sums: Mapping[str, HessianSum],
    *,
    fp8: bool = False,
    want: tuple[str, ...] = (),
    kept: Mapping[str, TokenFile] = MappingProxyType({}),
    done: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[tuple[int, int]], dict[str, Array]]]:
    """Runs the layer over the stream, chunk by chunk, and adds its tokens to the sums.

    Yields the chunk's place in the stream, first row and count for each sample; the inputs [B, T, K] of the modules
    wanted, or the layer's `_OUTPUT`.
    """
    for rows, counted, values, multiplied in one_ahead(_steps(block, stream, tuple(sums), fp8, want, kept)):
        for tap, tokens in multiplied.items():
            sums[tap].add(tokens, counted)
        yield rows, values
        if done is not None:
            done(sum(size for _, size in rows))


def _steps(
    block: Block,
    stream: ResidualStream,
    taps: tuple[str, ...],
    fp8: bool,
    want: tuple[str, ...],
    kept: Mapping[str, TokenFile],
) -> Iterator[tuple[list[tuple[int, int]], Bool[np.ndarray, "B T"], dict[str, Array], dict[str, Array]]]:
    """Of each chunk: its place, as `_passes` has it, which of its tokens count, and the results of `_step`."""
    config = stream.config
    graph, state = nnx.split(block)
    for batch in stream.batches:
        count, cache = len(batch.starts), None
        if batch.slots > batch.width and "attention.output" not in kept:
            slots = min(batch.slots, block.attention.window or batch.slots)
            shape = (count, slots, config.num_kv_heads, config.head_dim)
            cache = LayerCache(jnp.zeros(shape, stream.dtype), jnp.zeros(shape, stream.dtype))
        for begin in range(0, max(batch.lengths), batch.width):
            x = np.zeros((count, batch.width, config.hidden_size), stream.dtype)
            counted = np.zeros(x.shape[:2], bool)
            given = {path: np.zeros((*x.shape[:2], file.width), file.dtype) for path, file in kept.items()}
            rows = []
            for i, (first, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
                start, size = first + begin, max(0, min(batch.width, length - begin))
                x[i, :size] = stream.read(start, size)
                counted[i, :size] = stream.mask[start : start + size]
                for path, file in kept.items():
                    given[path][i, :size] = file.read(start, size)
                rows.append((start, size))
            starts = np.minimum(begin, batch.lengths).astype(np.int32)
            sizes = np.array([size for _, size in rows], np.int32)
            values, cache, multiplied = _step(
                graph, state, config, x, starts, sizes, cache, given,
                fresh=begin == 0 or "attention.output" in kept, fp8=fp8, want=want, taps=taps,
            )  # fmt: skip
            yield rows, counted, values, multiplied


@partial(jax.jit, static_argnames=("graph", "config", "fresh", "fp8", "want", "taps"), donate_argnames=("cache",))
def _step(
    graph: Any,
    state: Any,
    config: DecoderConfig,
    x: Float[Array, "B T D"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
    cache: LayerCache | None,
    given: dict[str, Float[Array, "B T K"]],
    *,
    fresh: bool,
    fp8: bool,
    want: tuple[str, ...],
    taps: tuple[str, ...],
) -> tuple[dict[str, Array], LayerCache | None, dict[str, Float[Array, "B T K"]]]:
    """What is wanted, the cache, and the inputs of `taps` as the kernel multiplies them."""
    block = nnx.merge(graph, state)
    seen: dict[str, Array] = {}
    for path, value in given.items():
        _replace(block, path, value)
    # Inner modules first: what stands in for a module has no modules of its own.
    for tap in sorted({*taps, *want} - {_OUTPUT}, key=lambda path: -path.count(".")):
        parent, name = _parent(block, tap)
        setattr(parent, name, _Tap(tap, getattr(parent, name), seen))
    # As in Decoder.hidden_states: padding has the position of the last token.
    step = jnp.minimum(jnp.arange(x.shape[1], dtype=jnp.int32), jnp.maximum(lengths, 1)[:, None] - 1)
    table = rope_table(config.rope, config.head_dim, config.max_context, start[:, None] + step)
    y, cache = block(x, table, start, lengths, cache, fresh)
    seen[_OUTPUT] = y
    multiplied = {tap: kernel_inputs(jax.lax.optimization_barrier(seen[tap]), fp8) for tap in taps}
    return {name: seen[name] for name in want}, cache, multiplied


def kernel_inputs(x: Float[Array, "*batch K"], fp8: bool) -> Float[Array, "*batch K"]:
    """fp32 inputs as a kernel multiplies them: those of W4A8 rounded to FP8 by token."""
    if not fp8:
        return x.astype(jnp.float32)
    x8, token_scale = activation_values(x)
    return x8 * token_scale


def _replace(block: Block, path: str, value: Float[Array, "B T K"]) -> None:
    """Makes attention or the MLP no more than its last module, of a given input."""
    last = module_at(block, path)
    if path == "attention.output":
        block.attention = lambda x, table, start, lengths, cache, fresh: (last(value), cache)  # type: ignore[assignment]
    else:
        block.mlp = lambda x: last(value)  # type: ignore[assignment]


class _Tap:
    """Stands in for a module while a layer is traced, and notes its input."""

    def __init__(self, name: str, module: Callable[[Array], Array], seen: dict[str, Array]):
        self.name, self.module, self.seen = name, module, seen

    def __call__(self, x: Array) -> Array:
        self.seen[self.name] = x
        return self.module(x)


def _parent(block: Block, path: str) -> tuple[Any, str]:
    """The module that holds a module, and its name there."""
    *parents, name = path.split(".")
    holder: Any = block
    for step in parents:
        holder = getattr(holder, step)
    return holder, name


def module_at(block: Block, path: str) -> Any:
    """A module of a layer by its path, such as "attention.qkv"."""
    holder, name = _parent(block, path)
    return getattr(holder, name)


def _input_size(block: Block, path: str) -> int:
    return module_at(block, path).weight.get_value().shape[-1]

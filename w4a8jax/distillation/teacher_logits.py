"""A teacher's top-k log probabilities on disk, so that a large teacher runs once."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.decoder import Decoder
from models.functional import Structure, split

from .batches import Batches
from .loss import TopK, chunk_length, hidden_states

_FLUSH = 16  # batches that an interruption can cost


class TeacherLogits:
    """Two arrays in a folder, a row for each sample: log probabilities fp32 and ids int32 [samples, T - 1, k].

    Args:
        folder: made if it is not there; what an earlier run has finished there is kept.
        teacher: the decoder; batches: of the data; batch: rows computed together.
        k: at most the vocabulary.
        place: puts a batch's arrays on the devices.
        progress: called with the rows done and their number.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Decoder,
        batches: Batches,
        batch: int,
        k: int,
        *,
        place: Callable[[Any], Any] = lambda x: x,
        progress: Callable[[int, int], None] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        shape = (len(batches), batches.width - 1, min(k, teacher.config.vocab_size))
        journal = folder / "rows.json"
        done = json.loads(journal.read_text())["done"] if journal.is_file() else 0
        files = [(folder / "log_p.npy", np.float32), (folder / "ids.npy", np.int32)]
        if done:
            self._arrays = [np.lib.format.open_memmap(path, mode="r+") for path, _ in files]
        else:
            self._arrays = [np.lib.format.open_memmap(path, mode="w+", dtype=d, shape=shape) for path, d in files]
        structure, leaves = split(teacher)
        for i, part in enumerate(batches.in_order(batch)):
            stop = min((i + 1) * batch, len(batches))
            if stop <= done:
                continue
            found = _top_k(structure, leaves, place(part.tokens), place(part.lengths), k=shape[-1])
            for array, values in zip(self._arrays, found, strict=True):
                array[i * batch : stop] = np.asarray(values)[: stop - i * batch]
            if stop == len(batches) or i % _FLUSH == _FLUSH - 1:
                for array in self._arrays:
                    array.flush()
                temporary = journal.with_suffix(".tmp")
                temporary.write_text(json.dumps({"done": stop}))
                temporary.replace(journal)
            if progress is not None:
                progress(stop, len(batches))

    def rows(self, rows: np.ndarray) -> TopK:
        """numpy arrays [B, T - 1, k] of samples."""
        log_p, ids = (array[rows] for array in self._arrays)
        return TopK(log_p, ids)


@partial(jax.jit, static_argnames=("structure", "k"))
def _top_k(
    structure: Structure, leaves: list[Array], tokens: Int[Array, "B T"], lengths: Int[Array, "B"], *, k: int
) -> tuple[Float[Array, "B T-1 k"], Int[Array, "B T-1 k"]]:
    decoder = structure.merge(leaves)
    hidden = hidden_states(decoder, tokens, lengths)
    batch, steps, width = hidden.shape
    chunk = chunk_length(decoder.config.vocab_size, batch, steps)
    pieces = jnp.pad(hidden, ((0, 0), (0, -steps % chunk), (0, 0))).reshape(batch, -1, chunk, width)
    found = jax.lax.map(
        lambda h: jax.lax.top_k(jax.nn.log_softmax(decoder.logits(h), axis=-1), k), jnp.moveaxis(pieces, 1, 0)
    )
    log_p, ids = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, k)[:, :steps] for x in found)
    return log_p, ids.astype(jnp.int32)

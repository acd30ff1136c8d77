"""Logits of every family against transformers, on small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_cases import CASES, CHUNKS, PROMPTS, STEPS
from safetensors.numpy import load_file

import w4a8jax
from models.decoder import Decoder
from models.functional import split
from models.kv_cache import KVCache

LENGTHS = np.array(PROMPTS) + np.array(CHUNKS) + STEPS
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="session")
def logits(torch_oracle: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that scripts/logits.py filled."""
    folder = tmp_path_factory.mktemp("logits")
    cases = [asdict(case) for case in CASES]
    job = {"cases": cases, "prompts": PROMPTS, "chunks": CHUNKS, "steps": STEPS}
    (folder / "job.json").write_text(json.dumps(job))
    torch_oracle("logits.py", folder)
    return folder


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two [B, S, V] over the tokens that are there, in norm."""
    real = np.arange(found.shape[1]) < LENGTHS[:, None]
    return float(np.linalg.norm((found - expected)[real]) / np.linalg.norm(expected[real]))


def median_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The median over the tokens that are there of each one's relative error."""
    real = np.arange(found.shape[1]) < LENGTHS[:, None]
    return float(np.median(np.linalg.norm((found - expected)[real], axis=-1) / np.linalg.norm(expected[real], axis=-1)))


def cached_logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of the batch by prefill, a chunk of different lengths, and single steps."""
    structure, leaves = split(decoder)

    def step(leaves: list, tokens: jax.Array, cache: KVCache, lengths: jax.Array, fresh: bool) -> tuple:
        return structure.merge(leaves)(tokens, cache, lengths=lengths, fresh=fresh)

    compiled = jax.jit(step, static_argnames="fresh", donate_argnums=2)
    cache = KVCache.create(decoder.config, len(tokens), int(max(LENGTHS)), decoder.dtype)
    start = np.zeros(len(tokens), int)
    rows = np.arange(len(tokens))[:, None]
    result = np.zeros((*tokens.shape, decoder.config.vocab_size), np.float32)
    ones = (1,) * len(tokens)
    for lengths in (PROMPTS, CHUNKS, *[ones] * STEPS):
        positions = start[:, None] + np.arange(max(lengths))
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        piece = np.where(real, tokens[rows, np.where(real, positions, 0)], 7)  # padding must not matter
        found, cache = compiled(leaves, jnp.asarray(piece), cache, jnp.asarray(lengths), fresh=not start.any())
        row, column = np.nonzero(real)
        result[row, positions[row, column]] = np.asarray(found)[row, column]
        start = start + np.array(lengths)
    np.testing.assert_array_equal(np.asarray(cache.length), LENGTHS)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_through_the_cache(logits: Path, name: str):
    expected = load_file(logits / f"{name}.safetensors")
    decoder = w4a8jax.load(logits / name, dtype="float32").decoder
    found = cached_logits(decoder, expected["tokens"].astype(np.int32))
    spread = np.std(expected["cached"], axis=-1).mean()
    assert spread > 0.1, "the logits are too even for a comparison to mean much"
    error = relative_error(found, expected["cached"])
    assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_as_exact_as_those_of_transformers(logits: Path, name: str):
    expected = load_file(logits / f"{name}.safetensors")
    decoder = w4a8jax.load(logits / name, dtype="bfloat16").decoder
    structure, leaves = split(decoder)
    forward = jax.jit(lambda leaves, tokens, lengths: structure.merge(leaves)(tokens, lengths=lengths)[0])
    tokens = jnp.asarray(expected["tokens"].astype(np.int32))
    found = np.asarray(forward(leaves, tokens, jnp.asarray(LENGTHS)))
    assert found.dtype == np.float32
    # Where bf16 changes the choice of an expert, the token's error says nothing of exactness; the median leaves it out.
    error = relative_error if decoder.config.moe is None else median_error
    ours, theirs = (error(logits, expected["whole"]) for logits in (found, expected["bf16"]))
    assert ours < 1.5 * theirs, f"{name}: relative error {ours:.2e}, that of transformers {theirs:.2e}"

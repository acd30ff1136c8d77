"""Models whose kernels are divided between two Hopper GPUs, beside one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ties import assert_tie, perturbed_logits

import w4a8jax
from pallas_kernels import FragmentWeight, Partition, W4Weight, backend, divided, prepare_weight, w4a8_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend() != "hopper" or jax.device_count() < 2, reason="needs two Hopper GPUs"),
]


def two(axis: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), (axis,))


@pytest.mark.parametrize("m", [1, 9, 64, 129, 1024])
@pytest.mark.parametrize(("rows", "columns"), [("tensor", None), (None, "tensor")])
def test_products(m: int, rows: str | None, columns: str | None) -> None:
    rng, (n, k) = np.random.default_rng(m), (512, 1024)
    packed = jnp.asarray(rng.integers(-(2**31), 2**31, (n, k // 8)), jnp.int32)
    scale = jnp.asarray(np.exp2(rng.uniform(-9, -5, (n, k // 128))), jnp.bfloat16)
    w, partition = W4Weight.from_checkpoint(packed, scale), Partition(two("tensor"), rows=rows, columns=columns)
    # Tokens are greater in one half than in the other, whose own scales would be others.
    x = jnp.asarray(rng.standard_normal((m, k)) * np.where(np.arange(k) < k // 2, 1, 30), jnp.bfloat16)
    placed = jax.device_put(
        w, jax.tree.map(lambda spec: NamedSharding(partition.mesh, spec), divided.specs(w, partition))
    )
    kernel, whole = prepare_weight(placed, partition=partition), FragmentWeight.from_weight(w)
    assert isinstance(kernel, FragmentWeight)
    np.testing.assert_array_equal(kernel.words, whole.words)
    expected = np.asarray(jax.jit(lambda x, w: w4a8_matmul(x, w, out_dtype=jnp.float32))(x, w))
    found = np.asarray(jax.jit(w4a8_matmul)(jax.device_put(x, NamedSharding(partition.mesh, jax.P())), kernel))
    # Rounding to bf16 is 1.7e-3; with columns divided, of both parts and of their sum.
    limit = 2e-3 if columns is None else 2.7e-3
    assert np.linalg.norm(found.astype(np.float32) - expected) < limit * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "axis"), [("dense", "tensor"), ("moe", "tensor"), ("moe", "expert")])
def test_reference_models(tmp_path: Path, name: Any, axis: str) -> None:
    path = tmp_path / name
    w4a8jax.quantize(w4a8jax.reference_model(name), path, search="none", progress=False)
    one, many, reference = (
        w4a8jax.load(path, mesh=mesh, kernels=kernels)
        for mesh, kernels in ((None, True), (two(axis), True), (None, False))
    )
    leaves = jax.tree.leaves(nnx.state(many.decoder), is_leaf=lambda v: isinstance(v, W4Weight | FragmentWeight))
    weights = [leaf for leaf in leaves if isinstance(leaf, W4Weight | FragmentWeight)]
    assert weights
    assert all(isinstance(w, FragmentWeight) and w.partition is not None for w in weights)

    text = w4a8jax.reference_text("test")
    perplexity = [w4a8jax.evaluate(model, text, max_tokens=4096).perplexity for model in (one, many)]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=1e-3)
    prompts = ["import os\nimport sys", "class Stack:\n    def __init__(self):\n        self.items = []", "def main("]
    greedy = w4a8jax.SamplingParams(temperature=0.0)
    tokens = [[r.tokens for r in m.generate(prompts, max_new_tokens=64, sampling=greedy)] for m in (many, reference)]
    for prompt, found, expected in zip(prompts, *tokens, strict=True):
        same = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1), None)
        if same is not None:
            ids = [*reference.tokenizer.encode(prompt), *expected[:same]]
            theirs, ours = (np.asarray(model.logits(ids)[-1], np.float64) for model in (reference, many))
            assert_tie(ours, theirs, perturbed_logits(path, ids), found[same], expected[same])

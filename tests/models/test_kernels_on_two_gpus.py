"""Models whose kernels are divided between two Hopper GPUs, beside one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

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

    assert_no_farther(many, one, reference)
    prompts = ["import os\nimport sys", "class Stack:\n    def __init__(self):\n        self.items = []", "def main("]
    greedy = w4a8jax.SamplingParams(temperature=0.0)
    for prompt, result in zip(prompts, many.generate(prompts, max_new_tokens=64, sampling=greedy), strict=True):
        # Decoded step by step, with the cache divided, as the whole is at once: the choice is the best but for ties.
        prompt_ids = many.tokenizer.encode(prompt)
        logits = np.asarray(many.logits([*prompt_ids, *result.tokens]))[len(prompt_ids) - 1 : -1]
        chosen = logits[np.arange(len(result.tokens)), list(result.tokens)]
        assert np.mean(chosen == logits.max(-1)) > 0.9


def assert_no_farther(many: Any, one: Any, reference: Any) -> None:
    """Divided kernels are as far from the reference as those of one device are, and from those to neither side.

    Every rounding to bf16 may change a step of FP8, and that everything after it: logits of two exact implementations
    are a distance apart that depends on the model (`ties`), not on which roundings differ.
    """
    ids = np.asarray(reference.tokenizer.encode(w4a8jax.reference_text("test"))[: 8 * 512]).reshape(8, 512)
    logits = [np.concatenate([np.asarray(model.logits(row)) for row in ids]) for model in (reference, one, many)]
    own, divided = (np.linalg.norm(found - logits[0]) for found in logits[1:])
    print(f"from the reference: one device {own:.4f}, divided {divided:.4f}; of {np.linalg.norm(logits[0]):.1f}")
    assert 0 < divided < 1.2 * own
    targets = np.concatenate([[*row[1:], 0] for row in ids])
    scores = [np.asarray(jax.nn.log_softmax(found))[np.arange(len(targets)), targets] for found in logits]
    difference = np.delete(scores[2] - scores[1], np.arange(511, len(targets), 512))
    error = np.std(difference) / np.sqrt(len(difference))
    print(f"log probability: {np.mean(difference):.6f} +- {error:.6f} nats")
    assert abs(np.mean(difference)) <= 4 * error  # both are 0 where no product is divided

"""Models on a Hopper GPU: the kernel beside the reference."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ties import assert_tie, perturbed_logits

import w4a8jax
from pallas_kernels import FragmentWeight, W4Weight, backend, prepare_weight
from pallas_kernels.fragments import Scheme

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(backend() != "hopper", reason="no Hopper GPU")]


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("m", [1, 9, 64, 65, 129, 1024])
@pytest.mark.parametrize("shape", [(128, 128), (384, 640)])
def test_op_for_any_number_of_tokens(m: int, shape: tuple[int, int], scheme: Scheme) -> None:
    rng = np.random.default_rng(m)
    packed = jnp.asarray(rng.integers(-(2**31), 2**31, (shape[0], shape[1] // 8)), jnp.int32)
    scale = jnp.asarray(np.exp2(rng.uniform(-9, -5, (shape[0], shape[1] // 128))), jnp.bfloat16)
    w = W4Weight.from_checkpoint(packed, scale, numerics="lut" if scheme == "w4a8" else "exact")
    kernel = prepare_weight(w, scheme)
    matmul = {"w4a8": w4a8jax.w4a8_matmul, "w4a16": w4a8jax.w4a16_matmul}[scheme]
    assert isinstance(kernel, FragmentWeight)
    x = jnp.asarray(rng.standard_normal((m, shape[1])), jnp.bfloat16)
    expected = jax.jit(partial(matmul, out_dtype=jnp.float32))(x, w)
    found = jax.jit(matmul)(x, kernel).astype(jnp.float32)
    assert found.shape == expected.shape
    assert jnp.linalg.norm(found - expected) < 2e-3 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_reference_model_generates_the_same(tmp_path: Path, name: Any, scheme: Scheme) -> None:
    path = tmp_path / scheme
    w4a8jax.quantize(w4a8jax.reference_model(name), path, scheme=scheme, search="none", progress=False)
    prompts = ["import os\nimport sys", "class Stack:\n    def __init__(self):\n        self.items = []", "def main("]
    greedy = w4a8jax.SamplingParams(temperature=0.0)
    models = {kernels: w4a8jax.load(path, kernels=kernels) for kernels in (True, False)}
    tokens, perplexity = {}, {}
    for kernels, model in models.items():
        mlp: Any = model.decoder.layers[-1].mlp
        weight = (mlp.experts.down if name == "moe" else mlp.down.weight).get_value()
        assert isinstance(weight, FragmentWeight if kernels else W4Weight)
        # Of all tokens: changes of 2^-16 in the sums of products move that of 4,096 by up to 2.3e-3, of all by 6e-4.
        perplexity[kernels] = w4a8jax.evaluate(model, w4a8jax.reference_text("test")).perplexity
        tokens[kernels] = [r.tokens for r in model.generate(prompts, max_new_tokens=64, sampling=greedy)]
    assert perplexity[True] == pytest.approx(perplexity[False], rel=1e-3)
    for prompt, found, expected in zip(prompts, tokens[True], tokens[False], strict=True):
        same = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1), None)
        if same is not None:
            ids = [*models[False].tokenizer.encode(prompt), *expected[:same]]
            kernel, reference = (np.asarray(models[kernels].logits(ids)[-1], np.float64) for kernels in (True, False))
            assert_tie(kernel, reference, perturbed_logits(path, ids), found[same], expected[same])

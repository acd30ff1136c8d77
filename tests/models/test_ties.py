"""What counts as a tie between the kernel and the reference."""

from pathlib import Path

import numpy as np
import pytest
from ties import SEEDS, assert_tie, perturbed_logits

import w4a8jax
from models.layers import linear


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Of a kernel, a reference, and perturbed references: tokens 3 and 5 are best, 0.01 apart."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=100)
    reference[[3, 5]] = 10.0, 10.01
    kernel, *perturbed = (reference + 0.02 * rng.normal(size=100) for _ in range(1 + SEEDS))
    return kernel, reference, perturbed


def test_a_tie(logits: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    assert_tie(*logits, 3, 5)


def test_a_tie_of_three(logits: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    kernel, reference, perturbed = logits
    change = 10.005 - reference[7]
    for values in (kernel, reference, *perturbed):
        values[7] += change
    assert_tie(kernel, reference, perturbed, 3, 5)


def test_a_token_that_is_not_among_the_best(logits: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    for pair in ((3, 7), (7, 3), (7, 5)):
        with pytest.raises(AssertionError):
            assert_tie(*logits, *pair)


def test_tokens_too_far_apart(logits: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    kernel, reference, perturbed = logits
    for values in (kernel, reference, *perturbed):
        values[5] += 0.2
    with pytest.raises(AssertionError):
        assert_tie(kernel, reference, perturbed, 3, 5)


def test_a_kernel_that_is_off(logits: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    kernel, reference, perturbed = logits
    kernel[50] += 0.3
    with pytest.raises(AssertionError):
        assert_tie(kernel, reference, perturbed, 3, 5)


def test_the_reference_moves_when_its_sums_do(tmp_path: Path) -> None:
    """By some hundredths of the largest logit, not by more; and is itself again afterwards."""
    path, matmul = tmp_path / "model", linear.w4a8_matmul
    w4a8jax.quantize(w4a8jax.reference_model("dense"), path, search="none", progress=False)
    model = w4a8jax.load(path, kernels=False)
    ids = model.tokenizer.encode("import os\nimport sys\n")
    before = np.asarray(model.logits(ids)[-1], np.float64)
    found = perturbed_logits(path, ids)
    spread = [np.abs(values - before).max() / np.abs(before).max() for values in found]
    assert len(spread) == SEEDS
    assert 0.005 < max(spread) < 0.1
    assert linear.w4a8_matmul is matmul
    np.testing.assert_array_equal(w4a8jax.load(path, kernels=False).logits(ids)[-1], before)

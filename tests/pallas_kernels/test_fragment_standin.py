"""The stand-in for kernels finds in their layout what was put there, so that it may stand in."""

import fragment_standin
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_checkpoint, weight_of

from pallas_kernels import FragmentWeight, w4a8_matmul, w4a8_ragged_matmul
from pallas_kernels.fragments import Scheme
from pallas_kernels.ops import w4a8_gated_matmul
from pallas_kernels.rounding import round_to
from pallas_kernels.weight_format import Numerics

FORMS = [("lut", -7, "w4a8"), ("lut", -8, "w4a8"), ("exact", -7, "w4a8"), ("exact", -8, "w4a8"), ("exact", -8, "w4a16")]


@pytest.mark.parametrize("shape", [(128, 384), (3, 64, 256)])
@pytest.mark.parametrize(("numerics", "code_min", "scheme"), FORMS)
def test_operands_are_those_of_the_weight(
    numerics: Numerics, code_min: int, scheme: Scheme, shape: tuple[int, ...]
) -> None:
    w = weight_of(*random_checkpoint(1, *shape, code_min=code_min), numerics=numerics, code_min=code_min)
    expected = w.operand() if scheme == "w4a8" else round_to(w.operand(), jnp.bfloat16)
    found = fragment_standin.operand(FragmentWeight.from_weight(w, scheme))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_products_are_those_of_the_reference() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 256)), jnp.bfloat16)
    w, experts = (weight_of(*random_checkpoint(2, *shape)) for shape in ((128, 256), (3, 128, 256)))
    sizes = jnp.asarray([2, 0, 5], jnp.int32)
    gate_up = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 512)), jnp.bfloat16)
    expected = w4a8_matmul(x, w), w4a8_ragged_matmul(x, experts, sizes), w4a8_gated_matmul(gate_up, w)
    with fragment_standin.kernels():
        found = (
            w4a8_matmul(x, FragmentWeight.from_weight(w)),
            w4a8_ragged_matmul(x, FragmentWeight.from_weight(experts), sizes),
            w4a8_gated_matmul(gate_up, FragmentWeight.from_weight(w)),
        )
    for ours, theirs in zip(found, expected, strict=True):
        # Sums in another order may be rounded to the neighbour in bf16.
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=2**-7, atol=1e-6)
        assert np.mean(np.asarray(ours) == np.asarray(theirs)) > 0.99

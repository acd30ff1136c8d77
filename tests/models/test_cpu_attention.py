"""Causal attention on CPUs against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import cpu_attention as module
from models.layers.cpu_attention import cpu_attention


@pytest.mark.parametrize("lengths", [None, (300, 150, 0)])
@pytest.mark.parametrize(("steps", "window"), [(300, None), (300, 64), (300, 300), (1030, 500), (128, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_xla(monkeypatch, steps, window, lengths, dtype):
    monkeypatch.setattr(module, "_QUERIES", 100)  # pieces of unlike size
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, steps, heads, 32)), dtype) for heads in (6, 2, 2))
    count = None if lengths is None else jnp.asarray([min(n, steps) for n in lengths])
    found = np.asarray(cpu_attention(q, k, v, count, window), np.float32)
    local = None if window is None or window >= steps else (window - 1, 0)
    wide = (a.astype(jnp.float32) for a in (q, k, v))
    expected = np.asarray(
        jax.nn.dot_product_attention(*wide, is_causal=True, key_value_seq_lengths=count, local_window_size=local)
    )
    assert found.shape == q.shape
    assert np.isfinite(found).all()
    for i in range(len(q)):
        real = slice(0, steps if count is None else int(count[i]))
        np.testing.assert_allclose(found[i, real], expected[i, real], atol=2e-5 if dtype == "float32" else 0.02)

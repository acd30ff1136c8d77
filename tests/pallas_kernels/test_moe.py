"""Routing and the experts' MLP against loops over tokens, and the order of their roundings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    W4A8Error,
    W4Weight,
    expert_rows,
    moe_mlp,
    route,
    w4a8_matmul,
    w4a8_moe_mlp,
    w4a8_ragged_matmul,
    w4a16_matmul,
    w4a16_ragged_matmul,
)

HIDDEN, INNER = 128, 256


def random_weight(rng: np.random.Generator, *shape: int) -> W4Weight:
    """[E, N, K] of about unit gain."""
    packed = rng.integers(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), dtype=np.int64).astype(np.int32)
    scale = rng.uniform(0.5, 1.5, (*shape[:-1], shape[-1] // 128)) / (4 * shape[-1] ** 0.5)
    return W4Weight.from_checkpoint(packed, jnp.asarray(scale, jnp.bfloat16))


mlp = jax.jit(w4a8_moe_mlp, static_argnames="top_k")


@functools.cache
def operands(experts: int, tokens: int) -> tuple:
    """bf16 x [T, D], router, gate_up, down."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.bfloat16)
    router = jnp.asarray(rng.standard_normal((experts, HIDDEN)) / HIDDEN**0.5, jnp.float32)
    return x, router, random_weight(rng, experts, 2 * INNER, HIDDEN), random_weight(rng, experts, HIDDEN, INNER)


def bf16(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7)


@functools.partial(jax.jit, static_argnames=("top_k", "matmul", "unrounded"))
def loop(
    x: jax.Array,
    router: jax.Array,
    gate_up: W4Weight,
    down: W4Weight,
    top_k: int,
    matmul: Callable[..., jax.Array] = w4a8_matmul,
    unrounded: str = "",
) -> jax.Array:
    """The MLP with all tokens through one expert after the other, and every rounding but the one named."""

    def to(name: str, value: jax.Array) -> jax.Array:
        return value if name == unrounded else bf16(value)

    def through(weights: tuple[W4Weight, W4Weight]) -> jax.Array:
        gate, up = jnp.split(to("gate_up", matmul(x, weights[0], out_dtype=jnp.float32)), 2, axis=-1)
        inner = to("inner", to("silu", jax.nn.silu(gate)) * up)
        return to("down", matmul(inner, weights[1], out_dtype=jnp.float32))

    weights, experts = route(x.astype(jnp.float32) @ router.T, top_k)
    each = jnp.swapaxes(jax.lax.map(through, (gate_up, down)), 0, 1)
    total = jnp.zeros(x.shape, jnp.float32)
    for k in range(top_k):
        total += weights[:, k, None] * each[jnp.arange(len(x)), experts[:, k]]
    return bf16(total)


def equal_share(found: jax.Array, expected: jax.Array) -> float:
    return float(np.mean(np.asarray(found, np.float32) == np.asarray(expected)))


@pytest.mark.parametrize(
    ("experts", "tokens", "top_k"),
    [(4, 24, 2), (4, 1, 2), (4, 1, 4), (32, 3, 5), (4, 24, 1)],
    ids=["usual", "one-token", "all-experts", "more-experts-than-tokens", "top-1"],
)
def test_the_mlp_is_a_loop_over_tokens(experts: int, tokens: int, top_k: int):
    x, router, gate_up, down = operands(experts, tokens)
    found = mlp(x, router, gate_up, down, top_k=top_k)
    assert (found.dtype, found.shape) == (jnp.bfloat16, x.shape)
    # fp32 sums in another order change a rounding now and then.
    assert equal_share(found, loop(x, router, gate_up, down, top_k)) > 0.97


@pytest.mark.parametrize("unrounded", ["gate_up", "silu", "inner", "down"])
def test_each_rounding_is_made(unrounded: str):
    x, router, gate_up, down = operands(4, 24)
    found = mlp(x, router, gate_up, down, top_k=2)
    assert equal_share(found, loop(x, router, gate_up, down, 2, unrounded=unrounded)) < 0.9


def test_w4a16_experts():
    x, router, gate_up, down = operands(4, 24)
    found = moe_mlp(x, router, gate_up, down, top_k=3, scheme="w4a16")
    assert equal_share(found, loop(x, router, gate_up, down, 3, w4a16_matmul)) > 0.97


def test_all_tokens_to_one_expert():
    x, router, gate_up, down = operands(4, 24)
    x = jnp.abs(x)
    router = jnp.zeros_like(router).at[3].set(1.0)
    found = mlp(x, router, gate_up, down, top_k=1)
    assert equal_share(found, loop(x, router, gate_up, down, 1)) > 0.97


def test_no_tokens():
    x, router, gate_up, down = operands(4, 24)
    assert mlp(x[:0], router, gate_up, down, top_k=2).shape == (0, HIDDEN)


def test_float_experts_and_leading_axes():
    x, router, gate_up, down = operands(4, 24)
    x, gate_up, down = x.astype(jnp.float32), gate_up.dequantize(), down.dequantize()
    options = {"top_k": 3, "selection": "sigmoid", "normalize": False}
    found = jax.jit(lambda x: moe_mlp(x, router, gate_up, down, **options))(x.reshape(2, 12, HIDDEN))
    weights, experts = route(x @ router.T, 3, selection="sigmoid", normalize=False)
    gates, ups = jnp.split(jnp.einsum("td,efd->tef", x, gate_up, precision="highest"), 2, axis=-1)
    each = jnp.einsum("tef,edf->ted", jax.nn.silu(gates) * ups, down, precision="highest")
    expected = jnp.einsum("tk,tkd->td", weights, jnp.take_along_axis(each, experts[..., None], axis=1))
    np.testing.assert_allclose(found.reshape(24, HIDDEN), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_float_experts():
    """Training a mixture of experts needs it."""
    x, router, gate_up, down = operands(4, 24)
    x, leaves = x.astype(jnp.float32), (router, gate_up.dequantize(), down.dequantize())

    def by_rows(router: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.sum(moe_mlp(x, router, gate_up, down, top_k=2) ** 2)

    def by_experts(router: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        gates, ups = jnp.split(jnp.einsum("td,efd->tef", x, gate_up, precision="highest"), 2, axis=-1)
        each = jnp.einsum("tef,edf->ted", jax.nn.silu(gates) * ups, down, precision="highest")
        weights, experts = route(x @ router.T, 2)
        return jnp.sum(jnp.einsum("tk,tkd->td", weights, jnp.take_along_axis(each, experts[..., None], axis=1)) ** 2)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*leaves) for f in (by_rows, by_experts))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(theirs))))


@pytest.mark.parametrize("sizes", [[0, 5, 0, 3], [8, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_w4a16_ragged_rows(sizes: list[int]):
    x, _, gate_up, _ = operands(4, 8)
    found = w4a16_ragged_matmul(x, gate_up, jnp.asarray(sizes), out_dtype=jnp.float32)
    owner = np.repeat(np.arange(4), sizes)
    each = jax.lax.map(lambda w: w4a16_matmul(x, w, out_dtype=jnp.float32), gate_up)
    np.testing.assert_allclose(found[: len(owner)], each[owner, np.arange(len(owner))], rtol=1e-5, atol=1e-5)
    assert not np.any(found[len(owner) :])


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (5, 3, 4), (0, 2, 8), (64, 8, 128), (300, 2, 7)])
def test_rows_are_sorted_by_expert(tokens: int, top_k: int, experts: int, monkeypatch: pytest.MonkeyPatch):
    """However many there are, those of one expert in their order."""
    rng = np.random.default_rng(tokens)
    chosen = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.int32).reshape(tokens, top_k)
    expected = np.argsort(chosen.reshape(-1), kind="stable")
    for few in (0, 1024):
        monkeypatch.setattr(expert_rows, "_FEW", few)
        order, place, sizes = expert_rows.sort_by_expert(jnp.asarray(chosen), experts)
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_array_equal(np.asarray(place).reshape(-1)[expected], np.arange(chosen.size))
        np.testing.assert_array_equal(sizes, np.bincount(chosen.reshape(-1), minlength=experts))


def test_weights_of_the_chosen_experts():
    logits = jnp.asarray([[2.0, -1.0, 0.5, 2.5], [0.0, 0.0, 0.0, 0.0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights, experts = route(logits, 2)
    np.testing.assert_array_equal(experts, [[3, 0], [0, 1]])
    np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))], [0.5, 0.5]], rtol=1e-6)
    weights, _ = route(logits, 3, normalize=False)
    np.testing.assert_allclose(weights[0], probabilities[0][[3, 0, 2]], rtol=1e-6)
    weights, _ = route(logits, 2, selection="sigmoid", normalize=False)
    np.testing.assert_allclose(weights[0], 1 / (1 + np.exp([-2.5, -2.0])), rtol=1e-6)
    weights, _ = route(logits.astype(jnp.bfloat16), 2, selection="sigmoid")
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k: expected 1 .. 4, the number of experts, found 5"),
        ({"top_k": 0}, "top_k: expected 1 .. 4"),
        ({"selection": "tanh"}, "expected softmax or sigmoid, found 'tanh'"),
        ({"x": jnp.zeros((2, 64), jnp.bfloat16)}, r"router: expected \[E, 64\], found \[4, 128\]"),
        ({"x": jnp.zeros((2, HIDDEN), jnp.int32)}, "x: expected a float array"),
        ({"down": random_weight(np.random.default_rng(0), 3, HIDDEN, INNER)}, r"down: expected \[4, 128, 256\], found"),
        ({"gate_up": jnp.zeros((4, 512, HIDDEN))}, "gate_up: expected a W4Weight"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str):
    x, router, gate_up, down = operands(4, 2)
    arguments = {"x": x, "router": router, "gate_up": gate_up, "down": down, "top_k": 2} | change
    with pytest.raises(W4A8Error, match=message):
        w4a8_moe_mlp(**arguments)


def test_ragged_w4a16_is_checked_as_w4a8_is():
    x, _, gate_up, _ = operands(4, 2)
    for product in (w4a8_ragged_matmul, w4a16_ragged_matmul):
        with pytest.raises(W4A8Error, match="group_sizes: expected integers"):
            product(x, gate_up, jnp.ones(3, jnp.int32))

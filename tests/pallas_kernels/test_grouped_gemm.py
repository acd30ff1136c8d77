"""The grouped kernel: the op that calls it, and its products on a Hopper GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_checkpoint, weight_of
from test_dense_gemm import gpu
from test_grouped_interpreted import expected_of

from pallas_kernels import (
    W4A8Error,
    moe_mlp,
    ops,
    quantize_activations,
    tuning,
    w4a8_ragged_matmul,
    w4a16_ragged_matmul,
)
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.fragments import FragmentWeight, Scheme

FORMS = [  # scheme, numerics, lowest code
    ("w4a8", "lut", -7),
    ("w4a8", "lut", -8),
    ("w4a8", "exact", -7),
    ("w4a8", "exact", -8),
    ("w4a16", "exact", -8),
]
RAGGED: dict[str, Any] = {"w4a8": w4a8_ragged_matmul, "w4a16": w4a16_ragged_matmul}


@pytest.mark.parametrize(("scheme", "numerics", "code_min"), FORMS)
def test_experts_are_prepared_as_one_by_one(scheme: Scheme, numerics: str, code_min: int) -> None:
    w = weight_of(*random_checkpoint(0, 3, 192, 256, code_min=code_min), numerics=numerics, code_min=code_min)
    prepared = FragmentWeight.from_weight(w, scheme)
    assert prepared.shape == (3, 192, 256)
    for e in range(3):
        one = FragmentWeight.from_weight(jax.tree.map(lambda leaf, e=e: leaf[e], w), scheme)
        for name in ("words", "scales", "channel_scale"):
            np.testing.assert_array_equal(getattr(prepared, name)[e], getattr(one, name))


def test_experts_are_prepared_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(0, 2, 128, 256))
    assert ops.prepare_weight(w) is w
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    assert isinstance(ops.prepare_weight(w), FragmentWeight)
    assert ops.prepare_weight(w, "w4a16") is w
    w = weight_of(*random_checkpoint(0, 2, 128, 256), numerics="exact")
    prepared = ops.prepare_weight(w, "w4a16")
    assert isinstance(prepared, FragmentWeight)
    assert (prepared.scheme, prepared.shape) == ("w4a16", (2, 128, 256))


def exact_if(scheme: Scheme) -> str:
    """The numerics that the scheme's kernel takes."""
    return "exact" if scheme == "w4a16" else "lut"


@pytest.mark.parametrize("scheme", RAGGED)
def test_the_op_calls_the_kernel(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def kernel(x: Any, token_scale: Any, w: Any, sizes: Any, config: Any) -> jax.Array:
        calls.append((x.shape, x.dtype, token_scale is None or token_scale.shape, sizes.dtype, config))
        return jnp.ones((x.shape[0], w.shape[1]), jnp.bfloat16)

    monkeypatch.setattr(ops, "_grouped_gemm", kernel)
    w = weight_of(*random_checkpoint(0, 2, 128, 256), numerics=exact_if(scheme))
    f, product = FragmentWeight.from_weight(w, scheme), RAGGED[scheme]
    sizes = jnp.asarray([1, 2], jnp.uint8)
    out = product(jnp.ones((3, 256)), f, sizes, out_dtype=jnp.float32)
    assert (out.shape, out.dtype) == ((3, 128), jnp.float32)
    config = tuning.heuristic_grouped(3, 2, 128, 256, f.form)
    operands = {"w4a8": (jnp.float8_e4m3fn, (8, 1)), "w4a16": (jnp.bfloat16, True)}[scheme]
    assert calls == [((8, 256), *operands, jnp.int32, config)]
    assert product(jnp.ones((0, 256)), f, sizes).shape == (0, 128)
    with pytest.raises(W4A8Error, match="has no gradient"):
        jax.grad(lambda x: jnp.sum(product(x, f, sizes, out_dtype=jnp.float32)))(jnp.ones((3, 256)))
    (other,) = set(RAGGED) - {scheme}
    with pytest.raises(W4A8Error, match=f"expected a weight prepared for {other}, found one for {scheme}"):
        RAGGED[other](jnp.ones((3, 256)), f, sizes)


@pytest.mark.parametrize("scheme", RAGGED)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 3), (16, 2)])
def test_experts_meet_the_rows_of_their_tokens(
    tokens: int, top_k: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole MLP, with a kernel that computes in float64 in place of the real one."""
    experts, width, inner = 4, 256, 128
    weights = [
        weight_of(*random_checkpoint(i, experts, *s), numerics=exact_if(scheme))
        for i, s in enumerate([(2 * inner, width), (width, inner)])
    ]
    of_kernel = {w.packed.shape: w for w in weights}

    def kernel(x8: Any, token_scale: Any, f: FragmentWeight, sizes: Any, config: Any) -> jax.Array:
        w = of_kernel[(*f.shape[:2], f.shape[2] // 8)]
        assert x8.dtype == (jnp.float8_e4m3fn if scheme == "w4a8" else jnp.bfloat16)
        assert x8.shape[0] % 8 == 0
        return jnp.asarray(expected_of(x8, token_scale, w, list(np.asarray(sizes))), jnp.bfloat16)

    monkeypatch.setattr(ops, "_grouped_gemm", kernel)
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    router = jnp.asarray(rng.standard_normal((experts, width)), jnp.float32)
    prepared = [FragmentWeight.from_weight(w, scheme) for w in weights]
    mlp = functools.partial(moe_mlp, x, router, top_k=top_k)
    found, expected = (mlp(*w, scheme=scheme).astype(jnp.float32) for w in (prepared, weights))
    assert jnp.linalg.norm(found - expected) < 5e-3 * jnp.linalg.norm(expected)
    (other,) = set(RAGGED) - {scheme}
    with pytest.raises(W4A8Error, match=f"expected a weight prepared for {other}"):
        mlp(*prepared, scheme=other)
    if scheme == "w4a16":
        return


def random_sizes(rng: np.random.Generator, experts: int, m: int, kind: int) -> np.ndarray:
    """Uniform, skewed, or all to one expert, with up to a fifth of the rows left over."""
    share = [np.ones(experts), 1 / np.arange(1, experts + 1) ** 1.2, np.eye(experts)[rng.integers(experts)]][kind]
    return rng.multinomial(int(m * min(1, rng.uniform(0.8, 1.2))), rng.permutation(share) / share.sum())


def wrong(product: Callable[..., jax.Array], arguments: tuple[Any, ...], expected: np.ndarray) -> str:
    """What is not right with two launches' results, if anything; memory holds NaN where the kernel must write."""
    rows = int(arguments[-1].sum())
    arguments = jax.device_put(arguments)
    jax.block_until_ready(jax.device_put(np.full((4 * expected.size + 2**24,), np.nan, np.float32))).delete()
    found, again = (np.asarray(product(*arguments), np.float64) for _ in "12")
    error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)
    if error < 2.5e-3 and np.array_equal(found, again) and not np.any(found[rows:]):
        return ""
    return f"error {error}, the same twice: {np.array_equal(found, again)}"


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("tile", [(128, 2, 2, 4, 1), (192, 1, 2, 5, 1), (256, 1, 2, 4, 1), (256, 1, 2, 4, 2)])
    def test_small_groups_in_large_tiles(self, tile: tuple[int, ...]) -> None:
        """Groups within an eight, across eights, and of several sizes of a tile."""
        rng, (experts, n, k) = np.random.default_rng(tile[0]), (40, 1024, 512)
        *sizes, cluster = tile
        codes, scale = random_checkpoint(0, experts, n, k)
        product = jax.jit(w4a8_ragged_matmul)
        with jax.default_device(jax.devices("cpu")[0]):
            w = weight_of(codes, scale)
            f = jax.device_get(jax.jit(FragmentWeight.from_weight)(w))
        for m in (96, 640, 2500):
            x = rng.standard_normal((m, k)).astype(jnp.bfloat16)
            groups = random_sizes(rng, experts, m, 1)
            with jax.default_device(jax.devices("cpu")[0]):
                expected = expected_of(*quantize_activations(x), w, list(groups))
            with tuning.force_config(TuningConfig(*sizes, cluster=cluster)):
                assert not wrong(product, (x, f, groups.astype(np.int32)), expected), (m, groups)

    @pytest.mark.parametrize(
        ("scheme", "config"),
        [
            ("w4a8", TuningConfig(8, 1, 2, 4, slot_steps=2, stream_k=True)),
            ("w4a8", TuningConfig(16, 2, 2, 4, slot_steps=2, stream_k=True)),
            ("w4a8", TuningConfig(32, 2, 2, 4, slot_steps=2, stream_k=True)),
            ("w4a16", TuningConfig(8, 2, 2, 8, stream_k=True)),
        ],
    )
    def test_shared_tiles(self, scheme: Scheme, config: TuningConfig) -> None:
        """Fewer tiles than blocks, about as many, and several waves; counters end at zero."""
        rng, (experts, n, k) = np.random.default_rng(config.tile_tokens), (8, 2048, 3584)
        product = jax.jit(RAGGED[scheme])
        with jax.default_device(jax.devices("cpu")[0]):
            w = weight_of(*random_checkpoint(0, experts, n, k), numerics="lut" if scheme == "w4a8" else "exact")
            f = jax.device_get(jax.jit(FragmentWeight.from_weight, static_argnums=1)(w, scheme))
        for m, kind in ((1, 0), (2, 2), (8, 0), (40, 1), (200, 0), (200, 2)):
            x = rng.standard_normal((m, k)).astype(jnp.bfloat16)
            groups = random_sizes(rng, experts, m, kind)
            with jax.default_device(jax.devices("cpu")[0]):
                expected = expected_of(*((x, None) if scheme == "w4a16" else quantize_activations(x)), w, list(groups))
            on_device = jax.device_put(f)
            with tuning.force_config(config):
                assert not wrong(product, (x, on_device, groups.astype(np.int32)), expected), (m, groups)
            assert not np.any(np.asarray(on_device.flags))

    @pytest.mark.parametrize(("scheme", "numerics", "code_min"), FORMS)
    @pytest.mark.parametrize("seed", range(3))
    def test_random_groups(self, seed: int, scheme: Scheme, numerics: str, code_min: int) -> None:
        """With the heuristic's configurations; memory holds NaN where the kernel must write."""
        rng = np.random.default_rng(seed)
        failed = []
        product = jax.jit(RAGGED[scheme])
        for i, (experts, m) in enumerate([(8, 1), (128, 8), (5, 77), (40, 640), (256, 1500), (4, 2999)]):
            n, k = (int(v) for v in 128 * rng.integers(1, 9, 2))
            codes, scale = random_checkpoint(i, experts, n, k, code_min=code_min)
            x = rng.standard_normal((m, k)).astype(jnp.bfloat16)
            with jax.default_device(jax.devices("cpu")[0]):
                w = weight_of(codes, scale, numerics=numerics, code_min=code_min)
                x8, token_scale = (x, None) if scheme == "w4a16" else quantize_activations(x)
                f = jax.device_get(jax.jit(FragmentWeight.from_weight, static_argnums=1)(w, scheme))
            for kind in range(3):
                sizes = random_sizes(rng, experts, m, kind)
                with jax.default_device(jax.devices("cpu")[0]):
                    expected = expected_of(x8, token_scale, w, list(sizes))
                problem = wrong(product, (x, f, sizes.astype(np.int32)), expected)
                failed += [(experts, m, n, k, kind, problem)] if problem else []
        assert not failed

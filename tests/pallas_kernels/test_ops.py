"""The matrix products against float64 of the same operands."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from random_weights import extreme_checkpoint, random_checkpoint, weight_of

from pallas_kernels import (
    FragmentWeight,
    W4A8Error,
    prepare_weight,
    reference,
    tuning,
    w4a8_matmul,
    w4a8_ragged_matmul,
    w4a16_matmul,
)

TOLERANCE = 1e-5
PRODUCTS = {"w4a8": w4a8_matmul, "w4a16": w4a16_matmul}
SHAPES = [
    (1, 128, 128), (2, 256, 384), (3, 2048, 1024), (17, 640, 256), (64, 128, 1024), (127, 384, 640),
    (128, 512, 512), (129, 1152, 128), (200, 2048, 256), (257, 1024, 1024),
]  # fmt: skip


def _activations(seed, *shape, dtype=twin.BF16):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp2(rng.uniform(-4, 4, (*shape[:-1], 1)))).astype(dtype)


def _agree(ours, expected):
    assert ours.dtype == jnp.float32
    assert ours.shape == expected.shape
    assert twin.relative(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("numerics", ["lut", "exact"])
@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matmul(m, n, k, scheme, numerics):
    x, (codes, scale) = _activations(m, m, k), random_checkpoint(n + k, n, k)
    ours = PRODUCTS[scheme](x, weight_of(codes, scale, numerics=numerics), out_dtype=jnp.float32)
    _agree(ours, twin.matmul(x, codes, scale, numerics=numerics, scheme=scheme))


@pytest.mark.parametrize("numerics", ["lut", "exact"])
@pytest.mark.parametrize("dtype", [np.float32, twin.BF16, np.float16], ids=str)
def test_leading_axes_and_dtypes(dtype, numerics):
    x, (codes, scale) = _activations(0, 2, 1, 3, 256, dtype=dtype), random_checkpoint(1, 128, 256)
    w = weight_of(codes, scale, numerics=numerics)
    _agree(jax.jit(w4a8_matmul, static_argnames="out_dtype")(x, w, out_dtype=jnp.float32),
           twin.matmul(x, codes, scale, numerics=numerics))  # fmt: skip
    assert w4a8_matmul(x[0, 0, 0], w).shape == (128,)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_processors_with_and_without_bf16(monkeypatch, has_bf16):
    """FP8 values are multiplied in what the processor is fast at: bf16 or fp32 hold them alike."""
    monkeypatch.setattr(reference, "_multiplies_bf16", lambda: has_bf16)
    x, (codes, scale) = _activations(0, 33, 384), random_checkpoint(1, 256, 384)
    w = weight_of(codes, scale)
    product = jax.jit(lambda x: reference.matmul(x, w))
    assert ("bf16" in product.lower(x).as_text().split("dot_general", 1)[1].split("\n", 1)[0]) == has_bf16
    _agree(product(x), twin.matmul(x, codes, scale))


@pytest.mark.parametrize("numerics", ["lut", "exact"])
def test_extreme_rows(numerics):
    """Row by row, since one huge row would hide the others in a norm."""
    x, (codes, scale) = _activations(5, 9, 512), extreme_checkpoint(40, 512)
    x[0], x[1] = 0, x[1] * twin.BF16.type(1e-30)
    ours = np.asarray(w4a8_matmul(x, weight_of(codes, scale, numerics=numerics), out_dtype=jnp.float32))
    expected = twin.matmul(x, codes, scale, numerics=numerics)
    assert (ours[0] == 0).all()
    assert (ours[:, 0::5] == 0).all()
    for row in range(40):
        error = np.linalg.norm(ours[:, row] - expected[:, row])
        assert error <= TOLERANCE * np.linalg.norm(expected[:, row]), f"row {row}"


def test_the_result_is_bf16_rounded_once():
    x, (codes, scale) = _activations(2, 33, 256), random_checkpoint(3, 256, 256)
    w = weight_of(codes, scale)
    fp32 = np.asarray(w4a8_matmul(x, w, out_dtype=jnp.float32))
    bf16 = w4a8_matmul(x, w)
    assert bf16.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(bf16), fp32.astype(twin.BF16))


@pytest.mark.parametrize("numerics", ["lut", "exact"])
@pytest.mark.parametrize(
    "sizes",
    [[5, 0, 9, 1, 0, 18], [0, 0, 0, 33, 0, 0], [33, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 33],
     [0, 0, 0, 0, 0, 0], [6, 5, 6, 5, 6, 5], [3, 0, 4, 0, 0, 2]],
)  # fmt: skip
def test_ragged_matmul(sizes, numerics):
    x, (codes, scale) = _activations(4, 33, 256), random_checkpoint(6, 6, 128, 256)
    w, group_sizes = weight_of(codes, scale, numerics=numerics), np.array(sizes, np.int32)
    ours = jax.jit(w4a8_ragged_matmul, static_argnames="out_dtype")(x, w, group_sizes, out_dtype=jnp.float32)
    expected = twin.ragged_matmul(x, codes, scale, group_sizes, numerics=numerics)
    assert ours.shape == expected.shape
    assert not np.asarray(ours)[sum(sizes) :].any()
    if sum(sizes):
        _agree(ours, expected)


def test_ragged_matmul_does_not_compile_again_for_other_group_sizes():
    x, (codes, scale) = _activations(4, 8, 128), random_checkpoint(6, 2, 128, 128)
    product, w = jax.jit(lambda *arguments: w4a8_ragged_matmul(*arguments)), weight_of(codes, scale)
    for sizes in ([8, 0], [3, 5]):
        product(x, w, np.array(sizes, np.int32))
    assert product._cache_size() == 1


@pytest.mark.parametrize("numerics", ["lut", "exact"])
@pytest.mark.parametrize("dtype", [np.float32, twin.BF16], ids=str)
def test_gradient_is_straight_through(dtype, numerics):
    x, (codes, scale) = _activations(8, 2, 7, 256, dtype=dtype), random_checkpoint(9, 128, 256)
    w = weight_of(codes, scale, numerics=numerics)
    weight_of_output = np.random.default_rng(0).normal(size=(2, 7, 128)).astype(np.float32)

    def loss(x, channel_scale):
        scaled = type(w)(w.packed, w.group_scale, channel_scale, w.numerics, w.code_min)
        return jnp.sum(weight_of_output * w4a8_matmul(x, scaled, out_dtype=jnp.float32))

    dx, d_channel_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w.channel_scale)
    assert dx.dtype == dtype
    expected = weight_of_output.astype(np.float64) @ twin.weight(codes, scale, numerics)
    assert twin.relative(dx, expected.astype(dtype)) <= (TOLERANCE if dtype == np.float32 else 1e-3)
    product = twin.matmul(x, codes, scale, numerics=numerics) / np.asarray(w.channel_scale, np.float64)
    expected = np.einsum("abn,abn->n", weight_of_output, product)
    assert twin.relative(d_channel_scale, expected) <= TOLERANCE


def test_gradient_with_respect_to_the_whole_weight():
    """Codes are integers: `allow_int` gives them no tangent; group scales get zeros; the structure is the weight's."""
    codes, scale = random_checkpoint(9, 128, 128)
    w, x = weight_of(codes, scale, code_min=-7), _activations(8, 4, 128)
    gradient = jax.grad(lambda w: jnp.sum(w4a8_matmul(x, w, out_dtype=jnp.float32)), allow_int=True)(w)
    assert jax.tree.structure(gradient) == jax.tree.structure(w)
    assert gradient.packed.dtype == jax.dtypes.float0
    assert not np.asarray(gradient.group_scale).astype(np.float32).any()
    assert np.asarray(gradient.channel_scale).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: w4a8_matmul(x[:, :64], w), r"x: expected \[..., 128\] to fit w \[128, 128\], found \[4, 64\]"),
        (lambda w, x: w4a16_matmul(x[:, :64], w), r"x: expected \[..., 128\]"),
        (lambda w, x: w4a8_matmul(x.astype(np.int32), w), r"x: expected a float dtype, found int32"),
        (lambda w, x: w4a8_matmul(x, x), r"w: expected a W4Weight, found"),
        (lambda w, x: w4a8_ragged_matmul(x, w, np.array([4], np.int32)), r"w: expected \[E, N, K\], found"),
    ],
)
def test_refusals(call, message):
    codes, scale = random_checkpoint(9, 128, 128)
    with pytest.raises(W4A8Error, match=message):
        call(weight_of(codes, scale), _activations(8, 4, 128))


@pytest.mark.parametrize(
    ("scheme", "numerics", "prepared"),
    [("w4a8", "lut", True), ("w4a8", "exact", True), ("w4a16", "exact", True), ("w4a16", "lut", False)],
)
def test_weights_are_prepared_for_a_scheme(scheme, numerics, prepared, monkeypatch):
    w = weight_of(*random_checkpoint(9, 128, 128), numerics=numerics)
    assert prepare_weight(w, scheme) is w
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    found = prepare_weight(w, scheme)
    assert isinstance(found, FragmentWeight) == prepared
    if prepared:
        assert found.scheme == scheme
        other = {"w4a8": w4a16_matmul, "w4a16": w4a8_matmul}[scheme]
        with pytest.raises(W4A8Error, match=f"w: expected a weight prepared for w4a.*, found one for {scheme}"):
            other(_activations(8, 4, 128), found)


def test_scales_that_bf16_cannot_hold_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    codes, scale = random_checkpoint(9, 128, 128)
    w = weight_of(codes, scale.astype(np.float32), numerics="exact")
    assert prepare_weight(w, "w4a16") is w


@pytest.mark.parametrize("sizes", [np.array([1, 2, 1], np.int32), np.array([2.0, 2.0], np.float32)], ids=str)
def test_ragged_refuses_group_sizes_that_do_not_fit(sizes):
    codes, scale = random_checkpoint(9, 2, 128, 128)
    with pytest.raises(W4A8Error, match=r"group_sizes: expected integers \[2\], one for each expert, found"):
        w4a8_ragged_matmul(_activations(8, 4, 128), weight_of(codes, scale), sizes)


def test_layers_of_one_shape_share_a_kernel():
    """Tracing and lowering one takes seconds, and models have many layers."""
    layers = [FragmentWeight.from_weight(weight_of(*random_checkpoint(i, 256, 256))) for i in range(3)]

    def model(x, layers):
        for w in layers:
            x = w4a8_matmul(x, w)
        return x

    traced = jax.make_jaxpr(model)(jnp.ones((16, 256), jnp.bfloat16), layers)
    kernels = [e.params["jaxpr"] for e in _equations(traced.jaxpr) if e.params.get("name") == "dense_gemm"]
    assert len(kernels) == 3
    assert all(kernel is kernels[0] for kernel in kernels)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield from _equations(getattr(part, "jaxpr", part))

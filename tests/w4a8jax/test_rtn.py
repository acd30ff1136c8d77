"""Round-to-nearest with the scale search, judged by the numpy twin's arithmetic of the kernel."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest

from pallas_kernels import W4A8Error, W4Weight
from w4a8jax.quantization import rtn
from w4a8jax.quantization.rtn import quantize_weight

CODE_MINS = pytest.mark.parametrize("code_min", [-7, -8])
NUMERICS = pytest.mark.parametrize("numerics", ["lut", "exact"])


def _weights(kind="gaussian", n=64, k=1024, seed=0):
    rng = np.random.default_rng(seed)
    draw = {"gaussian": rng.standard_normal, "laplace": rng.laplace, "bf16": rng.standard_normal}[kind]
    w = 0.02 * (draw(size=(n, k)) * np.exp(0.3 * rng.standard_normal((n, 1))))
    return w.astype(twin.BF16 if kind == "bf16" else np.float32)


def _error(q, w, numerics="lut"):
    return twin.relative(twin.weight(twin.unpack(q.packed), q.scale, numerics), w)


def _row_errors(q, w, numerics="lut"):
    value = twin.weight(twin.unpack(q.packed), q.scale, numerics)
    return np.linalg.norm(value - np.asarray(w, np.float64), axis=1)


def _edge_rows():
    """Rows that round, clip, underflow or have nothing in them; [10, 512]."""
    w = np.random.default_rng(5).standard_normal((10, 512))
    w *= np.array([1e-2, 0, 1e-8, 1e-5, 1e4, 1e30, 1e-2, 1e-2, 7 / 512 / 4, 1e-2])[:, None]
    w[0, 128:256] = 0
    w[6, 7] = 50.0  # an outlier: the other groups' scales are below the e4m3 grid of its row
    w[7, 130] = -1.0
    w[9] = -np.abs(w[9])
    return w.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "code_min", "figure", "gain", "gain_over_naive"),
    [
        # The kernel's relative error, its ratio to plain round-to-nearest, and to the best code * scale.
        ("gaussian", -7, 0.1061, 0.88, 0.965),
        ("gaussian", -8, 0.1019, 0.89, 0.970),
        ("laplace", -7, 0.1450, 0.90, 0.980),
        ("laplace", -8, 0.1386, 0.90, 0.985),
        ("bf16", -7, 0.1061, 0.88, 0.965),
    ],
)
def test_better_than_plain_and_than_ignoring_the_kernel(kind, code_min, figure, gain, gain_over_naive):
    w = _weights(kind, n=128, k=2048)
    full, fast, plain = (quantize_weight(w, code_min=code_min, search=s) for s in ("full", "fast", "none"))
    naive = quantize_weight(w, numerics="exact", code_min=code_min)
    assert _error(full, w) == pytest.approx(figure, rel=0.01)
    assert _error(full, w) < _error(fast, w) < 1.005 * _error(full, w)
    assert _error(full, w) < gain * _error(plain, w)
    assert _error(full, w) < gain_over_naive * _error(naive, w)
    assert (_row_errors(full, w) < _row_errors(plain, w)).all()


def test_the_lut_costs_nothing_after_the_search():
    """Its two roundings add 3 % to codes and scales chosen without them, and are absorbed when they are known."""
    w = _weights(n=128, k=2048)
    assert _error(quantize_weight(w), w) < 1.005 * _error(quantize_weight(w, numerics="exact"), w, "exact")


@CODE_MINS
@NUMERICS
@pytest.mark.parametrize("search", ["full", "fast", "none"])
@pytest.mark.parametrize("make", [_weights, _edge_rows], ids=["gaussian", "edges"])
def test_result_is_consistent(make, numerics, code_min, search):
    w = make()
    q = quantize_weight(w, numerics=numerics, code_min=code_min, search=search)
    codes = twin.unpack(q.packed)
    assert q.packed.dtype == np.int32
    assert q.scale.dtype == twin.BF16
    assert q.shape == w.shape
    assert codes.min() >= code_min
    assert codes.max() <= 7
    assert (q.scale > 0).all()
    assert np.isfinite(q.scale.astype(np.float32)).all()
    np.testing.assert_array_equal(q.histogram, np.bincount(codes.ravel().astype(int) + 8, minlength=16))
    assert q.relative_error == pytest.approx(_error(q, w, numerics), rel=1e-4)
    ours = W4Weight.from_checkpoint(jnp.asarray(q.packed), jnp.asarray(q.scale), numerics=numerics)
    assert q.relative_error == pytest.approx(twin.relative(ours.dequantize(), w), rel=1e-4)


@CODE_MINS
@NUMERICS
@pytest.mark.parametrize("make", [_weights, _edge_rows], ids=["gaussian", "edges"])
def test_every_code_is_the_nearest_level_of_the_stored_scales(make, numerics, code_min):
    w = make()
    q = quantize_weight(w, numerics=numerics, code_min=code_min)
    value = twin.weight(twin.unpack(q.packed), q.scale, numerics)
    distance = np.abs(value - w)
    for code in range(code_min, 8):
        other = np.abs(twin.weight(np.full(w.shape, code, np.int8), q.scale, numerics) - w)
        assert (distance <= other + 1e-6 * np.abs(w)).all(), code


@CODE_MINS
@pytest.mark.parametrize("make", [_weights, _edge_rows], ids=["gaussian", "edges"])
def test_stored_scales_give_back_the_chosen_group_scales(make, code_min):
    """Each stored scale is the bf16 of g * channel_scale: nothing of the choice is lost in the checkpoint."""
    q = quantize_weight(make(), code_min=code_min)
    group_scale, channel_scale = twin.convert_scales(q.scale)
    g = twin.e4m3_values(group_scale)
    assert (g > 0).all()
    again = (g * channel_scale[:, None]).astype(np.float32).astype(twin.BF16)
    np.testing.assert_array_equal(again, q.scale)


def _group_errors(w, channel_scale, code_min):
    """Squared errors [R, G, 102] of every reachable g, bytes 0x01..0x66, for given channel scales [R]."""
    codes = np.arange(code_min, 8)
    levels = twin.e4m3_values(twin.e4m3(twin.MAGNITUDES[1:0x67, None] * codes))
    groups = w.astype(np.float64).reshape(w.shape[0], -1, twin.GROUP_SIZE)
    errors = np.empty((*groups.shape[:2], len(levels)))
    for row, group in itertools.product(*map(range, groups.shape[:2])):
        distance = groups[row, group][:, None, None] - levels * channel_scale[row]
        errors[row, group] = (distance**2).min(-1).sum(0)
    return errors


@CODE_MINS
def test_groups_take_the_best_reachable_scale(code_min):
    """Against all 102 group scales, for the channel scales chosen; only a row's largest scale is not free."""
    w = _weights("laplace", n=8, k=768)
    q = quantize_weight(w, code_min=code_min)
    group_scale, channel_scale = twin.convert_scales(q.scale)
    errors = _group_errors(w, channel_scale.astype(np.float64), code_min)
    chosen = group_scale.view(np.uint8).astype(int)
    ours = np.take_along_axis(errors, chosen[..., None] - 1, axis=-1)[..., 0]
    free = chosen != 0x66
    assert free.sum() >= 30
    best = errors.min(-1)
    assert np.mean(ours[free] <= best[free] * (1 + 1e-4)) >= 0.95
    assert (ours[free] <= best[free] * 1.02).all()
    assert ours.sum() <= 1.01 * best.sum()


@CODE_MINS
def test_rows_take_nearly_the_best_channel_scale(code_min):
    """Against all bf16 values for the row's largest scale, each with the best of all group scales."""
    w = _weights(n=3, k=384, seed=2)
    q = quantize_weight(w, code_min=code_min)
    top = np.abs(w).max(-1) / 7
    best = np.full(len(w), np.inf)
    for factor in np.exp2(np.arange(-1, 0.3, 2**-7)):
        row_scale = (factor * top).astype(np.float32).astype(twin.BF16)
        channel_scale = twin.convert_scales(row_scale[:, None])[1].astype(np.float64)
        errors = _group_errors(w, channel_scale, code_min)
        loss = errors[..., -1] - errors.min(-1)
        best = np.minimum(best, errors.min(-1).sum(-1) + loss.min(-1))
    assert (_row_errors(q, w) ** 2 <= 1.015 * best).all()


@CODE_MINS
@NUMERICS
def test_edge_rows(numerics, code_min):
    w = _edge_rows()
    q, plain = (quantize_weight(w, numerics=numerics, code_min=code_min, search=s) for s in ("full", "none"))
    codes = twin.unpack(q.packed)
    norms = np.linalg.norm(w.astype(np.float64), axis=1)
    errors = _row_errors(q, w, numerics)
    assert (errors <= _row_errors(plain, w, numerics) * (1 + 1e-6)).all()
    assert not codes[1].any()
    assert not codes[0, 128:256].any()
    usual = [0, 4, 5, 8, 9]
    assert (errors[usual] < 0.12 * norms[usual]).all()
    if numerics == "lut":
        # The channel scale has a floor: 1e-5 is coarse under it, 1e-8 is nothing.
        assert not codes[2].any()
        assert errors[3] < 0.25 * norms[3]
    else:
        assert errors[2] < 0.12 * norms[2]
        assert errors[3] < 0.12 * norms[3]


def test_an_outlier_does_not_cost_the_groups_beside_it():
    """50 in a row of 0.01: the other groups' best scale, 0.004, is s_max / 1800, a subnormal g."""
    w = _edge_rows()[6:7]
    full, plain = quantize_weight(w), quantize_weight(w, search="none")
    others = np.r_[128:512]

    def error(q):
        return twin.relative(twin.lut_weight(twin.unpack(q.packed), q.scale)[:, others], w[:, others])

    assert error(full) < min(0.30, error(plain))


@CODE_MINS
def test_no_search_is_the_usual_round_to_nearest(code_min):
    w = _weights()
    q = quantize_weight(w, code_min=code_min, search="none")
    groups = w.reshape(64, -1, twin.GROUP_SIZE)
    scale = (np.abs(groups).max(-1) / np.float32(7 if code_min == -7 else 7.5)).astype(twin.BF16)
    codes = np.clip(np.round(groups / scale.astype(np.float32)[..., None]), code_min, 7).reshape(w.shape)
    assert np.mean(q.scale == scale) > 0.99  # XLA divides by 7 as a product, one bf16 may differ
    same = np.repeat(q.scale == scale, twin.GROUP_SIZE, axis=-1)
    assert np.mean(twin.unpack(q.packed)[same] == codes[same]) > 0.9999


@NUMERICS
def test_blocks_and_containers_do_not_change_the_result(numerics, monkeypatch, tmp_path):
    w = _weights("bf16", n=37, k=256)
    whole = quantize_weight(w, numerics=numerics)
    np.save(tmp_path / "w.npy", w.astype(np.float32))
    others = [w.astype(np.float64), jnp.asarray(w), np.load(tmp_path / "w.npy", mmap_mode="r")]
    results = [quantize_weight(other, numerics=numerics) for other in others]
    monkeypatch.setattr(rtn, "_BLOCK_WEIGHTS", 256 * 8)
    results.append(quantize_weight(w, numerics=numerics))
    results.append(quantize_weight(w[:1], numerics=numerics))
    for q in results:
        rows = len(q.packed)
        np.testing.assert_array_equal(q.packed, whole.packed[:rows])
        np.testing.assert_array_equal(q.scale, whole.scale[:rows])
    assert results[3].relative_error == pytest.approx(whole.relative_error, rel=1e-6)


def test_a_shape_compiles_once():
    quantize_weight(_weights(n=40, k=384))
    before = rtn._quantize_block._cache_size()
    for n, seed in ((40, 1), (33, 2), (64, 3)):
        quantize_weight(_weights(n=n, k=384, seed=seed))
    assert rtn._quantize_block._cache_size() == before


def test_an_all_zero_weight():
    q = quantize_weight(np.zeros((4, 256), np.float32))
    assert q.relative_error == 0
    assert q.histogram[8] == 1024
    assert not twin.unpack(q.packed).any()


NAN = _weights(n=4, k=256)
NAN[2, 77] = np.nan
INF = np.full((3, 128), 1e300)


@pytest.mark.parametrize("search", ["full", "fast", "none"])
@pytest.mark.parametrize("background", [0.0, 1.0])
@pytest.mark.parametrize("columns", [slice(5, 6), slice(128, 256), slice(None)])
def test_no_nan_gets_through(search, background, columns):
    w = np.full((4, 256), background, np.float32)
    w[1, columns] = np.nan
    with pytest.raises(W4A8Error, match=rf"found nan at \[1, {columns.start or 0}\]"):
        quantize_weight(w, search=search)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (np.zeros((4, 192), np.float32), {}, r"K must be a multiple of the group size 128, found shape \[4, 192\]"),
        (np.zeros((2, 4, 128), np.float32), {}, r"expected a matrix \[N, K\], found shape \[2, 4, 128\]"),
        (np.zeros((0, 128), np.float32), {}, r"expected a matrix \[N, K\], found shape \[0, 128\]"),
        (np.zeros((4, 128), np.int32), {}, r"expected a float array \[N, K\], found int32"),
        ([[0.0] * 128], {}, r"expected a float array \[N, K\], found list"),
        (NAN, {}, r"expected finite weights, found nan at \[2, 77\]"),
        (NAN, {"search": "none", "numerics": "exact"}, r"expected finite weights, found nan at \[2, 77\]"),
        (INF, {}, r"expected finite weights, found inf at \[0, 0\]"),
        (NAN, {"numerics": "int"}, r"numerics: expected .* found 'int'"),
        (NAN, {"code_min": -6}, r"code_min: expected -7 or -8, found -6"),
        (NAN, {"search": "best"}, r"search: expected .* found 'best'"),
    ],
)
def test_refusals_name_the_tensor(w, options, message):
    with pytest.raises(W4A8Error, match=r"model\.layers\.3\.mlp: .*" + message) as caught:
        quantize_weight(w, name="model.layers.3.mlp", **options)
    assert "\n" not in str(caught.value)

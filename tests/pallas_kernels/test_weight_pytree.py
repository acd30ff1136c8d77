"""`W4Weight` goes wherever arrays go: jit, vmap, shapes, shardings, donation, orbax."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from random_weights import random_checkpoint, weight_of

from pallas_kernels import W4Weight, w4a8_matmul


@pytest.fixture(params=["lut", "exact"])
def experts(request):
    """Three experts [3, 128, 256]."""
    return weight_of(*random_checkpoint(0, 3, 128, 256, code_min=-7), numerics=request.param, code_min=-7)


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_flatten_and_map(experts):
    leaves, structure = jax.tree.flatten(experts)
    assert len(leaves) == 3
    _assert_same(jax.tree.unflatten(structure, leaves), experts)
    second = jax.tree.map(lambda leaf: leaf[1], experts)
    assert isinstance(second, W4Weight)
    assert second.shape == (128, 256)
    assert (second.numerics, second.code_min) == (experts.numerics, -7)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(experts)]
    assert paths == [".packed", ".group_scale", ".channel_scale"]


def test_statics_tell_structures_apart(experts):
    other = weight_of(*random_checkpoint(0, 3, 128, 256), numerics=experts.numerics, code_min=-8)
    assert jax.tree.structure(other) != jax.tree.structure(experts)


def test_jit_takes_and_returns_it(experts):
    _assert_same(jax.jit(lambda w: w)(experts), experts)


def test_vmap_over_experts_is_one_matmul_each(experts):
    x = np.random.default_rng(1).normal(size=(3, 5, 256)).astype(np.float32)
    together = jax.vmap(lambda x, w: w4a8_matmul(x, w, out_dtype=jnp.float32))(x, experts)
    for e in range(3):
        alone = w4a8_matmul(x[e], jax.tree.map(lambda leaf, e=e: leaf[e], experts), out_dtype=jnp.float32)
        assert twin.relative(together[e], alone) < 1e-6


def test_vmap_over_tokens_with_one_weight(experts):
    w = jax.tree.map(lambda leaf: leaf[0], experts)
    x = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
    rows = jax.vmap(w4a8_matmul, in_axes=(0, None))(x, w)
    np.testing.assert_allclose(rows.astype(jnp.float32), w4a8_matmul(x, w).astype(jnp.float32), rtol=1e-2)


def test_eval_shape_and_scan(experts):
    shape = jax.eval_shape(lambda w: w, experts)
    assert isinstance(shape, W4Weight)
    assert shape.shape == (3, 128, 256)
    assert shape.packed.dtype == jnp.int32
    made = jax.eval_shape(
        W4Weight.from_checkpoint,
        jax.ShapeDtypeStruct((16, 32), jnp.int32),
        jax.ShapeDtypeStruct((16, 2), jnp.bfloat16),
    )
    assert made.shape == (16, 256)
    assert made.group_scale.dtype == jnp.float8_e4m3fn
    x = np.ones((2, 256), np.float32)
    _, stacked = jax.lax.scan(lambda carry, w: (carry, w4a8_matmul(x, w)), None, experts)
    assert stacked.shape == (3, 2, 128)


def test_donation(experts):
    copy = jax.tree.map(jnp.copy, experts)
    result = jax.jit(lambda w: jax.tree.map(lambda leaf: leaf, w), donate_argnums=0)(copy)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    _assert_same(result, experts)


def test_orbax_round_trip(experts, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "weight", {"layer": experts})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "weight", jax.eval_shape(lambda w: {"layer": w}, experts))
    assert isinstance(restored["layer"], W4Weight)
    _assert_same(restored["layer"], experts)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from random_weights import random_checkpoint, weight_of
from pallas_kernels import w4a8_matmul, w4a8_ragged_matmul
import numpy_twin as twin

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
for numerics in ("lut", "exact"):
    codes, scale = random_checkpoint(0, 256, 512)
    w = weight_of(codes, scale, numerics=numerics)
    alone = w4a8_matmul(x, w, out_dtype=jnp.float32)
    for spec in (P("model"), P(None, "model")):  # outputs split, inputs split
        specs = type(w)(P(*spec), P(*spec), P(*spec[:1]), w.numerics, w.code_min)
        placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), w, specs)
        assert len(placed.packed.sharding.device_set) == 8 and not placed.packed.is_fully_replicated
        out = jax.jit(lambda x, w: w4a8_matmul(x, w, out_dtype=jnp.float32))(x, placed)
        assert twin.relative(out, alone) < 1e-6, (numerics, spec)
    codes, scale = random_checkpoint(1, 4, 128, 512)
    w = weight_of(codes, scale, numerics=numerics)
    sizes = np.array([3, 0, 9, 4], np.int32)
    alone = w4a8_ragged_matmul(x, w, sizes, out_dtype=jnp.float32)
    placed = jax.device_put(w, NamedSharding(mesh, P("expert", "model")))
    out = jax.jit(lambda x, w, s: w4a8_ragged_matmul(x, w, s, out_dtype=jnp.float32))(x, placed, sizes)
    assert twin.relative(out, alone) < 1e-6, numerics
    by_expert = jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.shard_map(
        lambda x, w: w4a8_matmul(x, jax.tree.map(lambda leaf: leaf[0], w), out_dtype=jnp.float32)[None],
        mesh=by_expert, in_specs=(P(), P("e")), out_specs=P("e"),
    )(x, w)
    for e in range(4):
        expected = w4a8_matmul(x, jax.tree.map(lambda leaf: leaf[e], w), out_dtype=jnp.float32)
        assert twin.relative(spread[e], expected) < 1e-6
print("sharded: fine")
"""


def test_shardings_on_eight_simulated_devices():
    """In a process of its own: the number of CPU devices is fixed when JAX starts."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "sharded: fine" in run.stdout

"""Kernels on a mesh of simulated devices, by their stand-in; run by `test_sharding` in a process of its own."""

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fragment_standin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import logits, make, mesh, random_weight
from flax import nnx

import w4a8jax
from models.decoder import Decoder
from models.functional import split
from models.generate import Generator
from models.layers.linear import Linear
from models.sharding import Sharding, device_bytes
from pallas_kernels import (
    FragmentWeight,
    Partition,
    W4A8Error,
    W4Weight,
    divided,
    moe_mlp,
    prepare_weight,
    w4a8_matmul,
    w4a8_ragged_matmul,
    w4a16_matmul,
)

# A part's F is a multiple of 128.
CHANGES = {"qwen3_moe": {"moe_intermediate_size": 256}}
FAMILIES = [("cohere2", 4), ("llama", 2), ("qwen3", 4), ("cohere2_moe", 2), ("qwen3_moe", 1), ("mixtral", 4)]


def decoder_of(family: str) -> Decoder:
    return make(family, quantized=True, **CHANGES.get(family, {}))


def weights(decoder: Decoder) -> list[Any]:
    """Quantized ones, in whatever layout."""
    leaves = jax.tree.leaves(nnx.state(decoder, nnx.Param), is_leaf=lambda v: isinstance(v, W4Weight | FragmentWeight))
    return [leaf for leaf in leaves if isinstance(leaf, W4Weight | FragmentWeight)]


def prepared(decoder: Decoder) -> Decoder:
    """On one device."""
    for path, parameter in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        if isinstance(value := parameter.get_value(), W4Weight):
            *parents, attribute = path
            module: Any = decoder
            for step in parents:
                module = module[step] if isinstance(step, int) else getattr(module, step)
            setattr(module, str(attribute), nnx.Param(prepare_weight(value)))
    return decoder


def divided_decoder(family: str, shards: int) -> Decoder:
    decoder = decoder_of(family)
    Sharding(mesh(shards, "expert"), decoder.config).apply(decoder, kernels=True)
    assert all(isinstance(w, FragmentWeight) and w.partition is not None for w in weights(decoder))
    return decoder


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative, of each position."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def placed(w: W4Weight, partition: Partition) -> W4Weight:
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(partition.mesh, spec), divided.specs(w, partition))
    return jax.device_put(w, shardings)


@pytest.mark.parametrize(("family", "shards"), FAMILIES)
def test_logits_are_those_of_one_device_but_for_roundings_of_kernels(family: str, shards: int) -> None:
    """With a kernel that does not round its results, there is nothing but the order of sums in fp32."""
    expected = logits(decoder_of(family))
    with fragment_standin.kernels(jnp.float32):
        found = errors(logits(divided_decoder(family, shards)), expected)
    # Where an activation is at a tie, that order decides, and the positions after it are off by a step of FP8.
    assert np.median(found) < 2e-6
    assert np.max(found) < 5e-2


@pytest.mark.parametrize(("family", "shards"), [("cohere2", 4), ("cohere2_moe", 4)])
def test_rounding_parts_costs_no_more_than_rounding_wholes(family: str, shards: int) -> None:
    exact = logits(decoder_of(family))
    with fragment_standin.kernels():
        one, many = (
            np.linalg.norm(logits(decoder) - exact)
            for decoder in (prepared(decoder_of(family)), divided_decoder(family, shards))
        )
    assert 0 < many < 1.15 * one


@pytest.mark.parametrize("family", ["cohere2", "qwen3_moe"])
def test_generated_tokens_are_those_of_one_device(family: str) -> None:
    prompts = [[1, 5, 7, 9], [3] * 20]
    with fragment_standin.kernels(jnp.float32):
        decoders = prepared(decoder_of(family)), divided_decoder(family, 2)
        one, many = (Generator(decoder, chunk=16).generate(prompts, max_new_tokens=12)[0] for decoder in decoders)
    assert [r.tokens for r in one] == [r.tokens for r in many]


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize(("rows", "columns"), [("tensor", None), (None, "tensor"), ("data", "tensor"), (None, None)])
def test_products_have_the_operands_of_one_device(rows: str | None, columns: str | None, scheme: Any) -> None:
    numerics = "lut" if scheme == "w4a8" else "exact"
    w = random_weight(512, 1024)
    if numerics == "exact":
        w = W4Weight.from_checkpoint(w.packed, w.group_scale.astype(jnp.bfloat16), numerics="exact")
    # Each token is far greater in one part than in the others: their own scales would be others.
    x = np.random.default_rng(0).standard_normal((3, 3, 1024)) * np.where(np.arange(1024) // 256 == 2, 100, 1)
    x, matmul = jnp.asarray(x, jnp.bfloat16), {"w4a8": w4a8_matmul, "w4a16": w4a16_matmul}[scheme]
    expected = matmul(x, w, out_dtype=jnp.float32)
    partition = Partition(auto(mesh(4)), rows=rows, columns=columns)
    with fragment_standin.kernels(jnp.float32):
        prepared = prepare_weight(placed(w, partition), scheme, partition)
        found = jax.jit(matmul, static_argnames="out_dtype")(x, prepared, out_dtype=jnp.float32)
    assert found.shape == expected.shape
    assert found.sharding.spec[-1:] == ((rows,) if rows else ())
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def auto(devices: jax.sharding.Mesh) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices.devices, devices.axis_names)


@pytest.mark.parametrize(
    ("experts", "inner", "spread"),
    [
        ("expert", None, "even"),
        (None, "tensor", "even"),
        ("expert", "tensor", "even"),
        ("expert", "tensor", "one expert"),
        ("expert", None, "few tokens"),
    ],
)
def test_experts(experts: str | None, inner: str | None, spread: str) -> None:
    rng = np.random.default_rng(0)
    gate_up, down = random_weight(4, 1024, 256), random_weight(4, 256, 512)
    x = jnp.asarray(rng.standard_normal((3 if spread == "few tokens" else 40, 256)), jnp.float32)
    router = jnp.asarray(rng.standard_normal((4, 256)) / 16, jnp.float32)
    if spread == "one expert":
        x, router = jnp.abs(x), jnp.zeros_like(router).at[3].set(1.0)
    options = {"top_k": 1 if spread == "one expert" else 2}
    mlp = jax.jit(lambda x, *weights: moe_mlp(x, router, *weights, **options))
    expected = mlp(x, gate_up, down)
    of_down = Partition(auto(mesh(2, "expert")), experts=experts, columns=inner)
    shards = of_down.shards(inner)
    order = np.arange(1024).reshape(2, shards, -1).swapaxes(0, 1).reshape(-1)
    pieces = (v[:, order] for v in (gate_up.packed, gate_up.group_scale, gate_up.channel_scale))
    with fragment_standin.kernels(jnp.float32):
        parts = []
        for w, p in ((W4Weight(*pieces), dataclasses.replace(of_down, rows=inner, columns=None)), (down, of_down)):
            parts.append(prepare_weight(placed(w, p), partition=p))
        found = mlp(x, *parts)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_each_device_repacks_its_part() -> None:
    partition = Partition(auto(mesh(4)), rows="data", columns="tensor")
    w = random_weight(256, 1024)
    whole, parts = FragmentWeight.from_weight(w), placed(w, partition)
    found = divided.repack(parts, "w4a8", partition)
    for name in ("words", "scales", "channel_scale", "flags"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert {shard.data.shape for shard in found.words.addressable_shards} == {(2, 2, 4, 256)}
    assert {shard.data.shape for shard in found.scales.addressable_shards} == {(2, 2, 64)}
    assert {shard.data.shape for shard in found.channel_scale.addressable_shards} == {(128,)}
    assert not collectives(divided.repack, parts, "w4a8", partition)


def collectives(function: Any, *arguments: Any) -> list[str]:
    """Names and shapes of a compiled function's collectives, in the order of names."""
    text = function.lower(*arguments).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return sorted(f"{name} {shape}" for shape, name in re.findall(rf"= (\S+?)(?:{{\S*)? ({names})(?:-start)?\(", text))


def test_what_products_send() -> None:
    x = jnp.ones((8, 1024), jnp.bfloat16)
    with fragment_standin.kernels():
        sent = {}
        for rows, columns in (("tensor", None), (None, "tensor")):
            partition = Partition(auto(mesh(4)), rows=rows, columns=columns)
            w = prepare_weight(placed(random_weight(512, 1024), partition), partition=partition)
            operand = jax.device_put(x, jax.sharding.NamedSharding(partition.mesh, jax.P(None, columns)))
            sent[rows] = collectives(jax.jit(w4a8_matmul), operand, w)
    assert sent == {"tensor": [], None: ["all-reduce f32[8,1]", "all-reduce f32[8,512]"]}


def test_no_device_gathers_weights() -> None:
    with fragment_standin.kernels():
        structure, leaves = split(divided_decoder("qwen3_moe", 2))
        program = jax.jit(lambda leaves, tokens: structure.merge(leaves)(tokens)[0])
        sent = collectives(program, leaves, jnp.zeros((2, 16), jnp.int32))
    assert sent
    assert not [name for name in sent if re.search("u32|s32|u8", name) and "all-gather" in name]


def test_one_device_is_as_without_a_mesh() -> None:
    def program(decoder: Decoder) -> list[str]:
        structure, leaves = split(decoder)
        call = jax.make_jaxpr(lambda leaves, tokens: structure.merge(leaves)(tokens)[0])
        return list(equations(call(leaves, jnp.zeros((2, 16), jnp.int32)).jaxpr))

    one = jax.make_mesh((1, 1), ("expert", "tensor"), devices=jax.devices()[:1])
    with fragment_standin.kernels():
        for family in ("cohere2", "cohere2_moe"):
            alone = decoder_of(family)
            Sharding(one, alone.config).apply(alone, kernels=True)
            assert all(isinstance(w, FragmentWeight) and w.partition is None for w in weights(alone))
            found = program(alone)
            assert found == program(prepared(decoder_of(family)))
            assert not [equation for equation in found if "shard_map" in equation]
        assert [equation for equation in program(divided_decoder("cohere2", 2)) if "shard_map" in equation]


def equations(jaxpr: Any) -> Iterator[str]:
    """Each with its operands' and results' types, in the order of execution, those of inner functions too."""
    for equation in jaxpr.eqns:
        types = [[str(v.aval) for v in variables] for variables in (equation.invars, equation.outvars)]
        yield f"{equation.primitive.name} {types[0]} -> {types[1]}"
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("name", "scheme"), [("dense", "w4a8"), ("dense", "w4a16"), ("moe", "w4a8")])
def test_loading_places_each_part(tmp_path: Path, name: Any, scheme: Any) -> None:
    w4a8jax.quantize(w4a8jax.reference_model(name), tmp_path / name, scheme=scheme, search="none", progress=False)
    with fragment_standin.kernels():
        one, many = (
            w4a8jax.load(tmp_path / name, mesh=m)
            for m in (None, jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2]))
        )
        assert all(isinstance(w, FragmentWeight) and w.scheme == scheme for w in weights(many.decoder))
        (whole,) = device_bytes(one.decoder).values()
        kept = sum(w.flags.nbytes + w.channel_scale.nbytes for w in weights(one.decoder))
        assert max(device_bytes(many.decoder).values()) < 0.52 * whole + kept
        tokens = np.arange(32)
        expected = np.asarray(one.logits(tokens), np.float32)
        assert np.median(errors(np.asarray(many.logits(tokens), np.float32), expected)) < 3e-2


def test_parts_that_kernels_do_not_take_fall_back() -> None:
    """Of 16 query heads and 4 of keys and of values, 32 wide, each of four devices has 192 rows, no multiple of 128."""
    changes = {"num_attention_heads": 16, "head_dim": 32}
    expected = logits(make("llama", quantized=True, **changes))
    with fragment_standin.kernels(jnp.float32):
        decoder = make("llama", quantized=True, **changes)
        with pytest.warns(UserWarning, match=r"no kernel takes parts \[192, 256\] of weights \[768, 256\]"):
            Sharding(mesh(4), decoder.config).apply(decoder, kernels=True)
        attention = decoder.layers[0].attention
        assert isinstance(attention.qkv.weight.get_value(), W4Weight)
        assert isinstance(attention.output.weight.get_value(), FragmentWeight)
        found = errors(logits(decoder), expected)
    assert np.median(found) < 2e-6
    with fragment_standin.kernels(), warnings.catch_warnings():
        warnings.simplefilter("error")
        divided_decoder("llama", 2)


def test_refusals() -> None:
    with fragment_standin.kernels():
        decoder = divided_decoder("cohere2_moe", 2)
        linear: Linear = decoder.layers[0].mlp.down
        w = linear.weight.get_value()
        with pytest.raises(W4A8Error, match="a FragmentWeight has no gradient"):
            jax.grad(lambda x: jnp.sum(w4a8_matmul(x, w, out_dtype=jnp.float32)))(jnp.ones((4, w.shape[1])))
        experts = decoder.layers[1].mlp.experts
        gate_up, down = experts.gate_up.get_value(), experts.down.get_value()
        x, router = jnp.ones((4, down.shape[1])), jnp.ones((4, down.shape[1]))
        with pytest.raises(W4A8Error, match="a FragmentWeight has no gradient"):
            jax.grad(lambda x: jnp.sum(moe_mlp(x, router, gate_up, down, top_k=2)))(x)
        with pytest.raises(W4A8Error, match="experts divided among devices have no product of their own"):
            w4a8_ragged_matmul(x, gate_up, jnp.asarray([4, 0, 0, 0]))
        with pytest.raises(W4A8Error, match="gate_up: expected a weight divided and prepared for w4a8"):
            moe_mlp(x, router, random_weight(*gate_up.shape), down, top_k=2)
        other = dataclasses.replace(gate_up, partition=dataclasses.replace(gate_up.partition, rows=None))
        with pytest.raises(W4A8Error, match="experts: gate_up must be divided by rows and down by columns"):
            moe_mlp(x, router, other, down, top_k=2)

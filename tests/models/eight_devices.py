"""Decoders divided among simulated devices; run by `test_sharding` in a process of its own, which has eight."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_decoders import CONFIGS

import w4a8jax
from models.decoder import Decoder
from models.families import decoder_config
from models.functional import split
from models.generate import Generator
from models.layers.linear import Linear
from models.layers.moe import Experts
from models.scoring import chunked_logits
from models.sharding import RULES, Sharding, device_bytes
from pallas_kernels import FragmentWeight, W4A8Error, W4Weight, pack_codes

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"head_dim": 64, "vocab_size": 96}


CONFIGS = CONFIGS | {  # families whose every layer has experts
    "qwen3_moe": {**CONFIGS["qwen3"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {**CONFIGS["llama"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(family: str, *, quantized: bool = False, **changes: Any) -> Decoder:
    """A random decoder, the same each time."""
    config = decoder_config(CONFIGS[family] | SIZES | changes)
    decoder = Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    for path, module in nnx.iter_modules(decoder):
        if quantized and isinstance(module, Linear) and "lm_head" not in path:
            module.weight, module.scheme = nnx.Param(random_weight(*module.weight.get_value().shape)), "w4a8"
        if quantized and isinstance(module, Experts):
            for name in ("gate_up", "down"):
                setattr(module, name, nnx.Param(random_weight(*getattr(module, name).get_value().shape)))
    return decoder


def random_weight(*shape: int) -> W4Weight:
    rng = np.random.default_rng(shape[-1])
    scale = np.exp(rng.uniform(-7, -5, (*shape[:-1], shape[-1] // 128)))
    packed = pack_codes(jnp.asarray(rng.integers(-7, 8, shape)))
    return W4Weight.from_checkpoint(packed, jnp.asarray(scale, jnp.bfloat16))


def mesh(shards: int, name: str = "data") -> jax.sharding.Mesh:
    return jax.make_mesh((8 // shards, shards), (name, "tensor"))


def logits(decoder: Decoder) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, 96, (2, 16))
    return np.concatenate([np.asarray(piece) for _, piece in chunked_logits(decoder, tokens, chunk=16)], axis=1)


@pytest.mark.parametrize(
    ("family", "shards", "quantized"),
    [
        ("cohere2", 4, False),
        ("llama", 2, False),
        ("qwen3", 4, False),
        ("cohere2", 2, True),
        ("cohere2_moe", 2, False),
        ("qwen3_moe", 1, False),
        ("mixtral", 2, False),
        ("cohere2_moe", 2, True),
    ],
)
def test_logits_and_tokens_are_those_of_one_device(family: str, shards: int, quantized: bool) -> None:
    one, many = make(family, quantized=quantized), make(family, quantized=quantized)
    Sharding(mesh(shards, "expert"), many.config).apply(many)
    expected, found = logits(one), logits(many)
    # A quantized activation near a tie may round the other way, where sums differ in their last bit.
    limit = 2e-3 if quantized else 2e-6
    assert np.linalg.norm(found - expected) < limit * np.linalg.norm(expected)
    if family == "cohere2" and not quantized:
        prompts = [[1, 5, 7, 9], [3] * 20]
        runs = [Generator(decoder, chunk=16).generate(prompts, max_new_tokens=16)[0] for decoder in (one, many)]
        assert [r.tokens for r in runs[0]] == [r.tokens for r in runs[1]]


@pytest.mark.parametrize("quantized", [False, True])
def test_each_device_holds_its_part(quantized: bool) -> None:
    decoder = make("llama", quantized=quantized)
    (whole,) = device_bytes(decoder).values()
    Sharding(mesh(2), decoder.config).apply(decoder)
    norms = sum(math.prod(v.shape) * 4 for v in jax.tree.leaves(nnx.state(decoder, nnx.Param)) if v.ndim == 1)
    held = device_bytes(decoder)
    assert len(held) == 8
    # Norms, and the channel scales of the two projections whose outputs are whole, are on every device.
    assert all(whole / 2 <= size <= whole / 2 + norms for size in held.values())


def test_experts_are_divided() -> None:
    decoder = make("mixtral")
    Sharding(mesh(2, "expert"), decoder.config).apply(decoder)
    shards = decoder.layers[0].mlp.experts.down.get_value().addressable_shards
    assert {shard.data.shape for shard in shards} == {(1, 256, 256)}
    assert len({str(shard.index) for shard in shards}) == 8
    with pytest.raises(W4A8Error, match="mesh: num_experts 4 cannot be divided among 8 devices"):
        Sharding(mesh(1, "expert"), decoder.config)


def test_no_device_gathers_experts() -> None:
    decoder = make("qwen3_moe")
    sharding = Sharding(mesh(1, "expert"), decoder.config)
    structure, leaves = split(sharding.apply(decoder))
    program = jax.jit(lambda leaves, tokens: structure.merge(leaves)(tokens)[0])
    text = program.lower(leaves, jnp.zeros((2, 16), jnp.int32)).compile().as_text()
    gathered = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)]
    assert gathered
    assert max(gathered) < 256 * 256  # an expert's down has 256 x 512 or more


def test_loading_places_each_part() -> None:
    path = w4a8jax.reference_model("dense")
    one, many = (w4a8jax.load(path, dtype="float32", mesh=m) for m in (None, mesh(2)))
    assert max(device_bytes(many.decoder).values()) < 0.51 * sum(device_bytes(one.decoder).values())
    tokens = np.arange(16)
    np.testing.assert_allclose(many.logits(tokens), one.logits(tokens), atol=1e-3)


def test_what_does_not_divide_is_refused() -> None:
    config = make("llama").config
    with pytest.raises(W4A8Error, match="mesh: num_kv_heads 4 cannot be divided among 8 devices"):
        Sharding(mesh(8), config)
    with pytest.raises(W4A8Error, match="mesh: intermediate_size 516 cannot be divided among 8 devices"):
        Sharding(mesh(8), dataclasses.replace(config, intermediate_size=516, num_kv_heads=8))
    decoder = make("llama", quantized=True, num_attention_heads=4)
    with pytest.raises(W4A8Error, match=r"output\.weight: 2 groups of 128 cannot be divided among 4 devices"):
        Sharding(mesh(4), decoder.config).apply(decoder)
    layer = decoder.layers[0].mlp.down
    layer.weight = nnx.Param(FragmentWeight.from_weight(layer.weight.get_value()))
    with pytest.raises(W4A8Error, match=r"down\.weight: a kernel's weight cannot be divided"):
        Sharding(mesh(2), decoder.config).apply(decoder)


def test_rules_say_what_is_divided() -> None:
    decoder = make("llama", vocab_size=97)
    Sharding(mesh(2), decoder.config, {**RULES, "mlp": None}).apply(decoder)

    def parts(parameter: Any) -> int:
        return len({str(s.index) for s in parameter.get_value().addressable_shards})

    block = decoder.layers[0]
    assert (parts(block.attention.qkv.weight), parts(block.mlp.down.weight), block.mlp.shards) == (2, 1, 1)
    assert parts(decoder.embedding) == 1  # 97 rows
    np.testing.assert_allclose(logits(decoder), logits(make("llama", vocab_size=97)), rtol=1e-4, atol=1e-5)

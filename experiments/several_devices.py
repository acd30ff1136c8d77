"""Decode and prefill steps on one GPU and on several, kernels divided among them: microseconds.

    python experiments/several_devices.py --out experiments/results/several_devices_h100.json

Layers of Command A's size (dense, divided over "tensor") and of Qwen3-30B-A3B's (experts, divided over "tensor" or
over "expert"), with random weights and a small vocabulary. A decode step gives each sequence one more token after
2048; 16 of them run in one program, each on the token that the one before gave. A prefill step is one sequence's. Times
are of the whole step by the clock, after compilation, medians over runs; `us_a_layer` is a step's over the layers.
`difference` is that of the prefill's final states from those of one device, relative.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder
from models.families import decoder_config
from models.functional import Structure, split
from models.kv_cache import KVCache
from models.layers.linear import Linear
from models.layers.moe import Experts
from models.parameters import abstract_decoder, module_at
from models.sharding import Sharding, device_bytes
from pallas_kernels import W4Weight, backend

COMMON = {"vocab_size": 512, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "command-a": {
        "model_type": "cohere2", "hidden_size": 12288, "intermediate_size": 36864, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 4, "sliding_window": 4096, "logit_scale": 0.25,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 8,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
BATCHES, PROMPTS = (1, 16, 64), (512, 4096)
CONTEXT, STEPS, RUNS, WARM_UP = 2048, 16, 9, 2


def decoder_on(devices: int, axis: str, config: DecoderConfig) -> Decoder:
    """A decoder with random W4A8 weights, divided among devices over an axis of a mesh."""
    decoder = abstract_decoder(config)
    sharding = Sharding(jax.make_mesh((devices,), (axis,), devices=jax.devices()[:devices]), config)
    for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        *parents, attribute = path
        module, shape = module_at(decoder, tuple(parents)), tuple(variable.get_value().shape)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            if isinstance(module, Linear | Experts):
                value, module.scheme = random_weight(shape), "w4a8"
            elif len(shape) == 1:
                value = jnp.ones(shape, variable.get_value().dtype)
            else:
                value = jnp.asarray(np.random.default_rng(0).standard_normal(shape), variable.get_value().dtype)
            setattr(module, str(attribute), nnx.Param(value))
        sharding.place(decoder, tuple(path), kernels=True)
    return sharding.finish(decoder)


@functools.cache
def random_weight(shape: tuple[int, ...]) -> W4Weight:
    """Of about unit gain, codes -7..7."""
    *lead, k = shape
    words = np.random.default_rng(k).integers(-(2**31), 2**31, (*lead, k // 8), np.int32) | np.int32(0x11111111)
    group_scale = jnp.full((*lead, k // 128), 8, jnp.float8_e4m3fn)
    return W4Weight(jnp.asarray(words), group_scale, jnp.full(lead, 0.03 * k**-0.5, jnp.float32), "lut", -7)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(structure: Structure, leaves: list[Any], cache: KVCache, tokens: jax.Array) -> tuple[KVCache, jax.Array]:
    decoder = structure.merge(leaves)

    def step(_: Any, state: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
        logits, cache = decoder(state[1], state[0], lengths=jnp.ones(len(state[1]), jnp.int32))
        assert cache is not None
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))


@functools.partial(jax.jit, static_argnums=0)
def prefill(structure: Structure, leaves: list[Any], tokens: jax.Array) -> jax.Array:
    return structure.merge(leaves).hidden_states(tokens)[0]


def timed(call: Callable[[], Any], runs: int) -> dict[str, Any]:
    """Microseconds of a call that returns device arrays; the first two compile, for their own results too."""
    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e6 * (time.perf_counter() - start))
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "runs": runs}


def decode_steps(decoder: Decoder, batch: int, runs: int) -> dict[str, Any]:
    structure, leaves = split(decoder)
    slots = CONTEXT + STEPS * (runs + WARM_UP)
    cache = KVCache.create(decoder.config, batch, slots, decoder.dtype, decoder.cache_sharding)
    state = KVCache(cache.layers, jnp.full((batch,), CONTEXT, jnp.int32)), jnp.ones((batch, 1), jnp.int32)

    def call() -> Any:
        nonlocal state
        state = decode(structure, leaves, *state)
        return state

    return {name: value if name == "runs" else value / STEPS for name, value in timed(call, runs).items()}


def main(models: dict[str, dict[str, Any]], devices: int, runs: int) -> list[dict[str, Any]]:
    rows = []
    for model, fields in models.items():
        config = decoder_config(COMMON | fields)
        meshes = [(1, "tensor"), (devices, "tensor"), *([(devices, "expert")] if config.moe else [])]
        expected: dict[int, np.ndarray] = {}
        for count, axis in meshes:
            decoder = decoder_on(count, axis, config)
            of = {"model": model, "layers": config.num_layers, "devices": count, "axis": axis}
            of |= {"mib_a_device": max(device_bytes(decoder).values()) / 2**20}
            for batch in BATCHES:
                row = of | {"step": "decode", "sequences": batch, "context": CONTEXT}
                rows.append(row | decode_steps(decoder, batch, runs))
                print(_line(rows[-1]), flush=True)
            structure, leaves = split(decoder)
            for length in PROMPTS:
                tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (1, length)), jnp.int32)
                call = functools.partial(prefill, structure, leaves, tokens)
                states = np.asarray(call(), np.float32)
                one = expected.setdefault(length, states)
                difference = float(np.linalg.norm(states - one) / np.linalg.norm(one))
                rows.append(of | {"step": "prefill", "tokens": length, "difference": difference} | timed(call, runs))
                print(_line(rows[-1]), flush=True)
            del decoder, leaves, call
    return [row | {"us_a_layer": row["us"] / row["layers"]} for row in rows]


def _line(row: dict[str, Any]) -> str:
    size = f"{row.get('sequences') or row.get('tokens'):5}"
    return f"{row['model']:14} {row['devices']} x {row['axis']:7} {row['step']:8} {size} {row['us']:10.1f} us"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, action="append", help="by default all")
    parser.add_argument("--layers", type=int, help="of each model, instead of its own number here")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if backend() != "hopper" or jax.device_count() < arguments.devices:
        parser.error(f"needs {arguments.devices} Hopper GPUs, found {jax.devices()}")
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    chosen = {name: MODELS[name] | layers for name in arguments.model or MODELS}
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": "python experiments/several_devices.py",
    }
    record = about | {"rows": main(chosen, arguments.devices, arguments.runs)}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

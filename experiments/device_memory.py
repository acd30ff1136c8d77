"""Memory of each device when decoders with experts are divided among eight: simulated on a CPU.

    python experiments/device_memory.py --out experiments/results/device_memory.json

Random decoders of two layers, hidden size 1024, eight experts, in bf16 and in W4A8; the forward pass of two sequences
of 256 tokens. Of one device and of eight, "expert" x "tensor" = 4 x 2: the parameters that the fullest device holds,
and XLA's own figure for the program's peak on each device, parameters included (`memory_analysis`). On a CPU quantized
weights are widened for products, so that W4A8's peak says what is divided, not what a GPU takes.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.decoder import Decoder
from models.families import decoder_config
from models.functional import split
from models.layers.linear import Linear
from models.layers.moe import Experts
from models.sharding import Sharding, device_bytes
from pallas_kernels import W4Weight

COMMON = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"first_k_dense_replace": 1, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
                    "expert_selection_fn": "sigmoid", "logit_scale": 1.0, "sliding_window": 512},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "rms_norm_eps": 1e-6},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
}  # fmt: skip
TOKENS = (2, 256)


def decoder_of(family: str, scheme: str) -> Decoder:
    config = decoder_config(COMMON | FAMILIES[family] | {"model_type": family})
    decoder = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    if scheme == "w4a8":
        for path, module in nnx.iter_modules(decoder):
            if isinstance(module, Linear) and "lm_head" not in path:
                module.weight, module.scheme = nnx.Param(random_weight(*module.weight.get_value().shape)), "w4a8"
            if isinstance(module, Experts):
                for name in ("gate_up", "down"):
                    setattr(module, name, nnx.Param(random_weight(*getattr(module, name).get_value().shape)))
    return decoder


def random_weight(*shape: int) -> W4Weight:
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), np.int32) | np.int32(0x11111111)
    scale = np.exp2(rng.uniform(-9, -6, (*shape[:-1], shape[-1] // 128)))
    return W4Weight.from_checkpoint(jnp.asarray(words), jnp.asarray(scale, jnp.bfloat16))


def measure(decoder: Decoder) -> dict[str, int]:
    structure, leaves = split(decoder)
    program = jax.jit(lambda leaves, tokens: structure.merge(leaves)(tokens)[0])
    found = program.lower(leaves, jnp.zeros(TOKENS, jnp.int32)).compile().memory_analysis()
    peak = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return {"parameters": max(device_bytes(decoder).values()), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = []
    print("| family | weights | parameters, one device | each of eight | peak, one device | each of eight |")
    print("|---|---|---|---|---|---|")
    for family in FAMILIES:
        for scheme in ("bf16", "w4a8"):
            one, many = decoder_of(family, scheme), decoder_of(family, scheme)
            Sharding(jax.make_mesh((4, 2), ("expert", "tensor")), many.config).apply(many)
            row = {"family": family, "scheme": scheme, "one": measure(one), "eight": measure(many)}
            sizes = [row[where][what] / 2**20 for what in ("parameters", "peak") for where in ("one", "eight")]
            print(f"| {family} | {scheme} | {' | '.join(f'{size:.1f}' for size in sizes)} |", flush=True)
            rows.append(row)
    if out:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "jax": jax.__version__}
        out.write_text(json.dumps(about | {"command": "python experiments/device_memory.py", "rows": rows}) + "\n")


if __name__ == "__main__":
    main()

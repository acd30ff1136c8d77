"""Tiny random checkpoints in the format that vLLM loads, written with numpy alone.

They share no code with the package: the layout below is the format's definition a second time, so that a mistake in
the package's writer cannot hide behind the same mistake here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

BF16 = ml_dtypes.bfloat16
GROUP_SIZE = 128
INDEX = "model.safetensors.index.json"
SERVED_BY = "CompressedTensorsW4A8Fp8 on CutlassW4A8LinearKernel"
EXPERTS_SERVED_BY = "CompressedTensorsW4A8Fp8MoEMethod"

_COMMON = {
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "cohere2": _COMMON
    | {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "rope_theta": 50000.0,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "qwen3": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "cohere2_moe": _COMMON
    | {
        "architectures": ["Cohere2MoeForCausalLM"],
        "model_type": "cohere2_moe",
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "rope_theta": 50000.0,
        "sliding_window": 128,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "prefix_dense_intermediate_size": 512,
        "intermediate_size": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "expert_selection_fn": "sigmoid",
        "tie_word_embeddings": True,
    },
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "moe_intermediate_size": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "mixtral": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "llama": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}


def _quantization_config(group_size: int, ignore: tuple[str, ...]) -> dict[str, Any]:
    """The compressed-tensors section of config.json for INT4 weights and FP8 per-token activations."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights | {"dynamic": False},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp\\.gate$", "re:.*block_sparse_moe\\.gate$", *ignore],
        "config_groups": {"group_0": group},
    }


def has_experts(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer has experts in place of the MLP."""
    kinds = config.get("mlp_layer_types", ["sparse" if "num_experts_per_tok" in config else "dense"] * (layer + 1))
    return kinds[layer] == "sparse"


def served(config: dict[str, Any]) -> dict[str, int]:
    """How vLLM must serve a W4A8 checkpoint: the number of matrices by what computes them."""
    layers = config["num_hidden_layers"]
    sparse = sum(has_experts(config, layer) for layer in range(layers))
    dense = 4 * (layers - sparse) + (2 + 2 * bool(config.get("num_shared_experts"))) * sparse  # qkv, o, gate_up, down
    return {SERVED_BY: dense} | ({EXPERTS_SERVED_BY: sparse} if sparse else {})


def _linears(config: dict[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of the linears of a decoder layer, router excepted."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    }
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    mlps = {"mlp": config.get("prefix_dense_intermediate_size", inner)}
    if has_experts(config, layer):
        experts, width = _router(config)[1], config.get("moe_intermediate_size", inner)
        parent = _router(config)[0].removesuffix(".gate")
        mlps = {f"{parent}.experts.{e}": width for e in range(experts)}
        if shared := config.get("num_shared_experts"):
            mlps[f"{parent}.shared_experts"] = shared * inner
        if config["model_type"] == "mixtral":
            gate, up, down = "w1", "w3", "w2"
    for mlp, width in mlps.items():
        linears |= {f"{mlp}.{gate}": (width, hidden), f"{mlp}.{up}": (width, hidden), f"{mlp}.{down}": (hidden, width)}
    return linears


def _router(config: dict[str, Any]) -> tuple[str, int]:
    """Its name in a layer and the number of experts."""
    if config["model_type"] == "mixtral":
        return "block_sparse_moe.gate", config["num_local_experts"]
    return "mlp.gate", config["num_experts"]


def _norms(config: dict[str, Any]) -> dict[str, int]:
    """Name -> size of the norms of one decoder layer."""
    norms = {"input_layernorm": config["hidden_size"]}
    if not config["model_type"].startswith("cohere2"):
        norms["post_attention_layernorm"] = config["hidden_size"]
    if config["model_type"].startswith("qwen3"):
        norms |= {"self_attn.q_norm": config["head_dim"], "self_attn.k_norm": config["head_dim"]}
    return norms


def _quantized(rng: np.random.Generator, n: int, k: int, group_size: int) -> dict[str, np.ndarray]:
    nibbles = rng.integers(0, 16, (n, k // 8, 8), dtype=np.uint32)  # code + 8, lowest nibble first
    packed = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    return {
        "weight_packed": packed.view(np.int32),
        "weight_scale": rng.uniform(1e-3, 1e-2, (n, k // group_size)).astype(BF16),
        "weight_shape": np.array([n, k], np.int64),
    }


def write_toy(
    path: Path,
    family: str,
    *,
    quantized: bool = True,
    group_size: int = GROUP_SIZE,
    ignore: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Writes a two-shard checkpoint of `family` to the new folder `path` and returns it.

    Args:
        quantized: W4A8 linears, or else plain bf16 ones.
        group_size: columns per scale; vLLM takes 128 only.
        ignore: modules that config.json says are not quantized, besides lm_head.
        **changes: entries that replace those of the family's config.
    """
    config = CONFIGS[family] | changes
    rng = np.random.default_rng(sum(map(ord, family)))

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.02, shape).astype(BF16)

    shards: list[dict[str, np.ndarray]] = [{}, {}]
    for layer in range(config["num_hidden_layers"]):
        shard = shards[layer % 2]
        if has_experts(config, layer):
            router, experts = _router(config)
            shard[f"model.layers.{layer}.{router}.weight"] = random(experts, config["hidden_size"])
        for name, (n, k) in _linears(config, layer).items():
            tensors = _quantized(rng, n, k, group_size) if quantized else {"weight": random(n, k)}
            shard.update({f"model.layers.{layer}.{name}.{leaf}": t for leaf, t in tensors.items()})
        for name, size in _norms(config).items():
            shard[f"model.layers.{layer}.{name}.weight"] = 1 + random(size)
    shards[0]["model.embed_tokens.weight"] = random(config["vocab_size"], config["hidden_size"])
    shards[1]["model.norm.weight"] = 1 + random(config["hidden_size"])
    if not config["tie_word_embeddings"]:
        shards[1]["lm_head.weight"] = random(config["vocab_size"], config["hidden_size"])

    path.mkdir(parents=True)
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        index["metadata"]["total_size"] += sum(t.nbytes for t in shard.values())
        index["weight_map"] |= dict.fromkeys(shard, file)
    (path / INDEX).write_text(json.dumps(index, indent=2))
    if quantized:
        config["quantization_config"] = _quantization_config(group_size, ignore)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def _shards(path: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, of a checkpoint with or without an index."""
    shards = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            shards[file.name] = list(opened.keys())
    return shards


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors of a checkpoint."""
    return sorted(name for names in _shards(path).values() for name in names)


def copy_without(source: Path, path: Path, tensor: str) -> Path:
    """Copies a checkpoint to the new folder `path`, less one tensor, which its shard and the index no longer know."""
    shutil.copytree(source, path)
    file = path / next(file for file, names in _shards(path).items() if tensor in names)
    tensors = load_file(file)
    del tensors[tensor]
    save_file(tensors, file, metadata={"format": "pt"})
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_text())
        del index["weight_map"][tensor]
        (path / INDEX).write_text(json.dumps(index, indent=2))
    return path

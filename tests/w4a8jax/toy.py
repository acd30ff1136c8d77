"""Tiny random checkpoints in Hugging Face's layout, as transformers 5 writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from w4a8jax.checkpoints.safetensors_format import TensorSpec, layout

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 256, 4, 2, 64
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def toy_config(
    model_type: str = "llama",
    *,
    layers: int = 2,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """config.json of a small llama, qwen3 or cohere2."""
    config: dict[str, Any] = {
        "architectures": [{"llama": "Llama", "qwen3": "Qwen3", "cohere2": "Cohere2"}[model_type] + "ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 512,
        "model_type": model_type,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(hidden // HEAD_DIM // 2, 1),
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": model_type == "cohere2",
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    if model_type == "llama":
        config |= {"mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-06}
    elif model_type == "qwen3":
        full = ["full_attention"] * layers
        config |= {"layer_types": full, "max_window_layers": 28, "rms_norm_eps": 1e-06}
        config |= {"sliding_window": None, "use_sliding_window": False}
    else:
        types = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
        config |= {"layer_norm_eps": 1e-05, "layer_types": types, "logit_scale": 0.0625, "sliding_window": 32}
    return config


def toy_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"] * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        if config["model_type"] != "cohere2":
            layer["post_attention_layernorm"] = (hidden,)
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def toy_tensors(config: Mapping[str, Any], dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for all tensors."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape, np.float32) * 0.05 + ("norm" in name)).astype(DTYPES[dtype])
        for name, shape in toy_shapes(config).items()
    }


def save_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file."""
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    prefix, offsets, size = layout(specs)
    data = bytearray(size)
    data[: len(prefix)] = prefix
    for name, array in tensors.items():
        data[offsets[name] : offsets[name] + array.nbytes] = array.tobytes()
    path.write_bytes(data)


def save_checkpoint(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, sharded: bool = False
) -> Path:
    """Writes a checkpoint directory: one file, or two shards with an index; with a tokenizer's files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if sharded:
        names = sorted(tensors)
        half = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(half.values())):
            save_file(path / file, {name: tensors[name] for name in names if half[name] == file})
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": half}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(path / "model.safetensors", tensors)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates").mkdir(exist_ok=True)
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return path


def toy_checkpoint(
    tmp_path: Path,
    *,
    model_type: str = "llama",
    sharded: bool = False,
    dtype: str = "bfloat16",
    layers: int = 2,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    name: str = "source",
    **changes: np.ndarray,
) -> Path:
    """A whole checkpoint of random weights in `tmp_path / name`; `changes` replace tensors."""
    config = toy_config(model_type, layers=layers, hidden=hidden, intermediate=intermediate, dtype=dtype)
    tensors = toy_tensors(config, dtype) | changes
    return save_checkpoint(tmp_path / name, config, tensors, sharded=sharded)


def contents(path: Path) -> dict[str, bytes]:
    """Every file under a directory, by relative path."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}

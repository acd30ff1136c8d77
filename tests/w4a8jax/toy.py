"""Tiny random checkpoints in Hugging Face's layout, as transformers 5 writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorSpec, layout

Edit = Callable[[dict[str, np.ndarray], dict], object]

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 256, 4, 2, 64
EXPERTS, EXPERT_SIZE = 4, 256
MOE = ("cohere2_moe", "mixtral", "qwen3_moe")
ARCHITECTURES = {
    "cohere2": "Cohere2",
    "cohere2_moe": "Cohere2Moe",
    "llama": "Llama",
    "mixtral": "Mixtral",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
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
    """config.json of a small model of any family; two experts of four for each token."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type] + "ForCausalLM"],
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
        "tie_word_embeddings": model_type.startswith("cohere2"),
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    if model_type in MOE:
        config |= {"num_local_experts" if model_type == "mixtral" else "num_experts": EXPERTS, "num_experts_per_tok": 2}
    if model_type == "llama":
        config |= {"mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-06}
    elif model_type == "qwen3":
        full = ["full_attention"] * layers
        config |= {"layer_types": full, "max_window_layers": 28, "rms_norm_eps": 1e-06}
        config |= {"sliding_window": None, "use_sliding_window": False}
    elif model_type == "qwen3_moe":
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": EXPERT_SIZE}
        config |= {"norm_topk_prob": True, "rms_norm_eps": 1e-06, "sliding_window": None}
    elif model_type == "mixtral":
        config |= {"intermediate_size": EXPERT_SIZE, "rms_norm_eps": 1e-05, "sliding_window": None}
    else:
        types = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
        config |= {"layer_norm_eps": 1e-05, "layer_types": types, "logit_scale": 0.0625, "sliding_window": 32}
    if model_type == "cohere2_moe":
        config |= {"expert_selection_fn": "sigmoid", "num_shared_experts": 1, "intermediate_size": EXPERT_SIZE}
        config |= {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1), "norm_topk_prob": True}
        config |= {"prefix_dense_intermediate_size": intermediate, "shared_expert_combination_strategy": "average"}
    return config


def toy_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    hidden, kind = config["hidden_size"], config["model_type"]
    intermediate = config.get("prefix_dense_intermediate_size") or config["intermediate_size"]
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
        }
        if kind not in MOE or (kind == "cohere2_moe" and i == 0):
            layer |= {f"mlp.{leaf}_proj": (intermediate, hidden) for leaf in ("gate", "up")}
            layer["mlp.down_proj"] = (hidden, intermediate)
        else:
            mlp = "block_sparse_moe" if kind == "mixtral" else "mlp"
            gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            layer[f"{mlp}.gate"] = (EXPERTS, hidden)
            experts = [f"{mlp}.experts.{e}" for e in range(EXPERTS)]
            for expert in [*experts, "mlp.shared_experts"] if kind == "cohere2_moe" else experts:
                layer |= {f"{expert}.{leaf}": (EXPERT_SIZE, hidden) for leaf in (gate, up)}
                layer[f"{expert}.{down}"] = (hidden, EXPERT_SIZE)
        if not kind.startswith("cohere2"):
            layer["post_attention_layernorm"] = (hidden,)
        if kind.startswith("qwen3"):
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


def edited_checkpoint(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a checkpoint, without a tokenizer, with its tensors and config changed."""
    reader = CheckpointReader(source)
    tensors, config = {key: reader.read(key) for key in reader.tensors}, json.loads(json.dumps(reader.config))
    edit(tensors, config)
    path = save_checkpoint(target, config, tensors)
    (path / "tokenizer.json").unlink()
    return path

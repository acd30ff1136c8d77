"""A larger cohere2 checkpoint of random weights, of which only the time to quantize it means anything."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import w4a8jax

# By their hidden size. The second are those of Command R7B, of 218 million parameters a layer.
SIZES = {
    1024: {"intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    4096: {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}


def synthetic_model(folder: Path, hidden: int, layers: int) -> Path:
    """Makes a checkpoint of the dense reference model's kind and vocabulary, but of so many larger layers.

    Weights are normal, so large that the residual stream keeps its size.
    """
    source = w4a8jax.reference_model("dense")
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_hidden_layers": layers} | SIZES[hidden]
    kinds = config["layer_types"]
    config["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    mlp, head = config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": normal(draw, (config["vocab_size"], hidden)),
        "model.norm.weight": np.ones(hidden, ml_dtypes.bfloat16),
    }
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(draw, shape, shape[1] ** -0.5)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(source / file, folder)
    return folder


def normal(draw: np.random.Generator, shape: tuple[int, ...], scale: float = 1) -> np.ndarray:
    """bf16, of this standard deviation."""
    return (draw.standard_normal(shape, np.float32) * np.float32(scale)).astype(ml_dtypes.bfloat16)

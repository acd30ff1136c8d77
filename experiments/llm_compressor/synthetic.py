"""A larger cohere2 checkpoint of random weights, of which only the time to quantize it means anything."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import w4a8jax

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}


def synthetic_model(folder: Path) -> Path:
    """Makes a checkpoint of the dense reference model's kind, vocabulary and number of layers, but of larger layers.

    Weights are normal, so large that the residual stream keeps its size; 60 million parameters.
    """
    source = w4a8jax.reference_model("dense")
    config = json.loads((source / "config.json").read_text()) | SIZES
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": draw.normal(size=(config["vocab_size"], hidden)),
        "model.norm.weight": np.ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(hidden)
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = draw.normal(size=shape) / shape[1] ** 0.5
    folder.mkdir()
    save_file(
        {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(source / file, folder)
    return folder

"""The dense reference model: its Hugging Face config, its initialization, and the decoder run on named parameters.

Training keeps parameters as a dict from Hugging Face tensor names to fp32 arrays, so that exporting is writing them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from models.decoder import Decoder
from models.families import family

Params = dict[str, jax.Array]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PAD_ID, BOS_ID, EOS_ID, END_OF_TURN_ID = 0, 1, 2, 4


def hf_config(vocab_size: int = 3840, max_context: int = 65536) -> dict[str, Any]:
    """config.json, as transformers writes it. Its matrices satisfy vLLM's W4A8 shape rules; 4.9 million parameters."""
    layers = 4
    return {
        "architectures": ["Cohere2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "dtype": "bfloat16",
        "eos_token_id": EOS_ID,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "layer_norm_eps": 1e-05,
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)],
        "logit_scale": 0.25,
        "max_position_embeddings": max_context,
        "model_type": "cohere2",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by Hugging Face name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "mlp.down_proj.weight": (hidden, inner),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "self_attn.k_proj.weight": (keys, hidden),
            layer + "self_attn.o_proj.weight": (hidden, queries),
            layer + "self_attn.q_proj.weight": (queries, hidden),
            layer + "self_attn.v_proj.weight": (keys, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def init_params(config: Mapping[str, Any], key: jax.Array) -> Params:
    """fp32 parameters. What is added to the residual stream starts small, so that it starts as the embedding."""
    params = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if len(shape) == 1:
            params[name] = jnp.ones(shape, jnp.float32)
            continue
        scale = 0.08 if "embed" in name else 0.8 / math.sqrt(shape[1])
        if "o_proj" in name or "down_proj" in name:
            scale /= math.sqrt(2 * config["num_hidden_layers"])
        params[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    return params


class Model:
    """The library's `Decoder` as a pure function of named parameters."""

    def __init__(self, config: Mapping[str, Any], dtype: Any = jnp.bfloat16):
        self.config, self.dtype = dict(config), dtype
        self._family = family(config)
        decoder_config = self._family.decoder_config(config)
        abstract = nnx.eval_shape(lambda: Decoder(decoder_config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
        self._graph, self._state = nnx.split(abstract)

    def _decoder(self, params: Params) -> Decoder:
        flat = dict(nnx.to_flat_state(self._state))
        for ours, theirs in self._family.names.items():
            for i in range(self.config["num_hidden_layers"] if "{i}" in ours else 1):
                pieces = [params[name.format(i=i) + ".weight"] for name in theirs if name != "lm_head"]
                path = tuple(int(part) if part.isdigit() else part for part in ours.format(i=i).split("."))
                path = path if path in flat else (*path, "weight")
                if path not in flat:
                    continue
                weight = jnp.concatenate([piece.astype(self.dtype) for piece in pieces])
                if weight.shape != flat[path].get_value().shape:
                    raise ValueError(f"{'.'.join(map(str, path))} cannot be made of {theirs}")
                flat[path] = flat[path].replace(weight)
        return nnx.merge(self._graph, nnx.from_flat_state(list(flat.items())))

    def logits(
        self, params: Params, tokens: jax.Array, dropout: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """fp32 logits [B, T, V] of tokens [B, T]; with `dropout`, of what attention and MLP add to the stream."""
        decoder = self._decoder(params)
        if dropout is not None and key is not None:
            block: Any
            for i, block in enumerate(decoder.layers):
                block.attention.output = _Dropout(block.attention.output, dropout, jax.random.fold_in(key, 2 * i))
                block.mlp.down = _Dropout(block.mlp.down, dropout, jax.random.fold_in(key, 2 * i + 1))
        return decoder(tokens.astype(jnp.int32))[0]


class _Dropout:
    """A layer whose outputs are dropped at a traced rate, in steps of 1/256."""

    def __init__(self, inner: Any, rate: jax.Array, key: jax.Array):
        self.inner, self.rate, self.key = inner, rate, key

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.inner(x)
        threshold = jnp.round(self.rate * 256)
        kept = jax.random.bits(self.key, y.shape, jnp.uint8).astype(jnp.float32) >= threshold
        return jnp.where(kept, y * (256 / (256 - threshold)).astype(y.dtype), 0)


def save_checkpoint(params: Params, config: Mapping[str, Any], tokenizer: Path, folder: Path) -> int:
    """Writes a Hugging Face checkpoint in bf16 with the tokenizer's files; returns the folder's size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in params.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {
        "_from_model_config": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_OF_TURN_ID],
        "pad_token_id": PAD_ID,
        "transformers_version": config["transformers_version"],
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return sum(path.stat().st_size for path in folder.iterdir())

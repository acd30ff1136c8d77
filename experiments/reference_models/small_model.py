"""The reference models: Hugging Face configs, initialization, and the decoder run on named parameters.

Training keeps parameters as a dict from Hugging Face tensor names to fp32 arrays, so that exporting is writing them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from experts import DenselyComputedMoE
from flax import nnx
from safetensors.numpy import save_file

from models.decoder import Decoder
from models.families import family
from models.layers.moe import MoE
from models.parameters import abstract_decoder, expected_shapes, parameters

Params = dict[str, jax.Array]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PAD_ID, BOS_ID, EOS_ID, END_OF_TURN_ID = 0, 1, 2, 4


def hf_config(name: str, vocab_size: int = 3840, max_context: int = 65536) -> dict[str, Any]:
    """config.json, as transformers writes it, of the model "dense" (4.9 million parameters) or "moe" (4.7 million).

    Their matrices satisfy vLLM's W4A8 shape rules, and each is below 10 MB in bf16.
    """
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "dtype": "bfloat16",
        "eos_token_id": EOS_ID,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.25,
        "max_position_embeddings": max_context,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": vocab_size,
        **_CONFIGS[name],
    }


_CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {
        "architectures": ["Cohere2ForCausalLM"],
        "intermediate_size": 1024,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "model_type": "cohere2",
        "num_hidden_layers": 4,
    },
    # 256 is the least width of an expert that vLLM's W4A8 kernel takes, so that six of them fill what 10 MB leave.
    "moe": {
        "architectures": ["Cohere2MoeForCausalLM"],
        "expert_selection_fn": "softmax",
        "intermediate_size": 256,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "model_type": "cohere2_moe",
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 512,
        "shared_expert_combination_strategy": "average",
    },
}
MODELS = tuple(_CONFIGS)


def init_params(config: Mapping[str, Any], key: jax.Array) -> Params:
    """fp32 parameters. What is added to the residual stream starts small, so that it starts as the embedding."""
    members = family(config)
    params = {}
    for i, (name, shape) in enumerate(expected_shapes(members.decoder_config(config), members.names).items()):
        if len(shape) == 1:
            params[name] = jnp.ones(shape, jnp.float32)
            continue
        scale = 0.08 if "embed" in name else 0.8 / math.sqrt(shape[1])
        if "o_proj" in name or "down_proj" in name:
            scale /= math.sqrt(2 * config["num_hidden_layers"])
        params[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    return params


class Forward(NamedTuple):
    """What the model makes of tokens [B, T].

    Attributes:
        logits: fp32 [B, T, V].
        chosen: bool [S, B, T, E], the experts of each token in the S layers that have any; None without experts.
        balance: fp32, the mean over these layers of their balancing losses (see experts.py); 0 without experts.
    """

    logits: jax.Array
    chosen: jax.Array | None
    balance: jax.Array


class Model:
    """The library's `Decoder` as a pure function of named parameters."""

    def __init__(self, config: Mapping[str, Any], dtype: Any = jnp.bfloat16):
        self.config = dict(config)
        members = family(config)
        abstract = abstract_decoder(members.decoder_config(config), dtype)
        self._parameters = parameters(abstract, members.names)
        self._graph, self._state = nnx.split(abstract)

    def _decoder(self, params: Params) -> Decoder:
        flat = dict(nnx.to_flat_state(self._state))
        for parameter in self._parameters:
            variable = flat[parameter.path]
            dtype = variable.get_value().dtype  # fp32 for routers
            matrices = [
                jnp.concatenate([params[f"{module}.{parameter.suffix}"].astype(dtype) for module in modules])
                for modules in parameter.modules
            ]
            value = jnp.stack(matrices) if parameter.kind == "experts" else matrices[0]
            flat[parameter.path] = variable.replace(value)
        return nnx.merge(self._graph, nnx.from_flat_state(list(flat.items())))

    def forward(
        self, params: Params, tokens: jax.Array, dropout: jax.Array | None = None, key: jax.Array | None = None
    ) -> Forward:
        """Runs tokens [B, T]; with `dropout`, of what attention and MLP add to the stream."""
        decoder = self._decoder(params)
        sparse: list[DenselyComputedMoE] = []
        block: Any
        for i, block in enumerate(decoder.layers):
            if isinstance(block.mlp, MoE):
                sparse.append(DenselyComputedMoE(block.mlp))
                block.mlp = sparse[-1]
            if dropout is not None and key is not None:
                block.attention.output = _Dropout(block.attention.output, dropout, jax.random.fold_in(key, 2 * i))
                block.mlp = _Dropout(block.mlp, dropout, jax.random.fold_in(key, 2 * i + 1))
        logits = decoder(tokens.astype(jnp.int32))[0]
        if not sparse:
            return Forward(logits, None, jnp.float32(0))
        return Forward(
            logits,
            jnp.stack([layer.chosen for layer in sparse]),
            jnp.mean(jnp.stack([layer.balance for layer in sparse])),
        )

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        """fp32 logits [B, T, V] of tokens [B, T]."""
        return self.forward(params, tokens).logits


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
    """Writes a Hugging Face checkpoint with the tokenizer's files; returns the folder's size in bytes.

    In bf16, but for routers: those stay in fp32, since a rounding there sends tokens to other experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.asarray(value, np.float32 if name.endswith(".mlp.gate.weight") else ml_dtypes.bfloat16)
        for name, value in params.items()
    }
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
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return sum(path.stat().st_size for path in folder.iterdir())

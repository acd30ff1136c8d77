"""Tiny random decoders of each family, in fp32 so that two ways of computing agree to rounding."""

import functools

import jax.numpy as jnp
from flax import nnx

from models.decoder import Decoder
from models.families import decoder_config

VOCAB = 97
WINDOW = 8
CONTEXT = 128

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    # Layer 0 slides over a window shorter than the prompts of the tests, layer 1 attends to everything.
    "cohere2": _COMMON
    | {
        "model_type": "cohere2",
        "num_hidden_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 1.0,
    },
    # A dense layer, then experts beside a shared one.
    "cohere2_moe": _COMMON
    | {
        "model_type": "cohere2_moe",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "first_k_dense_replace": 1,
        "num_experts": 4,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
        "logit_scale": 1.0,
    },
    "llama": _COMMON | {"model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-6},
    "qwen3": _COMMON | {"model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 32, "rms_norm_eps": 1e-6},
}


@functools.cache
def tiny_decoder(family: str, **changes) -> Decoder:
    """A random decoder with weights large enough for greedy text to vary; do not change it."""
    decoder = Decoder(
        decoder_config(CONFIGS[family] | changes), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    for layer in decoder.layers:
        for _, variable in nnx.to_flat_state(nnx.state((layer.attention, layer.mlp), nnx.Param)):
            if variable.get_value().ndim > 1:
                variable.set_value(variable.get_value() * 24)
    return decoder

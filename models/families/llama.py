"""Llama 2 and 3, and the many models of their shape."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from . import common

NAMES = common.NAMES | common.MLP_NORM


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "llama"; raises `W4A8Error` as `common.common_fields` does."""
    fields = common.common_fields(config)
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        **fields,
        layer_types=("full",) * fields["num_layers"],
        rope=common.rope_config(config, fields["head_dim"]),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )

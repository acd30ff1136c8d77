"""Qwen3, dense."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerType
from . import common

NAMES = common.NAMES | common.MLP_NORM | common.QK_NORM


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "qwen3"; raises `W4A8Error` as `common.common_fields` does."""
    fields = {**common.common_fields(config), "head_dim": config.get("head_dim") or 128}
    layers = fields["num_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = layers if window is None else config.get("max_window_layers", 28)
    default: tuple[LayerType, ...] = tuple("sliding" if i >= first else "full" for i in range(layers))
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        **fields,
        layer_types=common.layer_types(config, default, window),
        sliding_window=window,
        rope=common.rope_config(config, fields["head_dim"]),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
        tie_embeddings=config.get("tie_word_embeddings", False),
    )

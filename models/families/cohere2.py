"""Cohere2: Command A, Command R7B."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerType
from . import common

NAMES = common.NAMES


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "cohere2"; raises `W4A8Error` as `common.common_fields` does."""
    fields = common.common_fields(config)
    pattern = config.get("sliding_window_pattern") or 4
    default: tuple[LayerType, ...] = tuple(
        "sliding" if (i + 1) % pattern else "full" for i in range(fields["num_layers"])
    )
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        **fields,
        layer_types=common.layer_types(config, default, config.get("sliding_window")),
        sliding_window=config.get("sliding_window"),
        rope=common.rope_config(config, fields["head_dim"], interleaved=True),
        rope_on_full=False,
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        parallel_block=True,
        attention_bias=bias,
        output_bias=bias,
        tie_embeddings=config.get("tie_word_embeddings", True),
        logit_scale=config.get("logit_scale", 0.0625),
    )

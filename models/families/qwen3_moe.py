"""Qwen3 with experts: Qwen3-30B-A3B, Qwen3-235B-A22B."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerType
from . import common

NAMES = common.NAMES | common.MLP_NORM | common.QK_NORM | common.EXPERTS


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "qwen3_moe"; raises `W4A8Error` as `common` does."""
    fields = common.common_fields(config)
    layers = fields["num_layers"]
    # All layers or none: transformers has no max_window_layers here.
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    default: tuple[LayerType, ...] = ("sliding" if window else "full",) * layers
    experts, step = common.num_experts(config, 128), config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    sparse = tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers))
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        **fields,
        layer_types=default,
        sliding_window=window,
        rope=common.rope_config(config, fields["head_dim"]),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
        tie_embeddings=config.get("tie_word_embeddings", False),
        moe=common.moe_config(
            num_experts=experts,
            top_k=config.get("num_experts_per_tok", 8),
            intermediate_size=config.get("moe_intermediate_size", 768),
            sparse_layers=sparse,
            normalize=bool(config.get("norm_topk_prob")),
        ),
    )

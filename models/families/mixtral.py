"""Mixtral."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from . import common

_MOE = "model.layers.{i}.block_sparse_moe"

NAMES = (
    common.NAMES
    | common.MLP_NORM
    | {
        "layers.{i}.mlp.router": (f"{_MOE}.gate",),
        "layers.{i}.mlp.experts.gate_up": (f"{_MOE}.experts.{{e}}.w1", f"{_MOE}.experts.{{e}}.w3"),
        "layers.{i}.mlp.experts.down": (f"{_MOE}.experts.{{e}}.w2",),
    }
)


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "mixtral"; raises `W4A8Error` as `common` does."""
    fields = common.common_fields(config)
    layers, window = fields["num_layers"], config.get("sliding_window")
    return DecoderConfig(
        **fields,
        layer_types=("sliding" if window else "full",) * layers,
        sliding_window=window,
        rope=common.rope_config(config, fields["head_dim"], theta=1e6),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", False),
        moe=common.moe_config(
            num_experts=common.num_experts(config, 8),
            top_k=config.get("num_experts_per_tok", 2),
            intermediate_size=fields["intermediate_size"],
            sparse_layers=(True,) * layers,
        ),
    )

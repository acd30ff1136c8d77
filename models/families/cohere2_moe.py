"""Cohere2 with experts: Command A+."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels import W4A8Error

from ..config import DecoderConfig, LayerType
from . import common

NAMES = common.NAMES | common.EXPERTS | common.SHARED_EXPERTS


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type "cohere2_moe"; raises `W4A8Error` as `common` does."""
    fields = {**common.common_fields(config), "head_dim": config.get("head_dim") or 128}
    layers, inner = fields["num_layers"], fields["intermediate_size"]
    prefix = config.get("first_k_dense_replace") or 0
    if not 0 <= prefix <= layers:
        raise W4A8Error(f"config.json: first_k_dense_replace must be 0 .. {layers}, the layers, found {prefix}")
    # The prefix counts its own pattern, and the rest begins anew.
    dense_pattern = config.get("prefix_dense_sliding_window_pattern") or 1
    types: tuple[LayerType, ...] = _pattern(dense_pattern, prefix)
    types += _pattern(config.get("sliding_window_pattern") or 4, layers - prefix)
    window = config.get("sliding_window", 4096)
    bias = bool(config.get("attention_bias"))
    rms = config.get("rms_norm_eps")
    return DecoderConfig(
        **fields | {"intermediate_size": config.get("prefix_dense_intermediate_size") or inner},
        layer_types=common.layer_types(config, types, window),
        sliding_window=window,
        rope=common.rope_config(config, fields["head_dim"], interleaved=True),
        rope_on_full=False,
        rope_on_dense=dense_pattern == 1,
        norm="layernorm" if rms is None else "rmsnorm",
        norm_eps=config.get("layer_norm_eps", 1e-5) if rms is None else rms,
        parallel_block=True,
        attention_bias=bias,
        output_bias=bias,
        tie_embeddings=config.get("tie_word_embeddings", True),
        logit_scale=config.get("logit_scale", 0.0625),
        moe=common.moe_config(
            num_experts=common.num_experts(config, 8),
            top_k=config.get("num_experts_per_tok", 2),
            intermediate_size=inner,
            sparse_layers=_sparse_layers(config, layers, prefix),
            selection=_one_of(config, "expert_selection_fn", "softmax", "sigmoid"),
            # A softmax is always over the chosen experts; the option is for sigmoids.
            normalize=bool(config.get("norm_topk_prob", True)) or config.get("expert_selection_fn") != "sigmoid",
            shared_intermediate_size=inner * (config.get("num_shared_experts") or 0),
            shared_combination=_one_of(config, "shared_expert_combination_strategy", "average", "sum"),
        ),
    )


def _pattern(every: int, layers: int) -> tuple[LayerType, ...]:
    """Sliding layers, but for each `every`-th."""
    return tuple("sliding" if (i + 1) % every else "full" for i in range(layers))


def _sparse_layers(config: Mapping[str, Any], layers: int, prefix: int) -> tuple[bool, ...]:
    found = config.get("mlp_layer_types")
    if found is None:
        return tuple(i >= prefix for i in range(layers))
    if len(found) != layers or (unknown := set(found) - {"dense", "sparse"}):
        what = f"{len(found)} entries" if len(found) != layers else repr(sorted(map(str, unknown))[0])
        raise W4A8Error(f'config.json: mlp_layer_types must be {layers} times "dense" or "sparse", found {what}')
    return tuple(kind == "sparse" for kind in found)


def _one_of(config: Mapping[str, Any], name: str, default: str, other: str) -> Any:
    value = config.get(name) or default
    if value not in (default, other):
        raise W4A8Error(f'config.json: {name} must be "{default}" or "{other}", found {value!r}')
    return value

"""What Hugging Face configs and checkpoints of all families have in common."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels import W4A8Error

from ..config import LayerType, MoEConfig, RopeConfig
from ..layers.rope import check_rope

Names = dict[str, tuple[str, ...]]

NAMES: Names = {
    "embedding": ("model.embed_tokens",),
    "layers.{i}.input_norm": ("model.layers.{i}.input_layernorm",),
    "layers.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "layers.{i}.attention.output": ("model.layers.{i}.self_attn.o_proj",),
    "layers.{i}.mlp.gate_up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj",),
    "final_norm": ("model.norm",),
    "lm_head": ("lm_head",),
}
MLP_NORM: Names = {"layers.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm",)}
QK_NORM: Names = {
    "layers.{i}.attention.q_norm": ("model.layers.{i}.self_attn.q_norm",),
    "layers.{i}.attention.k_norm": ("model.layers.{i}.self_attn.k_norm",),
}
EXPERTS: Names = {
    "layers.{i}.mlp.router": ("model.layers.{i}.mlp.gate",),
    "layers.{i}.mlp.experts.gate_up": (
        "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "model.layers.{i}.mlp.experts.{e}.up_proj",
    ),
    "layers.{i}.mlp.experts.down": ("model.layers.{i}.mlp.experts.{e}.down_proj",),
}
SHARED_EXPERTS: Names = {
    "layers.{i}.mlp.shared.gate_up": (
        "model.layers.{i}.mlp.shared_experts.gate_proj",
        "model.layers.{i}.mlp.shared_experts.up_proj",
    ),
    "layers.{i}.mlp.shared.down": ("model.layers.{i}.mlp.shared_experts.down_proj",),
}


def need(config: Mapping[str, Any], name: str) -> Any:
    """A value of config.json that has no default.

    Raises:
        W4A8Error: it is missing.
    """
    if config.get(name) is None:
        raise W4A8Error(f'config.json: "{name}" is missing')
    return config[name]


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` that every family reads alike.

    Raises:
        W4A8Error: a value is missing, contradicts another, or asks for what the decoder cannot do.
    """
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise W4A8Error(f'config.json: hidden_act must be "silu", found {activation!r}')
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise W4A8Error(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    eos = config.get("eos_token_id")
    return {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": need(config, "intermediate_size"),
        "num_layers": need(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "max_context": need(config, "max_position_embeddings"),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_token_id": config.get("pad_token_id"),
    }


def layer_types(
    config: Mapping[str, Any], default: tuple[LayerType, ...], sliding_window: int | None
) -> tuple[LayerType, ...]:
    """Each layer's attention, from `layer_types`.

    Raises:
        W4A8Error: one is unknown, their number is not the number of layers, or a window is missing.
    """
    names: dict[str, LayerType] = {"full_attention": "full", "sliding_attention": "sliding"}
    found = config.get("layer_types")
    if found is not None and (unknown := set(found) - set(names)):
        raise W4A8Error(f"config.json: layer_types has {sorted(unknown)[0]!r}; known are {', '.join(names)}")
    types = default if found is None else tuple(names[name] for name in found)
    if len(types) != config["num_hidden_layers"]:
        expected = config["num_hidden_layers"]
        raise W4A8Error(
            f"config.json: layer_types must have num_hidden_layers = {expected} entries, found {len(types)}"
        )
    if "sliding" in types and not sliding_window:
        raise W4A8Error("config.json: there are layers with sliding attention, but sliding_window is missing or unused")
    return types


def num_experts(config: Mapping[str, Any], default: int) -> int:
    """The number of experts; transformers 5 writes Mixtral's name for it for other families too."""
    found = (config.get(name) for name in ("num_experts", "num_local_experts"))
    return next((number for number in found if number is not None), default)


def moe_config(*, num_experts: int, top_k: int, sparse_layers: tuple[bool, ...], **fields: Any) -> MoEConfig | None:
    """The experts; None if no layer has any.

    Raises:
        W4A8Error: there are no experts, or fewer than `top_k`.
    """
    if not any(sparse_layers):
        return None
    if num_experts < 1:
        raise W4A8Error(f"config.json: num_experts must be positive, found {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise W4A8Error(
            f"config.json: num_experts_per_tok must be 1 .. {num_experts}, the number of experts, found {top_k}"
        )
    return MoEConfig(num_experts, top_k, sparse_layers=sparse_layers, **fields)


def rope_config(
    config: Mapping[str, Any], head_dim: int, *, interleaved: bool = False, theta: float = 10000.0
) -> RopeConfig:
    """Rotary parameters, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    Args:
        config: config.json.
        head_dim: of attention.
        interleaved: see `RopeConfig`.
        theta: the family's default.

    Raises:
        W4A8Error: they are not for the whole model and the whole head, or as `check_rope`.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if nested := sorted(name for name, value in parameters.items() if isinstance(value, Mapping)):
        raise W4A8Error(f"config.json: rope_parameters must be the same for all layers, found some for {nested[0]}")
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or theta
    kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or kind or "default"
    partial = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise W4A8Error(f"config.json: partial_rotary_factor must be 1, found {partial}")
    original = config.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3") and original:
        parameters["original_max_position_embeddings"] = original
    scaling = {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
    rope = RopeConfig(float(theta), interleaved, kind, tuple(sorted(scaling.items())))
    check_rope(rope, head_dim)
    return rope

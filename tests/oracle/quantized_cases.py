"""Small quantized models: shapes that vLLM could serve, of every family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "cohere2": {**_COMMON, "model_type": "cohere2", "sliding_window": 8, "sliding_window_pattern": 2},
    "llama": {**_COMMON, "model_type": "llama"},
    "qwen3": {**_COMMON, "model_type": "qwen3", "attention_bias": True},
    "cohere2_moe": {
        **_COMMON,
        "model_type": "cohere2_moe",
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "prefix_dense_intermediate_size": 512,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "expert_selection_fn": "sigmoid",
    },
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "mixtral": {**_COMMON, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}
# As transformers saves them: a layer's experts as one tensor, or one by one as everyone else does.
FUSED = ("mixtral",)
_LINEARS = 14  # q, k, v, o, gate, up, down of two layers
_ATTENTION = 4


@dataclass(frozen=True)
class TheirCase:
    """A checkpoint that compressed-tensors makes with one of its presets.

    Attributes:
        quantized: how many linear layers are.
    """

    name: str
    config: dict[str, Any] = field(hash=False)
    preset: str
    group_size: int = 128
    ignore: tuple[str, ...] = ("lm_head",)
    quantized: int = _LINEARS

    @property
    def scheme(self) -> str:
        return {"W4AFP8": "w4a8", "W4A16": "w4a16"}[self.preset]


@dataclass(frozen=True)
class OurCase:
    """A checkpoint that `w4a8jax.quantize` makes with these options from a random bf16 model of CONFIGS."""

    name: str
    model_type: str
    options: dict[str, Any] = field(hash=False)
    quantized: int = _LINEARS

    @property
    def experts(self) -> bool:
        return self.model_type in ("cohere2_moe", "qwen3_moe", "mixtral")

    @property
    def source(self) -> str:
        return f"{self.model_type}-bf16"


THEIRS = (
    TheirCase("cohere2-w4a8", CONFIGS["cohere2"], "W4AFP8"),
    TheirCase("llama-w4a8", CONFIGS["llama"], "W4AFP8", ignore=("lm_head", r"re:.*1\.mlp\.down_proj$"), quantized=13),
    TheirCase("qwen3-w4a8", CONFIGS["qwen3"], "W4AFP8"),
    TheirCase("llama-w4a16", CONFIGS["llama"], "W4A16"),
    TheirCase("qwen3-w4a16-groups-of-32", CONFIGS["qwen3"], "W4A16", group_size=32),
)
OURS = (
    OurCase("cohere2-w4a8", "cohere2", {"scheme": "w4a8"}),
    OurCase("llama-w4a8-exact", "llama", {"scheme": "w4a8", "numerics": "exact", "code_min": -8}),
    OurCase("qwen3-w4a8", "qwen3", {"scheme": "w4a8", "ignore": ["re:.*layers.0.self_attn.o_proj"]}, quantized=13),
    OurCase("llama-w4a16", "llama", {"scheme": "w4a16"}),
    # A dense layer, then one of experts and a shared one.
    OurCase("cohere2_moe-w4a8", "cohere2_moe", {"scheme": "w4a8"}, quantized=7 + _ATTENTION + 3 * 4 + 3),
    OurCase("qwen3_moe-w4a8", "qwen3_moe", {"scheme": "w4a8"}, quantized=2 * (_ATTENTION + 3 * 8)),
    OurCase("qwen3_moe-w4a16", "qwen3_moe", {"scheme": "w4a16"}, quantized=2 * (_ATTENTION + 3 * 8)),
    OurCase("mixtral-w4a8", "mixtral", {"scheme": "w4a8", "code_min": -8}, quantized=2 * (_ATTENTION + 3 * 3)),
)

"""Small configs of every family, varied in what changes the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 101
# Of three sequences: prompt, right-padded; then a chunk; then one token at a time.
PROMPTS = (37, 20, 29)
CHUNKS = (5, 2, 4)
STEPS = 32

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class LogitCase:
    """A config to compare logits on.

    Attributes:
        name: of the case.
        config: config.json.
        verbatim: the checkpoint keeps this config.json and, of a mixture of experts, tensors of single experts; else
            transformers writes its own config of version 5, and each layer's experts as one tensor.
    """

    name: str
    config: dict[str, Any] = field(hash=False)
    verbatim: bool = False


def _case(name: str, model_type: str, verbatim: bool = False, **changes: Any) -> LogitCase:
    return LogitCase(name, {**_COMMON, "model_type": model_type, **changes}, verbatim)


_HALF = 8  # head_dim / 2 of the longrope case
CASES = (
    _case(
        "cohere2-window",
        "cohere2",
        num_hidden_layers=5,
        num_key_value_heads=2,
        sliding_window=8,
        logit_scale=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    ),
    _case(
        "cohere2-bias-untied",
        "cohere2",
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=16,
        attention_bias=True,
        tie_word_embeddings=False,
        logit_scale=1.0,
        layer_norm_eps=0.1,
    ),
    _case(
        "cohere2-multi-query",
        "cohere2",
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=2,
        logit_scale=2.0,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
    ),
    _case(
        # As Command R7B has it.
        "cohere2-older-keys",
        "cohere2",
        verbatim=True,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=50000,
        rope_scaling=None,
        sliding_window=19,
        sliding_window_pattern=2,
        torch_dtype="float32",
        cache_implementation="hybrid",
        layer_switch=2,
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=True,
    ),
    _case("qwen3-grouped", "qwen3", num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6),
    _case(
        "qwen3-bias-tied",
        "qwen3",
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    _case(
        "qwen3-window",
        "qwen3",
        num_key_value_heads=4,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    _case(
        # As Qwen3's own instructions for long contexts have it.
        "qwen3-yarn-older-keys",
        "qwen3",
        verbatim=True,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1000000,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=3,
        torch_dtype="float32",
    ),
    _case(
        "llama-bias-tied",
        "llama",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=0.1,
    ),
    _case(
        "llama-linear",
        "llama",
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0},
    ),
    _case(
        "llama-dynamic",
        "llama",
        num_key_value_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    ),
    _case(
        "llama-yarn",
        "llama",
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 500.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 1.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
    ),
    _case(
        # As Llama 3.1 has it.
        "llama3-older-keys",
        "llama",
        verbatim=True,
        num_key_value_heads=1,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        pretraining_tp=1,
        torch_dtype="float32",
    ),
    _case(
        # The config's own original_max_position_embeddings goes before that of the rope parameters.
        "llama-longrope",
        "llama",
        verbatim=True,
        num_key_value_heads=4,
        original_max_position_embeddings=48,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(_HALF)],
            "long_factor": [2.0 + 3 * i for i in range(_HALF)],
            "original_max_position_embeddings": 200,
        },
        dtype="float32",
    ),
    _case(
        # As Command A+ has it: a dense prefix whose full attention rotates, shared experts, sigmoids.
        "cohere2_moe-prefix-sigmoid-average",
        "cohere2_moe",
        num_hidden_layers=6,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        sliding_window_pattern=4,
        first_k_dense_replace=2,
        prefix_dense_intermediate_size=160,
        prefix_dense_sliding_window_pattern=1,
        intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=2,
        expert_selection_fn="sigmoid",
        norm_topk_prob=True,
        logit_scale=0.25,
        layer_norm_eps=0.01,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    ),
    _case(
        "cohere2_moe-sum-rmsnorm",
        "cohere2_moe",
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        prefix_dense_sliding_window_pattern=2,
        num_experts=5,
        num_experts_per_tok=5,
        num_shared_experts=1,
        shared_expert_combination_strategy="sum",
        rms_norm_eps=0.1,
        attention_bias=True,
        tie_word_embeddings=False,
        logit_scale=1.0,
    ),
    _case(
        # Keys as the checkpoint's author writes them, before transformers expands them; a prefix that slides.
        "cohere2_moe-older-keys",
        "cohere2_moe",
        verbatim=True,
        num_hidden_layers=5,
        head_dim=16,
        sliding_window=5,
        sliding_window_pattern=2,
        first_k_dense_replace=3,
        prefix_dense_sliding_window_pattern=3,
        num_experts=6,
        num_experts_per_tok=2,
        num_shared_experts=0,
        expert_selection_fn="sigmoid",
        norm_topk_prob=False,
        rope_theta=50000,
        torch_dtype="float32",
    ),
    _case(
        "cohere2_moe-softmax-no-norm",
        "cohere2_moe",
        num_key_value_heads=4,
        head_dim=16,
        sliding_window=4096,
        num_experts=16,
        num_experts_per_tok=1,
        num_shared_experts=3,
        expert_selection_fn="softmax",
        norm_topk_prob=False,
    ),
    _case(
        "qwen3_moe-grouped",
        "qwen3_moe",
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
    ),
    _case(
        "qwen3_moe-some-layers-dense",
        "qwen3_moe",
        num_hidden_layers=6,
        num_key_value_heads=1,
        head_dim=8,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    _case(
        # As Qwen3-30B-A3B has it, with its window turned on.
        "qwen3_moe-window-older-keys",
        "qwen3_moe",
        verbatim=True,
        num_key_value_heads=4,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
        rope_theta=1000000.0,
        rope_scaling=None,
        torch_dtype="float32",
    ),
    _case("mixtral-default-rope", "mixtral", num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2),
    _case(
        "mixtral-window-tied",
        "mixtral",
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
        rms_norm_eps=0.1,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    ),
    _case(
        # As Mixtral 8x7B has it.
        "mixtral-older-keys",
        "mixtral",
        verbatim=True,
        num_key_value_heads=4,
        num_local_experts=3,
        num_experts_per_tok=1,
        sliding_window=None,
        rope_theta=1000000.0,
        rms_norm_eps=1e-5,
        torch_dtype="float32",
    ),
)

"""From Hugging Face configs to `DecoderConfig`: the keys that matter of well-known models, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from models.config import DecoderConfig, MoEConfig, RopeConfig
from models.families import FAMILIES, decoder_config
from pallas_kernels import W4A8Error

COMMAND_R7B: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 8192,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "vocab_size": 256000,
}
COMMAND_A: dict[str, Any] = COMMAND_R7B | {
    "hidden_size": 12288,
    "intermediate_size": 36864,
    "max_position_embeddings": 131072,
    "num_attention_heads": 96,
    "num_hidden_layers": 64,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
# Of Command A+'s kind; the sizes are made up.
COHERE2_MOE: dict[str, Any] = {
    "architectures": ["Cohere2MoeForCausalLM"],
    "expert_selection_fn": "sigmoid",
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.25,
    "max_position_embeddings": 131072,
    "model_type": "cohere2_moe",
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 9,
    "num_key_value_heads": 8,
    "num_shared_experts": 2,
    "prefix_dense_intermediate_size": 16384,
    "prefix_dense_sliding_window_pattern": 1,
    "rope_theta": 50000,
    "shared_expert_combination_strategy": "average",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
PUBLISHED = {
    "cohere2": COMMAND_R7B,
    "qwen3": QWEN3_8B,
    "llama": LLAMA_3_1_8B,
    "qwen3_moe": QWEN3_30B_A3B,
    "mixtral": MIXTRAL_8X7B,
    "cohere2_moe": COHERE2_MOE,
}


def test_command_a():
    assert decoder_config(COMMAND_A) == DecoderConfig(
        vocab_size=256000,
        hidden_size=12288,
        intermediate_size=36864,
        num_layers=64,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        max_context=131072,
        layer_types=("sliding", "sliding", "sliding", "full") * 16,
        sliding_window=4096,
        rope=RopeConfig(theta=50000.0, interleaved=True),
        rope_on_full=False,
        norm="layernorm",
        norm_eps=1e-5,
        parallel_block=True,
        tie_embeddings=True,
        logit_scale=0.25,
        bos_token_id=5,
        eos_token_ids=(255001,),
        pad_token_id=0,
    )


def test_command_r7b():
    config = decoder_config(COMMAND_R7B)
    assert (config.num_heads, config.head_dim, config.num_layers) == (32, 128, 32)
    assert [config.window(i) for i in range(5)] == [4096, 4096, 4096, None, 4096]
    assert [config.uses_rope(i) for i in range(5)] == [True, True, True, False, True]


def test_qwen3_8b():
    assert decoder_config(QWEN3_8B) == DecoderConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_context=40960,
        layer_types=("full",) * 36,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-6,
        qk_norm=True,
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


def test_llama_3_1_8b():
    scaling = (
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 8192),
    )
    assert decoder_config(LLAMA_3_1_8B) == DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_context=131072,
        layer_types=("full",) * 32,
        rope=RopeConfig(theta=500000.0, kind="llama3", scaling=scaling),
        norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_present_and_former_spellings_are_the_same(published: dict[str, Any]):
    config = dict(published)
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    if pattern := config.pop("sliding_window_pattern", None):
        types = ["sliding_attention"] * (pattern - 1) + ["full_attention"]
        config["layer_types"] = types * (config["num_hidden_layers"] // pattern)
    if "num_experts" in config and config["model_type"] == "qwen3_moe":
        config["num_local_experts"] = config.pop("num_experts")
    if prefix := config.pop("first_k_dense_replace", None):
        layers = config["num_hidden_layers"]
        config["mlp_layer_types"] = ["dense"] * prefix + ["sparse"] * (layers - prefix)
        period = ["sliding_attention"] * 3 + ["full_attention"]
        config["layer_types"] = ["full_attention"] + period * 2
    assert decoder_config(config) == decoder_config(published)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_a_config_is_hashable(published: dict[str, Any]):
    assert hash(decoder_config(published)) == hash(decoder_config(dict(published)))


def test_qwen3_30b_a3b():
    config = decoder_config(QWEN3_30B_A3B)
    assert config.moe == MoEConfig(
        num_experts=128, top_k=8, intermediate_size=768, sparse_layers=(True,) * 48, normalize=True
    )
    assert (config.intermediate_size, config.head_dim, config.qk_norm) == (6144, 128, True)


def test_mixtral_8x7b():
    config = decoder_config(MIXTRAL_8X7B)
    assert config.moe == MoEConfig(num_experts=8, top_k=2, intermediate_size=14336, sparse_layers=(True,) * 32)
    assert (config.layer_types, config.head_dim, config.qk_norm) == (("full",) * 32, 128, False)
    assert decoder_config(MIXTRAL_8X7B | {"rope_theta": None}) == config, "the family's default base is 1e6"


def test_cohere2_moe():
    config = decoder_config(COHERE2_MOE)
    assert config.moe == MoEConfig(
        num_experts=64,
        top_k=4,
        intermediate_size=2048,
        sparse_layers=(False,) + (True,) * 8,
        selection="sigmoid",
        normalize=True,
        shared_intermediate_size=4096,
        shared_combination="average",
    )
    assert config.intermediate_size == 16384
    assert [config.window(i) for i in range(6)] == [None, 4096, 4096, 4096, None, 4096]
    assert [config.uses_rope(i) for i in range(6)] == [True, True, True, True, False, True]
    assert (config.norm, config.parallel_block) == ("layernorm", True)
    assert decoder_config(COHERE2_MOE | {"rms_norm_eps": 1e-6}).norm == "rmsnorm"


def test_layers_without_experts():
    config = decoder_config(QWEN3_30B_A3B | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [config.experts(i) is not None for i in range(6)] == [False, True, False, False, False, True]
    assert decoder_config(QWEN3_30B_A3B | {"num_experts": 0}).moe is None


def test_qwen3_windows_begin_at_max_window_layers():
    config = decoder_config(QWEN3_8B | {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 34})
    assert config.layer_types == ("full",) * 34 + ("sliding",) * 2
    assert config.window(35) == 1024
    assert config.rope_on_full


def test_a_config_may_leave_out_what_has_a_default():
    config = dict(LLAMA_3_1_8B)
    for name in (
        "num_key_value_heads",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "eos_token_id",
        "mlp_bias",
    ):
        del config[name]
    found = decoder_config(config)
    assert (found.num_kv_heads, found.rope, found.tie_embeddings) == (32, RopeConfig(), False)
    assert found.eos_token_ids == ()


@pytest.mark.parametrize(
    ("published", "changes", "message"),
    [
        (
            LLAMA_3_1_8B,
            {"model_type": "gpt2"},
            "model_type 'gpt2' is unknown; known are " + ", ".join(sorted(FAMILIES)),
        ),
        (LLAMA_3_1_8B, {"model_type": None}, "model_type None is unknown"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 7}, "num_attention_heads 32 is no multiple of num_key_value_heads 7"),
        (COMMAND_A, {"hidden_act": "gelu"}, "hidden_act must be \"silu\", found 'gelu'"),
        (COMMAND_A, {"layer_types": ["full_attention"] * 63}, "num_hidden_layers = 64 entries, found 63"),
        (QWEN3_8B, {"layer_types": ["linear_attention"] * 36}, "layer_types has 'linear_attention'"),
        (COMMAND_A, {"sliding_window": None}, "sliding_window is missing or unused"),
        (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "sliding_window is missing or unused"),
        (QWEN3_8B, {"sliding_window": 8, "layer_types": ["sliding_attention"] * 36}, "is missing or unused"),
        (LLAMA_3_1_8B, {"head_dim": 5}, "head_dim must be even, found 5"),
        (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "su"}}, 'rope_type "su" is unknown; known are default, linear'),
        (LLAMA_3_1_8B, {"rope_scaling": {"type": "yarn"}}, 'rope_type "yarn" needs "factor"'),
        (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, found 0.5"),
        (
            QWEN3_30B_A3B,
            {"num_experts_per_tok": 129},
            "num_experts_per_tok must be 1 .. 128, the number of experts, found",
        ),
        (
            MIXTRAL_8X7B,
            {"num_experts_per_tok": 9},
            "num_experts_per_tok must be 1 .. 8, the number of experts, found 9",
        ),
        (COHERE2_MOE, {"num_experts_per_tok": 65}, "num_experts_per_tok must be 1 .. 64, the number of experts, found"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_experts must be positive, found 0"),
        (COHERE2_MOE, {"first_k_dense_replace": 10}, "first_k_dense_replace must be 0 .. 9, the layers, found 10"),
        (COHERE2_MOE, {"mlp_layer_types": ["dense"]}, 'must be 9 times "dense" or "sparse", found 1 entries'),
        (COHERE2_MOE, {"mlp_layer_types": ["moe"] * 9}, '"dense" or "sparse", found \'moe\''),
        (COHERE2_MOE, {"expert_selection_fn": "tanh"}, 'expert_selection_fn must be "softmax" or "sigmoid", found'),
        (
            COHERE2_MOE,
            {"shared_expert_combination_strategy": "max"},
            'shared_expert_combination_strategy must be "average" or "sum"',
        ),
        (
            LLAMA_3_1_8B,
            {"rope_scaling": {"full_attention": {}}},
            "the same for all layers, found some for full_attention",
        ),
        (
            LLAMA_3_1_8B,
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "short_factor must have head_dim / 2 = 64 numbers, found 1",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(published: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(W4A8Error) as caught:
        decoder_config(published | changes)
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_missing_value_is_named(published: dict[str, Any], name: str):
    config = {key: value for key, value in published.items() if key != name}
    with pytest.raises(W4A8Error, match=f'^config.json: "{name}" is missing$'):
        decoder_config(config)

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
        verbatim: the checkpoint keeps this config.json; otherwise transformers writes its own, of version 5.
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
)

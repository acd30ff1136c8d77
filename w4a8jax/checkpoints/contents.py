"""Which tensors an unquantized checkpoint must hold, by its config.json; decides from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pallas_kernels.errors import W4A8Error

from .safetensors_format import TensorSpec

# Left out of what is written, ignored in what is read: recomputed from the config.
BUFFERS = ("rotary_emb.inv_freq",)
OUTPUT_HEAD = "lm_head.weight"


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, before quantization.

    Raises:
        W4A8Error: the model_type is unknown, or the config lacks a value.
    """
    from models.families import family  # brings jax along, which reading a header need not

    known = family(config)
    c = known.decoder_config(config)
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (c.vocab_size, hidden),
        "lm_head": (c.vocab_size, hidden),
        "q_proj": (heads, hidden),
        "k_proj": (kv_heads, hidden),
        "v_proj": (kv_heads, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "q_norm": (c.head_dim,),
        "k_norm": (c.head_dim,),
    }
    biased = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), c.attention_bias),
        "o_proj": c.output_bias,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), c.mlp_bias),
    }
    expected = {}
    for modules in known.names.values():
        for template in modules:
            for i in range(c.num_layers) if "{i}" in template else (0,):
                module = template.format(i=i)
                leaf = module.rpartition(".")[2]
                expected[f"{module}.weight"] = shapes.get(leaf, (hidden,))
                if biased.get(leaf):
                    expected[f"{module}.bias"] = shapes[leaf][:1]
    if c.tie_embeddings:
        expected.pop(OUTPUT_HEAD, None)
    return expected


def check_contents(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Checks an unquantized checkpoint's tensors against its config.

    Raises:
        W4A8Error: the first tensor that is missing, unknown or of another shape; an unknown model_type.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise W4A8Error(f"{where}: {name} is missing; config.json says {list(shape)}")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise W4A8Error(f"{where}: {name} is {found}, but config.json says {list(shape)}")
    for name in tensors:
        if name not in expected and name != OUTPUT_HEAD and not name.endswith(BUFFERS):
            raise W4A8Error(f"{where}: {name} is unknown to a {config['model_type']} model of this config.json")

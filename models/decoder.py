"""One decoder-only transformer for every family, driven by `DecoderConfig`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from .config import DecoderConfig
from .kv_cache import KVCache, LayerCache
from .layers.attention import Attention
from .layers.linear import Linear
from .layers.mlp import MLP
from .layers.moe import MoE
from .layers.norm import LayerNorm, RMSNorm
from .layers.rope import rope_table


class Block(nnx.Module):
    """One layer: attention and MLP or experts, in sequence or in parallel, around a residual stream."""

    def __init__(self, config: DecoderConfig, layer: int, *, param_dtype: Any, rngs: nnx.Rngs):
        self.input_norm = _norm(config, param_dtype)
        self.attention = Attention(config, layer, param_dtype=param_dtype, rngs=rngs)
        self.mlp_norm = nnx.data(None) if config.parallel_block else _norm(config, param_dtype)
        sizes: dict[str, Any] = {"use_bias": config.mlp_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.mlp: MLP | MoE
        if (moe := config.experts(layer)) is None:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, **sizes)
        else:
            self.mlp = MoE(config.hidden_size, moe, **sizes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        table: tuple[Array, Array],
        start: Int[Array, "B"],
        lengths: Int[Array, "B"] | None,
        cache: LayerCache | None,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        normed = self.input_norm(x)
        attended, cache = self.attention(normed, table, start, lengths, cache, fresh)
        if self.mlp_norm is None:
            return x + attended + self.mlp(normed), cache
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Tokens in, logits out.

    Args:
        config: the model.
        dtype: dtype of activations, and of the key-value cache by convention.
        param_dtype: dtype of parameters as they are made; loading a checkpoint replaces them.
        rngs: random initialization. `nnx.eval_shape(lambda: Decoder(...))` makes none.
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: Any = jnp.bfloat16, param_dtype: Any = jnp.bfloat16, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.cache_sharding: NamedSharding | None = None  # see `models.sharding`
        init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype))
        self.layers = nnx.List([Block(config, i, param_dtype=param_dtype, rngs=rngs) for i in range(config.num_layers)])
        self.final_norm = _norm(config, param_dtype)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, param_dtype=param_dtype, rngs=rngs)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The final norm's output for T more tokens of each sequence.

        Args:
            tokens: int32 [B, T], padded at the end.
            cache: the tokens before them; None means there are none and none will follow.
            lengths: int32 [B], how many of the T tokens are real; all by default. States of padding are arbitrary.
            fresh: the cache is known to be empty, which makes a prefill cheaper; static.

        Returns:
            [B, T, hidden] in the decoder's dtype, and the cache with the new tokens (None if there was none).
        """
        batch, steps = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        if lengths is None and cache is not None:
            lengths = jnp.full((batch,), steps, jnp.int32)
        step = jnp.arange(steps, dtype=jnp.int32)
        if lengths is not None:
            step = jnp.minimum(step, jnp.maximum(lengths, 1)[:, None] - 1)  # padding must not lengthen a sequence
        positions = start[:, None] + step
        config = self.config
        table = rope_table(config.rope, config.head_dim, config.max_context, positions)
        x = self.embedding.get_value().at[tokens].get(mode="clip").astype(self.dtype)
        layers: list[Any] = []
        for i, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer = block(x, table, start, lengths, None if cache is None else cache.layers[i], fresh)
            layers.append(layer)
        if cache is not None and lengths is not None:
            cache = KVCache(tuple(layers), start + lengths)
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits of final hidden states, [..., V]."""
        if self.lm_head is None:
            weight = self.embedding.get_value().astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden).astype(jnp.float32)
        return logits * self.config.logit_scale

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """fp32 logits at every position, [B, T, V], and the cache; see `hidden_states`."""
        hidden, cache = self.hidden_states(tokens, cache, lengths=lengths, fresh=fresh)
        return self.logits(hidden), cache


def _norm(config: DecoderConfig, param_dtype: Any) -> RMSNorm | LayerNorm:
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)

"""Grouped-query attention with rotary positions, sliding windows and a key-value cache."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import DecoderConfig
from ..kv_cache import LayerCache
from .chunk_attention import chunk_attention
from .cpu_attention import MIN_STEPS, cpu_attention
from .linear import Linear
from .norm import RMSNorm
from .rope import apply_rope


class Attention(nnx.Module):
    """Multi-head attention; queries, keys and values come from one fused projection."""

    def __init__(self, config: DecoderConfig, layer: int, *, param_dtype: Any, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.shards = 1  # pieces of the fused projection, see `models.sharding`
        self.window = config.window(layer)
        self.rope = config.rope if config.uses_rope(layer) else None
        outputs = (self.heads + 2 * self.kv_heads) * self.head_dim
        bias, output_bias = config.attention_bias, config.output_bias
        self.qkv = Linear(config.hidden_size, outputs, use_bias=bias, param_dtype=param_dtype, rngs=rngs)
        inputs = self.heads * self.head_dim
        self.output = Linear(inputs, config.hidden_size, use_bias=output_bias, param_dtype=param_dtype, rngs=rngs)
        self.q_norm = self.k_norm = nnx.data(None)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        table: tuple[Array, Array],
        start: Int[Array, "B"],
        lengths: Int[Array, "B"] | None,
        cache: LayerCache | None,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends from T new tokens of each sequence to them and to the cache.

        Args:
            x: [B, T, hidden].
            table: cosines and sines of `rope_table`.
            start: int32 [B], tokens already in the cache.
            lengths: int32 [B], how many of the T tokens are real; the others are padding at the end. None: all are;
                only without a cache, where it spares the padding mask.
            cache: the layer's cache, or None to attend to the new tokens alone.
            fresh: the cache is known to be empty; static.

        Returns:
            [B, T, hidden] and the cache with the new tokens.
        """
        batch, steps, _ = x.shape
        heads, kv_heads = self.heads // self.shards, self.kv_heads // self.shards
        qkv = self.qkv(x).reshape(batch, steps, self.shards, -1, self.head_dim)
        parts = jnp.split(qkv, [heads, heads + kv_heads], axis=3)
        q, k, v = (part.reshape(batch, steps, -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = (apply_rope(t, *table, interleaved=self.rope.interleaved) for t in (q, k))
        if cache is None or lengths is None:
            y = causal_attention(q, k, v, lengths, self.window)
        elif fresh:
            y = causal_attention(q, k, v, lengths, self.window)
            cache = cache.write(k, v, start, lengths)
        elif steps == 1:
            # The ring holds just the window, and slots need no order, so lengths alone mask it.
            cache = cache.write(k, v, start, lengths)
            held = jnp.minimum(start + lengths, cache.slots)
            y = _attention(q, cache.k, cache.v, key_value_seq_lengths=held)
        else:
            y = chunk_attention(q, k, v, cache, start, lengths, self.window)
            cache = cache.write(k, v, start, lengths)
        return self.output(y.reshape(batch, steps, -1)), cache


def causal_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    lengths: Int[Array, "B"] | None,
    window: int | None,
) -> Float[Array, "B T N D"]:
    """Attention of a sequence to itself; with a window, to the last `window` tokens, the current one included."""
    if q.shape[1] >= MIN_STEPS and jax.default_backend() == "cpu" and jax.local_device_count() == 1:
        return cpu_attention(q, k.astype(q.dtype), v.astype(q.dtype), lengths, window)
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return _attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths, local_window_size=local)


def _attention(q: Array, k: Array, v: Array, **masks: Any) -> Array:
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, implementation=_implementation(q), **masks)


def _implementation(q: Array) -> Literal["cudnn"] | None:
    """cuDNN's fused attention where it can run; it never materializes the scores."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "cudnn" if fits and jax.default_backend() == "gpu" else None

"""A static key-value cache: full layers keep every token, sliding layers a ring of the last `window` tokens."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [B, S, H, D]; token p stands in slot p % S."""

    k: Float[Array, "B S H D"]
    v: Float[Array, "B S H D"]

    @property
    def slots(self) -> int:
        """S."""
        return self.k.shape[1]

    def write(
        self,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
    ) -> Self:
        """Stores tokens start .. start + lengths - 1 of each sequence; where more than S come, the last S."""
        step = jnp.arange(k.shape[1])
        kept = (step < lengths[:, None]) & (step >= lengths[:, None] - self.slots)
        slot = jnp.where(kept, (start[:, None] + step) % self.slots, self.slots)  # slot S is dropped
        row = jnp.arange(k.shape[0])[:, None]
        return dataclasses.replace(
            self,
            k=self.k.at[row, slot].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[row, slot].set(v.astype(self.v.dtype), mode="drop"),
        )

    def positions(self, start: Int[Array, "B"]) -> Int[Array, "B S"]:
        """The token position in each slot when tokens 0 .. start - 1 were written; negative where there is none."""
        last = start[:, None] - 1
        return last - (last - jnp.arange(self.slots)) % self.slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of a decoder; donate it to the step that returns its successor.

    Attributes:
        layers: one `LayerCache` a layer.
        length: int32 [B], tokens of each sequence so far.
    """

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]

    @classmethod
    def create(
        cls,
        config: DecoderConfig,
        batch: int,
        max_length: int,
        dtype: Any = jnp.bfloat16,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """An empty cache for `batch` sequences of at most `max_length` tokens; `sharding` is of keys and values."""

        def layer(index: int) -> LayerCache:
            slots = min(max_length, config.window(index) or max_length)
            shape = (batch, slots, config.num_kv_heads, config.head_dim)
            return LayerCache(*(jnp.zeros(shape, dtype, device=sharding) for _ in range(2)))

        return cls(tuple(layer(i) for i in range(config.num_layers)), jnp.zeros((batch,), jnp.int32))

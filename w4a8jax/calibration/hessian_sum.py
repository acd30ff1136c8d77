"""The sum of x x^T over calibration tokens: most of what statistics cost, so each platform does it its best way.

On a CPU numpy's BLAS does it: as a product of a matrix with its own transpose it takes half the operations of XLA's
matrix product, at a higher rate. Elsewhere XLA does it, on the device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class HessianSum:
    """sum weight * x x^T, token by token, fp32 [K, K], exactly symmetric.

    Args:
        size: K.
    """

    def __init__(self, size: int):
        self._on_host = jax.default_backend() == "cpu"
        shape = (size, size)
        self._total = np.zeros(shape, np.float32) if self._on_host else jnp.zeros(shape, jnp.float32)

    def add(
        self,
        x: Float[Array, "*batch K"],
        counted: Bool[np.ndarray, "*batch"],
        weight: Float[Array, "*batch"] | None = None,
    ) -> None:
        """Adds tokens, fp32; those that do not count may be NaN."""
        if not self._on_host:
            self._total = _add(self._total, x, counted, weight)
            return
        tokens = np.asarray(x).reshape(-1, x.shape[-1])
        if weight is not None:
            tokens = tokens * np.sqrt(np.asarray(weight)).reshape(-1, 1)
        tokens = tokens if counted.all() else tokens[counted.reshape(-1)]
        self._total += tokens.T @ tokens  # numpy sees that it is one array, and computes half

    def result(self) -> Float[Array, "K K"]:
        """The sum so far."""
        return jnp.asarray(self._total)


@partial(jax.jit, donate_argnames=("total",))
def _add(
    total: Float[Array, "K K"], x: Float[Array, "*batch K"], counted: Bool[Array, "*batch"], weight: Array | None
) -> Float[Array, "K K"]:
    if weight is not None:
        x = x * jnp.sqrt(weight)[..., None]
    # A selection, not a product: what does not count may be NaN.
    x = jnp.where(counted[..., None], x, 0).reshape(-1, x.shape[-1])
    # Its halves need not have the same bits where a product's tiles are not symmetric.
    upper = jnp.triu(jnp.dot(x.T, x, precision=jax.lax.Precision.HIGHEST))
    return total + upper + jnp.triu(upper, 1).T

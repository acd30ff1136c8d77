"""How far a quantized model's residual stream is from its original's, layer by layer."""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.functional import Structure, split
from models.residual import residual_stream
from pallas_kernels import W4A8Error

from .evaluation import Plan, Progress

if TYPE_CHECKING:
    from .language_model import LanguageModel


def residual_errors(
    model: "LanguageModel",
    original: "LanguageModel",
    text: str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """||h - h_original|| / ||h_original|| of the residual stream h behind each layer, the mean over a text's tokens.

    Errors of all layers before are in it. A mean of ratios, so that the few tokens whose states are a thousand times
    greater than others' do not decide it alone. It does not see weights, so that a model whose weights were rescaled
    without changing what it computes has no error.

    Args:
        model, original: of one shape, see `load`.
        text: of any length; read in the windows of `evaluate`, each token that predicts a scored one counts once.
        context: tokens of a window; by default 1024 or what the model takes, if less.
        max_tokens: only the text's first tokens; all by default.
        progress: called with the windows done and their number.

    Returns:
        One number for each layer.

    Raises:
        W4A8Error: the two have other numbers or sizes of layers, the text has no tokens, or an option is out of range.
    """
    for field in ("num_layers", "hidden_size"):
        ours, theirs = (getattr(m.decoder.config, field) for m in (model, original))
        if ours != theirs:
            raise W4A8Error(f"cannot compare: {field} is {ours} in the model, {theirs} in its original")
    plan = Plan.make(model, text, context, None, None, max_tokens)
    pair = *split(model.decoder), *split(original.decoder)
    total, tokens = np.zeros(model.decoder.config.num_layers), 0
    for windows in plan.batches(progress):
        counted = np.pad(plan.scored(windows), ((0, 0), (0, 1)))  # at the positions that predict
        tokens += int(counted.sum())
        total += np.asarray(_sums(*pair, windows.tokens, windows.lengths, counted), np.float64)
    return tuple((total / tokens).tolist())


@partial(jax.jit, static_argnames=("structure", "original_structure"))
def _sums(
    structure: Structure,
    leaves: list[Array],
    original_structure: Structure,
    original_leaves: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    counted: Bool[Array, "B T"],
) -> Float[Array, "L"]:
    """Sums of the tokens' relative errors, by layer."""
    lengths = jnp.maximum(lengths, 1)  # a row of no tokens would attend to nothing; none of it is counted
    ours = residual_stream(structure.merge(leaves), tokens, lengths)
    theirs = residual_stream(original_structure.merge(original_leaves), tokens, lengths)

    def error(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        ratio = jnp.linalg.norm(a - b, axis=-1) / jnp.maximum(jnp.linalg.norm(b, axis=-1), 1e-30)
        return jnp.sum(jnp.where(counted, ratio, 0))

    return jnp.stack([error(a, b) for a, b in zip(ours, theirs, strict=True)])

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
    plan = Plan.make(model, text, context, None, 1, max_tokens)  # all layers' states at once: of one window
    pair = split(model.decoder), split(original.decoder)
    total, tokens = np.zeros(model.decoder.config.num_layers), 0
    for windows in plan.batches(progress):
        counted = np.pad(plan.scored(windows), ((0, 0), (0, 1)))  # at the positions that predict
        tokens += int(counted.sum())
        # Compiled one by one: together, XLA rounds equal models to bf16 at different places.
        streams = [_stream(structure, leaves, windows.tokens, windows.lengths) for structure, leaves in pair]
        total += [float(_error(*layer, counted)) for layer in zip(*streams, strict=True)]
    return tuple((total / tokens).tolist())


@partial(jax.jit, static_argnames="structure")
def _stream(
    structure: Structure, leaves: list[Array], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> list[Float[Array, "B T D"]]:
    return residual_stream(structure.merge(leaves), tokens, lengths)


@jax.jit
def _error(a: Float[Array, "B T D"], b: Float[Array, "B T D"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The sum of the counted tokens' ||a - b|| / ||b||."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    ratio = jnp.linalg.norm(a - b, axis=-1) / jnp.maximum(jnp.linalg.norm(b, axis=-1), 1e-30)
    return jnp.sum(jnp.where(counted, ratio, 0))

"""The MLP of a mixture of experts: routing, the experts' matrix products on tokens sorted by expert, their sum."""

import functools
import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .divided_moe import divided_total
from .errors import W4A8Error
from .expert_rows import sort_by_expert
from .fragments import FragmentWeight, Scheme
from .ops import gated, w4a8_gated_rows, w4a8_ragged_matmul, w4a8_ragged_rows, w4a16_ragged_matmul
from .reference import ragged_dot
from .rounding import round_to
from .straight_through import MasterWeight, straight_through_ragged_matmul
from .weight_format import W4Weight

Selection = Literal["softmax", "sigmoid"]
ExpertWeight = Float[Array, "E N K"] | W4Weight | FragmentWeight | MasterWeight


def route(
    logits: Float[Array, "T E"], top_k: int, *, selection: Selection = "softmax", normalize: bool = True
) -> tuple[Float[Array, "T top_k"], Int[Array, "T top_k"]]:
    """Chooses each token's experts and weighs them, in fp32.

    Args:
        logits: [T, E], of the router.
        top_k: experts a token is sent to: those of the greatest logits.
        selection: weights are a "softmax" over all experts, or the "sigmoid" of each logit.
        normalize: divide the chosen experts' weights by their sum. With "softmax" that is a softmax over the top k.

    Returns:
        fp32 weights and int32 experts, [T, top_k] each, greatest first.

    Raises:
        W4A8Error: top_k is not between 1 and E, or the selection is unknown.
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise W4A8Error(f"top_k: expected 1 .. {logits.shape[-1]}, the number of experts, found {top_k}")
    if selection not in ("softmax", "sigmoid"):
        raise W4A8Error(f"selection: expected softmax or sigmoid, found {selection!r}")
    logits = logits.astype(jnp.float32)
    chosen, experts = jax.lax.top_k(logits, top_k)
    if selection == "softmax" and not normalize:
        return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), experts
    weights = jax.nn.sigmoid(chosen) if selection == "sigmoid" else jnp.exp(chosen - chosen[..., :1])
    # One by one, which XLA computes along with what needs the weights; a sum over an axis is a kernel of its own.
    total = functools.reduce(operator.add, [weights[..., k, None] for k in range(top_k)])
    return (weights / total if normalize else weights), experts


def router_logits(x: Float[Array, "... D"], router: Float[Array, "E D"]) -> Float[Array, "... E"]:
    """fp32 logits [..., E] of x [..., D], whatever the dtypes: a rounding here sends tokens to other experts.

    Products of two bf16 numbers are exact in fp32, so that the tensor core may take those.
    """
    if x.dtype == router.dtype == jnp.bfloat16:
        return jnp.dot(x, router.T, preferred_element_type=jnp.float32)
    return jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32).T, precision="highest")


def moe_mlp(
    x: Float[Array, "... D"],
    router: Float[Array, "E D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    *,
    top_k: int,
    selection: Selection = "softmax",
    normalize: bool = True,
    scheme: Scheme = "w4a8",
) -> Float[Array, "... D"]:
    """`sum_k weight_k * down_k(silu(gate_k(x)) * up_k(x))` over the experts k that the router chooses.

    Args:
        x: [..., D], float.
        router: [E, D]; its logits are computed in fp32.
        gate_up: [E, 2F, D], the rows of gate before those of up; a float array, a `W4Weight`, or what
            `prepare_weight(w, scheme)` makes of one. Divided among devices by a `Partition`, see `divided_moe`.
        down: [E, D, F], the same.
        top_k, selection, normalize: see `route`.
        scheme: how a quantized weight computes: with FP8 activations ("w4a8") or bf16 ones ("w4a16").

    Returns:
        [..., D] in x's dtype. Each product, `silu(gate)` and its product with up are rounded to that dtype; the sum
        over experts is in fp32, from the greatest weight down, and rounded once: the order of vLLM's kernels.

    Raises:
        W4A8Error: shapes or dtypes do not fit, or as `route`.
    """
    _check(x, router, gate_up, down)
    *lead, width = x.shape
    tokens = x.reshape(math.prod(lead), width)
    weights, experts = route(router_logits(tokens, router), top_k, selection=selection, normalize=normalize)
    if any(isinstance(w, FragmentWeight) and w.partition is not None for w in (gate_up, down)):
        total = divided_total(tokens, weights, experts, gate_up, down, scheme)
        return round_to(total, x.dtype).reshape(x.shape)
    order, place, sizes = sort_by_expert(experts, router.shape[0])
    if isinstance(gate_up, FragmentWeight) and scheme == gate_up.scheme == "w4a8":
        # Each token is quantized once, whatever its number of experts.
        inner = w4a8_ragged_rows(tokens, place, gate_up, sizes).astype(x.dtype)
    else:
        inner = _products(tokens[order // top_k], gate_up, sizes, scheme)
    if isinstance(down, FragmentWeight) and scheme == down.scheme == "w4a8" and x.dtype == jnp.bfloat16:
        rows = w4a8_gated_rows(inner, down, sizes)
    else:
        rows = _products(gated(inner), down, sizes, scheme)
    total = jnp.zeros((tokens.shape[0], width), jnp.float32)
    for k in range(top_k):
        total += weights[:, k, None] * rows[place[:, k]].astype(jnp.float32)
    return round_to(total, x.dtype).reshape(x.shape)


def w4a8_moe_mlp(
    x: Float[Array, "... D"],
    router: Float[Array, "E D"],
    gate_up: W4Weight | FragmentWeight,
    down: W4Weight | FragmentWeight,
    *,
    top_k: int,
    selection: Selection = "softmax",
    normalize: bool = True,
) -> Float[Array, "... D"]:
    """`moe_mlp` with INT4 experts and FP8 activations, quantized per token before gate_up and again before down.

    Arguments, result and errors are those of `moe_mlp`.
    """
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not isinstance(weight, W4Weight | FragmentWeight):
            raise W4A8Error(f"{name}: expected a W4Weight, found {type(weight).__name__}")
    return moe_mlp(x, router, gate_up, down, top_k=top_k, selection=selection, normalize=normalize)


def _products(x: Array, w: ExpertWeight, sizes: Array, scheme: Scheme) -> Array:
    """Rows of x, sorted by expert, times their experts' weights, [M, N], rounded once to x's dtype."""
    if isinstance(w, W4Weight | FragmentWeight):
        product: Any = {"w4a8": w4a8_ragged_matmul, "w4a16": w4a16_ragged_matmul}[scheme]
        return product(x, w, sizes, out_dtype=x.dtype)
    if isinstance(w, MasterWeight):
        return straight_through_ragged_matmul(x, w, sizes, out_dtype=x.dtype)
    return round_to(ragged_dot(x, w.astype(x.dtype), sizes), x.dtype)


def _check(x: Array, router: Array, gate_up: ExpertWeight, down: ExpertWeight) -> None:
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise W4A8Error(f"x: expected a float array [..., D], found {x.dtype}{list(x.shape)}")
    if router.ndim != 2 or router.shape[1] != x.shape[-1]:
        raise W4A8Error(f"router: expected [E, {x.shape[-1]}], found {list(router.shape)}")
    experts, width = router.shape
    inner = down.shape[-1]
    for name, weight, expected in (("gate_up", gate_up, (2 * inner, width)), ("down", down, (width, inner))):
        if tuple(weight.shape) != (experts, *expected):
            raise W4A8Error(f"{name}: expected {[experts, *expected]}, found {list(weight.shape)}")

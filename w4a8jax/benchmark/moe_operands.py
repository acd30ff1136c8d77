"""Random weights of experts, tokens that go where a benchmark sends them, and what products and MLPs should be."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import W4Weight, quantize_activations
from pallas_kernels.dequantize import expand_groups
from pallas_kernels.weight_format import Numerics

from .ahead import Ahead
from .moe_points import Point, Routes
from .operands import Reference, Tokens, random_weight

# Rows that are multiplied at a time for what is expected, so that one program serves all.
_ROWS = 8
_COMPARED_TOKENS = 4


class ExpertWeights:
    """Copies of random weights [E, N, K], made when they are asked for, the same ones each time.

    They are those of one weight [E * N, K], in experts.
    """

    def __init__(self, experts: int, n: int, k: int, code_min: int = -7, seed: int = 0) -> None:
        self.experts, self.n, self.k, self.code_min, self._seed = experts, n, k, code_min, seed

    def prepare(self, kind: Reference, numerics: Numerics = "lut") -> tuple[W4Weight, Array]:
        """Compiles what `quantized` and `product` run; returns what stands for the result of `quantized`."""
        plain, compared = (_random.prepare(*self._arguments(0, x)) for x in ("lut", numerics))
        with jax.enable_x64(True):
            rows = jax.ShapeDtypeStruct((_ROWS, self.k), jnp.float64)
            _product.prepare(kind, *plain, jax.ShapeDtypeStruct((), jnp.int32), rows)
        return compared  # type: ignore[no-any-return]

    def quantized(self, i: int, numerics: Numerics = "lut") -> tuple[W4Weight, Array]:
        """Copy i: the weight [E, N, K], and its scales as a checkpoint has them, bf16 [E, N, K/128]."""
        return _random(*self._arguments(i, numerics))  # type: ignore[no-any-return]

    def _arguments(self, i: int, numerics: Numerics) -> tuple[Any, ...]:
        key = jax.random.fold_in(jax.random.key(self._seed), i)
        return self.experts, self.n, self.k, self.code_min, numerics, key

    def product(self, kind: Reference, expert: int, x: np.ndarray) -> np.ndarray:
        """float64 [R, N]: rows float64 [R, K], R up to 8, times an expert of copy 0, without token scales."""
        w, scale = self._kept
        rows = np.zeros((_ROWS, self.k))
        rows[: len(x)] = x
        with jax.enable_x64(True):
            return np.asarray(_product(kind, w, scale, np.int32(expert), rows))[: len(x)]

    @functools.cached_property
    def _kept(self) -> tuple[W4Weight, Array]:
        return self.quantized(0)

    def forget(self) -> None:
        """Drops what `product` keeps: memory of the device."""
        self.__dict__.pop("_kept", None)


class MlpInputs:
    """Tokens of an MLP, whose first features are the logits of experts, and routers that pick them out.

    Attributes:
        x: bf16 [tokens, hidden].
        routers: fp32 [E, hidden] for each set of routes.
        logits: fp32 [tokens, E] of set 0; a token's logits fall from 2 in even steps, so that none are equal.
    """

    def __init__(self, point: Point, seed: int = 2) -> None:
        experts, hidden = point.model.experts, point.model.hidden
        ranks, routes = point.routes.ranks, point.routes
        self.logits = np.empty(ranks.shape, np.float32)
        np.put_along_axis(self.logits, ranks, 2 - 4 / experts * np.arange(experts, dtype=np.float32)[None], axis=1)
        x = jax.random.normal(jax.random.key(seed), (point.tokens, hidden), jnp.bfloat16)
        self.x = x.at[:, :experts].set(jnp.asarray(self.logits, jnp.bfloat16))
        self.routers = [jnp.asarray(_router(routes, i, hidden)) for i in range(routes.sets)]


def sample_tokens(point: Point) -> np.ndarray:
    """Up to 4 tokens of an MLP to compare, sorted, the first and the last among them."""
    inner = np.random.default_rng(point.tokens).integers(point.tokens, size=_COMPARED_TOKENS - 2)
    return np.unique([0, point.tokens - 1, *inner])


def expected_rows(kind: Reference, weights: ExpertWeights, tokens: Tokens, routes: Routes) -> np.ndarray:
    """float64 [R, N]: the rows of set 0 that `Routes.sample` names, in that order."""
    sample = routes.sample()
    x, x8, token_scale = tokens.sample(np.concatenate(list(sample.values())))
    found, at = [], 0
    for expert, rows in sample.items():
        part = slice(at, at := at + len(rows))
        scale = token_scale[part] if _quantized(kind) else 1
        found.append(scale * weights.product(kind, expert, (x8 if _quantized(kind) else x)[part]))
    return np.concatenate(found)


def expected_mlp(
    kind: Reference, gate_up: ExpertWeights, down: ExpertWeights, inputs: MlpInputs, point: Point
) -> np.ndarray:
    """float64 [R, hidden]: the MLP of some tokens, with `moe_mlp`'s roundings between its products."""
    tokens = sample_tokens(point)
    found = np.zeros((len(tokens), point.model.hidden))
    rows = np.asarray(inputs.x[tokens], np.float64)
    for total, x, token in zip(found, rows, tokens, strict=True):
        experts = point.routes.ranks[token, : point.model.top_k]
        for weight, expert in zip(_weights(inputs.logits[token, experts], point), experts, strict=True):
            products = _rounded(_with_scales(kind, gate_up, int(expert), x[None]))
            gate, up = np.split(products, 2, axis=-1)
            inner = _rounded(_rounded(gate / (1 + np.exp(-gate))) * up)
            total += weight * _rounded(_with_scales(kind, down, int(expert), inner))[0]
    return found


def _weights(logits: np.ndarray, point: Point) -> np.ndarray:
    logits = logits.astype(np.float64)
    weights = 1 / (1 + np.exp(-logits)) if point.model.selection == "sigmoid" else np.exp(logits)
    return weights / weights.sum()


def _with_scales(kind: Reference, weights: ExpertWeights, expert: int, x: np.ndarray) -> np.ndarray:
    if not _quantized(kind):
        return weights.product(kind, expert, x)
    x8, token_scale = (np.asarray(v, np.float64) for v in _quantize(jnp.asarray(x, jnp.bfloat16)))
    return token_scale * weights.product(kind, expert, x8)


def _quantized(kind: Reference) -> bool:
    return kind in ("w4a8", "exact")


def _rounded(x: np.ndarray) -> np.ndarray:
    """To bf16, as float64."""
    return x.astype(jnp.bfloat16).astype(np.float64)


def _router(routes: Routes, i: int, hidden: int) -> np.ndarray:
    router = np.zeros((routes.experts, hidden), np.float32)
    router[routes.names(i), np.arange(routes.experts)] = 1
    return router


def _random_experts(experts: int, n: int, k: int, code_min: int, numerics: Numerics, key: Array) -> Any:
    made = random_weight(key, experts * n, k, code_min, numerics)
    return jax.tree.map(lambda a: a.reshape(experts, n, *a.shape[1:]), made)


def _expert_product(kind: Reference, w: W4Weight, scale: Array, expert: Any, x: Array) -> Array:
    part = jax.tree.map(lambda leaf: leaf[expert], w)
    if kind in ("exact", "w4a16"):
        operand = part.codes.astype(jnp.float64) * expand_groups(scale[expert].astype(jnp.float64), x.shape[1])
        return x @ operand.T
    return (x @ part.operand().astype(jnp.float64).T) * part.channel_scale.astype(jnp.float64)


_random, _product = Ahead(_random_experts, 5), Ahead(_expert_product, 1)
_quantize = jax.jit(quantize_activations)
# bf16 [E, K, N], as `jax.lax.ragged_dot` takes weights; an expert at a time, which needs little memory.
dequantize_transposed = Ahead(lambda w: jax.lax.map(lambda part: part.dequantize(jnp.bfloat16).T, w))
# int4 [E, N, K], likewise.
codes_int4 = Ahead(lambda w: jax.lax.map(lambda part: part.codes.astype(jnp.int4), w))

"""Which kernels are audited: each configuration that the project would choose, once for each form of weights."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import W4Weight, tuning, tuning_tables
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.fragments import FragmentWeight
from pallas_kernels.grouped_gemm import grouped_gemm

TABLES = Path(tuning_tables.__file__).with_name("tuned")
FORMS = [  # (scheme, numerics, code_min)
    ("w4a8", "lut", -7),
    ("w4a8", "lut", -8),
    ("w4a8", "exact", -7),
    ("w4a8", "exact", -8),
    ("w4a16", "exact", -8),
]
TOKENS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
OUTPUTS = (384, 4096, 12288, 14336, 73728)
INPUTS = (36864, 12288, 4096, 2048, 768)
# Rows of the grouped kernel, and [E, N, K] of its weights.
ROWS = (8, 64, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
# Of the grouped kernel's tiles that blocks share.
SHARED = {
    "sign_magnitude": [
        TuningConfig(tokens, blocks, 2, 4, stream_k=True, slot_steps=2) for tokens, blocks in ((8, 1), (8, 2), (32, 2))
    ],
    "bf16": [TuningConfig(8, 2, 2, 8, stream_k=True)],
}
EXPERTS = ((8, 28672, 4096), (8, 4096, 14336), (128, 1536, 2048), (128, 2048, 768), (256, 384, 4096))
# With fewer K steps, the compiler may unroll them all, and there is no main loop to audit.
LEAST_INPUTS = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel to compile; hashable, and made of what JSON can hold."""

    scheme: str
    numerics: str
    code_min: int
    config: TuningConfig
    m: int
    n: int
    k: int
    experts: int = 0  # of the grouped kernel

    def __str__(self) -> str:
        shown = [f"{f.name}={v}" for f in dataclasses.fields(self.config) if (v := getattr(self.config, f.name))]
        form = self.scheme if self.scheme == "w4a16" else f"{self.numerics}{self.code_min}"
        return f"{'grouped-' * (self.experts > 0)}{form}-{'-'.join(shown)}"


def abstract_weight(scheme: str, numerics: str, code_min: int, *shape: int) -> FragmentWeight:
    """A prepared weight [N, K] or [E, N, K] without its numbers."""
    *lead, k = shape
    packed = jax.ShapeDtypeStruct((*lead, k // 8), jnp.int32)
    scale = jax.ShapeDtypeStruct((*lead, k // 128), jnp.bfloat16)

    def prepare(packed: jax.Array, scale: jax.Array) -> FragmentWeight:
        w = W4Weight.from_checkpoint(packed, scale, numerics=numerics, code_min=code_min)
        return FragmentWeight.from_weight(w, scheme)

    return jax.eval_shape(prepare, packed, scale)


def abstract_tokens(scheme: str, m: int, k: int) -> tuple[Any, Any]:
    """Activations [M, K] and their scales, of which W4A16 has none."""
    if scheme == "w4a16":
        return jax.ShapeDtypeStruct((m, k), jnp.bfloat16), None
    return jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((m, 1), jnp.float32)


def dense(
    scheme: str, numerics: str, code_min: int, config: dict[str, Any], m: int, n: int, k: int
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """The dense kernel and its abstract arguments."""
    w = abstract_weight(scheme, numerics, code_min, n, k)

    def product(x: jax.Array, token_scale: jax.Array | None, w: FragmentWeight) -> jax.Array:
        return dense_gemm(x, token_scale, w, TuningConfig(**config))

    return product, (*abstract_tokens(scheme, m, k), w)


def grouped(
    scheme: str, numerics: str, code_min: int, config: dict[str, Any], m: int, n: int, k: int, experts: int
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """The grouped kernel and its abstract arguments."""
    w = abstract_weight(scheme, numerics, code_min, experts, n, k)

    def product(x: jax.Array, token_scale: jax.Array | None, w: FragmentWeight, sizes: jax.Array) -> jax.Array:
        return grouped_gemm(x, token_scale, w, sizes, TuningConfig(**config))

    tokens = abstract_tokens(scheme, -(-m // 8) * 8, k)
    return product, (*tokens, w, jax.ShapeDtypeStruct((experts,), jnp.int32))


def all_cases() -> list[Case]:
    """Every pair of form and configuration that may be chosen, each at one of the shapes that it is chosen for."""
    found: dict[tuple[Any, ...], Case] = {}
    for scheme, numerics, code_min in FORMS:
        form = abstract_weight(scheme, numerics, code_min, 384, 768).form
        for config, m, n, k in [*_from_heuristic(form), *_from_tables(form)]:
            case = Case(scheme, numerics, code_min, config, m, n, max(k, LEAST_INPUTS))
            found.setdefault((form, config), case)
    return list(found.values()) + _grouped_cases()


def _grouped_cases() -> list[Case]:
    found: dict[tuple[Any, ...], Case] = {}
    for scheme, numerics, code_min in FORMS:
        form = abstract_weight(scheme, numerics, code_min, 384, 768).form
        for m, (experts, n, k) in itertools.product(ROWS, EXPERTS):
            config = tuning.heuristic_grouped(m, experts, n, k, form)
            case = Case(scheme, numerics, code_min, config, m, n, max(k, LEAST_INPUTS), experts)
            found.setdefault((form, config), case)
        for config in SHARED.get(form, ()):
            found[form, config] = Case(scheme, numerics, code_min, config, 64, 4096, 14336, 8)
        for entry in _entries(form):
            if entry.experts:
                k = max(entry.k, LEAST_INPUTS)
                case = Case(scheme, numerics, code_min, entry.config, entry.m, entry.n, k, entry.experts)
                found.setdefault((form, entry.config), case)
    return list(found.values())


def _from_heuristic(form: str) -> Iterator[tuple[TuningConfig, int, int, int]]:
    for m, n, k in itertools.product(TOKENS, OUTPUTS, INPUTS):
        yield tuning.heuristic(m, n, k, form), m, n, k


def _from_tables(form: str) -> Iterator[tuple[TuningConfig, int, int, int]]:
    for entry in _entries(form):
        if not entry.experts:
            yield entry.config, entry.m, entry.n, entry.k


def _entries(form: str) -> Iterator[tuning_tables.Entry]:
    for path in sorted(TABLES.glob("*.json")):
        yield from (entry for entry in tuning_tables.read(path).entries.values() if entry.form == form)

"""Activation quantization as one kernel for Hopper: `activations.quantize_activations`, and padding to whole tiles.

A block of one warpgroup takes a token: it finds the largest value, then divides all. It holds tokens of up to 16384
values in registers, and reads longer ones again, from the cache. XLA makes two to four kernels of this, more where
tokens are padded, and its division is put right by some sixty instructions (`rounding.divide`); here it takes four.

With a gate, values are those between the two products of an MLP, `silu(gate) * up`, computed on the way. With places,
a token goes to several rows, those of its experts, and no gather is needed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float, Int32

from .activations import MIN_SCALE
from .rounding import E4M3_MAX

_THREADS = 128
_MOST = 32  # elements that a thread holds at a time
# Rounded to nearest. The compiler's own division is off by up to two units in the last place.
_DIVIDE = "div.rn.f32 $0, $1, $2;"
# The same, given the divisor's inverse, rounded to nearest: Markstein, "Computation of elementary functions on the IBM
# RISC System/6000 processor", 1990. Not for divisors whose mantissa is all ones, which no scale of 16-bit numbers is.
_DIVIDE_BY_INVERSE = """{ .reg .f32 quotient, negative, rest;
        mul.rn.f32 quotient, $1, $3;
        neg.f32 negative, quotient;
        fma.rn.f32 rest, negative, $2, $1;
        fma.rn.f32 $0, rest, $3, quotient; }"""
# x / (1 + exp(-x)), right to a few units in the last place of fp32; 0fBFB8AA3B is -log2(e).
_SILU = """{ .reg .f32 power;
        mul.rn.f32 power, $1, 0fBFB8AA3B;
        ex2.approx.f32 power, power;
        add.rn.f32 power, power, 0f3F800000;
        rcp.approx.f32 power, power;
        mul.rn.f32 $0, $1, power; }"""
_HELD = 16384  # values of a token in registers, 128 a thread
_ONE_EACH = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)


def quantize_tokens(
    x: Float[Array, "M K"], rows: int, place: Int32[Array, "M top_k"] | None = None
) -> tuple[Float[Array, "rows K"], Float[Array, "rows 1"]]:
    """`quantize_activations`, the same bits, with the last token repeated up to a number of rows.

    Args:
        x: [M, K], bf16, fp16 or fp32; K a multiple of 128.
        rows: of the result, at least M.
        place: the rows that each token goes to, all different; what other rows hold is not defined. None for its own.

    Returns:
        x8: `float8_e4m3fn` [rows, K].
        token_scale: fp32 [rows, 1].
    """
    return _quantize(x, rows, place, gated=False)


def quantize_gated(gate_up: Float[Array, "M 2F"], rows: int) -> tuple[Float[Array, "rows F"], Float[Array, "rows 1"]]:
    """`quantize_tokens(silu(gate) * up, rows)`, silu and the product each rounded to gate_up's dtype.

    Args:
        gate_up: [M, 2F], the columns of gate before those of up, bf16 or fp16; F a multiple of 128.
        rows: of the result, at least M.

    Returns:
        x8: `float8_e4m3fn` [rows, F].
        token_scale: fp32 [rows, 1].
    """
    return _quantize(gate_up, rows, None, gated=True)


# Under jit, so that XLA sees that two kernels are the same, and runs one: two layers may read the same tokens.
@functools.partial(jax.jit, static_argnames=("rows", "gated"))
def _quantize(x: Array, rows: int, place: Array | None, *, gated: bool) -> tuple[Array, Array]:
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    short = x.dtype.itemsize == 2
    columns = _THREADS * max(c for c in range(1, _MOST + 1) if k // _THREADS % c == 0)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=math.gcd(columns // _THREADS, 16 // x.dtype.itemsize))
    parts = k // columns
    holds = short and k <= _HELD

    def body(x_gmem: Any, place_gmem: Any, x8_gmem: Any, scale_gmem: Any) -> None:
        row = lax.axis_index("row")
        token = jnp.minimum(row, m - 1)
        targets = [row] if place is None else [place_gmem[row * place.shape[1] + i] for i in range(place.shape[1])]

        def read(first: Any) -> Array:
            values = plgpu.load(x_gmem.at[token, pl.ds(first, columns)], layout=layout, optimized=False)
            return values.astype(jnp.float32)

        def part(i: Any) -> Array:
            if not gated:
                return read(i * columns)
            silu = _with_threads(_SILU, [read(i * columns)], layout).astype(x.dtype).astype(jnp.float32)
            return (silu * read(k + i * columns)).astype(x.dtype).astype(jnp.float32)

        held = [part(i).astype(x.dtype) for i in range(parts)] if holds else []

        def largest(i: Any, so_far: Array) -> Array:
            values = held[i].astype(jnp.float32) if holds else part(i)
            return jnp.maximum(so_far, jnp.maximum(values, -values))

        def everywhere(scalar: Any, size: int = columns, layout: Any = layout) -> Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(scalar, (size,), ()), layout)

        most = everywhere(jnp.float32(0))
        if holds:
            for i in range(parts):
                most = largest(i, most)
        else:
            most = lax.fori_loop(0, parts, largest, most)
        most, limit = (everywhere(v, _THREADS, _ONE_EACH) for v in (jnp.max(most), jnp.float32(E4M3_MAX)))
        scale = jnp.max(jnp.maximum(_with_threads(_DIVIDE, [most, limit], _ONE_EACH), MIN_SCALE))
        for target in targets:
            scale_gmem[target] = scale
        one, divisor = (everywhere(v, _THREADS, _ONE_EACH) for v in (jnp.float32(1), scale))
        inverse = everywhere(jnp.max(_with_threads(_DIVIDE, [one, divisor], _ONE_EACH)))
        divisor = everywhere(scale)

        def store(i: Any) -> None:
            text, operands = (_DIVIDE_BY_INVERSE, [divisor, inverse]) if short else (_DIVIDE, [divisor])
            values = held[i].astype(jnp.float32) if holds else part(i)
            quotients = _with_threads(text, [values, *operands], layout)
            rounded = quotients.astype(jnp.float8_e4m3fn)
            for target in targets:
                x8_gmem[target, pl.ds(i * columns, columns)] = rounded

        if holds:
            for i in range(parts):
                store(i)
        else:
            pl.loop(0, parts)(store)

    x8, scale = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows,), jnp.float32)),
        grid=(rows if place is None else m,),
        grid_names=("row",),
    )(x, None if place is None else place.reshape(-1))
    return x8, scale[:, None]


def _with_threads(text: str, arrays: list[Array], layout: Any) -> Array:
    """PTX on each element of fp32 arrays in a layout: $0 the result, $1 and so on the arrays'."""

    @plgpu.inline_mgpu(
        arg_types=([layout] * len(arrays),),
        return_type=plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.float32, layout=layout),
    )
    def body(_: Any, arrays: Any) -> Any:
        constraints = ",".join(["=f"] + ["f"] * len(arrays))

        def each(*vectors: Any) -> Any:
            elements = [[vector.extract(v, [], [i]) for v in vectors] for i in range(vectors[0].type.shape[0])]
            results = [llvm.inline_asm(ir.F32Type.get(), x, text, constraints) for x in elements]
            return vector.from_elements(vectors[0].type, results)

        registers = np.empty(arrays[0].registers.shape, dtype=object)
        for index in np.ndindex(registers.shape):
            registers[index] = each(*(array.registers[index] for array in arrays))
        return mgpu.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=None)

    return body(arrays)

"""The kernels that a benchmark compares: ours, and cuBLAS as JAX calls it.

`peers` has those of torch and vLLM, `triton_peer` a plain Triton kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning, w4a8_matmul
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.errors import W4A8Error
from pallas_kernels.fragments import FragmentWeight, Scheme
from pallas_kernels.weight_format import Numerics

from . import timing
from .operands import Reference, Tokens, Weights

# Relative errors above this are failures. The rounding of the result to bf16 alone is 1.7e-3.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Runner:
    """What products and whole MLPs share; those of torch have `peers.TorchRunner`.

    Attributes:
        name: as records and tables have it.
        reference: what it multiplies.
        weight_bytes: that it reads for each weight, scales of groups included.
        input_bytes: for each activation.
        code_min: the lowest code of its weights.
        tolerance: largest relative error of a right result.
    """

    name: str
    reference: Reference
    weight_bytes: float
    input_bytes: int
    code_min: int = -7
    tolerance: float = TOLERANCE

    def synchronize(self, result: Any) -> None:
        """Waits for all that was launched, of which this is the last result."""
        jax.block_until_ready(result)

    def compare(self, a: Any, b: Any, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, bool]:
        """Elements of the first of two results, float64 [R, C], and whether both are the same in every bit."""
        elements, same = _compare(a, b, rows, columns)
        return np.asarray(elements, np.float64), bool(same)

    def release(self) -> None:
        """Gives cached memory of the device back, so that other frameworks have it."""


class Kernel(Runner):
    """A product of activations [M, K] and a weight [N, K] to bf16 [M, N]; the base of all."""

    def config(self, m: int, n: int, k: int) -> dict[str, Any] | None:
        """The configuration that it will run with, if it has such."""
        return None

    def weight(self, weights: Weights, i: int) -> Any:
        """Set i of the weights in the kernel's own form, on the device."""
        raise NotImplementedError

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        """The compiled product: takes the inputs of a set of tokens, and a weight; runs asynchronously.

        Raises:
            Exception: it cannot be compiled; whatever the framework raises.
        """
        raise NotImplementedError

    def inputs(self, tokens: Tokens) -> list[Any]:
        """What the function takes of each set of tokens."""
        return tokens.bf16 if self.input_bytes == 2 else tokens.fp8  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class OurKernel(Kernel):
    """`dense_gemm`, in the configuration that `tuning.choose` gives; for W4A16 its reference is "w4a16"."""

    numerics: Numerics = "lut"

    @property
    def scheme(self) -> Scheme:
        """What it multiplies the weights with."""
        return "w4a16" if self.reference == "w4a16" else "w4a8"

    def config(self, m: int, n: int, k: int) -> dict[str, Any] | None:
        return dataclasses.asdict(tuning.choose(m, n, k, self.form(n, k)))

    def form(self, n: int, k: int) -> str:
        """How the kernel's weights hold codes."""
        return self._abstract_weight(n, k).form

    def weight(self, weights: Weights, i: int) -> Any:
        return _to_fragments(weights.quantized(i, self.numerics)[0], self.scheme)

    def _abstract_weight(self, n: int, k: int) -> Any:
        return _abstract_weight(n, k, self.code_min, self.numerics, self.scheme)

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        return self.compiled(m, n, k, tuning.choose(m, n, k, self.form(n, k)))

    def compiled(self, m: int, n: int, k: int, config: TuningConfig) -> Callable[[Any, Any], Any]:
        """The product in a configuration."""

        def product(inputs: Any, w: FragmentWeight) -> Any:
            x, token_scale = (inputs, None) if self.scheme == "w4a16" else inputs
            # As the op does it: the copy engine's tiles are of 8 tokens.
            if m > 8 and m % 8:
                x = jnp.pad(x, ((0, -m % 8), (0, 0)))
            return dense_gemm(x, token_scale, w, config)[:m]

        inputs: Any = jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((m, 1), jnp.float32)
        if self.scheme == "w4a16":
            inputs = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        return jax.jit(product).lower(inputs, self._abstract_weight(n, k)).compile()


@dataclasses.dataclass(frozen=True)
class OurOp(OurKernel):
    """`w4a8_matmul`, with the quantization of bf16 activations before the kernel."""

    def compiled(self, m: int, n: int, k: int, config: TuningConfig) -> Callable[[Any, Any], Any]:
        """The product in a configuration."""

        def product(x: Any, w: FragmentWeight) -> Any:
            with tuning.force_config(config):
                return w4a8_matmul(x, w)

        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        return jax.jit(product).lower(x, self._abstract_weight(n, k)).compile()


class JaxDot(Kernel):
    """`jax.lax.dot_general` without scales, which XLA gives to cuBLAS."""

    def weight(self, weights: Weights, i: int) -> Any:
        return weights.bf16(i) if self.input_bytes == 2 else weights.fp8(i)

    def inputs(self, tokens: Tokens) -> list[Any]:
        return tokens.bf16 if self.input_bytes == 2 else [x8 for x8, _ in tokens.fp8]

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        dtype = jnp.bfloat16 if self.input_bytes == 2 else jnp.float8_e4m3fn
        a, b = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((n, k), dtype)
        # Among cuBLAS's algorithms XLA takes the one that it measures to be best; its own kernels are left out.
        with timing.exclusive():
            return jax.jit(_dot).lower(a, b).compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def our_kernels() -> list[Kernel]:
    """Ours, one for each form of the weights."""
    # The tensor core's FP8 sums grow less exact with K: at K = 36864 vLLM's kernel is at 4.9e-3.
    lut = [OurKernel(f"w4a8 lut {c}..7", "w4a8", 0.5 + 1 / 128, 1, c, 5.5e-3) for c in (-7, -8)]
    # Sums of "exact" numerics are of 128 products; the rest is in fp32.
    exact = [OurKernel(f"w4a8 exact {c}..7", "exact", 0.5 + 4 / 128, 1, c, 2e-3, "exact") for c in (-7, -8)]
    # What is expected has weights that are not rounded to bf16: that is 1.7e-3 at most, as is the result's rounding.
    w4a16 = OurKernel("w4a16 -8..7", "w4a16", 0.5 + 2 / 128, 2, -8, 4e-3, "exact")
    return [*lut, *exact, w4a16]


def our_ops() -> list[Kernel]:
    """Our op from bf16 activations on."""
    return [OurOp("w4a8 op", "w4a8", 0.5 + 1 / 128, 2, -7, 5.5e-3)]


def jax_kernels() -> list[Kernel]:
    """cuBLAS, as JAX calls it."""
    return [JaxDot("jax bf16", "bf16", 2, 2), JaxDot("jax fp8", "fp8", 1, 1)]


def selected[R: Runner](kernels: Iterable[R], names: Iterable[str], absent: Iterable[str] = ()) -> list[R]:
    """Those whose names hold one of some words; all, if no words are given.

    Args:
        kernels: those that there are.
        names: the words.
        absent: why others are missing, for the message.

    Raises:
        W4A8Error: some word is in no name.
    """
    kernels, names = list(kernels), list(names)
    for name in names:
        if not any(name in kernel.name for kernel in kernels):
            there = "; ".join([", ".join(k.name for k in kernels), *absent])
            raise W4A8Error(f"kernel {name!r}: there is none; there are {there}")
    return [kernel for kernel in kernels if not names or any(name in kernel.name for name in names)]


@jax.jit
def _compare(a: Any, b: Any, rows: Any, columns: Any) -> Any:
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (a, b)]
    return a[rows][:, columns].astype(jnp.float32), jnp.all(bits[0] == bits[1])


def _dot(a: Any, b: Any) -> Any:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


@functools.cache
def _abstract_weight(n: int, k: int, code_min: int, numerics: Numerics, scheme: Scheme) -> Any:
    return jax.eval_shape(lambda: _to_fragments(Weights(n, k, code_min).quantized(0, numerics)[0], scheme))


# Under jit, so that the codes are never unpacked in memory as a whole.
_to_fragments = jax.jit(FragmentWeight.from_weight, static_argnums=1)

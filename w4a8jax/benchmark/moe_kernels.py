"""The kernels for experts that a benchmark compares: ours, JAX's ragged_dot, tokamax's; `moe_peers` has vLLM's."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import GROUP_SIZE, moe_mlp, tuning
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.errors import W4A8Error
from pallas_kernels.fragments import FragmentWeight, Scheme
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.weight_format import Numerics

from . import timing
from .ahead import Ahead
from .kernels import Runner
from .moe_operands import ExpertWeights, MlpInputs, codes_int4, dequantize_transposed
from .moe_points import Point
from .operands import Tokens

# Where an expansion of all rows for all experts would take more memory, it is not run: other processes need it.
_MOST_TEMPORARY = 6e9


class ExpertsKernel(Runner):
    """A product of rows [M, K], sorted by expert, with experts [E, N, K], or the whole MLP; the base of all.

    The weights that it is given are one for a product, and those of gate_up and down for an MLP.
    """

    def takes(self, point: Point) -> bool:
        """Whether it is measured there."""
        return point.product != "mlp"

    def limit(self, point: Point) -> float:
        """Largest relative error of a right result.

        In an MLP, an error of the first product makes some elements round to the next FP8 number, 2^-4 away: of
        elements that are off by e, a part e / 2^-4 does, so that the root of their mean square is the root of e * 2^-4.
        The second product adds its own error.
        """
        if point.product != "mlp":
            return self.tolerance
        passed_on = (self.tolerance * 2**-4) ** 0.5 if self.input_bytes == 1 else self.tolerance
        return passed_on + self.tolerance

    def config(self, point: Point) -> Any:
        """The configuration that it will run with, if it has such."""
        return None

    def prepare(self, weights: Sequence[ExpertWeights]) -> None:
        """Compiles what makes the kernel's weights, and what it is compared with."""
        for w in weights:
            w.prepare(self.reference)

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        """Copy i of the weights in the kernel's own form, on the device."""
        raise NotImplementedError

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        """What is compiled: takes the inputs of a set of routes, and a weight; runs asynchronously.

        It is the same for all routings of a point.

        Raises:
            Exception: it cannot be compiled; whatever the framework raises.
        """
        raise NotImplementedError

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        """What the function takes for each set of routes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class OurExperts(ExpertsKernel):
    """`grouped_gemm`, in the configuration that `tuning.choose_grouped` gives, and `moe_mlp` on it.

    For W4A16 its reference is "w4a16". A product's rows are padded to whole eights beforehand: the op does that while
    it quantizes.
    """

    numerics: Numerics = "lut"

    @property
    def scheme(self) -> Scheme:
        """What it multiplies the weights with."""
        return "w4a16" if self.reference == "w4a16" else "w4a8"

    def takes(self, point: Point) -> bool:
        # The MLP differs in its products only, and compiling two kernels for each point takes its time.
        fast = self.numerics == "lut" and self.code_min == -7
        return point.product != "mlp" or fast or self.scheme == "w4a16"

    def config(self, point: Point) -> Any:
        chosen = [dataclasses.asdict(self.choose(point, n, k)) for n, k in point.shapes]
        return chosen if point.product == "mlp" else chosen[0]

    def choose(self, point: Point, n: int, k: int) -> TuningConfig:
        """The configuration of one of the point's products."""
        # The op looks it up for the rows that there are, not for those that it pads to.
        return tuning.choose_grouped(point.rows, point.model.experts, n, k, self.form(point))

    def form(self, point: Point) -> str:
        """How the kernel's weights hold codes."""
        return self._abstract_weight(point.model.experts, *point.shapes[0]).form  # type: ignore[no-any-return]

    def prepare(self, weights: Sequence[ExpertWeights]) -> None:
        for w in weights:
            _to_fragments.prepare(self.scheme, w.prepare(self.reference, self.numerics)[0])

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        return [_to_fragments(self.scheme, w.quantized(i, self.numerics)[0]) for w in weights]

    def _abstract_weight(self, experts: int, n: int, k: int) -> Any:
        return _abstract_weight(experts, n, k, self.code_min, self.numerics, self.scheme)

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        if point.product != "mlp":
            ((n, k),) = point.shapes
            return self.compiled(point, self.choose(point, n, k))
        model = point.model

        def mlp(inputs: Any, w: Any) -> Any:
            return moe_mlp(*inputs, *w, top_k=model.top_k, selection=model.selection, scheme=self.scheme)

        x = jax.ShapeDtypeStruct((point.tokens, model.hidden), jnp.bfloat16)
        router = jax.ShapeDtypeStruct((model.experts, model.hidden), jnp.bfloat16)
        weights = [self._abstract_weight(model.experts, n, k) for n, k in point.shapes]
        # cuBLAS's algorithm for the router is chosen by measuring, which takes milliseconds; compiling takes seconds,
        # and goes on beside other processes.
        return jax.jit(mlp).lower((x, router), weights).compile()

    def compiled(self, point: Point, config: TuningConfig) -> Callable[[Any, Any], Any]:
        """A product in a configuration."""
        m, experts, ((n, k),) = point.padded_rows, point.model.experts, point.shapes

        def product(inputs: Any, w: Any) -> Any:
            x, token_scale, sizes = inputs
            return grouped_gemm(x, token_scale, w[0], sizes, config)

        x: tuple[Any, Any] = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), None
        if self.scheme == "w4a8":
            x = jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((m, 1), jnp.float32)
        inputs = *x, jax.ShapeDtypeStruct((experts,), jnp.int32)
        return jax.jit(product).lower(inputs, [self._abstract_weight(experts, n, k)]).compile()

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        if isinstance(tokens, MlpInputs):
            return [(tokens.x, router.astype(jnp.bfloat16)) for router in tokens.routers]
        x = tokens.fp8 if self.scheme == "w4a8" else [(x, None) for x in tokens.bf16]
        return [(*x[i], jnp.asarray(point.routes.sizes(i))) for i in range(point.routes.sets)]


class RaggedDot(ExpertsKernel):
    """`jax.lax.ragged_dot` of bf16 rows and weights."""

    def prepare(self, weights: Sequence[ExpertWeights]) -> None:
        dequantize_transposed.prepare(weights[0].prepare(self.reference)[0])

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        return dequantize_transposed(weights[0].quantized(i)[0])

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        ((n, k),), experts = point.shapes, point.model.experts
        inputs = jax.ShapeDtypeStruct((point.padded_rows, k), jnp.bfloat16), jax.ShapeDtypeStruct((experts,), jnp.int32)
        weight = jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16)

        def product(inputs: Any, w: Any) -> Any:
            return jax.lax.ragged_dot(inputs[0], w, inputs[1], preferred_element_type=jnp.bfloat16)

        # Among cuBLAS's algorithms XLA takes the one that it measures to be best.
        with timing.exclusive():
            compiled = jax.jit(product).lower(inputs, weight).compile()
        analysis = compiled.memory_analysis()
        needed = 0 if analysis is None else analysis.temp_size_in_bytes
        if needed > _MOST_TEMPORARY:
            raise W4A8Error(f"XLA's ragged_dot needs {needed / 1e9:.1f} GB of temporary memory")
        return compiled  # type: ignore[no-any-return]

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        assert isinstance(tokens, Tokens)
        return [(tokens.bf16[i], jnp.asarray(point.routes.sizes(i))) for i in range(point.routes.sets)]


class TokamaxRaggedDot(RaggedDot):
    """tokamax's `ragged_dot` of bf16 rows and INT4 weights in groups of 128, by its kernel for Hopper."""

    def prepare(self, weights: Sequence[ExpertWeights]) -> None:
        codes_int4.prepare(weights[0].prepare(self.reference)[0])

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        w, scale = weights[0].quantized(i)
        # Codes [E, N, K]: the kernel takes them transposed, which then moves nothing.
        return codes_int4(w), jnp.swapaxes(scale, 1, 2)

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        import qwix
        import tokamax

        ((n, k),), experts = point.shapes, point.model.experts
        inputs = jax.ShapeDtypeStruct((point.padded_rows, k), jnp.bfloat16), jax.ShapeDtypeStruct((experts,), jnp.int32)
        codes = jax.ShapeDtypeStruct((experts, n, k), jnp.int4)
        scale = jax.ShapeDtypeStruct((experts, k // GROUP_SIZE, n), jnp.bfloat16)

        def product(inputs: Any, w: Any) -> Any:
            weight = qwix.QArray(jnp.swapaxes(w[0], 1, 2), w[1])
            return tokamax.ragged_dot(
                inputs[0], weight, inputs[1], preferred_element_type=jnp.bfloat16, implementation="mosaic"
            )

        return jax.jit(product).lower(inputs, (codes, scale)).compile()


def our_experts() -> list[ExpertsKernel]:
    """Ours, one for each form of the weights; tolerances are those of `kernels.our_kernels`."""
    lut = [OurExperts(f"grouped lut {c}", "w4a8", 0.5 + 1 / 128, 1, c, 5.5e-3) for c in (-7, -8)]
    exact = OurExperts("grouped exact", "exact", 0.5 + 4 / 128, 1, -7, 4e-3, "exact")
    w4a16 = OurExperts("grouped w4a16 -8", "w4a16", 0.5 + 2 / 128, 2, -8, 4e-3, "exact")
    return [*lut, exact, w4a16]


def jax_experts() -> list[ExpertsKernel]:
    """JAX's, and tokamax's where it is installed."""
    found: list[ExpertsKernel] = [RaggedDot("ragged_dot bf16", "bf16", 2, 2)]
    if importlib.util.find_spec("tokamax") is not None:
        found.append(TokamaxRaggedDot("tokamax w4a16", "w4a16", 0.5 + 2 / GROUP_SIZE, 2))
    return found


@functools.cache
def _abstract_weight(experts: int, n: int, k: int, code_min: int, numerics: Numerics, scheme: Scheme) -> Any:
    def made() -> Any:
        return FragmentWeight.from_weight(ExpertWeights(experts, n, k, code_min).quantized(0, numerics)[0], scheme)

    return jax.eval_shape(made)


# Under jit, so that the codes are never unpacked in memory as a whole.
_to_fragments = Ahead(lambda scheme, w: FragmentWeight.from_weight(w, scheme), 1)

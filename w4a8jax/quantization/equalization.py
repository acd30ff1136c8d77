"""Equalization: channels that matter more get finer steps, at no cost when the model runs.

As AWQ (Lin et al., 2023, arXiv:2306.00978): the columns of a weight that meet large inputs are scaled up before it is
quantized, and what produces these inputs is scaled down by as much, where the family's structure allows it without a
change of what the model computes (channel_folds.py).

Scales are s = mean|x|^alpha, or mean|x|^alpha / mean|w|^(1 - alpha), rounded to an eighth of an octave. Where a tensor
that is stored in bf16 reads the channels, such as a router, whose logits decide which experts a token meets, they are
rounded to powers of two, which change no bits there. For each fold the alpha stays whose quantized weights have the
least output error in the kernel's arithmetic, activations rounded to FP8 as well, on a sample of the tokens that count;
no scale is a candidate too. Rounding to nearest, here and in the result, weighs a column's error by the mean square of
its inputs: a search for the least error of the weights alone would clip just the columns that were scaled up. As folds
change no other's inputs, one pass over the unquantized model finds all of them.

Shapes: S tokens of the sample, N outputs, K inputs, C channels.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.decoder import Block
from models.families import family
from models.layers.moe import MoE
from models.weights import load_block
from pallas_kernels import W4Weight
from pallas_kernels.weight_format import Numerics

from ..calibration.data import CalibrationData
from ..calibration.expert_statistics import expert_inner, token_weights
from ..calibration.statistics import ResidualStream, advance, inputs, kernel_inputs
from ..checkpoints.compressed_tensors import Scheme
from ..checkpoints.folds import STEPS, Fold
from ..checkpoints.reader import CheckpointReader
from .channel_folds import LayerFolds, Readers
from .rtn import Search, quantize_weight

SAMPLE = 1024  # tokens
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
LARGEST = 8  # octaves of a scale


@dataclasses.dataclass(frozen=True)
class Equalization:
    """The folds of a model, and what they do for the layers that read the scaled channels.

    Attributes:
        folds: those that change something.
        tried: how many folds the model allows.
        error: the readers' relative output error on the sample, root mean square over folds; plain_error: without.
        tokens: of the sample.
        importance: for each module that reads scaled channels, fp32 [K], what a squared error in a column of the scaled
            weight costs; see `quantize_weight`.
    """

    folds: tuple[Fold, ...]
    tried: int
    error: float
    plain_error: float
    tokens: int
    importance: Mapping[str, Float[np.ndarray, "K"]]

    def describe(self) -> str:
        """One line."""
        return (
            f"{len(self.folds)} of {self.tried} folds scale; error of the outputs of layers behind them, rounded to "
            f"nearest, {self.plain_error:.4f} -> {self.error:.4f} on {self.tokens:,} tokens"
        )


def find_folds(
    reader: CheckpointReader,
    modules: Sequence[str],
    data: CalibrationData,
    *,
    scheme: Scheme = "w4a8",
    numerics: Numerics = "lut",
    code_min: int = -7,
    search: Search = "full",
    unrouted_weight: float = 0.1,
    check: Callable[[str, np.ndarray], None] = lambda name, weight: None,
) -> Equalization:
    """Finds the scales of each fold of a model.

    Args:
        reader: the unquantized checkpoint.
        modules: Hugging Face names of the modules that will be quantized.
        data: what to calibrate on.
        scheme, numerics, code_min: of the result.
        search: for the weights' scales while candidates are compared, at most "fast".
        unrouted_weight: what a token counts for experts that it is not sent to.
        check: called with the name and the value of each weight that is read.

    Raises:
        W4A8Error: the model's family is unknown, or a sample is longer than the model's context.
    """
    members = family(reader.config)
    config = members.decoder_config(reader.config)
    data.check_context(config.max_context)
    quantized = frozenset(modules)
    search_fold = _Search(reader, quantized, scheme, numerics, code_min, search, check)
    embedding = reader.read(f"{members.names['embedding'][0]}.weight")
    found: list[tuple[Fold, float, float]] = []
    importance: dict[str, np.ndarray] = {}
    with ResidualStream(data.samples, embedding, config, jnp.bfloat16) as stream:
        counted = np.flatnonzero(stream.mask)
        chosen = np.zeros(stream.tokens, bool)
        chosen[counted[np.linspace(0, len(counted) - 1, min(SAMPLE, len(counted))).round().astype(int)]] = True
        for layer in range(config.num_layers):
            block = load_block(config, members.names, reader, layer, dtype=jnp.bfloat16)
            folds = list(LayerFolds(config, members.names, reader.tensors, layer))
            taps = {group.tap for _, groups in folds for group in groups}
            sample = _Sample(block, stream, chosen, taps, unrouted_weight)
            for fold, groups in folds:
                if any(name in quantized for group in groups for name in group.modules):
                    found.append(search_fold(fold, groups, sample))
                    scales = found[-1][0].factors(reader)[1]
                    for group in groups:
                        importance |= _importance(group, sample, scales)
            if layer + 1 < config.num_layers:
                advance(block, stream)
    squares = np.array([f[1:] for f in found] or [(0, 0)])
    error, plain_error = np.sqrt(squares.mean(axis=0)).tolist()
    changed = tuple(fold for fold, _, _ in found if fold.steps.any())
    return Equalization(changed, len(found), error, plain_error, int(chosen.sum()), importance)


class _Sample:
    """What the modules of a layer read at the tokens of the sample.

    Args:
        block: the layer; stream: before it.
        tokens: bool, the stream's tokens that are in the sample.
        taps: see `Readers`.
        unrouted_weight: what a token counts for experts that it is not sent to.
    """

    def __init__(
        self, block: Block, stream: ResidualStream, tokens: np.ndarray, taps: Collection[str], unrouted_weight: float
    ):
        self._mlp: Any = block.mlp
        outer = sorted({"mlp" if tap.startswith("mlp.experts.") else tap for tap in taps})
        parts = list(inputs(block, stream, outer, tokens))
        self._x = {tap: np.concatenate([part[tap] for part in parts]) for tap in outer}
        self._ones = np.ones(len(self._x["mlp"]), np.float32)
        if isinstance(self._mlp, MoE):
            router, x = self._mlp.router.get_value(), jnp.asarray(self._x["mlp"])
            self._weights = np.asarray(token_weights(self._mlp.config, router, x, unrouted_weight))

    def inputs(self, group: Readers) -> Float[np.ndarray, "S K"]:
        """What the modules read."""
        if group.tap != "mlp.experts.down":
            return self._x[group.tap]
        gate_up = self._mlp.experts.gate_up.get_value()[group.experts[0]]
        return np.asarray(expert_inner(jnp.asarray(self._x["mlp"]), gate_up, "w4a16"))

    def weights(self, group: Readers) -> list[Float[np.ndarray, "S"]]:
        """What each token counts for each of the modules."""
        return [self._weights[:, e] for e in group.experts] or [self._ones] * len(group.modules)


@dataclasses.dataclass(frozen=True)
class _Search:
    """Finds the scales of a fold."""

    reader: CheckpointReader
    quantized: frozenset[str]
    scheme: Scheme
    numerics: Numerics
    code_min: int
    search: Search
    check: Callable[[str, np.ndarray], None]

    def __call__(self, fold: Fold, groups: Sequence[Readers], sample: _Sample) -> tuple[Fold, float, float]:
        """The fold with the scales that serve its readers best; their squared relative error, and without it.

        Of each group of readers the errors are summed, and put in proportion to their outputs.
        """
        tried = [fold, *(dataclasses.replace(fold, steps=s) for s in self._candidates(fold, groups, sample))]
        factors = [candidate.factors(self.reader)[1] for candidate in tried]
        sums = np.zeros((len(tried), len(groups), 2))
        for g, group in enumerate(groups):
            x = sample.inputs(group)
            importance = [_importance(group, sample, scales) for scales in factors]
            for module, weights in zip(group.modules, sample.weights(group), strict=True):
                if module not in self.quantized:
                    continue
                w = self._weight(module)
                for c, scales in enumerate(factors):
                    sums[c, g] += self._errors(scales, x, weights, w, importance[c][module])
        known = sums[0, :, 1] > 0
        relative = (sums[:, known, 0] / sums[:, known, 1]).sum(axis=1) / max(1, int(known.sum()))
        best = int(np.argmin(relative))
        return tried[best], relative[best], relative[0]

    def _candidates(self, fold: Fold, groups: Sequence[Readers], sample: _Sample) -> list[Int[np.ndarray, "C"]]:
        """Steps to try, all different and none zero throughout."""
        size = np.mean([_mean_size(sample.inputs(group), sample.weights(group)) for group in groups], axis=0)
        read = [name for group in groups for name in group.modules if name in self.quantized]
        weight = np.mean([self._relative_weights(name) for name in read], axis=0)
        # Query heads that share a head of values share its scale.
        size, weight = (a.reshape(-1, fold.repeat, fold.block).mean(axis=1).reshape(-1) for a in (size, weight))
        stored = [name for name in (*fold.rows, *fold.columns) if name.removesuffix(".weight") not in self.quantized]
        exact = len(stored) > fold.norm
        usable = (size > 0) & (weight > 0)
        logs = [np.log2(np.where(usable, a, 1)) for a in (size, weight)]
        found: dict[bytes, np.ndarray] = {}
        for alpha in ALPHAS:
            for exponent in (alpha * logs[0], alpha * logs[0] - (1 - alpha) * logs[1]):
                exponent = np.where(usable, exponent - (exponent[usable].mean() if usable.any() else 0), 0)
                rounded = round_scales(exponent, exact=exact)
                if rounded.any():
                    found[rounded.tobytes()] = rounded
        return list(found.values())

    def _relative_weights(self, module: str) -> Float[np.ndarray, "K"]:
        """Mean over rows of |w|, relative to the largest of its group: what AWQ weighs the inputs against."""
        w = np.abs(self._weight(module))
        groups = w.reshape(len(w), -1, 128)
        peak = groups.max(axis=2, keepdims=True)
        return (groups / np.where(peak > 0, peak, 1)).mean(axis=0).reshape(-1)

    def _weight(self, module: str) -> Float[np.ndarray, "N K"]:
        name = f"{module}.weight"
        weight = self.reader.read(name)
        self.check(name, weight)
        return weight.astype(np.float32)

    def _errors(
        self, factors: np.ndarray, x: np.ndarray, weights: np.ndarray, w: np.ndarray, importance: np.ndarray
    ) -> tuple[float, float]:
        """Squared error and square of a weight's outputs, each token times what it counts."""
        options: dict[str, Any] = {"numerics": self.numerics, "code_min": self.code_min}
        options["search"] = "none" if self.search == "none" else "fast"
        tensor = quantize_weight(w * factors, importance=importance, **options)
        error, total = _output_errors(
            x, factors, weights, w, tensor.packed, tensor.scale, numerics=self.numerics, fp8=self.scheme == "w4a8"
        )
        return float(error), float(total)


def _importance(group: Readers, sample: _Sample, scales: Float[np.ndarray, "K"]) -> dict[str, np.ndarray]:
    """For each module the mean square of its scaled inputs, and a hundredth of their mean."""
    squares = (sample.inputs(group).astype(np.float32) / scales) ** 2
    found: dict[str, np.ndarray] = {}
    for module, weights in zip(group.modules, sample.weights(group), strict=True):
        mean = weights @ squares / weights.sum()
        found[module] = mean + 0.01 * mean.mean()
    return found


def _mean_size(x: Float[np.ndarray, "S K"], weights: Sequence[Float[np.ndarray, "S"]]) -> Float[np.ndarray, "K"]:
    """Mean |x| over tokens, each with what it counts."""
    total = np.sum(weights, axis=0)
    return total @ np.abs(x.astype(np.float32)) / total.sum()


def round_scales(exponents: Float[np.ndarray, "C"], *, exact: bool) -> Int[np.ndarray, "C"]:
    """Steps of `Fold` for scales 2^exponents, within bounds, int8 [C]; powers of two if they shall be exact."""
    unit = STEPS if exact else 1
    steps = unit * np.round(exponents * STEPS / unit)
    return np.clip(steps, -LARGEST * STEPS, LARGEST * STEPS).astype(np.int8)


@partial(jax.jit, static_argnames=("numerics", "fp8"))
def _output_errors(
    x: Float[Array, "S K"],
    factors: Float[Array, "K"],
    weights: Float[Array, "S"],
    w: Float[Array, "N K"],
    packed: Int[Array, "N K/8"],
    scale: Float[Array, "N G"],
    *,
    numerics: Numerics,
    fp8: bool,
) -> tuple[Array, Array]:
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    plain = x.astype(jnp.float32)
    exact = dot(plain, w.T)
    value = W4Weight.from_checkpoint(packed, scale, numerics=numerics).dequantize()
    difference = dot(kernel_inputs(plain / factors, fp8), value.T) - exact
    return jnp.sum(weights[:, None] * difference**2), jnp.sum(weights[:, None] * exact**2)

"""GPTQ of a whole checkpoint: layer after layer, each on the inputs that the layers quantized before it give.

Within a layer too: attention's output projection sees the attention of quantized queries, keys and values, and so on.
Modules with the same input share its Hessian. Weights are quantized as the checkpoint has them, one module at a time.
"""

import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.decoder import Block
from models.families import family
from models.weights import load_block
from pallas_kernels import W4A8Error, W4Weight

from ..calibration.data import CalibrationData
from ..calibration.statistics import ResidualStream, advance, hessians, module_at
from ..checkpoints.reader import CheckpointReader
from . import rtn
from .gptq import Factor, GptqResult, GptqSearch, factorize, gptq_quantize_weight
from .rtn import Numerics

if TYPE_CHECKING:
    from ..checkpoints.compressed_tensors import Scheme

# The linear modules of a layer in the order of computation: those of a stage see what all stages before it give.
_SEQUENTIAL = (("attention.qkv",), ("attention.output",), ("mlp.gate_up",), ("mlp.down",))
_PARALLEL = (("attention.qkv", "mlp.gate_up"), ("attention.output", "mlp.down"))
_SAME_INPUT = {"mlp.gate_up": "attention.qkv"}  # in a parallel block
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class GptqQuantizer:
    """Quantizes the modules of a checkpoint, which must be asked for layer by layer.

    Args:
        reader: the unquantized checkpoint.
        modules: Hugging Face names of the modules to quantize; the others compute in bf16.
        data: what to calibrate on.
        scheme: what the result will run as: the inputs of "w4a8" layers are taken as FP8 values.
        numerics, code_min, search, act_order, damping: see `gptq_quantize_weight` and `factorize`.
        check: called with the name and the value of each weight that is read.

    Attributes:
        seconds: so far, of running the calibration data through layers; not of solving.
        tokens: int, how many are run: those of the data without what follows a trace's last token that counts.

    Raises:
        W4A8Error: the model's family is unknown, or it is not dense; a part of a fused module would be quantized.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        modules: Sequence[str],
        data: CalibrationData,
        *,
        scheme: "Scheme" = "w4a8",
        numerics: Numerics = "lut",
        code_min: int = -7,
        search: GptqSearch = "full",
        act_order: bool = False,
        damping: float = 0.01,
        check: Callable[[str, np.ndarray], None] = lambda name, weight: None,
    ):
        members = family(reader.config)
        self._config, self._names = members.decoder_config(reader.config), members.names
        self._reader, self._modules, self._scheme, self._check = reader, frozenset(modules), scheme, check
        self._options: dict[str, Any] = {"numerics": numerics, "code_min": code_min}
        self._search, self._act_order, self._damping = search, act_order, damping
        self._ready: dict[str, GptqResult] = {}
        self._next, self.seconds = 0, 0.0
        for layer in range(self._config.num_layers):
            for path in ("attention.qkv", "mlp.gate_up"):
                self._quantized(layer, path)
        longest = max(len(sample.tokens) for sample in data.samples)
        if longest > self._config.max_context:
            raise W4A8Error(
                f"{data.name}: has a sample of {longest} tokens, but the model's context is "
                f"{self._config.max_context}; cut it"
            )
        embedding = reader.read(f"{self._names['embedding'][0]}.weight")
        self._stream = ResidualStream(data.samples, embedding, self._config, jnp.bfloat16)
        self.tokens = self._stream.tokens

    def close(self) -> None:
        """Frees the stream's file."""
        self._stream.close()

    def quantize(self, module: str) -> GptqResult:
        """The quantized weight of a module. Modules of one layer may come in any order, layers must ascend."""
        match = _LAYER.match(module)
        if match is None:
            return self._round(module, "it is in none of the decoder's layers")
        while self._next <= int(match[1]) and module not in self._ready:
            self._ready.clear()
            self._run_layer(self._next)
            self._next += 1
        if module not in self._ready:
            return self._round(module, "it is no linear module of the decoder, or was asked for out of order")
        return self._ready.pop(module)

    def _run_layer(self, layer: int) -> None:
        block = load_block(self._config, self._names, self._reader, layer, dtype=jnp.bfloat16)
        for stage in _PARALLEL if self._config.parallel_block else _SEQUENTIAL:
            todo = [path for path in stage if self._quantized(layer, path)]
            source = {p: _SAME_INPUT.get(p, p) if self._config.parallel_block else p for p in todo}
            taps = sorted(set(source.values()))
            began = time.perf_counter()
            sums = hessians(block, self._stream, taps, fp8=self._scheme == "w4a8") if taps else {}
            jax.block_until_ready(sums)
            self.seconds += time.perf_counter() - began
            for tap in taps:
                name = f"model.layers.{layer}, input of {tap}"
                factor: Factor | str
                try:
                    factor = factorize(sums.pop(tap), damping=self._damping, act_order=self._act_order, name=name)
                except W4A8Error as e:
                    factor = str(e)
                for path in (p for p in todo if source[p] == tap):
                    self._quantize_module(block, layer, path, factor)
                del factor
        if layer + 1 < self._config.num_layers:
            began = time.perf_counter()
            advance(block, self._stream)
            self.seconds += time.perf_counter() - began

    def _quantize_module(self, block: Block, layer: int, path: str, factor: Factor | str) -> None:
        """Quantizes the parts of a fused module, and puts the result into the block."""
        parts = self._parts(layer, path)
        for name in parts:
            self._ready[name] = self._solve(name, factor)
        tensors = [self._ready[name].tensor for name in parts]
        linear = module_at(block, path)
        weight = W4Weight.from_checkpoint(
            jnp.asarray(np.concatenate([tensor.packed for tensor in tensors])),
            jnp.asarray(np.concatenate([tensor.scale for tensor in tensors])),
            **self._options,
        )
        linear.weight = nnx.Param(weight)
        linear.scheme = self._scheme

    def _solve(self, module: str, factor: Factor | str) -> GptqResult:
        if isinstance(factor, str):
            return self._round(module, factor)
        name = f"{module}.weight"
        weight = self._reader.read(name)
        self._check(name, weight)
        result = gptq_quantize_weight(weight, factor, search=self._search, name=name, **self._options)
        if result.fallback:
            _warn(module, result.fallback)
        return result

    def _round(self, module: str, reason: str) -> GptqResult:
        """The fallback."""
        name = f"{module}.weight"
        weight = self._reader.read(name)
        self._check(name, weight)
        _warn(module, reason)
        return GptqResult(rtn.quantize_weight(weight, name=name, **self._options), np.nan, np.nan, reason)

    def _parts(self, layer: int, path: str) -> list[str]:
        key = f"layers.{{i}}.{path}"
        if key not in self._names:
            raise W4A8Error(f"GPTQ: dense layers only, but this family has no {path}; quantize with --method rtn")
        return [name.format(i=layer) for name in self._names[key]]

    def _quantized(self, layer: int, path: str) -> bool:
        """Whether a fused module is quantized."""
        parts = self._parts(layer, path)
        chosen = [name in self._modules for name in parts]
        if any(chosen) and not all(chosen):
            other = parts[chosen.index(False)]
            raise W4A8Error(f"{other}: ignored, but {parts[chosen.index(True)]} is not; they are computed as one")
        return all(chosen)


def _warn(module: str, reason: str) -> None:
    warnings.warn(f"{module}: rounded to nearest instead of GPTQ: {reason}", stacklevel=2)

"""GPTQ of a whole checkpoint: layer after layer, each on the inputs that the layers quantized before it give.

Within a layer too: attention's output projection sees the attention of quantized queries, keys and values, and so on;
an expert's down projection sees its quantized gate and up. Modules with the same input share its Hessian. Weights are
quantized as the checkpoint has them, one module at a time; Hessians of experts are held for a few at once.
"""

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.decoder import Block
from models.families import family
from models.weights import load_block
from pallas_kernels import W4A8Error, W4Weight

from ..calibration.data import CalibrationData
from ..calibration.expert_statistics import ExpertMatrix, Leaf, expert_groups, expert_hessians, expert_inputs
from ..calibration.statistics import ResidualStream, TokenFile, advance, hessians, module_at
from ..checkpoints.reader import CheckpointReader
from . import rtn
from .gptq import Factor, GptqResult, GptqSearch, factorize, gptq_quantize_weight
from .rtn import Numerics

if TYPE_CHECKING:
    from ..checkpoints.compressed_tensors import Scheme

EXPERT_MEMORY = 2 * 2**30  # bytes of experts' Hessians at once
UNROUTED_WEIGHT = 0.1
_LEAVES: tuple[Leaf, ...] = ("gate_up", "down")
_kernel_weight = jax.jit(W4Weight.from_checkpoint, static_argnames=("numerics", "code_min"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class GptqQuantizer:
    """Quantizes the modules of a checkpoint, which must be asked for layer by layer.

    Args:
        reader: the unquantized checkpoint.
        modules: Hugging Face names of the modules to quantize; the others compute in bf16.
        data: what to calibrate on.
        scheme: what the result will run as: the inputs of "w4a8" layers are taken as FP8 values.
        numerics, code_min, search, act_order, damping: see `gptq_quantize_weight` and `factorize`.
        unrouted_weight: what a token counts for experts that it is not sent to, see `expert_hessians`; in (0, 1].
        check: called with the name and the value of each weight that is read.

    Attributes:
        seconds: so far, of running the calibration data through layers; not of solving.
        tokens: int, how many are run: those of the data without what follows a trace's last token that counts.

    Raises:
        W4A8Error: the model's family is unknown; a part of a fused module, or of a layer's experts, would be quantized;
            a sample is longer than the model's context.
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
        unrouted_weight: float = UNROUTED_WEIGHT,
        check: Callable[[str, np.ndarray], None] = lambda name, weight: None,
    ):
        members = family(reader.config)
        self._config, self._names = members.decoder_config(reader.config), members.names
        self._reader, self._modules, self._scheme, self._check = reader, frozenset(modules), scheme, check
        self._options: dict[str, Any] = {"numerics": numerics, "code_min": code_min}
        self._search, self._act_order, self._damping, self._unrouted_weight = (
            search,
            act_order,
            damping,
            unrouted_weight,
        )
        self._ready: dict[str, GptqResult] = {}
        self._next, self.seconds = 0, 0.0
        for layer in range(self._config.num_layers):
            for path in [path for stage in self._stages(layer) for path in stage]:
                self._quantized(layer, path)
            if self._config.experts(layer):
                for leaf in _LEAVES:
                    self._quantized(layer, f"mlp.experts.{leaf}")
        data.check_context(self._config.max_context)
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
        kept: dict[str, TokenFile] = {}
        for stage in self._stages(layer):
            todo = [path for path in stage if self._quantized(layer, path)]
            # In a parallel block, all that is computed first reads the same norm.
            source = {p: "attention.qkv" if "attention.qkv" in stage else p for p in todo}
            taps = sorted(set(source.values()))
            began = time.perf_counter()
            sums = hessians(block, self._stream, taps, fp8=self._scheme == "w4a8", kept=kept) if taps else {}
            jax.block_until_ready(sums)
            self.seconds += time.perf_counter() - began
            for tap in taps:
                factor = self._factorize(sums.pop(tap), f"model.layers.{layer}, input of {tap}")
                for path in (p for p in todo if source[p] == tap):
                    self._quantize_module(block, layer, path, factor)
                del factor
        if self._config.experts(layer):
            self._run_experts(block, layer)
        if layer + 1 < self._config.num_layers:
            began = time.perf_counter()
            advance(block, self._stream, kept=kept)
            self.seconds += time.perf_counter() - began
        for file in kept.values():
            file.close()

    def _stages(self, layer: int) -> list[tuple[str, ...]]:
        """The linear modules of a layer in the order of computation: those of a stage see what all before it give."""
        moe = self._config.experts(layer)
        mlp = "mlp" if moe is None else "mlp.shared" if moe.shared_intermediate_size else None
        first, second = ((f"{mlp}.gate_up",), (f"{mlp}.down",)) if mlp else ((), ())
        if self._config.parallel_block:
            return [("attention.qkv", *first), ("attention.output", *second)]
        return [stage for stage in (("attention.qkv",), ("attention.output",), first, second) if stage]

    def _run_experts(self, block: Block, layer: int) -> None:
        """Quantizes the experts of a layer, a group at a time, and puts the results into the block."""
        todo = [leaf for leaf in _LEAVES if self._quantized(layer, f"mlp.experts.{leaf}")]
        if not todo:
            return
        moe: Any = block.mlp
        began = time.perf_counter()
        tokens = expert_inputs(block, self._stream)
        self.seconds += time.perf_counter() - began
        with tokens:
            for group in expert_groups(moe.config, self._config.hidden_size, EXPERT_MEMORY):
                gate_up: dict[int, ExpertMatrix] = {}
                if "gate_up" in todo:
                    self._quantize_experts(moe, layer, "gate_up", dict.fromkeys(group), tokens)
                    gate_up = {e: self._weight(self._parts(layer, "mlp.experts.gate_up", e)) for e in group}
                else:
                    gate_up = {e: moe.experts.gate_up.get_value()[e] for e in group}
                if "down" in todo:
                    self._quantize_experts(moe, layer, "down", gate_up, tokens)
        for leaf in todo:
            weight = self._weight(self._parts(layer, f"mlp.experts.{leaf}"), stack=moe.config.num_experts)
            setattr(moe.experts, leaf, nnx.Param(weight))
        moe.experts.scheme = self._scheme

    def _quantize_experts(
        self, moe: Any, layer: int, leaf: Leaf, gate_up: Mapping[int, ExpertMatrix | None], tokens: TokenFile
    ) -> None:
        """Quantizes one matrix of each of some experts; `gate_up` as of `expert_hessians`."""
        began = time.perf_counter()
        sums = expert_hessians(
            moe.config,
            moe.router.get_value(),
            tokens,
            gate_up,
            scheme=self._scheme,
            unrouted_weight=self._unrouted_weight,
        )
        jax.block_until_ready(sums)
        self.seconds += time.perf_counter() - began
        for e in gate_up:
            factor = self._factorize(sums.pop(e), f"model.layers.{layer}, input of {leaf} of expert {e}")
            for name in self._parts(layer, f"mlp.experts.{leaf}", e):
                self._ready[name] = self._solve(name, factor)
            del factor

    def _factorize(self, hessian: Array, name: str) -> Factor | str:
        """The factor of a Hessian, or why there is none."""
        try:
            return factorize(hessian, damping=self._damping, act_order=self._act_order, name=name)
        except W4A8Error as e:
            return str(e)

    def _quantize_module(self, block: Block, layer: int, path: str, factor: Factor | str) -> None:
        """Quantizes the parts of a fused module, and puts the result into the block."""
        parts = self._parts(layer, path)
        for name in parts:
            self._ready[name] = self._solve(name, factor)
        linear = module_at(block, path)
        linear.weight = nnx.Param(self._weight(parts))
        linear.scheme = self._scheme

    def _weight(self, parts: Sequence[str], stack: int | None = None) -> W4Weight:
        """Quantized modules as one, their rows joined; `stack`: as that many of equal shape, [E, N, K]."""
        tensors = [self._ready[name].tensor for name in parts]
        packed, scale = (np.concatenate([getattr(t, part) for t in tensors]) for part in ("packed", "scale"))
        if stack is not None:
            packed, scale = (part.reshape(stack, -1, part.shape[-1]) for part in (packed, scale))
        return _kernel_weight(packed, scale, **self._options)

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

    def _parts(self, layer: int, path: str, expert: int | None = None) -> list[str]:
        """The Hugging Face modules that make up one of ours; of a single expert, if one is given."""
        names, moe = self._names[f"layers.{{i}}.{path}"], self._config.experts(layer)
        count = moe.num_experts if moe is not None and ".experts." in path else 1
        return [name.format(i=layer, e=e) for e in (range(count) if expert is None else [expert]) for name in names]

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

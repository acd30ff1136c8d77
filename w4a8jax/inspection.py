"""What is in a checkpoint: layer by layer, and in total. Reads one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoints.compressed_tensors import PACKED, SCALE, SHAPE, is_linear, quantized_modules
from .checkpoints.reader import CheckpointReader
from .checkpoints.safetensors_format import TensorInfo, natural_key
from .expert_sizes import ExpertSizes, expert_sizes
from .weight_statistics import CodeStatistics, ValueStatistics, code_statistics, value_statistics

if TYPE_CHECKING:
    from rich.console import Console

    from .expert_load import ExpertLoad

# config.json entries that say what the model is, in the order to show them.
_CONFIG_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "sliding_window", "num_experts",
    "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "tie_word_embeddings",
    "dtype", "torch_dtype",
)  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "float8_e4m3fn": "fp8"}
KINDS = ("codes", "scales", "unquantized linears", "embeddings", "norms", "other")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One module of a checkpoint.

    Attributes:
        name: the module, "model.layers.0.self_attn.q_proj"; "*" stands for any number once reports are merged.
        shape: of its weight, [N, K] for a linear.
        scheme: "w4a8" or "w4a16", else the weight's dtype: "bf16", "fp16", "fp32", ...
        nbytes: on disk, everything that belongs to the module.
        kind: one of `KINDS`; a quantized linear counts as "codes".
        weights: how many values the weight has.
        count: modules that this report stands for.
        codes: of a quantized linear, else None.
        values: of a float weight, else None.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    kind: str
    weights: int
    count: int = 1
    codes: CodeStatistics | None = None
    values: ValueStatistics | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and bias included."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return _plain(dataclasses.asdict(self)) | {"bits_per_weight": self.bits_per_weight}


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect` found; `render` shows it.

    Attributes:
        path: the checkpoint.
        config: the entries of config.json that say what the model is.
        layers: one report for each module, in the order of the model.
        bytes_by_kind: bytes on disk, by `KINDS`.
        sidecars: tokenizer and other files that come with the weights.
        expert_load: where the tokens of a text went, one entry for each layer with experts; None without a text.
    """

    path: Path
    config: dict[str, Any]
    layers: tuple[LayerReport, ...]
    bytes_by_kind: dict[str, int]
    sidecars: tuple[str, ...]
    expert_load: tuple[ExpertLoad, ...] | None = None

    @property
    def scheme(self) -> str:
        """ "w4a8" or "w4a16" if anything is quantized, else the dtype of the largest weight."""
        quantized = [layer for layer in self.layers if layer.codes is not None]
        return max(quantized or self.layers, key=lambda layer: layer.weights).scheme

    @property
    def parameters(self) -> int:
        """Weights and biases, quantized or not."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Over the whole checkpoint."""
        return 8 * self.nbytes / self.parameters

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Over the quantized layers; None if there are none."""
        layers = [layer for layer in self.layers if layer.codes is not None]
        return 8 * sum(x.nbytes for x in layers) / sum(x.weights for x in layers) if layers else None

    @property
    def experts(self) -> ExpertSizes | None:
        """Sizes of the routed experts; None if there are none."""
        return expert_sizes(self.layers, self.config)

    @property
    def histogram(self) -> np.ndarray:
        """int64 [16], how often each code from -8 to 7 occurs in all quantized layers."""
        return sum((x.codes.histogram for x in self.layers if x.codes is not None), np.zeros(16, np.int64))

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "path": str(self.path),
            "config": self.config,
            "scheme": self.scheme,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "bytes_by_kind": self.bytes_by_kind,
            "experts": None if self.experts is None else dataclasses.asdict(self.experts),
            "expert_load": None if self.expert_load is None else [load.record() for load in self.expert_load],
            "code_histogram": self.histogram.tolist(),
            "sidecars": list(self.sidecars),
            "layers": [layer.record() for layer in self.layers],
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.record(), indent=2)

    def render(self, console: Console | None = None, *, details: bool | None = None) -> None:
        """Prints tables.

        Args:
            console: where to.
            details: a row for each module, rather than one for all that differ only in the number of their layer or
                expert; by default, where they are few.
        """
        from .inspection_tables import render

        render(self, console, details)

    def __repr__(self) -> str:
        return (
            f"<Inspection of {self.path}: {self.config.get('model_type')}, {self.scheme}, "
            f"{self.parameters:,} parameters, {self.bits_per_weight:.2f} bits per weight, {len(self.layers)} modules>"
        )


def inspect(
    path: str | Path,
    *,
    text: str | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Reads a checkpoint, quantized or not, and says what is in it.

    Args:
        path: the checkpoint's directory, or a name on the Hugging Face Hub.
        text: of a mixture of experts, load the model, run it on this and count the tokens that each expert meets.
        context, max_tokens: how to read the text; as for `evaluate`.
        progress: called after each module with the bytes read and the bytes in all.

    Raises:
        W4A8Error: there is no checkpoint, or it is damaged; there is a text, but the model has no experts or no
            tokenizer, or an option is out of range.
    """
    load = None
    if text is not None:
        from .checkpoints.load import load as load_model
        from .expert_load import expert_load

        load = expert_load(load_model(path), text, context=context, max_tokens=max_tokens)
    reader = CheckpointReader(path)
    quantized = quantized_modules(reader)
    members: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in reader.tensors.items():
        members[_module(name)].append(info)
    layers, by_kind, done = [], dict.fromkeys(KINDS, 0), 0
    total = sum(info.nbytes for info in reader.tensors.values())
    for name in sorted(members, key=natural_key):
        tensors = members[name]
        nbytes = sum(info.nbytes for info in tensors)
        if name in quantized:
            module = quantized[name]
            scales = sum(info.nbytes for info in tensors if not info.name.endswith(PACKED))
            by_kind["codes"] += nbytes - scales
            by_kind["scales"] += scales
            bias = sum(info.size for info in tensors if info.name == f"{name}.bias")
            weights = module.shape[0] * module.shape[1] + bias
            codes = code_statistics(reader, module)
            layers.append(LayerReport(name, module.shape, module.scheme, nbytes, "codes", weights, codes=codes))
        else:
            layers.append(_plain_layer(reader, name, tensors))
            by_kind[layers[-1].kind] += nbytes
        done += nbytes
        if progress is not None:
            progress(done, total)
    config = {key: reader.config[key] for key in _CONFIG_KEYS if reader.config.get(key) is not None}
    sidecars = tuple(map(str, reader.sidecars()))
    return Inspection(reader.path, config, tuple(sorted(layers, key=_model_order)), by_kind, sidecars, load)


def merge(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """One report for all modules that differ only in numbers of their names, such as the layer's or the expert's.

    Quantiles of merged scales keep only the least and the greatest exactly; those between are means.
    """
    groups: dict[tuple, list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), layer.shape, layer.scheme].append(layer)
    return [_merge(name, group) if len(group) > 1 else group[0] for (name, *_), group in groups.items()]


def _merge(name: str, group: list[LayerReport]) -> LayerReport:
    codes = [layer.codes for layer in group if layer.codes is not None]
    values = [layer.values for layer in group if layer.values is not None]
    first = group[0]
    return LayerReport(
        name,
        first.shape,
        first.scheme,
        sum(layer.nbytes for layer in group),
        first.kind,
        sum(layer.weights for layer in group),
        len(group),
        codes=_merge_codes(codes) if codes else None,
        values=ValueStatistics(
            float(np.sqrt(np.mean([v.rms**2 for v in values]))),
            max(v.largest for v in values),
            sum(v.not_finite for v in values),
        )
        if values
        else None,
    )


def _merge_codes(codes: list[CodeStatistics]) -> CodeStatistics:
    quantiles = np.array([c.scale_quantiles for c in codes])
    return CodeStatistics(
        histogram=np.sum([c.histogram for c in codes], axis=0),
        groups=sum(c.groups for c in codes),
        scale_quantiles=(
            float(quantiles[:, 0].min()),
            *quantiles[:, 1:-1].mean(axis=0).tolist(),
            float(quantiles[:, -1].max()),
        ),
        spread=np.sum([c.spread for c in codes], axis=0),
        channel_scale=(min(c.channel_scale[0] for c in codes), max(c.channel_scale[1] for c in codes)),
        bad_scales=sum(c.bad_scales for c in codes),
        weak_groups=sum(c.weak_groups for c in codes),
        lost_groups=sum(c.lost_groups for c in codes),
    )


def _module(tensor: str) -> str:
    for part in (PACKED, SCALE, SHAPE, ".weight", ".bias"):
        if tensor.endswith(part):
            return tensor.removesuffix(part)
    return tensor.rpartition(".")[0] if ".weight_" in tensor else tensor


def _plain_layer(reader: CheckpointReader, name: str, tensors: list[TensorInfo]) -> LayerReport:
    weight = max(tensors, key=lambda info: info.size)
    values = None
    if weight.dtype.name.startswith(("float", "bfloat")):
        values = value_statistics(reader, weight.name)
    scheme = _DTYPES.get(weight.dtype.name, weight.dtype.name)
    size, nbytes = sum(info.size for info in tensors), sum(info.nbytes for info in tensors)
    return LayerReport(name, weight.shape, scheme, nbytes, _kind(name, weight), size, values=values)


def _kind(name: str, weight: TensorInfo) -> str:
    if "embed" in name or name.endswith("lm_head"):
        return "embeddings"
    if "norm" in name:
        return "norms"
    return "unquantized linears" if is_linear(name) or len(weight.shape) == 2 else "other"


def _model_order(layer: LayerReport) -> tuple:
    """Embedding, layers, final norm, output."""
    inside = ".layers." in layer.name
    place = 1 if inside else 0 if "embed" in layer.name else 2
    last = layer.name.endswith("lm_head")
    return (place + last, natural_key(layer.name))


def _plain(value: Any) -> Any:
    """The value with arrays and paths as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    json.dumps(value)
    return value

"""The compressed-tensors description of a quantized checkpoint: `quantization_config` and the tensors it speaks of.

Reads what other tools write (llm-compressor, older spellings included) as far as it is INT4 symmetric weights in
groups, with FP8 per-token activations ("w4a8") or none ("w4a16"); refuses the rest, naming the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from pallas_kernels.errors import W4A8Error

from .reader import CONFIG, CheckpointReader
from .safetensors_format import TensorSpec

Scheme = Literal["w4a8", "w4a16"]
FORMAT = "pack-quantized"
EXPORT_GROUP_SIZE = 128
# Never quantized, and named in every config written: vLLM makes its routers unquantized whatever the config says.
DEFAULT_IGNORE = ("lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$")
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"

_LINEAR = re.compile(r"(.*\.)?layers\.\d+\..*(_proj|\.w[123])$")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_OTHER_METHODS = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4"}
_PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}},
}
_PRESETS["W4AFP8"] = _PRESETS["W4A16"] | {
    "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
}


@dataclass(frozen=True)
class QuantizationGroup:
    """One config group: which modules, and how. `group_size` None: one scale per output channel."""

    targets: tuple[str, ...]
    scheme: Scheme
    group_size: int | None


@dataclass(frozen=True)
class QuantizationConfig:
    """A parsed `quantization_config`. `warnings`: what it holds that this project leaves out."""

    groups: tuple[QuantizationGroup, ...]
    ignore: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """The one scheme of the checkpoint. Raises W4A8Error if its groups differ."""
        schemes = sorted({g.scheme for g in self.groups})
        if len(schemes) != 1:
            raise W4A8Error(f"quantization_config: config_groups mix the schemes {' and '.join(schemes)}")
        return schemes[0]

    def group_of(self, module: str) -> QuantizationGroup | None:
        """How the config wants a linear module quantized; None if not at all."""
        if is_ignored(module, self.ignore):
            return None
        # compressed-tensors prefers exact names, then regular expressions, then classes.
        for rank in (lambda t: t == module, lambda t: t.startswith("re:") and matches(module, t), is_linear_class):
            for group in self.groups:
                if any(rank(target) for target in group.targets):
                    return group
        return None


@dataclass(frozen=True)
class QuantizedModule:
    """A quantized linear module of a checkpoint: weight [N, K] = `shape`, and its scheme."""

    name: str
    shape: tuple[int, int]
    group_size: int
    scheme: Scheme


def is_linear_class(target: str) -> bool:
    return target in ("Linear", "LinearBase")


def matches(module: str, pattern: str) -> bool:
    """compressed-tensors' rule: "re:..." is matched from the name's start (not to its end), all else is exact."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as e:
            raise W4A8Error(f"ignore/targets pattern {pattern!r} is no regular expression: {e}") from e
    return pattern == module


def is_ignored(module: str, patterns: Iterable[str]) -> bool:
    return any(matches(module, pattern) for pattern in patterns)


def is_linear(module: str) -> bool:
    """Is this a linear layer inside a decoder layer, router excepted? By name, for every family alike."""
    return _LINEAR.match(module) is not None


def build(scheme: Scheme = "w4a8", ignore: Sequence[str] = DEFAULT_IGNORE) -> dict[str, Any]:
    """The `quantization_config` that vLLM loads as this scheme, group size 128."""
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "format": FORMAT,  # else compressed-tensors infers "int-quantized" from FP8 activations, and cannot load it
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": EXPORT_GROUP_SIZE,
            "dynamic": False,
        },
    }
    if scheme == "w4a8":
        group["input_activations"] = dict(_PRESETS["W4AFP8"]["input_activations"])
    elif scheme != "w4a16":
        raise W4A8Error(f"scheme: must be w4a8 or w4a16 for a quantized checkpoint, found {scheme!r}")
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def find(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The raw quantization config inside config.json, under its present or former name."""
    for key in ("quantization_config", "compression_config"):
        for place in (config, config.get("text_config") or {}):
            if place.get(key):
                return place[key]
    return None


def parse(config: Mapping[str, Any], where: str = CONFIG) -> QuantizationConfig | None:
    """Parses the quantization config of a config.json; None if the checkpoint is not quantized.

    Raises:
        W4A8Error: it asks for something that this project does not run; the message names the field.
    """
    raw = find(config)
    if raw is None:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(raw, Mapping):
        raise W4A8Error(f"{where} must be an object, found {type(raw).__name__}")
    if isinstance(raw.get("quantization_config"), Mapping):  # former nesting, beside sparsity_config
        raw = {**raw, **raw["quantization_config"]}
    method = raw.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        name = _OTHER_METHODS.get(method, method)
        raise W4A8Error(f"{where}.quant_method: {name} checkpoints are not read, only compressed-tensors ones")
    if (raw.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise W4A8Error(f"{where}.sparsity_config: sparse weights are not read: {raw['sparsity_config']['format']}")
    if (raw.get("transform_config") or {}).get("config_groups"):
        raise W4A8Error(f"{where}.transform_config: rotated or otherwise transformed weights are not read")
    warnings = []
    if raw.get("kv_cache_scheme"):
        warnings.append(f"{where}.kv_cache_scheme is ignored: the KV cache stays in bf16")
    config_groups = raw.get("config_groups")
    if not isinstance(config_groups, Mapping) or not config_groups:
        raise W4A8Error(f"{where}.config_groups: must be a non-empty object")
    groups = tuple(
        _parse_group(f"{where}.config_groups.{name}", name, group, raw.get("format"))
        for name, group in config_groups.items()
    )
    ignore = tuple(map(str, raw.get("ignore") or ()))
    for pattern in (*ignore, *(t for g in groups for t in g.targets)):
        matches("", pattern)  # refuses broken regular expressions here, once
    return QuantizationConfig(groups, ignore, tuple(warnings))


def _parse_group(where: str, name: str, group: Any, default_format: str | None) -> QuantizationGroup:
    if isinstance(group, list):  # {"W4A16": ["Linear"]}: a preset by name
        if name.upper() not in _PRESETS:
            raise W4A8Error(f"{where}: the preset {name} is not read, only {' and '.join(_PRESETS)}")
        group = {"targets": group, **_PRESETS[name.upper()]}
    form = group.get("format") or default_format
    if form != FORMAT:
        raise W4A8Error(f"{where}.format: must be {FORMAT}, found {form}")
    weights = group.get("weights") or {}

    def require(field: str, found: Any, *wanted: Any) -> None:
        if found not in wanted:
            expected = " or ".join(map(str, wanted))
            raise W4A8Error(f"{where}.{field}: must be {expected}, found {found}")

    require("weights.num_bits", weights.get("num_bits"), 4)
    require("weights.type", str(weights.get("type", "int")).lower(), "int")
    require("weights.symmetric", weights.get("symmetric", True), True)
    require("weights.dynamic", weights.get("dynamic", False), False)
    group_size = weights.get("group_size")
    inferred = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = str(weights.get("strategy") or inferred).lower()
    require("weights.strategy", strategy, "group", "channel")
    if strategy == "group" and not (isinstance(group_size, int) and group_size > 0):
        raise W4A8Error(f"{where}.weights.group_size: must be positive, found {group_size}")
    # "group" reorders the columns through weight_g_idx; it may still be trivial, which the tensors tell.
    require("weights.actorder", weights.get("actorder"), None, False, True, "weight", "static", "group", "dynamic")
    if group.get("output_activations"):
        raise W4A8Error(f"{where}.output_activations: quantized outputs are not read")
    inputs = group.get("input_activations")
    if inputs:
        require("input_activations.num_bits", inputs.get("num_bits"), 8)
        require("input_activations.type", str(inputs.get("type")).lower(), "float")
        require("input_activations.dynamic", inputs.get("dynamic"), True)
        require("input_activations.strategy", str(inputs.get("strategy")).lower(), "token")
        require("input_activations.symmetric", inputs.get("symmetric", True), True)
    return QuantizationGroup(
        tuple(group.get("targets") or ()),
        "w4a8" if inputs else "w4a16",
        group_size if strategy == "group" else None,
    )


def quantized_modules(reader: CheckpointReader) -> dict[str, QuantizedModule]:
    """The quantized linear modules of a checkpoint, by name; empty if it is not quantized.

    Found by their tensors and checked against the config; reads only the small `weight_shape` and `weight_g_idx`.

    Raises:
        W4A8Error: a module's tensors are incomplete or disagree, or config and tensors contradict each other.
    """
    tensors = reader.tensors
    config = parse(reader.config, str(reader.path / CONFIG))
    names = sorted(name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED))
    if config is None:
        if names:
            raise W4A8Error(f"{reader.path / CONFIG}: has no quantization_config, but {names[0]}{PACKED} is quantized")
        return {}
    modules = {}
    for name in names:
        group = config.group_of(name)
        if group is None:
            raise W4A8Error(f"{name}{PACKED}: is quantized, but quantization_config does not target or ignores {name}")
        modules[name] = _module(reader, name, group)
    for name in tensors:
        module = name.removesuffix(".weight")
        if module != name and is_linear(module) and config.group_of(module) is not None:
            found = "both .weight and .weight_packed are there" if module in modules else "its weight is not"
            raise W4A8Error(f"{name}: quantization_config says that {module} is quantized, but {found}")
        if module != name and is_linear(module) and f"{module}{SCALE}" in tensors:
            raise W4A8Error(f"{module}{SCALE}: a scale beside an unpacked weight; only {FORMAT} weights are read")
        for part in (SCALE, SHAPE):
            module = name.removesuffix(part)
            if module != name and is_linear(module) and module not in modules:
                raise W4A8Error(f"{name}: {module}{PACKED} is missing")
    return modules


def _module(reader: CheckpointReader, name: str, group: QuantizationGroup) -> QuantizedModule:
    tensors = reader.tensors
    packed, scale = tensors[name + PACKED], tensors.get(name + SCALE)
    if f"{name}.weight_zero_point" in tensors:
        raise W4A8Error(f"{name}.weight_zero_point: zero points (asymmetric weights) are not read")
    if scale is None:
        raise W4A8Error(f"{name}{SCALE}: is missing")
    if packed.dtype != np.int32 or len(packed.shape) != 2:
        raise W4A8Error(f"{name}{PACKED}: must be int32 [N, K/8], found {packed}")
    n, k = packed.shape[0], packed.shape[1] * 8
    group_size = group.group_size or k
    if k % group_size:
        raise W4A8Error(f"{name}{PACKED}: K = {k} is not a multiple of the group size {group_size}")
    if scale.shape not in ((n, k // group_size), (n,) if group_size == k else None):
        raise W4A8Error(f"{name}{SCALE}: must be {[n, k // group_size]} (group size {group_size}), found {scale}")
    if scale.dtype not in (ml_dtypes.bfloat16, np.float16, np.float32):
        raise W4A8Error(f"{name}{SCALE}: must be bfloat16, float16 or float32, found {scale.dtype.name}")
    if name + SHAPE in tensors:
        shape = reader.read(name + SHAPE).tolist()
        if shape != [n, k]:
            raise W4A8Error(f"{name}{SHAPE}: says {shape}, but weight_packed holds {[n, k]}")
    if f"{name}.weight_g_idx" in tensors:
        g_idx = reader.read(f"{name}.weight_g_idx")
        if not (np.all(g_idx == -1) or np.array_equal(g_idx, np.arange(k) // group_size)):
            raise W4A8Error(f"{name}.weight_g_idx: reordered columns (actorder) are not read")
    return QuantizedModule(name, (n, k), group_size, group.scheme)


def packed_specs(module: str, n: int, k: int) -> list[TensorSpec]:
    """The tensors on disk of one quantized linear module [N, K], group size 128."""
    return [
        TensorSpec(module + PACKED, np.dtype(np.int32), (n, k // 8)),
        TensorSpec(module + SCALE, np.dtype(ml_dtypes.bfloat16), (n, k // EXPORT_GROUP_SIZE)),
        TensorSpec(module + SHAPE, np.dtype(np.int64), (2,)),
    ]


def fused_siblings(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The sets of modules that vLLM concatenates into one matrix: (q, k, v) and (gate, up), as far as present."""
    present = set(modules)
    result = []
    for module in sorted(present):
        parent, _, leaf = module.rpartition(".")
        for leaves in _FUSED:
            if leaf == leaves[0]:
                result.append(tuple(m for m in (f"{parent}.{x}" for x in leaves) if m in present))
    return result

"""Would vLLM serve this checkpoint as W4A8, and correctly? Judged from headers and config.json alone.

vLLM refuses some shapes, corrupts memory on others, and does not notice a missing tensor: it runs on what was in
memory. Each rule below is one of vLLM 0.26's; a `Problem` names the layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pallas_kernels.errors import W4A8Error

from .compressed_tensors import (
    EXPORT_GROUP_SIZE,
    PACKED,
    SCALE,
    SHAPE,
    QuantizationConfig,
    fused_siblings,
    is_linear,
    packed_specs,
    parse,
)
from .contents import OUTPUT_HEAD
from .safetensors_format import TensorSpec, natural_key

# The CUTLASS kernels' tiles. Dense K % 128 is accepted by vLLM, but its weight reorder then goes out of bounds.
DENSE_N, DENSE_K, MOE_MULTIPLE = 128, 256, 256
_LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)$")
_ROUTER = re.compile(r".*(\.mlp|\.block_sparse_moe)\.gate$")
_ROW_PARALLEL = ("o_proj", "down_proj", "w2")


@dataclass(frozen=True)
class Problem:
    """What vLLM would refuse or get wrong, and where: a module, a tensor, or a field of config.json."""

    layer: str
    what: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.what}"


def problems(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], *, tensor_parallel: int = 1
) -> list[Problem]:
    """Lists what keeps vLLM from serving a checkpoint.

    Args:
        config: its config.json.
        tensors: all its tensors by name, on disk or planned.
        tensor_parallel: number of GPUs over which each matrix is split; the shapes per GPU count.

    Raises:
        W4A8Error: `tensor_parallel` is not positive.
    """
    if tensor_parallel < 1:
        raise W4A8Error(f"tensor_parallel: must be at least 1, found {tensor_parallel}")
    try:
        quantization = parse(config)
    except W4A8Error as e:
        return [Problem("quantization_config", str(e))]
    if quantization is None:
        return [Problem("config.json", "has no quantization_config: not a quantized checkpoint")]
    packed = {
        name.removesuffix(PACKED): (spec.shape[0], spec.shape[1] * 8)
        for name, spec in tensors.items()
        if name.endswith(PACKED) and len(spec.shape) == 2
    }
    found = [
        *_config_problems(config, quantization),
        *_module_problems(quantization, tensors, packed),
        *_completeness_problems(config, tensors),
    ]
    if any(group.scheme == "w4a8" for group in quantization.groups):
        found += _dense_problems(config, packed, tensor_parallel)
        found += _expert_problems(packed, tensor_parallel)
    return sorted(set(found), key=lambda p: (natural_key(p.layer), p.what))


def _config_problems(config: Mapping[str, Any], quantization: QuantizationConfig) -> Iterable[Problem]:
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype != "bfloat16":
        yield Problem("config.json", f"dtype must be bfloat16, the kernels' only output type; found {dtype}")
    for group in quantization.groups:
        if group.group_size != EXPORT_GROUP_SIZE:
            size = group.group_size or "the whole channel"
            yield Problem("config.json", f"quantization group size must be {EXPORT_GROUP_SIZE}, found {size}")
    if not (config.get("quantization_config") or {}).get("quant_method"):
        yield Problem("config.json", 'quantization_config must name its "quant_method"')


def _module_problems(
    quantization: QuantizationConfig, tensors: Mapping[str, TensorSpec], packed: Mapping[str, tuple[int, int]]
) -> Iterable[Problem]:
    """Each module against the config and against the tensors it must have; matrices that vLLM fuses."""
    for module, (n, k) in packed.items():
        if _ROUTER.match(module):
            yield Problem(module, "is a router, which vLLM never quantizes; ignore it")
        if quantization.group_of(module) is None:
            yield Problem(module, "is quantized, but quantization_config ignores it")
        if k % EXPORT_GROUP_SIZE:
            yield Problem(module, f"K = {k} is not a multiple of the group size {EXPORT_GROUP_SIZE}")
            continue
        for spec in packed_specs(module, n, k):
            given = tensors.get(spec.name)
            if given is None:
                yield Problem(module, f"{spec.name.removeprefix(module + '.')} is missing")
            elif (given.dtype, given.shape) != (spec.dtype, spec.shape):
                yield Problem(module, f"{spec.name.removeprefix(module + '.')} must be {spec}, found {given}")
        for extra in ("weight", "weight_zero_point", "weight_g_idx"):
            if f"{module}.{extra}" in tensors:
                yield Problem(module, f"has {extra} beside weight_packed")
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module not in packed and quantization.group_of(module) is not None:
            if is_linear(module):
                yield Problem(module, "is not quantized, and quantization_config does not ignore it")
            elif _ROUTER.match(module):
                yield Problem(module, "is a router, which quantization_config must ignore")
        if f".{kind}" in (SCALE, SHAPE) and module not in packed:
            yield Problem(module, f"has {kind} but no weight_packed")
    linear = {n.rpartition(".")[0] for n in tensors if n.endswith((PACKED, ".weight"))}
    for siblings in fused_siblings(m for m in linear if is_linear(m)):
        plain = [m for m in siblings if m not in packed]
        if plain and len(plain) < len(siblings):
            fused = ", ".join(m.rpartition(".")[2] for m in siblings)
            yield Problem(plain[0], f"vLLM fuses {fused}: all of them must be quantized, or none; this one is not")


def _dense_problems(config: Mapping[str, Any], packed: Mapping[str, tuple[int, int]], ranks: int) -> Iterable[Problem]:
    dense = {m: shape for m, shape in packed.items() if not _EXPERT.match(m)}
    fused = {m: siblings for siblings in fused_siblings(dense) for m in siblings}
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    at = f" on each of {ranks} GPUs" if ranks > 1 else ""
    if heads and heads % ranks:
        yield Problem("config.json", f"num_attention_heads = {heads} does not divide over {ranks} GPUs")
    for module, (n, k) in dense.items():
        leaf = module.rpartition(".")[2]
        siblings = fused.get(module, (module,))
        if leaf in _ROW_PARALLEL:
            if k % (ranks * DENSE_K):
                yield Problem(module, f"K = {_per_rank(k, ranks)}{at} is not a multiple of {DENSE_K}")
            if n % DENSE_N:
                yield Problem(module, f"N = {n} is not a multiple of {DENSE_N}")
            continue
        if k % DENSE_K:
            yield Problem(module, f"K = {k} is not a multiple of {DENSE_K}")
        if module != siblings[0]:
            continue
        rows, uneven = 0, []
        for sibling in siblings:
            share = ranks
            if sibling.endswith((".k_proj", ".v_proj")) and kv_heads and kv_heads < ranks:
                share = kv_heads if ranks % kv_heads == 0 else ranks  # vLLM replicates heads
            uneven += [sibling] if dense[sibling][0] % share else []
            rows += dense[sibling][0] // share
        name = "+".join(s.rpartition(".")[2] for s in siblings)
        if uneven:
            yield Problem(uneven[0], f"N = {dense[uneven[0]][0]} does not divide over {ranks} GPUs")
        elif rows % DENSE_N:
            yield Problem(module, f"N = {rows} ({name}){at} is not a multiple of {DENSE_N}")


def _expert_problems(packed: Mapping[str, tuple[int, int]], ranks: int) -> Iterable[Problem]:
    """vLLM's MoE kernel takes hidden and intermediate sizes in multiples of 256, and all experts of a layer alike."""
    shapes: dict[tuple[str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    at = f" on each of {ranks} GPUs" if ranks > 1 else ""
    for module, shape in packed.items():
        if match := _EXPERT.match(module):
            shapes[match[1], match[3]][module] = shape
    for (_, leaf), modules in shapes.items():
        first = next(iter(modules.values()))
        for module, (n, k) in modules.items():
            hidden, intermediate = (n, k) if leaf in _ROW_PARALLEL else (k, n)
            if hidden % MOE_MULTIPLE:
                yield Problem(module, f"hidden size {hidden} is not a multiple of {MOE_MULTIPLE}")
            if intermediate % (ranks * MOE_MULTIPLE):
                size = _per_rank(intermediate, ranks)
                yield Problem(module, f"expert intermediate size {size}{at} is not a multiple of {MOE_MULTIPLE}")
            if (n, k) != first:
                yield Problem(module, f"is {[n, k]}, other experts of its layer are {list(first)}")


def _completeness_problems(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Iterable[Problem]:
    """Tensors that must be there: those that other layers, or other experts of the layer, have."""
    layers: dict[int, dict[str, str]] = defaultdict(dict)
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        match = _LAYER.match(name)
        if match is None:
            continue
        expert = re.match(r"(.*\.experts)\.(\d+)\.(.*)$", name)
        if expert:
            experts[expert[1]][int(expert[2])].add(_unquantized(expert[3]))
        suffix = re.sub(r"\.experts\.\d+\.", ".experts.*.", match[3])
        layers[int(match[2])][_unquantized(suffix)] = name
    count = config.get("num_hidden_layers")
    if isinstance(count, int):
        for i in sorted(set(range(count)) - layers.keys()):
            yield Problem(f"layers.{i}", f"is missing, though num_hidden_layers is {count}")
        for i in sorted(layers.keys() - set(range(count))):
            yield Problem(f"layers.{i}", f"is there, though num_hidden_layers is {count}")
    prefix = next((m[1] or "" for m in map(_LAYER.match, tensors) if m), "model.")
    for sparse in (False, True):  # layers with experts differ from those without
        alike = {i: s for i, s in layers.items() if any(".experts.*." in x for x in s) == sparse}
        every = set().union(*alike.values()) if alike else set()
        for i, suffixes in alike.items():
            for suffix in sorted(every - suffixes.keys()):
                yield Problem(f"{prefix}layers.{i}.{suffix}", "is missing, though other layers have it")
    wanted = config.get("num_experts") or config.get("num_local_experts")
    for name, by_expert in experts.items():
        every_expert = set(range(wanted)) if isinstance(wanted, int) else set(by_expert)
        every = set().union(*by_expert.values())
        for e in sorted(every_expert | by_expert.keys()):
            for suffix in sorted(every - by_expert.get(e, set())):
                yield Problem(f"{name}.{e}.{suffix}", "is missing, though other experts have it")
        for e in sorted(by_expert.keys() - every_expert):
            yield Problem(f"{name}.{e}", f"is there, though config.json says {wanted} experts")
    for needed in ("embed_tokens.weight", "norm.weight"):
        if f"{prefix}{needed}" not in tensors:
            yield Problem(f"{prefix}{needed}", "is missing")
    tied = config.get("tie_word_embeddings", str(config.get("model_type")).startswith("cohere"))
    if not tied and OUTPUT_HEAD not in tensors:
        yield Problem(OUTPUT_HEAD, "is missing, though tie_word_embeddings is false")


def _unquantized(name: str) -> str:
    """One name for a weight, quantized or not: some layers may be ignored."""
    for suffix in (PACKED, SCALE, SHAPE):
        name = name.removesuffix(suffix) + ".weight" if name.endswith(suffix) else name
    return name


def _per_rank(size: int, ranks: int) -> str:
    return str(size // ranks) if size % ranks == 0 else f"{size}/{ranks}"

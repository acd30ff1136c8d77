"""Checks of a checkpoint by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pallas_kernels.errors import W4A8Error

from ..checkpoints.compressed_tensors import (
    EXPORT_GROUP_SIZE,
    PACKED,
    SHAPE,
    QuantizedModule,
    is_linear,
    packed_specs,
    parse,
)
from ..checkpoints.contents import BUFFERS, OUTPUT_HEAD, expected_shapes
from ..checkpoints.reader import CheckpointReader, read_json
from ..checkpoints.servable import problems as serving_problems
from ..inspection_tables import size
from ..weight_statistics import code_statistics, value_statistics
from .report import Check

Progress = Callable[[int, int], None]

GENERATION_CONFIG = "generation_config.json"
# Of a quantized key-value cache, which this project leaves out.
_CACHE_SCALE = re.compile(r"self_attn\.[qkv]_scale$|self_attn\.(q|k|v|prob)_output_scale$")
_MANY_WEAK = 0.01


def check_config(reader: CheckpointReader) -> Check:
    """Is config.json one of a model, and of a quantization, that we know?"""
    try:
        expected_shapes(reader.config)
        quantization = parse(reader.config)
    except W4A8Error as e:
        return Check("config.json", "failed", str(e))
    model = f"{reader.config['model_type']}, {reader.config.get('num_hidden_layers')} layers"
    if quantization is None:
        return Check("config.json", "ok", f"{model}, not quantized")
    found = f"{model}, " + " and ".join(sorted({group.scheme for group in quantization.groups}))
    if quantization.warnings:
        return Check("config.json", "note", found, quantization.warnings)
    return Check("config.json", "ok", found)


def check_tensors(reader: CheckpointReader) -> Check:
    """Is every tensor there that config.json asks for, of the right shape and dtype, and no other?"""
    problems = []
    try:
        expected = expected_shapes(reader.config)
        quantization = parse(reader.config)
    except W4A8Error:
        return Check("tensors", "failed", "cannot be told: config.json is not understood")
    known = set()
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        quantized = quantization is not None and is_linear(module) and quantization.group_of(module) is not None
        if module == name or not quantized or f"{module}{PACKED}" not in reader.tensors:
            known.add(name)
            info = reader.tensors.get(name)
            if info is None and quantized and module != name:
                problems.append(f"{module}{PACKED}: is missing")
            elif info is None:
                problems.append(f"{name}: is missing")
            elif info.shape != shape:
                problems.append(f"{name}: must be {list(shape)}, found {list(info.shape)}")
            elif quantized and module != name:
                problems.append(f"{name}: is not quantized, but quantization_config does not ignore it")
            continue
        n, k = shape
        for spec in packed_specs(module, n, k) if k % EXPORT_GROUP_SIZE == 0 else ():
            known.add(spec.name)
            info = reader.tensors.get(spec.name)
            if info is None:
                problems.append(f"{spec.name}: is missing")
            elif (info.shape, info.dtype) != (spec.shape, spec.dtype):
                problems.append(f"{spec.name}: must be {spec}, found {info}")
    tied = OUTPUT_HEAD if OUTPUT_HEAD not in expected else None
    for name in reader.tensors:
        if name not in known and name != tied and not name.endswith(BUFFERS) and not _CACHE_SCALE.search(name):
            problems.append(f"{name}: is there, but the model has no place for it")
    if problems:
        return Check("tensors", "failed", f"{len(problems)} missing, unexpected or of the wrong kind", tuple(problems))
    files = len({info.file for info in reader.tensors.values()})
    where = f"{files} file{'s' if files > 1 else ''}"
    total = size(sum(info.nbytes for info in reader.tensors.values()))
    return Check("tensors", "ok", f"all {len(reader.tensors)} are there, {total} in {where}, and no other")


def check_values(
    reader: CheckpointReader, modules: dict[str, QuantizedModule], progress: Progress | None = None
) -> list[Check]:
    """Reads every tensor: are scales finite and not negative, floats finite, and how precise are lut numerics?"""
    problems: list[str] = []
    groups = weak = lost = codes = lowest = 0
    worst = ("", 0.0)
    total, done = sum(info.nbytes for info in reader.tensors.values()), 0
    for name, info in reader.tensors.items():
        try:
            module = name.removesuffix(PACKED)
            if module in modules and module != name:
                found = code_statistics(reader, modules[module])
                codes += int(found.histogram.sum())
                lowest += int(found.histogram[0])
                groups, weak, lost = groups + found.groups, weak + found.weak_groups, lost + found.lost_groups
                if found.bad_scales:
                    problems.append(f"{module}.weight_scale: {found.bad_scales} scales are negative, NaN or infinite")
                if found.weak_groups / found.groups > worst[1]:
                    worst = (module, found.weak_groups / found.groups)
            elif info.dtype.name.startswith(("float", "bfloat")) and not name.endswith(".weight_scale"):
                values = value_statistics(reader, name)
                if values.not_finite:
                    problems.append(f"{name}: {values.not_finite} values are NaN or infinite")
            elif name.endswith(SHAPE):
                reader.read(name)
        except W4A8Error as e:
            problems.append(str(e))
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    if problems:
        checks = [Check("values", "failed", "some cannot be used", tuple(problems))]
    elif modules:
        share = f"code -8 in {lowest / codes:.2%}" if lowest else "codes -7..7"
        checks = [Check("values", "ok", f"{codes:,} codes and {groups:,} scales are sound; {share}")]
    else:
        checks = [Check("values", "ok", "all are finite")]
    if modules:
        detail = f"{weak:,} of {groups:,} groups are below 1/3584 of their row's greatest scale"
        if weak:
            detail += f" (most in {worst[0]}: {worst[1]:.2%}); lut numerics round them coarsely, {lost:,} to zero"
        status = "note" if weak > _MANY_WEAK * groups or lost else "ok"
        checks.append(Check("scale precision", status, detail, serving=False))  # type: ignore[arg-type]
    return checks


def check_serving(reader: CheckpointReader, scheme: str, tensor_parallel: int) -> Check:
    """vLLM's own rules."""
    on = f" on {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
    if scheme == "bf16":
        return Check("vLLM's rules", "skipped", "the checkpoint is not quantized")
    found = serving_problems(reader.config, reader.tensors, tensor_parallel=tensor_parallel)
    if found:
        return Check("vLLM's rules", "failed", f"{len(found)} broken{on}", tuple(map(str, found)))
    return Check("vLLM's rules", "ok", f"shapes, group size, fused layers and config.json fit{on}")


def check_tokenizer(reader: CheckpointReader) -> Check:
    """Can text be encoded, in tokens that the model has?"""
    from ..tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_directory(reader.path)
    except W4A8Error as e:
        return Check("tokenizer", "failed", str(e))
    size, limit = tokenizer.vocab_size, reader.config.get("vocab_size")
    if isinstance(limit, int) and size > limit:
        return Check("tokenizer", "failed", f"has {size} tokens, but config.json says vocab_size {limit}")
    template = "with" if tokenizer.chat_template else "without"
    return Check("tokenizer", "ok", f"{size} tokens, {template} a chat template")


def check_generation_config(reader: CheckpointReader) -> Check:
    """Are the stop tokens known, and tokens of the model?"""
    name, path = "generation config", reader.path / GENERATION_CONFIG
    if not path.is_file():
        if reader.config.get("eos_token_id") is None:
            return Check(name, "note", f"no {GENERATION_CONFIG}, and config.json has no eos_token_id: nothing stops it")
        return Check(name, "note", f"no {GENERATION_CONFIG}; the defaults and config.json's eos_token_id apply")
    try:
        config = read_json(path)
    except W4A8Error as e:
        return Check(name, "failed", str(e))
    limit = reader.config.get("vocab_size", 0)
    wrong = [f"{key} {token}" for key, token in _special(config) if not isinstance(token, int) or token >= limit]
    if wrong:
        return Check(name, "failed", f"{path.name}: {', '.join(wrong)} is no token of a vocabulary of {limit}")
    return Check(name, "ok", json.dumps({key: value for key, value in config.items() if key != "transformers_version"}))


def _special(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        values: Iterable[Any] = value if isinstance(value, list) else () if value is None else (value,)
        yield from ((key, token) for token in values)

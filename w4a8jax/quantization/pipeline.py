"""From a bf16 checkpoint to a W4A8 (or W4A16) one, tensor by tensor: never more than one weight in memory."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from pallas_kernels.errors import W4A8Error

from ..checkpoints.compressed_tensors import (
    DEFAULT_IGNORE,
    EXPORT_GROUP_SIZE,
    PACKED,
    SCALE,
    SHAPE,
    Scheme,
    build,
    find,
    is_ignored,
    is_linear,
    matches,
    packed_specs,
)
from ..checkpoints.contents import BUFFERS, check_contents
from ..checkpoints.folds import FOLDS, FoldedReader, folds_record
from ..checkpoints.plan import MAX_SHARD_BYTES
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.safetensors_format import TensorInfo, TensorSpec, natural_key
from ..checkpoints.servable import problems
from ..checkpoints.workspace import check_target
from ..checkpoints.writer import CheckpointWriter
from .progress import QuantizationProgress
from .summary import OUTPUT_ERRORS, LayerSummary, QuantizationSummary

if TYPE_CHECKING:
    from ..calibration.data import CalibrationData
    from .gptq_layers import GptqQuantizer
    from .rtn import QuantizedTensor

SUMMARY = "quantization_summary.json"
BF16 = np.dtype(ml_dtypes.bfloat16)
_COPY_BYTES = 64 * 2**20
_CHECK_SIZE = 2**22
_FLOATS = tuple(
    map(np.dtype, (BF16, np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
)
ROUTER = "router"
_ROUTER_DTYPES = tuple(map(np.dtype, (np.float16, np.float32)))


@dataclasses.dataclass(frozen=True)
class Item:
    """A source tensor and what becomes of it: quantized if `module` is set, else copied, for the `reason` given.

    `wide`: a copy in float16 becomes float32, since scales may take its values beyond float16's range.
    """

    info: TensorInfo
    module: str | None
    reason: str = ""
    wide: bool = False

    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors written for it."""
        if self.module is not None:
            n, k = self.info.shape
            return tuple(packed_specs(self.module, n, k))
        return (TensorSpec(self.info.name, self.copied_dtype, self.info.shape),)

    @property
    def copied_dtype(self) -> np.dtype:
        """Of a tensor that is copied: bf16 for floats, but a router, which is computed in fp32, as it was stored."""
        if self.wide and self.info.dtype == np.float16:
            return np.dtype(np.float32)
        kept = self.info.dtype not in _FLOATS or (self.reason == ROUTER and self.info.dtype in _ROUTER_DTYPES)
        return self.info.dtype if kept else BF16


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    scheme: Scheme = "w4a8",
    numerics: Literal["lut", "exact"] = "lut",
    code_min: int = -7,
    ignore: Sequence[str] = (),
    search: Literal["full", "fast", "none"] = "full",
    method: Literal["rtn", "gptq"] = "rtn",
    calibration: CalibrationData | str | Path | None = None,
    act_order: bool = False,
    damping: float = 0.01,
    unrouted_weight: float = 0.1,
    equalize: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    allow_unservable: bool = False,
    tensor_parallel: int = 1,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizationSummary:
    """Quantizes the linear layers of a checkpoint to INT4 in groups of 128, by rounding to nearest or by GPTQ.

    Embeddings, output head and norms stay as they are, in bf16, and routers in the dtype they have. The result is a
    compressed-tensors checkpoint that vLLM loads, with the tokenizer, generation config and chat template of the
    source. It appears under its name only when whole.

    Args:
        src: checkpoint directory, or a Hugging Face Hub name.
        dst: directory to make.
        scheme: "w4a8" (FP8 activations) or "w4a16" (bf16 activations).
        numerics: which kernel's arithmetic the scales are chosen for: vLLM's "lut" or "exact"; W4A16 is always exact.
        code_min: lowest code, -7 (faster kernel) or -8.
        ignore: further modules to leave in bf16: exact names, or "re:" and a regular expression for the name's start.
        search: effort for the scales.
        method: "rtn" rounds to nearest; "gptq" makes each layer's output on calibration data right, in the kernel's
            arithmetic (see gptq.py).
        calibration: data for "gptq" and `equalize`, of `load_calibration`, or a JSONL file to read with its defaults.
        act_order: GPTQ rounds the columns with the largest inputs first.
        damping: of GPTQ's Hessians, relative to their mean.
        unrouted_weight: what a token counts for experts that it is not sent to, so that each expert is calibrated,
            however rarely it is picked; 1 for those that it is sent to. 1: all tokens alike.
        equalize: before it is quantized, scale channels between layers, which leaves what the model computes as it is,
            so that those that matter more on calibration data get finer steps, and let "rtn" weigh columns by their
            inputs (see equalization.py).
        overwrite: replace an existing checkpoint `dst`, once the new one is whole.
        resume: go on from where an interrupted run of the same job stopped.
        allow_unservable: write it even if vLLM could not serve it.
        tensor_parallel: the number of GPUs for which vLLM's shape rules are checked.
        progress: show a progress bar.
        max_shard_bytes: of the files written, and of what an interruption can cost.

    Raises:
        W4A8Error: the source is damaged, unknown, already quantized or has NaN or Inf; a layer's K is not a multiple
            of 128; vLLM could not serve the result; `dst` exists; the disk is full; calibration data is missing,
            damaged or not for this model.
        KeyboardInterrupt: finished shards are kept for `resume`.
    """
    start = time.perf_counter()
    _check_options(scheme, numerics, code_min, search, unrouted_weight)
    numerics = "exact" if scheme == "w4a16" else numerics
    reader = CheckpointReader(src)
    target = Path(dst).expanduser()
    if reader.path.resolve().is_relative_to(target.resolve()):
        raise W4A8Error(f"{dst}: is or contains the source {src}; give another target")
    _refuse_quantized(reader)
    check_contents(reader.config, reader.tensors, str(reader.path))
    data = _calibration(reader, method, calibration, equalize)
    items, buffers = select(reader.tensors, ignore)
    if equalize:
        items = [dataclasses.replace(item, wide=item.reason == ROUTER) for item in items]
    config = quantized_config(reader.config, items, scheme, ignore)
    planned = {spec.name: spec for item in items for spec in item.specs()}
    if not allow_unservable and (found := problems(config, planned, tensor_parallel=tensor_parallel)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise W4A8Error(f"vLLM could not serve the result: {found[0]}{more}; --allow-unservable writes it anyway")

    skipped = {item.info.name: item.reason for item in items if item.module is None} | buffers
    seconds = dict.fromkeys(("read", "equalize", "quantize", "write", "check"), 0.0)
    if not equalize:
        del seconds["equalize"]
    summary: dict[str, Any] = {
        "source": str(src),
        "target": str(dst),
        "scheme": scheme,
        "numerics": numerics,
        "code_min": code_min,
        "search": search,
        "method": method,
        "skipped": skipped,
        "warnings": tuple(_warnings(reader, items)),
        "parameters": sum(item.info.size for item in items),
        "source_bytes": sum(item.info.nbytes for item in items),
        "target_bytes": sum(spec.nbytes for spec in planned.values()),
    }

    extra: dict[str, Any] = {SUMMARY: lambda: summarize().record()}

    def summarize(**more: Any) -> QuantizationSummary:
        layers = tuple(LayerSummary.from_note(note) for note in writer.notes)
        return QuantizationSummary(layers=layers, **summary, **more)

    job: dict[str, Any] = {
        "source": reader.identity(),
        "scheme": scheme,
        "numerics": numerics,
        "code_min": code_min,
        "search": search,
        "ignore": list(ignore),
        "max_shard_bytes": max_shard_bytes,
    }
    gptq: GptqQuantizer | None = None
    importance: Mapping[str, np.ndarray] = {}
    modules = [item.module for item in items if item.module is not None]
    if data is not None:
        summary["calibration"] = data.describe()
        job |= {"calibration": data.digest(), "unrouted_weight": unrouted_weight, "equalize": equalize}
    if data is not None and equalize:
        from .equalization import find_folds

        check_target(Path(os.path.abspath(target)), overwrite=overwrite)  # before what takes long
        with _timed(seconds, "equalize"):
            equalization = find_folds(
                reader, modules, data, scheme=scheme, numerics=numerics, code_min=code_min, search=search,
                unrouted_weight=unrouted_weight, check=_check_finite,
            )  # fmt: skip
        summary["equalization"] = equalization.describe()
        extra[FOLDS] = job["folds"] = folds_record(equalization.folds)
        reader = FoldedReader(reader, equalization.folds)
        importance = equalization.importance if method == "rtn" else {}
        del equalization
    if data is not None and method == "gptq":
        from .gptq_layers import GptqQuantizer

        job |= {"act_order": act_order, "damping": damping}
        gptq = GptqQuantizer(
            reader, modules, data, scheme=scheme, numerics=numerics, code_min=code_min, search=search,
            act_order=act_order, damping=damping, unrouted_weight=unrouted_weight, check=_check_finite,
        )  # fmt: skip
        summary["calibration_tokens"] = gptq.tokens
    with CheckpointWriter(
        target,
        [item.specs() for item in items],
        config=config,
        job=job,
        sidecars={str(name): reader.path / name for name in reader.sidecars()},
        extra=extra,
        overwrite=overwrite,
        resume=resume,
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        by_first = {item.specs()[0].name: item for item in items}
        todo = [by_first[unit[0].name] for unit in writer.remaining()]
        with QuantizationProgress(progress, items, todo, summary["target_bytes"]) as bar:
            for item in todo:
                if item.module is None:
                    _copy(reader, writer, item, seconds)
                elif gptq is not None:
                    _quantize_gptq(gptq, writer, item, seconds)
                else:
                    _quantize(
                        reader, writer, item, seconds, numerics=numerics, code_min=code_min, search=search,
                        importance=importance.get(item.module),
                    )  # fmt: skip
                bar.done(item)
            with _timed(seconds, "check"):
                writer.finish(bar.checked)
    seconds["total"] = time.perf_counter() - start
    return summarize(seconds=seconds, resumed_shards=writer.resumed)


def select(tensors: dict[str, TensorInfo], ignore: Sequence[str] = ()) -> tuple[list[Item], dict[str, str]]:
    """Decides for each tensor of an unquantized checkpoint whether it is quantized.

    Returns:
        What is written, in order, and the tensors that are dropped with the reason.

    Raises:
        W4A8Error: a layer to be quantized has K % 128 != 0; a pattern of `ignore` is no regular expression or matches
            no layer.
    """
    linear = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    for pattern in ignore:
        if not any(matches(module, pattern) for module in linear):
            raise W4A8Error(f"--ignore {pattern!r}: matches no module; give an exact name, or re: and an expression")
    items, dropped = [], {}
    for name in sorted(tensors, key=natural_key):
        info = tensors[name]
        if name.endswith(BUFFERS):
            dropped[name] = "dropped: recomputed from config.json"
            continue
        reason = _reason_to_copy(info, ignore)
        if reason:
            items.append(Item(info, None, reason))
            continue
        if info.shape[1] % EXPORT_GROUP_SIZE:
            raise W4A8Error(
                f"{name}: K must be a multiple of {EXPORT_GROUP_SIZE}, found shape {list(info.shape)}; "
                f"leave it in bf16 with --ignore {name.removesuffix('.weight')}"
            )
        items.append(Item(info, name.removesuffix(".weight")))
    return items, dropped


def _reason_to_copy(info: TensorInfo, ignore: Sequence[str]) -> str:
    """Why a tensor is not quantized; "" if it is."""
    module, _, kind = info.name.rpartition(".")
    if kind != "weight" or len(info.shape) != 2:
        return "not a matrix"
    for pattern in ignore:
        if matches(module, pattern):
            return f"ignored by {pattern}"
    if is_linear(module):
        if info.dtype not in _FLOATS:
            raise W4A8Error(f"{info.name}: has dtype {info.dtype.name}; only floating-point weights are quantized")
        return ""
    if module.endswith("embed_tokens"):
        return "embedding"
    if module.endswith("lm_head"):
        return "output head"
    return ROUTER if is_ignored(module, DEFAULT_IGNORE) else "not a linear layer of the decoder"


def quantized_config(
    config: dict[str, Any], items: Sequence[Item], scheme: Scheme, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json of the result: the source's, in bfloat16, with a quantization_config that ignores what is copied."""
    patterns = [*DEFAULT_IGNORE, *(p for p in ignore if p not in DEFAULT_IGNORE)]
    for item in items:
        module, _, kind = item.info.name.rpartition(".")
        if item.module is None and kind == "weight" and len(item.info.shape) == 2 and item.reason != "embedding":
            patterns += [] if is_ignored(module, patterns) else [module]
    result = {**config, "dtype": "bfloat16"}
    if "torch_dtype" in config:
        result["torch_dtype"] = "bfloat16"
    return {**result, "quantization_config": build(scheme, patterns)}


def _quantize(
    reader: CheckpointReader, writer: CheckpointWriter, item: Item, seconds: dict[str, float], **options: Any
) -> None:
    from .rtn import quantize_weight

    with _timed(seconds, "read"):
        weight = reader.read(item.info.name)
        _check_finite(item.info.name, weight)
    with _timed(seconds, "quantize"):
        result = quantize_weight(weight, name=item.info.name, **options)
    _write(writer, item, seconds, result)


def _quantize_gptq(gptq: GptqQuantizer, writer: CheckpointWriter, item: Item, seconds: dict[str, float]) -> None:
    with _timed(seconds, "quantize"):
        found = gptq.quantize(str(item.module))
    seconds["quantize"] -= gptq.seconds - seconds.get("calibrate", 0.0)
    seconds["calibrate"] = gptq.seconds
    errors = found.output_error, found.rtn_output_error
    more = {} if found.output_error != found.output_error else dict(zip(OUTPUT_ERRORS, errors, strict=True))
    _write(writer, item, seconds, found.tensor, fallback=found.fallback, **more)


def _write(
    writer: CheckpointWriter, item: Item, seconds: dict[str, float], result: QuantizedTensor, **more: Any
) -> None:
    packed, scale, shape = item.specs()
    bits = 8 * (packed.nbytes + scale.nbytes + shape.nbytes) / item.info.size
    histogram = tuple(int(count) for count in result.histogram)
    layer = LayerSummary(str(item.module), item.info.shape[:2], bits, float(result.relative_error), histogram, **more)  # type: ignore[arg-type]
    with _timed(seconds, "write"):
        writer.write(f"{item.module}{PACKED}", np.asarray(result.packed), note=layer.to_note())
        writer.write(f"{item.module}{SCALE}", np.asarray(result.scale))
        writer.write(f"{item.module}{SHAPE}", np.asarray(item.info.shape, np.int64))


def _copy(reader: CheckpointReader, writer: CheckpointWriter, item: Item, seconds: dict[str, float]) -> None:
    with _timed(seconds, "write"):
        writer.write(item.info.name, _cast_blocks(reader, item))


def _cast_blocks(reader: CheckpointReader, item: Item) -> Iterator[np.ndarray]:
    for block in reader.blocks(item.info.name, _COPY_BYTES):
        if item.info.dtype in _FLOATS:
            with np.errstate(over="ignore"):
                block = block.astype(item.copied_dtype, copy=False)
            _check_finite(item.info.name, block)
        yield block


def _check_finite(name: str, array: np.ndarray) -> None:
    """Raises W4A8Error if a float array has NaN or Inf, or, when it was cast to bf16, had values beyond its range.

    In numpy, since XLA's maximum on a CPU passes over NaN; in pieces, since the intermediate is as large as they are.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHECK_SIZE):
        piece = flat[start : start + _CHECK_SIZE]
        # In bf16, Inf and NaN are what has all exponent bits set; isfinite takes four times as long.
        bad = (piece.view(np.uint16) & 0x7F80) == 0x7F80 if array.dtype == BF16 else ~np.isfinite(piece)
        if np.any(bad):
            index = [int(i) for i in np.unravel_index(start + int(np.argmax(bad)), array.shape)]
            raise W4A8Error(
                f"{name}: has NaN or Inf (or a value beyond bf16's range) at {index}; expected finite weights"
            )


def _check_options(scheme: str, numerics: str, code_min: int, search: str, unrouted_weight: float) -> None:
    for name, value, allowed in (
        ("scheme", scheme, ("w4a8", "w4a16")),
        ("numerics", numerics, ("lut", "exact")),
        ("code_min", code_min, (-7, -8)),
        ("search", search, ("full", "fast", "none")),
    ):
        if value not in allowed:
            raise W4A8Error(f"{name}: must be {' or '.join(map(str, allowed))}, found {value!r}")
    if not 0 < unrouted_weight <= 1:
        raise W4A8Error(f"unrouted_weight: expected a number above 0, at most 1, found {unrouted_weight}")


def _calibration(
    reader: CheckpointReader, method: str, calibration: CalibrationData | str | Path | None, equalize: bool
) -> CalibrationData | None:
    if method not in ("rtn", "gptq"):
        raise W4A8Error(f"method: must be rtn or gptq, found {method!r}")
    if method == "rtn" and not equalize:
        if calibration is not None:
            raise W4A8Error("calibration: rounding to nearest uses none; choose method gptq, or equalize")
        return None
    if calibration is None:
        what = "gptq" if method == "gptq" else "equalize"
        raise W4A8Error(f"calibration: {what} needs data: a JSONL file of text, tokens or messages")
    if isinstance(calibration, str | Path):
        from ..calibration.load import load_calibration

        return load_calibration(reader, calibration)
    return calibration


def _refuse_quantized(reader: CheckpointReader) -> None:
    raw = find(reader.config)
    if raw is not None:
        method = raw.get("quant_method", "compressed-tensors")
        raise W4A8Error(f"{reader.path}: is quantized already ({method}); give the unquantized checkpoint")
    for name in reader.tensors:
        if name.endswith((PACKED, SCALE, ".weight_scale_inv", ".qweight")):
            raise W4A8Error(f"{reader.path}: {name} is quantized already; give the unquantized checkpoint")


def _warnings(reader: CheckpointReader, items: Sequence[Item]) -> Iterator[str]:
    if not reader.has_tokenizer():
        yield f"{reader.path} has no tokenizer.json; the result generates no text until it gets one"
    cast = sorted({i.info.dtype.name for i in items if i.module is None and i.info.dtype in _FLOATS} - {BF16.name})
    if cast:
        yield f"tensors that are not quantized were cast from {', '.join(cast)} to bfloat16"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] += time.perf_counter() - start

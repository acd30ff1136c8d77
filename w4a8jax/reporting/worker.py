"""One row of a report, in a process of its own: `python -m w4a8jax.reporting.worker JOB.json`.

The job and the result are files; progress goes to stdout, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import w4a8jax
from pallas_kernels.errors import W4A8Error

from ..checkpoints.compressed_tensors import PACKED, SCALE, SHAPE, find, quantized_modules
from ..checkpoints.reader import CheckpointReader
from ..residual_errors import residual_errors
from ..verification.parity import layer_error
from .recipes import RECIPES, Recipe, check_known

RESULT, START = "result.json", "start.json"
_RESIDUAL_TOKENS = 4096


def peak_bytes() -> int:
    """The greatest resident memory of this process so far.

    Not `ru_maxrss` where there is another way: Linux counts in it what the process that started this one had.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Makes the checkpoint, if it is not there, and measures it.

    Args:
        job: model, folder (to work in), name (of the recipe; None of a checkpoint), checkpoint (or None), numerics
            (it runs in, or None), texts (files by name), max_tokens, context, kernels, calibration (JSONL or None), and
            of a distillation start, distill_data, distillation.

    Raises:
        W4A8Error: as `quantize`, `distill` and `compare`.
    """
    recipe = RECIPES[job["name"]] if job["checkpoint"] is None else Recipe(job["name"], job["name"])
    began = time.perf_counter()
    path, made = Path(job["checkpoint"] or job["model"]), dict[str, Any]()
    if recipe.distilled:
        path, made = _distilled(job)
    elif recipe.options is not None:
        path, made = _quantized(job, recipe, Path(job["folder"]) / "model")
    result: dict[str, Any] = dict.fromkeys(("make_seconds", "make_peak_bytes", "weight_error", "bits_per_weight"))
    result |= {"layer_errors": {}, "residual_errors": [], "fallbacks": [], "expert_load": None}
    if made:
        result |= {"make_seconds": time.perf_counter() - began, "make_peak_bytes": peak_bytes()}
    began = time.perf_counter()
    result |= _evaluated(job, recipe, path) | made
    result |= {"evaluate_seconds": time.perf_counter() - began, "evaluate_peak_bytes": peak_bytes()}
    device = jax.local_devices()[0]
    result |= {"device": device.device_kind, "cores": _cores()}
    return result | {"device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")}


def _quantized(job: dict[str, Any], recipe: Recipe, target: Path) -> tuple[Path, dict[str, Any]]:
    options = dict(recipe.options or {})
    check_known(options)
    if recipe.calibrated:
        # Ids with their loss_mask: what the parent process read.
        options["calibration"] = w4a8jax.load_calibration(job["model"], job["calibration"])
    summary = w4a8jax.quantize(job["model"], target, progress=False, resume=True, overwrite=True, **options)
    made: dict[str, Any] = {"fallbacks": [layer.name for layer in summary.layers if layer.fallback]}
    if recipe.equalized:
        # Rescaled weights are near the rescaled original's, which only `quantize` had.
        made |= {"layer_errors": {layer.name: layer.relative_error for layer in summary.layers}}
        made["weight_error"] = summary.relative_error
    return target, made


def _distilled(job: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Goes on from an interrupted training, if the folder has one."""
    folder, recipe = Path(job["folder"]), RECIPES[job["start"]]
    start, note, began = folder / "start", folder / START, time.perf_counter()
    if not note.exists():
        _quantized(job, recipe, start)
        note.write_text(json.dumps({"seconds": time.perf_counter() - began}))
    options = w4a8jax.DistillationOptions(**job["distillation"] | {"train": tuple(job["distillation"]["train"])})
    data = w4a8jax.load_calibration(job["model"], job["distill_data"])
    record = w4a8jax.distill(
        job["model"], start, data, folder / "model", options=options, resume=True, overwrite=True,
        progress=lambda what, done, total: _say("making", done, total) if what == "training" else None,
    )  # fmt: skip
    # What interrupted runs took is in both.
    return folder / "model", {"make_seconds": json.loads(note.read_text())["seconds"] + record.seconds}


def _evaluated(job: dict[str, Any], recipe: Recipe, path: Path) -> dict[str, Any]:
    texts = {name: Path(file).read_text(encoding="utf-8") for name, file in job["texts"].items()}
    limits = {"context": job["context"], "max_tokens": job["max_tokens"]}
    original = w4a8jax.load(job["model"], kernels=job["kernels"])
    reader = CheckpointReader(path)
    result: dict[str, Any] = {"nbytes": sum(info.nbytes for info in reader.tensors.values()), "texts": {}}
    if recipe.name == "bf16" and job["checkpoint"] is None:
        for name, text in texts.items():
            found = json.loads(w4a8jax.evaluate(original, text, **limits, progress=_step(name)).to_json())
            result["texts"][name] = {"model": found, "original": found, "kl_mean": None, "top1_agreement": None}
        if original.config.moe is not None:
            from ..expert_load import expert_load

            result["expert_load"] = [x.record() for x in expert_load(original, next(iter(texts.values())), **limits)]
        return result
    model = w4a8jax.load(path, numerics=recipe.numerics, kernels=job["kernels"])
    for name, text in texts.items():
        compared = w4a8jax.compare(model, original, text, **limits, progress=_step(name))
        result["texts"][name] = json.loads(compared.to_json())
    first = min(limits["max_tokens"] or _RESIDUAL_TOKENS, _RESIDUAL_TOKENS)
    result["residual_errors"] = list(
        residual_errors(model, original, next(iter(texts.values())), context=job["context"], max_tokens=first)
    )
    return result | _weights(reader, CheckpointReader(job["model"]), model.scheme, recipe)


def _weights(reader: CheckpointReader, source: CheckpointReader, scheme: str, recipe: Recipe) -> dict[str, Any]:
    """Error of each quantized layer as the kernel has it, their root mean square, and their size."""
    if find(reader.config) is None:
        return {}
    modules = quantized_modules(reader)
    numerics = recipe.numerics or ("lut" if scheme == "w4a8" else "exact")
    sizes = {name: module.shape[0] * module.shape[1] for name, module in modules.items()}
    stored = sum(reader.info(name + part).nbytes for name in modules for part in (PACKED, SCALE, SHAPE))
    result: dict[str, Any] = {"bits_per_weight": 8 * stored / sum(sizes.values())}
    if not recipe.equalized:
        errors = {name: layer_error(reader, source, module, numerics) for name, module in modules.items()}
        mean = sum(errors[name] ** 2 * n for name, n in sizes.items()) / sum(sizes.values())
        result |= {"layer_errors": errors, "weight_error": float(np.sqrt(mean))}
    return result


def _step(text: str) -> Callable[[int, int], None]:
    return lambda done, total: _say(text, done, total)


def _say(step: str, done: int, total: int) -> None:
    print(json.dumps([step, done, total]), flush=True)


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """What `run` gives, or `failed` with what is wrong."""
    try:
        return run(job)
    except W4A8Error as e:
        return {"failed": " ".join(str(e).split())}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (Path(job["folder"]) / RESULT).write_text(json.dumps(outcome(job)), encoding="utf-8")


if __name__ == "__main__":
    main()

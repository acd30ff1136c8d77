"""A quantized checkpoint against its original: weights layer by layer, and predictions on a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import W4A8Error, W4Weight
from pallas_kernels.weight_format import Numerics

from ..checkpoints.compressed_tensors import PACKED, SCALE, QuantizedModule
from ..checkpoints.reader import CheckpointReader
from ..evaluation import Comparison, compare
from .report import Check

Progress = Callable[[int, int], None]

# Rounding to INT4 in groups of 128 gives about 0.1 on weights that are normally distributed; a wrong weight, 1.
MAX_LAYER_ERROR = 0.25
_BLOCK_WEIGHTS = 2**22


def check_weights(
    reader: CheckpointReader,
    original: CheckpointReader,
    modules: dict[str, QuantizedModule],
    numerics: Numerics,
    progress: Progress | None = None,
) -> tuple[list[Check], dict[str, float]]:
    """Compares each quantized layer, as the kernel sees it, and each other tensor with the original.

    Returns:
        Two checks, and the relative error of each quantized layer, ||w_kernel - w|| / ||w||.

    Raises:
        W4A8Error: a file is damaged.
    """
    errors: dict[str, float] = {}
    wrong: list[str] = []
    changed: list[str] = []
    same = 0
    plain = {name: info for name, info in reader.tensors.items() if name in original.tensors}
    total = sum(n * k for n, k in (m.shape for m in modules.values())) + sum(info.size for info in plain.values())
    done = 0
    for name, module in modules.items():
        info = original.tensors.get(f"{name}.weight")
        if info is None or info.shape != module.shape:
            found = "nothing" if info is None else f"{list(info.shape)}"
            wrong.append(f"{name}.weight: expected {list(module.shape)} in the original, found {found}")
        else:
            errors[name] = layer_error(reader, original, module, numerics)
            if not errors[name] <= MAX_LAYER_ERROR:
                wrong.append(f"{name}: relative error {errors[name]:.3f}, expected at most {MAX_LAYER_ERROR}")
        done += module.shape[0] * module.shape[1]
        if progress is not None:
            progress(done, total)
    for name, info in plain.items():
        if info.shape != original.tensors[name].shape:
            changed.append(f"{name}: is {list(info.shape)}, in the original {list(original.tensors[name].shape)}")
        elif _differs(reader, original, name):
            changed.append(f"{name}: differs from the original cast to {info.dtype.name}")
        else:
            same += 1
        done += info.size
        if progress is not None:
            progress(done, total)
    return [_weights_check(errors, wrong), _copies_check(changed, same)], errors


def layer_error(
    reader: CheckpointReader, original: CheckpointReader, module: QuantizedModule, numerics: Numerics
) -> float:
    """||w_kernel - w|| / ||w|| of one layer [N, K], Frobenius, read in blocks of rows; 0 if both are zero."""
    n, k = module.shape
    rows = max(1, min(n, _BLOCK_WEIGHTS // k))
    scale = reader.read(module.name + SCALE).reshape(n, -1)
    error = total = 0.0
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        packed = reader.read_rows(module.name + PACKED, start, stop)
        weight = original.read_rows(f"{module.name}.weight", start, stop).astype(np.float32)
        values = _squares(packed, scale[start:stop], weight, numerics=numerics)
        block_error, block_total = (np.asarray(v, np.float64).sum() for v in values)
        error, total = error + float(block_error), total + float(block_total)
    return float(np.sqrt(error / total)) if total else float(error > 0)


def check_text(
    path: Path,
    against: Path,
    text: str,
    source: str,
    *,
    numerics: Numerics,
    context: int | None,
    max_tokens: int | None,
    max_perplexity_increase: float,
    progress: Progress | None = None,
) -> tuple[Check, Comparison | None]:
    """Runs both checkpoints on a text.

    Args:
        source: what the text is, for the report.
        max_perplexity_increase: the check fails above it; relative, 0.1 for 10 %.
    """
    from ..checkpoints.load import load

    name = "predictions"
    try:
        result = compare(
            load(path, numerics=numerics),
            load(against),
            text,
            context=context,
            max_tokens=max_tokens,
            progress=progress,
        )
    except W4A8Error as e:
        return Check(name, "failed", str(e), serving=False), None
    detail = (
        f"perplexity {result.model.perplexity:.4g}, original {result.original.perplexity:.4g} "
        f"({result.perplexity_increase:+.2%}); top-1 agreement {result.top1_agreement:.2%}; "
        f"KL {result.kl_mean:.4f} nats (largest {result.kl_max:.3g}); "
        f"{numerics} numerics, {result.model.tokens} tokens of {source}"
    )
    if result.perplexity_increase <= max_perplexity_increase:
        return Check(name, "ok", detail, serving=False), result
    limit = f"the perplexity may be at most {max_perplexity_increase:.0%} above the original's"
    return Check(name, "failed", detail, (limit,), serving=False), result


@partial(jax.jit, static_argnames="numerics")
def _squares(
    packed: Int[Array, "N K/8"], scale: Float[Array, "N G"], weight: Float[Array, "N K"], *, numerics: Numerics
) -> tuple[Array, Array]:
    """Sums of squares of each row, [N]: of the error and of the weight."""
    value = W4Weight.from_checkpoint(packed, scale, numerics=numerics).dequantize(jnp.float32)
    return jnp.sum((value - weight) ** 2, axis=1), jnp.sum(weight**2, axis=1)


def _differs(reader: CheckpointReader, original: CheckpointReader, name: str) -> bool:
    """Whether a tensor that was not quantized is other than the original's, cast to its dtype."""
    info = reader.tensors[name]
    rows = max(1, _BLOCK_WEIGHTS * info.shape[0] // max(info.size, 1)) if info.shape else 1
    for start in range(0, info.shape[0] if info.shape else 1, rows):
        ours = reader.read_rows(name, start, start + rows)
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = original.read_rows(name, start, start + rows).astype(info.dtype)
        if not np.array_equal(ours.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8)):
            return True
    return False


def _weights_check(errors: dict[str, float], wrong: list[str]) -> Check:
    name = "quantized weights"
    if wrong:
        return Check(name, "failed", f"{len(wrong)} layers are not the original's", tuple(wrong), serving=False)
    if not errors:
        return Check(name, "skipped", "the checkpoint is not quantized", serving=False)
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    detail = f"relative error {mean:.4f} on average over {len(errors)} layers, at most {errors[worst]:.4f} ({worst})"
    return Check(name, "ok", detail, serving=False)


def _copies_check(changed: list[str], same: int) -> Check:
    name = "other weights"
    if changed:
        return Check(name, "failed", f"{len(changed)} differ from the original", tuple(changed), serving=False)
    return Check(name, "ok", f"{same} tensors are the original's, bit for bit", serving=False)

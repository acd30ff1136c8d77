"""`verify`: all checks of a checkpoint, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pallas_kernels.errors import W4A8Error
from pallas_kernels.weight_format import Numerics

from ..checkpoints.compressed_tensors import find, quantized_modules
from ..checkpoints.folds import FoldedReader, read_folds
from ..checkpoints.reader import CheckpointReader
from . import checks, parity
from .report import Check, Verification

# Called with the name of the step, what of it is done, and all of it.
Progress = Callable[[str, int, int], None]

DEFAULT_TOKENS = 4096


def verify(
    path: str | Path,
    against: str | Path | None = None,
    text: str | None = None,
    *,
    numerics: Numerics | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    max_perplexity_increase: float = 0.1,
    tensor_parallel: int = 1,
    progress: Progress | None = None,
) -> Verification:
    """Checks that a checkpoint is whole, that vLLM would serve it, and that it agrees with its original.

    What is wrong with the checkpoint is reported, not raised. Weights are read a few rows at a time; only the
    comparison of predictions loads models.

    Args:
        path: checkpoint directory, quantized or not, or a Hugging Face Hub name.
        against: the unquantized original; None leaves out the comparison of weights and predictions.
        text: on which predictions are compared; by default the first 4096 tokens of `reference_text("test")`.
        numerics: of W4A8 weights, "lut" as in vLLM (default), or "exact"; W4A16 weights are always exact.
        context: tokens of a window, see `evaluate`.
        max_tokens: how much of the text; all of a text that is given, by default. 0 leaves out the predictions.
        max_perplexity_increase: more than this above the original's perplexity fails; relative, 0.1 is 10 %.
        tensor_parallel: the number of GPUs for which vLLM's shape rules are checked.
        progress: called with the name of the step, what of it is done, and all of it.

    Raises:
        W4A8Error: there is no readable checkpoint at `path` or `against`, the original is quantized itself, or an
            option is out of range.
    """
    if numerics not in (None, "lut", "exact"):
        raise W4A8Error(f'numerics: expected "lut" or "exact", found {numerics!r}')
    if tensor_parallel < 1:
        raise W4A8Error(f"tensor_parallel: expected at least 1, found {tensor_parallel}")
    if max_tokens is not None and max_tokens < 0:
        raise W4A8Error(f"max_tokens: expected 0 or more, found {max_tokens}")
    if text is not None and not text.strip():
        raise W4A8Error("text: is empty; give one to compare predictions on")
    reader = CheckpointReader(path)
    original = None if against is None else CheckpointReader(against)
    if original is not None and find(original.config) is not None:
        raise W4A8Error(f"{original.path}: is quantized itself; compare against the unquantized original")
    if original is not None and (folds := read_folds(reader.path)):
        original = FoldedReader(original, folds)

    def step(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    found = [checks.check_config(reader), checks.check_tensors(reader)]
    try:
        modules = quantized_modules(reader)
    except W4A8Error as e:
        modules = {}
        found.append(Check("quantized layers", "failed", str(e)))
    schemes = sorted({module.scheme for module in modules.values()})
    scheme = "+".join(schemes) or ("bf16" if find(reader.config) is None else "unknown")
    found += checks.check_values(reader, modules, step("reading"))
    found.append(checks.check_serving(reader, scheme, tensor_parallel))
    found += [checks.check_tokenizer(reader), checks.check_generation_config(reader)]
    if original is None:
        return Verification(reader.path, None, scheme, tuple(found))

    numerics = "lut" if scheme == "w4a8" and numerics != "exact" else "exact"
    usable = all(check.ok for check in found if check.name != "vLLM's rules")
    weights, errors = parity.check_weights(reader, original, modules, numerics, step("comparing weights"))
    found += weights
    comparison = None
    if max_tokens == 0:
        found.append(Check("predictions", "skipped", "as asked (max_tokens 0)", serving=False))
    elif not usable:
        found.append(Check("predictions", "skipped", "the checkpoint cannot be run as it is", serving=False))
    else:
        source = "the text given"
        if text is None:
            from ..reference import reference_text

            text, source = reference_text("test"), "the reference text's test split"
            max_tokens = max_tokens or DEFAULT_TOKENS
        check, comparison = parity.check_text(
            reader.path,
            original.path,
            text,
            source,
            numerics=numerics,
            context=context,
            max_tokens=max_tokens,
            max_perplexity_increase=max_perplexity_increase,
            progress=step("comparing predictions"),
        )
        found.append(check)
    return Verification(reader.path, original.path, scheme, tuple(found), errors, comparison)

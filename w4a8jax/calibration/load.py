"""Calibration data for a checkpoint: its tokenizer, vocabulary and context say what fits."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.families import decoder_config

from ..checkpoints.reader import CheckpointReader
from ..tokenizer import Tokenizer
from .data import MAX_LENGTH, CalibrationData, read_calibration


def load_calibration(
    model: str | Path | CheckpointReader, source: str | Path | Iterable[Mapping[str, Any]], **options: Any
) -> CalibrationData:
    """Reads calibration data for a model.

    Args:
        model: checkpoint directory, or a Hugging Face Hub name.
        source: a JSONL file, or the objects of its lines; see `w4a8jax.calibration.data`.
        options: `mask`, `pack`, `max_length` (64k or the model's context by default) and `max_samples` of
            `w4a8jax.calibration.read_calibration`.

    Raises:
        W4A8Error: there is no such checkpoint, or as `read_calibration`.
    """
    reader = model if isinstance(model, CheckpointReader) else CheckpointReader(model)
    config = decoder_config(reader.config)
    tokenizer = Tokenizer.from_directory(reader.path) if reader.has_tokenizer() else None
    options["max_length"] = min(options.get("max_length") or MAX_LENGTH, config.max_context)
    return read_calibration(source, tokenizer, vocab_size=config.vocab_size, **options)

"""Calibration: which tokens count, and what a model's layers see on them."""

from .data import CalibrationData, Sample, read_calibration
from .masks import DEFAULT_MASK, KINDS

__all__ = ["DEFAULT_MASK", "KINDS", "CalibrationData", "Sample", "read_calibration"]

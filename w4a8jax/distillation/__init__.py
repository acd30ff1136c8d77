"""Quantization-aware distillation of a bf16 teacher into a W4A8 student."""

from .options import DistillationOptions
from .record import DistillationRecord
from .training import distill

__all__ = ["DistillationOptions", "DistillationRecord", "distill"]

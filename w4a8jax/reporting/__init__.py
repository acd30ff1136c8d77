"""What each of many ways to quantize a model costs it: one table, one picture."""

from .record import Report
from .runner import report

__all__ = ["Report", "report"]

"""The progress bar of a quantization: layers, bytes, time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .pipeline import Item


class QuantizationProgress:
    """Shows two bars on stderr: tensors made, and bytes checked afterwards.

    Args:
        enabled: False shows nothing.
        items: all tensors of the job; todo: those not done by an earlier run.
        target_bytes: what will be checked.
    """

    def __init__(self, enabled: bool, items: Sequence[Item], todo: Sequence[Item], target_bytes: int):
        self._layers = sum(item.module is not None for item in items)
        self._done = self._layers - sum(item.module is not None for item in todo)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        total = sum(item.info.nbytes for item in items)
        done = total - sum(item.info.nbytes for item in todo)
        self._making = self._progress.add_task("quantizing", total=total, completed=done, what=self._what())
        self._checking = self._progress.add_task("checking", total=target_bytes, what="", visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def done(self, item: Item) -> None:
        """One tensor was written."""
        self._done += item.module is not None
        self._progress.update(self._making, advance=item.info.nbytes, what=self._what())

    def checked(self, nbytes: int) -> None:
        """Bytes were read back."""
        self._progress.update(self._checking, advance=nbytes, visible=True)

    def _what(self) -> str:
        return f"{self._done}/{self._layers} layers"

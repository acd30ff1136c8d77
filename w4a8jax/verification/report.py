"""The outcome of a verification: checks, a verdict, and how far the checkpoint is from its original."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import Comparison

Status = Literal["ok", "note", "failed", "skipped"]
_MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "failed": ("✗", "red"), "skipped": ("-", "dim")}
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was asked.
        status: "ok", "note" (fine, but worth knowing), "failed" or "skipped".
        detail: what was found, in one line.
        problems: all that is wrong, one line each.
        serving: whether vLLM's serving depends on it, rather than quality alone.
    """

    name: str
    status: Status
    detail: str
    problems: tuple[str, ...] = ()
    serving: bool = True

    @property
    def ok(self) -> bool:
        """Not failed."""
        return self.status != "failed"


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found; `render` shows it.

    Attributes:
        path, against: the checkpoint, and its original if it was compared.
        scheme: "w4a8", "w4a16", or "bf16" for any checkpoint that is not quantized.
        checks: in the order in which they were made.
        layer_errors: for each quantized layer ||w_kernel - w|| / ||w|| against the original; empty without one.
        comparison: of the predictions on a text, if they were compared.
    """

    path: Path
    against: Path | None
    scheme: str
    checks: tuple[Check, ...]
    layer_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    comparison: Comparison | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok for check in self.checks)

    @property
    def servable(self) -> bool:
        """Whether vLLM would serve the checkpoint, as far as can be told without running vLLM."""
        return all(check.ok for check in self.checks if check.serving)

    @property
    def verdict(self) -> str:
        """The answer in one line."""
        if self.servable:
            how = f" ({self.scheme})" if self.scheme != "bf16" else " (it is not quantized)"
            return f"vLLM would serve this checkpoint: yes{how}"
        failed = ", ".join(check.name for check in self.checks if check.serving and not check.ok)
        return f"vLLM would serve this checkpoint: no ({failed})"

    def record(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "path": str(self.path),
            "against": None if self.against is None else str(self.against),
            "scheme": self.scheme,
            "ok": self.ok,
            "servable": self.servable,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "layer_errors": self.layer_errors,
            "comparison": None if self.comparison is None else json.loads(self.comparison.to_json()),
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.record(), indent=2)

    def render(self, console: Console | None = None, *, details: bool = False) -> None:
        """Prints the checks and the verdict; with `details`, every problem and every layer's error."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for check in self.checks:
            mark, style = _MARKS[check.status]
            table.add_row(Text(mark, style), check.name, Text(check.detail))
            shown = check.problems if details else check.problems[:_SHOWN]
            for problem in shown:
                table.add_row("", "", Text(problem, style))
            if len(shown) < len(check.problems):
                table.add_row("", "", Text(f"... and {len(check.problems) - len(shown)} more", "dim"))
        console.print(table)
        if details:
            for name, error in self.layer_errors.items():
                console.print(f"  {error:.4f}  {name}", markup=False, highlight=False)
        console.print(Text(self.verdict, "bold green" if self.servable else "bold red"), soft_wrap=True)
        if self.servable and not self.ok:
            failed = ", ".join(check.name for check in self.checks if not check.ok)
            console.print(Text(f"but it does not agree with its original: {failed}", "bold red"), soft_wrap=True)

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if not check.ok]
        return f"<Verification of {self.path}: {self.verdict}; failed: {', '.join(failed) or 'none'}>"

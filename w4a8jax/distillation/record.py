"""What a distillation did: its curves, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import quiet


@dataclasses.dataclass
class DistillationRecord:
    """A distillation's options, data and curves.

    Attributes:
        settings: teacher, student, data, options, versions.
        train: for each step, its number from 1, tokens so far that count, loss (KL per token, nats), learning rate.
        validation: steps with, on held-out data, "kl", "perplexity" and "accuracy" (of the next token), and the
            latter two of the teacher.
        seconds: of training.
    """

    settings: dict[str, Any]
    train: list[list[float]] = dataclasses.field(default_factory=list)
    validation: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [row[2] for row in self.train]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def describe(self) -> str:
        """A few lines."""
        first, last = (np.mean(part) for part in (self.losses[:10], self.losses[-10:]))
        lines = [f"{len(self.train)} steps, {int(self.train[-1][1]):,} tokens, {self.seconds:.0f} s"]
        lines.append(f"KL to the teacher  {first:.4f} nats in the first steps, {last:.4f} in the last")
        for name, row in (("before", self.validation[:1]), ("after", self.validation[-1:])):
            for found in row:
                lines.append(
                    f"held-out, {name:<7} perplexity {found['perplexity']:.4f} "
                    f"({found['perplexity'] / found['teacher_perplexity'] - 1:+.2%} to the teacher), next token right "
                    f"{found['accuracy']:.2%} ({found['accuracy'] / found['teacher_accuracy'] - 1:+.2%}), "
                    f"KL {found['kl']:.4f}"
                )
        return "\n".join(lines)

    def plot(self, path: Path) -> Path:
        """Draws loss and held-out quality over the tokens into a .png, .svg or .pdf."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = (quiet(axis) for axis in figure.subplots(1, 2))
        steps, _, losses, _ = np.array(self.train).T
        left.plot(steps, losses, color="#56B4E9", linewidth=0.7, alpha=0.6, label="a step")
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        left.plot(steps[width - 1 :], smooth, color="#0072B2", linewidth=1.5, label=f"mean of {width}")
        if self.validation:
            at = [row["step"] for row in self.validation]
            left.plot(at, [row["kl"] for row in self.validation], "o-", color="#D55E00", markersize=4, label="held out")
            for name, key, colour in (
                ("perplexity", "perplexity", "#D55E00"),
                ("next tokens right", "accuracy", "#009E73"),
            ):
                relative = [100 * (row[key] / row[f"teacher_{key}"] - 1) for row in self.validation]
                right.plot(at, relative, "o-", color=colour, markersize=4, label=name)
            right.axhline(0, color="#8a8a8a", linewidth=1)
            right.legend(frameon=False, fontsize=8)
        left.set_yscale("log")
        left.set(title="KL from teacher to student", xlabel="step", ylabel="nats per token")
        right.set(title="Held-out, relative to the teacher", xlabel="step", ylabel="%")
        left.legend(frameon=False, fontsize=8)
        figure.savefig(path)
        return path

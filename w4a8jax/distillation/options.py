"""What can be chosen of a distillation."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from pallas_kernels.errors import W4A8Error

Scales = Literal["keep", "refit"]
Extra = Literal["norms", "embedding"]
MasterDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """Options of `w4a8jax.distill`. All but `save_every` and `keep` are part of the job that is resumed.

    Attributes:
        steps: optimizer updates.
        batch: sequences of an update.
        length: tokens of a sequence: traces are joined to this, or with `pack=False` cut.
        accumulate: parts that a batch is computed in, one after the other.
        learning_rate: of AdamW at its peak; warmup: steps up to it, from where a cosine leads to zero.
        weight_decay, b1, b2, clip: of AdamW; clip is the greatest norm of a gradient.
        scales: "keep" the grid of the student and move codes only, or "refit" scales to the master weights, every
            `refit_every` steps during the first half of the training.
        train: what is trained beside the quantized linears: "norms", "embedding".
        master_dtype: of the weights that are trained; updates of bfloat16 are rounded stochastically.
        teacher_top_k: the teacher runs once over all data, and its k likeliest tokens at each position are kept on
            disk; 0: it runs in every step and gives its full distribution.
        pack: join traces to sequences of `length`.
        seed: of the order of data and of stochastic rounding.
        validate_every: steps between evaluations on held-out data, if there is any; save_every: between checkpoints
            for a resume, of which the last `keep` stay.

    Raises:
        W4A8Error: one is out of its range.
    """

    steps: int = 500
    batch: int = 8
    length: int = 2048
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 1.0
    scales: Scales = "keep"
    refit_every: int = 50
    train: tuple[Extra, ...] = ()
    master_dtype: MasterDtype = "float32"
    dtype: str = "bfloat16"
    teacher_top_k: int = 0
    pack: bool = True
    seed: int = 0
    validate_every: int = 100
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "refit_every", "validate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise W4A8Error(f"{name}: expected a positive number, found {getattr(self, name)}")
        if self.length < 2:
            raise W4A8Error(f"length: expected at least 2 tokens, found {self.length}")
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise W4A8Error(f"{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "teacher_top_k", "seed"):
            if not getattr(self, name) >= 0:
                raise W4A8Error(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise W4A8Error(f"batch: {self.batch} sequences cannot be divided into {self.accumulate} parts")
        for name, known in (
            ("scales", get_args(Scales)),
            ("master_dtype", get_args(MasterDtype)),
            ("dtype", ("bfloat16", "float32")),
        ):
            if getattr(self, name) not in known:
                raise W4A8Error(f"{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}")
        for extra in self.train:
            if extra not in get_args(Extra):
                raise W4A8Error(f"train: expected {' or '.join(get_args(Extra))}, found {extra!r}")

    def job(self) -> dict:
        """What must be the same for a resume."""
        record = dataclasses.asdict(self)
        return {name: value for name, value in record.items() if name not in ("save_every", "keep")}

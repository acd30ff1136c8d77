"""Quantization-aware distillation (QAD): a W4A8 student learns to predict what its bf16 teacher predicts.

The student's forward pass is the kernel's arithmetic, weights and activations, bit for bit; gradients pass straight
through its roundings to master weights (`pallas_kernels.straight_through`). The loss is the KL divergence from teacher
to student on the tokens that count. See LLM-QAT (Liu et al., 2023, arXiv:2305.17888) for distillation of this kind.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.decoder import Decoder
from models.functional import split
from models.sharding import Sharding
from pallas_kernels.errors import W4A8Error

from ..calibration.data import CalibrationData
from ..calibration.load import load_calibration
from ..checkpoints.reader import CheckpointReader
from .batches import Batches
from .export import PICTURE, write_student
from .loss import scores
from .options import DistillationOptions
from .record import DistillationRecord
from .snapshots import Snapshots
from .student import Student, load_pair
from .teacher_logits import TeacherLogits
from .update import State, initial_state, make_update, schedule

Progress = Callable[[str, int, int], None]


def distill(
    teacher: str | Path,
    student: str | Path,
    data: CalibrationData | str | Path,
    output: str | Path,
    *,
    validation: CalibrationData | str | Path | None = None,
    options: DistillationOptions | None = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> DistillationRecord:
    """Distills a bf16 checkpoint into a W4A8 one of the same shape.

    Args:
        teacher: the bf16 checkpoint, a directory or Hub name.
        student: a W4A8 checkpoint made from it, by `quantize`; where the training begins.
        data: what to train on, see `w4a8jax.calibration`; text, tokens or conversations, with masks.
        output: directory to make: a checkpoint as `student` is, with distillation.json and distillation.png.
        validation: held-out data of the same kind, to measure on during the training.
        options: see `DistillationOptions`.
        mesh: devices; "tensor" and "expert" divide both models as `load` does, "data" the sequences of a batch.
        overwrite: replace an existing checkpoint, at the very end.
        resume: go on from the last snapshot of the same job, if there is one.
        progress: called with what is being done, how many steps of it are, and of how many.

    Returns:
        The curves.

    Raises:
        W4A8Error: data is missing, damaged, empty, masked out or has ids beyond the vocabulary; teacher and student
            differ in shape or are not bf16 and W4A8; the output exists; the loss became NaN or infinite.
    """
    options = options or DistillationOptions()
    target = Path(output).expanduser().absolute()
    if target.exists() and not overwrite:
        raise W4A8Error(f"{output}: exists; give another name, or --overwrite to replace it")
    if target in (CheckpointReader(path).path.resolve() for path in (teacher, student)):
        raise W4A8Error(f"{output}: is a source; give another target")
    if not target.parent.is_dir():
        raise W4A8Error(f"{target}: its parent directory does not exist")
    train_data, held_out = _read(student, data, options), None
    if validation is not None:
        held_out = _read(student, validation, options)
    training = _Training(str(teacher), str(student), train_data, held_out, options, mesh, target, progress)
    return training.run(resume=resume, overwrite=overwrite)


def _read(model: str | Path, data: CalibrationData | str | Path, options: DistillationOptions) -> CalibrationData:
    if isinstance(data, CalibrationData):
        return data
    return load_calibration(model, data, pack=options.length if options.pack else None, max_length=options.length)


class _Training:
    def __init__(
        self,
        teacher: str,
        student: str,
        data: CalibrationData,
        held_out: CalibrationData | None,
        options: DistillationOptions,
        mesh: Mesh | None,
        target: Path,
        progress: Progress | None,
    ):
        self.options, self.target, self.source = options, target, student
        self.progress = progress or (lambda what, done, total: None)
        self.batches = Batches(data, options.batch, options.length, options.seed)
        self.held_out: Batches | None = None
        if held_out is not None:
            self.held_out = Batches(held_out, options.batch, options.length, options.seed)
        self._check_vocabulary(student, data, held_out)
        original, decoder, names = load_pair(teacher, student, dtype=options.dtype, mesh=mesh)
        self.sharding = None if mesh is None else Sharding(mesh, decoder.config)
        self.student = Student(
            decoder, original, names, train=options.train, master_dtype=jnp.dtype(options.master_dtype)
        )
        self.teacher: Decoder = original
        self.structure, self.leaves = split(original)
        self._scores = jax.jit(
            lambda state, frozen, leaves, *batch: scores(
                self.student.merge(state.trainable, state.scales, frozen), self.structure.merge(leaves), *batch
            )
        )
        devices: Any = jax.devices()
        self.settings = {
            "teacher": teacher,
            "student": student,
            "data": data.describe(),
            "validation": None if held_out is None else held_out.describe(),
            "options": options.job(),
            "device": {"kind": devices[0].device_kind, "count": 1 if mesh is None else mesh.size},
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
            | {"python": platform.python_version()},
        }
        identities = {
            name: CheckpointReader(path).identity() for name, path in (("teacher", teacher), ("student", student))
        }
        digests = {"data": data.digest(), "validation": None if held_out is None else held_out.digest()}
        self.job = identities | digests | options.job()

    @staticmethod
    def _check_vocabulary(student: str, *data: CalibrationData | None) -> None:
        size = CheckpointReader(student).config.get("vocab_size", math.inf)
        for part in data:
            for sample in part.samples if part is not None else ():
                if sample.tokens.size and not (sample.tokens.min() >= 0 and sample.tokens.max() < size):
                    raise W4A8Error(
                        f"{part.name if part else ''}: line {sample.line}: has a token id outside the vocabulary, "
                        f"0 .. {size - 1}"
                    )

    def run(self, *, resume: bool, overwrite: bool) -> DistillationRecord:
        options = self.options
        snapshots = Snapshots(self.target, self.job, keep=options.keep, resume=resume, overwrite=overwrite)
        finished = False
        try:
            state, record, step = initial_state(self.student, options), DistillationRecord(self.settings), 0
            # The student's own references would keep the donated arrays' names, but not their memory.
            frozen = self.student.frozen
            if resume and (found := snapshots.restore(state)) is not None:
                step, state, curves = found
                record = DistillationRecord(**curves)
            state = self._train(snapshots, state, frozen, record, step)
            picture = record.plot(snapshots.root / PICTURE)
            write_student(
                self.student, state.trainable, state.scales, self.source, self.target, record=vars(record),
                picture=picture, sharding=self.sharding, overwrite=overwrite,
            )  # fmt: skip
            finished = True
            return record
        finally:
            snapshots.close(discard=finished)

    def _train(self, snapshots: Snapshots, state: State, frozen: Any, record: DistillationRecord, first: int) -> State:
        options = self.options
        stored = self._teacher_logits(snapshots)
        update, rate = make_update(self.student, self.structure, options), schedule(options)
        leaves: list[Any] = [] if stored is not None else self.leaves
        started, before = time.monotonic(), record.seconds
        pending: list[tuple[int, Any, int]] = []

        def settle() -> None:
            """Takes the losses that were computed meanwhile."""
            for step, loss, counted in pending:
                self._note(record, step, float(loss), counted, float(rate(step)))
            pending.clear()
            record.seconds = before + time.monotonic() - started

        for step in range(first, options.steps):
            if step == 0:
                self._validate(record, state, frozen, 0)
            batch = self.batches.at(step)
            arrays = [self._parts(x) for x in (batch.tokens, batch.lengths, batch.loss_mask)]
            top_k = None if stored is None else jax.tree.map(self._parts, stored.rows(batch.rows))
            index = self._whole(np.int32(step))
            state, loss = update(state, frozen, leaves, index, *arrays, top_k)
            settle()  # of the step before, so that the device has the next one already
            pending.append((step, loss, int(batch.loss_mask[:, 1:].sum())))
            done = step + 1
            if options.scales == "refit" and done % options.refit_every == 0 and done <= options.steps // 2:
                state = state._replace(scales=self.student.refit(state.trainable, state.scales))
            if done % options.validate_every == 0 or done == options.steps:
                settle()
                self._validate(record, state, frozen, done)
            if done % options.save_every == 0 or done == options.steps:
                settle()
                snapshots.save(done, state, vars(record))
            self.progress("training", done, options.steps)
        settle()
        return state

    def _note(self, record: DistillationRecord, step: int, loss: float, counted: int, rate: float) -> None:
        if not math.isfinite(loss):
            raise W4A8Error(
                f"step {step + 1}: the loss is {loss}; take a lower learning rate than {self.options.learning_rate}, "
                "or look for NaN in the checkpoints"
            )
        tokens = (record.train[-1][1] if record.train else 0) + counted
        record.train.append([step + 1, tokens, loss, rate])

    def _validate(self, record: DistillationRecord, state: State, frozen: Any, step: int) -> None:
        if self.held_out is None:
            return
        total = np.zeros(6)
        batches = self.held_out.in_order(self.options.batch)
        for i, batch in enumerate(batches):
            arrays = [self._rows(x) for x in batch[:3]]
            total += np.array([float(x) for x in self._scores(state, frozen, self.leaves, *arrays)])
            self.progress("validating", i + 1, len(batches))
        tokens, kl, nll, teacher_nll, right, teacher_right = total.tolist()
        found = {"kl": kl, "accuracy": right, "teacher_accuracy": teacher_right}
        found = {name: value / tokens for name, value in found.items()}
        perplexities = {"perplexity": math.exp(nll / tokens), "teacher_perplexity": math.exp(teacher_nll / tokens)}
        record.validation.append({"step": step, "tokens": tokens} | found | perplexities)

    def _teacher_logits(self, snapshots: Snapshots) -> TeacherLogits | None:
        if not self.options.teacher_top_k:
            return None
        return TeacherLogits(
            snapshots.teacher, self.teacher, self.batches, self.options.batch, self.options.teacher_top_k,
            place=self._rows, progress=lambda done, total: self.progress("teacher", done, total),
        )  # fmt: skip

    def _parts(self, x: Any) -> jax.Array:
        """[B, ...] -> [A, B/A, ...], each part divided over the mesh's "data" axis, if it has one."""
        x = np.asarray(x).reshape(self.options.accumulate, -1, *x.shape[1:])
        return self._put(x, None, "data")

    def _rows(self, x: Any) -> jax.Array:
        return self._put(np.asarray(x), "data")

    def _whole(self, x: Any) -> jax.Array:
        return self._put(x)

    def _put(self, x: Any, *axes: str | None) -> jax.Array:
        if self.sharding is None:
            return jnp.asarray(x)
        return jax.device_put(x, self.sharding.batch(x.shape, *axes))

"""The working folder of a distillation: its job, snapshots to resume from, the teacher's stored logits."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pallas_kernels.errors import W4A8Error

JOB, LOCK, STEPS, TEACHER = "job.json", "lock", "steps", "teacher"


class Snapshots:
    """Opens or makes `.NAME.distill` beside the checkpoint to be made, and holds its lock.

    Args:
        target: the checkpoint directory to be made.
        job: what is being made, JSON; only the same job is resumed.
        keep: snapshots that stay.
        resume: go on with an unfinished job, if there is one.
        overwrite: throw an unfinished job away, unless `resume`.

    Raises:
        W4A8Error: an unfinished job is in the way or is another one, another process is at it, or the folder cannot
            be written.
    """

    def __init__(self, target: Path, job: dict[str, Any], *, keep: int, resume: bool, overwrite: bool):
        self.root = target.parent / f".{target.name}.distill"
        job = json.loads(json.dumps(job))
        try:
            self.root.mkdir(exist_ok=True)
            self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise W4A8Error(f"{target}: another process distills it; wait for it") from None
            self._open(target, job, resume=resume, overwrite=overwrite)
        except OSError as e:
            raise W4A8Error(f"{self.root}: cannot write there: {e.strerror or e}") from e
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager((self.root / STEPS).absolute(), options=options)

    @property
    def teacher(self) -> Path:
        """Folder of the teacher's logits."""
        return self.root / TEACHER

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Keeps the state after a number of steps; a snapshot that is not whole is never found again."""
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        )
        self._manager.wait_until_finished()

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The latest snapshot: step, state as `state` in shapes and shardings, record. None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
        return step, found.state, found.record

    def close(self, *, discard: bool) -> None:
        """Gives up the lock; with `discard`, removes the folder."""
        self._manager.close()
        if discard:
            shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    def _open(self, target: Path, job: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        path = self.root / JOB
        if path.is_file():
            if resume:
                found = json.loads(path.read_text())
                for name in (*job, *found):
                    if job.get(name) != found.get(name):
                        raise W4A8Error(
                            f"{self.root}: is another job: {name} was {found.get(name)}, is {job.get(name)} now; use "
                            "the same data and options, or discard it by --overwrite without --resume"
                        )
                return
            if not overwrite:
                raise W4A8Error(
                    f"{target}: an unfinished distillation is in {self.root}; go on with --resume, or --overwrite"
                )
            for name in (STEPS, TEACHER):
                shutil.rmtree(self.root / name, ignore_errors=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(job, indent=1))
        temporary.replace(path)

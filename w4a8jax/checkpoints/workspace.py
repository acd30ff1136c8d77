"""The hidden directory in which a checkpoint is made, and its way to the final name.

.NAME.partial/lock           held by the process that writes
.NAME.partial/journal.jsonl  the job, then one line per finished shard
.NAME.partial/checkpoint/    the files; renamed to NAME when whole
.NAME.partial/previous/      what NAME was before, for the instant of the exchange
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pallas_kernels.errors import W4A8Error

from .reader import CONFIG
from .safetensors_format import fsync_directory


class Workspace:
    """Opens or makes the workspace of a target directory and holds its lock.

    Args:
        target: the checkpoint directory to be made.
        job: what is being made, JSON; only the same job is resumed.
        overwrite: an existing target is replaced at the end (and an unfinished job is thrown away, unless `resume`).
        resume: go on with an unfinished job, if there is one.

    Raises:
        W4A8Error: the target exists; an unfinished job is in the way or is another one; another process writes.
    """

    def __init__(self, target: Path, job: dict[str, Any], *, overwrite: bool, resume: bool):
        self.target = Path(os.path.abspath(target.expanduser()))
        self.root = self.target.parent / f".{self.target.name}.partial"
        self.checkpoint = self.root / "checkpoint"
        self._journal = self.root / "journal.jsonl"
        self._previous = self.root / "previous"
        self._overwrite = overwrite
        self._lock: int | None = None
        self._check_parent()
        existed = self.root.exists()
        if not existed:
            self._check_target()
        try:
            self._acquire()
            self._restore_previous()
            self._check_target()
            self.done = self._open_job(job, existed, resume)
        except OSError as e:
            self.close()
            raise W4A8Error(f"{self.root}: cannot write there: {e.strerror or e}") from e
        except BaseException:
            self.close(discard=not existed)
            raise

    def record(self, entry: dict[str, Any]) -> None:
        """Appends a finished shard to the journal, durably."""
        with self._journal.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def publish(self) -> None:
        """Gives the checked checkpoint its name, and removes the workspace.

        What was there before is moved aside first and deleted last; if the process dies in between, the next one
        puts it back.
        """
        self._check_target()
        fsync_directory(self.checkpoint)
        if self.target.exists():
            os.rename(self.target, self._previous)
        os.rename(self.checkpoint, self.target)
        fsync_directory(self.target.parent)
        self.close(discard=True)

    def close(self, discard: bool = False) -> None:
        """Gives up the lock; with `discard`, removes the workspace too."""
        if self._lock is None:
            return
        self._restore_previous()
        if discard:
            shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _check_parent(self) -> None:
        if not self.target.parent.is_dir():
            raise W4A8Error(f"{self.target}: its parent directory does not exist")

    def _check_target(self) -> None:
        check_target(self.target, overwrite=self._overwrite)

    def _acquire(self) -> None:
        path = self.root / "lock"
        while True:
            self.root.mkdir(exist_ok=True)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # removed by a process that finished just now
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
                os.close(lock)
                raise W4A8Error(f"{self.target}: another process (pid {pid}) is writing it; wait for it") from None
            except OSError:
                pass  # a file system without locks
            if path.exists() and os.stat(path).st_ino == os.fstat(lock).st_ino:
                break
            os.close(lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def _restore_previous(self) -> None:
        if self._previous.exists():
            if self.target.exists():  # the exchange had taken place
                shutil.rmtree(self._previous)
            else:
                os.rename(self._previous, self.target)

    def _open_job(self, job: dict[str, Any], existed: bool, resume: bool) -> dict[str, dict[str, Any]]:
        """Starts the journal or reads it; returns the finished shards' entries by file name."""
        job = json.loads(json.dumps(job))
        entries = self._read_journal()
        if existed and entries and not resume and not self._overwrite:
            raise W4A8Error(f"{self.target}: an unfinished job is in {self.root}; go on with --resume, or --overwrite")
        if resume and entries:
            found = entries[0].get("job", {})
            other = [key for key in (*job, *found) if job.get(key) != found.get(key)]
            if other:
                key = other[0]
                raise W4A8Error(
                    f"{self.root}: is another job: {key} was {_short(found.get(key))}, is {_short(job.get(key))} now; "
                    "use the same source and options, or discard it by --overwrite without --resume"
                )
            return {entry["file"]: entry for entry in entries[1:]}
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self._journal.unlink(missing_ok=True)
        self.checkpoint.mkdir()
        self.record({"job": job})
        return {}

    def _read_journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal; the last one may have been torn. Without files to go with it, nothing."""
        if not self._journal.is_file() or not self.checkpoint.is_dir():
            return []
        entries = []
        text = self._journal.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines(keepends=True):
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        whole = "".join(json.dumps(entry) + "\n" for entry in entries)
        if whole != text:
            self._journal.write_text(whole, encoding="utf-8")
        return entries


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a checkpoint may be made in a directory.

    Raises:
        W4A8Error: it exists, and `overwrite` does not say to replace it, or it is no checkpoint.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise W4A8Error(f"{target}: exists; give another name, or --overwrite to replace it")
    if target.is_symlink() or not (target / CONFIG).is_file():
        raise W4A8Error(f"{target}: exists and is no checkpoint (no {CONFIG}); remove it yourself")

"""Writes a checkpoint shard by shard, resumably; it gets its name only after it was read back and found whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from pallas_kernels.errors import W4A8Error
from pallas_kernels.weight_format import unusable_scales

from .compressed_tensors import SCALE
from .plan import MAX_SHARD_BYTES, Shard, plan_shards
from .reader import CONFIG, INDEX, CheckpointReader
from .safetensors_format import COPY_CHUNK, TensorInfo, TensorSpec, fsync_directory, read_header
from .workspace import Workspace


class CheckpointWriter:
    """Writes the planned tensors; holds no tensor itself.

        with CheckpointWriter(target, units, config=config, job=job, sidecars=files) as writer:
            for unit in writer.remaining():
                for spec in unit:
                    writer.write(spec.name, array)
            writer.finish()

    Leaving the block without `finish` leaves no checkpoint. After Ctrl-C, a full disk or a killed process, the shards
    finished so far stay in the hidden `.NAME.partial` beside the target, for `resume=True`; after an error in the
    input nothing stays.

    Args:
        target: directory to make.
        units: the tensors in the order in which they will come; those of one unit share a shard.
        config: config.json.
        job: JSON that identifies the job: source and options. Only the same job is resumed.
        sidecars: files to copy, by their path relative to the target.
        extra: JSON files to add, by name; a function is called when all shards are written.
        overwrite: replace an existing checkpoint, at the very end.
        resume: go on from the finished shards of the same job.
        max_shard_bytes: data bytes per shard, and so how much work an interruption can cost.

    Raises:
        W4A8Error: the target exists, an unfinished job is in the way or is another one, another process is writing,
            or the disk is too small.
    """

    def __init__(
        self,
        target: str | Path,
        units: Sequence[Sequence[TensorSpec]],
        *,
        config: Mapping[str, Any],
        job: Mapping[str, Any],
        sidecars: Mapping[str, Path] | None = None,
        extra: Mapping[str, Any | Callable[[], Any]] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.target = Path(target)
        self.shards = plan_shards(units, max_shard_bytes)
        self._config, self._sidecars, self._extra = dict(config), dict(sidecars or {}), dict(extra or {})
        plan = zlib.crc32(b"".join(shard.file.encode() + shard.layout()[0] for shard in self.shards))
        self._workspace = Workspace(self.target, {**job, "plan": plan}, overwrite=overwrite, resume=resume)
        self._file: _ShardFile | None = None
        self._finished = self._keep = False
        try:
            self._done = self._revalidate(self._workspace.done)
            self._check_space()
        except BaseException:
            self._workspace.close(discard=not self._workspace.done)
            raise
        self.resumed = len(self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if self._file is not None:
            self._file.abandon()
        if self._finished:
            return
        keep = bool(self._done) and (self._keep or not isinstance(error, W4A8Error))
        self._workspace.close(discard=not keep)
        if keep and isinstance(error, KeyboardInterrupt):
            error.add_note(f"{len(self._done)} of {len(self.shards)} shards are kept; go on with --resume")

    @property
    def notes(self) -> list[Any]:
        """What was given to `write(note=...)`, in plan order, of resumed shards too."""
        return [note for shard in self.shards for note in self._done.get(shard.file, {}).get("notes", [])]

    def remaining(self) -> Iterator[tuple[TensorSpec, ...]]:
        """The units not yet on disk, in plan order. All tensors of one must be written before the next is taken."""
        for shard in self.shards:
            if shard.file not in self._done:
                yield from shard.units

    def write(self, name: str, data: np.ndarray | Iterable[np.ndarray], *, note: Any = None) -> None:
        """Writes one tensor, whole or as consecutive blocks of rows.

        Args:
            name: a tensor of the shard at hand.
            data: of the planned dtype and shape.
            note: JSON to keep in the journal with the shard, see `notes`.

        Raises:
            W4A8Error: not the planned dtype or shape; the disk is full.
        """
        if self._file is None:
            shard = next((s for s in self.shards if s.file not in self._done), None)
            if shard is None:
                raise W4A8Error(f"{name}: all planned tensors are written already")
            with self._disk_errors(shard.file):
                self._file = _ShardFile(self._workspace.checkpoint, shard)
        with self._disk_errors(self._file.shard.file):
            self._file.write(name, [data] if isinstance(data, np.ndarray) else data, note)
            if self._file.complete:
                entry = self._file.close()
                self._file = None
                self._workspace.record(entry)
                self._done[entry["file"]] = entry

    def finish(self, progress: Callable[[int], None] | None = None) -> Path:
        """Adds the other files, reads everything back, and gives the checkpoint its name.

        Args:
            progress: called with the number of bytes checked since the last call.

        Raises:
            W4A8Error: a tensor is missing or differs on disk from what was written; the disk is full.
        """
        missing = [unit[0].name for unit in self.remaining()]
        if missing:
            raise W4A8Error(f"{missing[0]}: was not written; the checkpoint is not finished")
        checkpoint = self._workspace.checkpoint
        with self._disk_errors("the files beside the weights"):
            for name, source in self._sidecars.items():
                (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, checkpoint / name)
                _fsync_file(checkpoint / name)
            for name, value in self._extra.items():
                _write_json(checkpoint / name, value() if callable(value) else value)
            specs = {spec.name: (spec, shard.file) for shard in self.shards for spec in shard.specs}
            _write_json(
                checkpoint / INDEX,
                {
                    "metadata": {"total_size": sum(spec.nbytes for spec, _ in specs.values())},
                    "weight_map": {name: file for name, (_, file) in sorted(specs.items())},
                },
            )
            _write_json(checkpoint / CONFIG, self._config)
        self._check_whole(progress)
        with self._disk_errors(str(self.target)):
            self._workspace.publish()
        self._finished = True
        return self.target

    def _check_whole(self, progress: Callable[[int], None] | None) -> None:
        reader = CheckpointReader(self._workspace.checkpoint)
        expected = {spec.name: spec for shard in self.shards for spec in shard.specs}
        check_tensors(reader, expected)
        for entry in self._done.values():
            for name, crc in entry["crc"].items():
                if _crc(reader, reader.tensors[name], progress) != crc:
                    raise W4A8Error(f"{self.target}: {name} reads back from disk other than it was written")

    def _revalidate(self, done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Of the journal's shards those whose file is as it was written; the others are made again."""
        valid = {}
        for shard in self.shards:
            path = self._workspace.checkpoint / shard.file
            entry = done.get(shard.file)
            if entry is not None and path.is_file() and _is_intact(path, shard, entry):
                valid[shard.file] = entry
        return valid

    def _check_space(self) -> None:
        needed = sum(shard.layout()[2] for shard in self.shards if shard.file not in self._done)
        free = shutil.disk_usage(self._workspace.root).free
        if needed > free:
            raise W4A8Error(f"{self.target}: needs {_gib(needed)} more on its disk, which has {_gib(free)} free")

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        """Turns an OSError on our own files into a W4A8Error, and keeps the finished shards for a resume."""
        try:
            yield
        except OSError as e:
            self._keep = True
            reason = f"cannot write: {e.strerror or e}"
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "the disk is full; make room"
            raise W4A8Error(f"{self.target}: {reason}, and go on with --resume (was at {what})") from e


class _ShardFile:
    """One shard being written under a temporary name, tensors in any order, at their planned offsets."""

    def __init__(self, directory: Path, shard: Shard):
        self.shard = shard
        self._path, self._temporary = directory / shard.file, directory / f"{shard.file}.tmp"
        prefix, self._offsets, size = shard.layout()
        self._specs = {spec.name: spec for spec in shard.specs}
        self._crc: dict[str, int] = {}
        self._notes: list[Any] = []
        self._file = self._temporary.open("wb", buffering=0)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk shows here, not minutes later
            _pwrite(self._file.fileno(), prefix, 0)
        except BaseException:
            self.abandon()
            raise

    @property
    def complete(self) -> bool:
        return len(self._crc) == len(self._specs)

    def write(self, name: str, blocks: Iterable[np.ndarray], note: Any) -> None:
        spec = self._specs.get(name)
        if spec is None or name in self._crc:
            raise W4A8Error(f"{name}: {'written twice' if spec else f'is not planned for {self.shard.file}'}")
        position, crc = self._offsets[name], 0
        end = position + spec.nbytes
        for block in blocks:
            if block.dtype != spec.dtype or block.shape[1:] != spec.shape[1:] or position + block.nbytes > end:
                raise W4A8Error(f"{name}: planned as {spec}, given {block.dtype.name} {list(block.shape)}")
            data = memoryview(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
            _pwrite(self._file.fileno(), data, position)
            crc = zlib.crc32(data, crc)
            position += block.nbytes
        if position != end:
            raise W4A8Error(f"{name}: planned as {spec}, given {spec.nbytes - (end - position)} of {spec.nbytes} bytes")
        self._crc[name] = crc
        if note is not None:
            self._notes.append(note)

    def close(self) -> dict[str, Any]:
        """Makes the shard durable under its name; returns its journal entry."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._temporary, self._path)
        fsync_directory(self._path.parent)
        return {"file": self.shard.file, "crc": self._crc, "notes": self._notes}

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def check_tensors(reader: CheckpointReader, expected: Mapping[str, TensorSpec]) -> None:
    """Checks a checkpoint's tensors against their specs, and that every quantization scale is finite and >= 0.

    Raises:
        W4A8Error: naming the first tensor that is missing, unexpected, of another dtype or shape, or a bad scale.
    """
    for name in expected.keys() - reader.tensors.keys():
        raise W4A8Error(f"{reader.path}: {name} is missing")
    for name in reader.tensors.keys() - expected.keys():
        raise W4A8Error(f"{reader.path}: {name} is unexpected")
    for name, spec in expected.items():
        info = reader.tensors[name]
        if (info.dtype, info.shape) != (spec.dtype, spec.shape):
            raise W4A8Error(f"{reader.path}: {name} must be {spec}, found {info}")
        if name.endswith(SCALE):
            check_scale(name, reader.read(name))


def check_scale(name: str, scale: np.ndarray) -> None:
    """Raises W4A8Error unless all scales are finite and not negative."""
    if unusable_scales(scale).any():
        raise W4A8Error(f"{name}: has scales that are negative, infinite or NaN")


def _is_intact(path: Path, shard: Shard, entry: dict[str, Any]) -> bool:
    try:
        header = read_header(path)
    except W4A8Error:
        return False
    planned = {spec.name: (spec.dtype, spec.shape) for spec in shard.specs}
    if {name: (info.dtype, info.shape) for name, info in header.items()} != planned:
        return False
    if entry.get("crc", {}).keys() != planned.keys():
        return False
    return all(_crc_of_file(header[name]) == crc for name, crc in entry["crc"].items())


def _crc(reader: CheckpointReader, info: TensorInfo, progress: Callable[[int], None] | None) -> int:
    crc = _crc_of_file(info)
    if progress is not None:
        progress(info.nbytes)
    return crc


def _crc_of_file(info: TensorInfo) -> int:
    crc, left = 0, info.nbytes
    with info.file.open("rb") as f:
        f.seek(info.offset)
        while left and (data := f.read(min(left, COPY_CHUNK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    return crc if not left else -1


def _pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 2**30], offset)
        view, offset = view[count:], offset + count


def _fsync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"

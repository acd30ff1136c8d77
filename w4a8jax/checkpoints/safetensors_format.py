"""The safetensors file format: a JSON header with byte offsets, read and written without loading any tensor.

Layout: uint64 header length, JSON header `{name: {dtype, shape, data_offsets}}`, data. The `safetensors` package's
numpy side has no bf16, so the header is handled here; the bytes are the same.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.errors import W4A8Error

# Hugging Face's dtype names.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # the format's own limit
_GIT_LFS = b"version https://git-lfs"
COPY_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file holds or will hold: name, numpy dtype (ml_dtypes for bf16 and fp8) and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor on disk: its file and the byte offset of its data in that file."""

    file: Path
    offset: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of one safetensors file, in the file's order, and checks that the file is whole.

    Raises:
        W4A8Error: not a safetensors file, truncated, corrupt, or with a dtype that this project does not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            if start == _GIT_LFS[:8]:
                raise W4A8Error(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
            if len(start) < 8:
                raise W4A8Error(f"{path}: truncated safetensors file: {size} bytes, no header; copy the file again")
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER:
                raise W4A8Error(f"{path}: not a safetensors file, or corrupt: a header of {length} bytes is declared")
            if 8 + length > size:
                raise W4A8Error(f"{path}: truncated safetensors file: its header needs {8 + length} bytes, has {size}")
            header = f.read(length)
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
    except ValueError as e:  # also JSONDecodeError, UnicodeDecodeError
        raise W4A8Error(f"{path}: corrupt safetensors header: {e}; copy the file again") from e
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _entry(path, name, entry, base) for name, entry in entries.items()}
    end = base
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise W4A8Error(f"{path}: corrupt safetensors header: {info.name} does not start where the one before ends")
        end = info.offset + info.nbytes
    if end != size:
        kind = "truncated safetensors file" if size < end else "corrupt safetensors file"
        raise W4A8Error(f"{path}: {kind}: its header describes {end} bytes, found {size}; copy the file again")
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(isinstance(i, int) and i >= 0 for i in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise W4A8Error(f"{path}: corrupt safetensors header: the entry of {name} is malformed")
    if dtype not in DTYPES:
        raise W4A8Error(f"{path}: {name} has dtype {dtype}; readable are {', '.join(DTYPES)}")
    info = TensorInfo(name, DTYPES[dtype], shape, path, base + begin)
    if info.nbytes != end - begin:
        raise W4A8Error(f"{path}: corrupt safetensors header: {name} is {info}, but has {end - begin} bytes")
    return info


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is listed twice")
    return result


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads rows `start:stop` of the first axis (all of them by default); holds nothing else in memory.

    Raises:
        W4A8Error: the file became shorter or unreadable.
    """
    shape = info.shape
    if shape and (start or stop is not None):
        start, stop, _ = slice(start, stop).indices(shape[0])
        shape = (max(stop - start, 0), *shape[1:])
    row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
    data = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
    view, position = memoryview(data), info.offset + start * row_bytes
    try:
        with info.file.open("rb", buffering=0) as f:
            f.seek(position)
            done = 0
            while done < len(view):
                count = f.readinto(view[done : done + 2**30])
                if not count:
                    raise W4A8Error(f"{info.file}: truncated while reading {info.name}; copy the file again")
                done += count
    except OSError as e:
        raise W4A8Error(f"{info.file}: cannot read {info.name}: {e.strerror or e}") from e
    return data.view(info.dtype).reshape(shape)


def layout(specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Plans a safetensors file.

    Returns:
        The bytes before the data, the absolute offset of each tensor, the file's size in bytes. Wide dtypes come
        first, which keeps every tensor aligned without padding (the format allows none).
    """
    entries, offsets, position = {}, {}, 0
    for spec in sorted(specs, key=lambda s: -s.dtype.itemsize):
        offsets[spec.name] = position
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    base = 8 + len(header)
    prefix = len(header).to_bytes(8, "little") + header
    return prefix, {name: base + offset for name, offset in offsets.items()}, base + position


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def fsync_directory(path: Path) -> None:
    """Makes renames inside a directory durable (a no-op where directories cannot be synced)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)

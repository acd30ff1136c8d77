"""Reads Hugging Face checkpoint directories: headers at once, tensors one by one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.errors import W4A8Error

from .experts import split_experts
from .safetensors_format import TensorInfo, read_header, read_rows

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Carried along with the weights. Named one by one: a checkpoint directory may hold anything (other formats of the
# same weights, training state), and a copy must not grow by them.
_SIDECARS = re.compile(
    r"""(tokenizer.*\.(json|model|jinja) | special_tokens_map\.json | added_tokens\.json | vocab\.(json|txt)
    | merges\.txt | .*\.(model|tiktoken) | generation_config\.json | chat_template.*\.(jinja|json)
    | (pre)?processor_config\.json | (image_|video_|feature_)?preprocessor_config\.json
    | equalization\.json | LICENSE.* | NOTICE.* | USE_POLICY.*)$""",
    re.VERBOSE | re.IGNORECASE,
)
_SIDECAR_DIRECTORIES = ("additional_chat_templates",)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "additional_chat_templates/*",
]


class CheckpointReader:
    """A checkpoint directory, `model.safetensors` or shards with `model.safetensors.index.json`.

    Opening reads config.json and the headers of all shards, and no tensor.

    Attributes:
        path: the directory (a Hub name such as "org/name" has been fetched).
        config: config.json.
        tensors: `TensorInfo` by tensor name: numpy dtype (ml_dtypes for bf16 and fp8), shape, file, nbytes. Experts
            that are fused in one tensor, as transformers keeps them, are listed as one tensor each.

    Raises:
        W4A8Error: there is no such directory, or what is in it is no whole checkpoint. The message names the file.
    """

    def __init__(self, path: str | Path):
        self.path = resolve(path)
        self.config = self._read_config()
        self.tensors: dict[str, TensorInfo] = split_experts(self._list_tensors(), self.config.get("model_type"))

    def read(self, name: str) -> np.ndarray:
        """One whole tensor.

        Raises:
            W4A8Error: there is no such tensor, or its file is damaged.
        """
        return read_rows(self.info(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of a tensor's first axis."""
        return read_rows(self.info(name), start, stop)

    def blocks(self, name: str, max_bytes: int) -> Iterator[np.ndarray]:
        """The tensor in consecutive blocks of whole rows, each of at most `max_bytes` (at least one row)."""
        info = self.info(name)
        if info.nbytes <= max_bytes or len(info.shape) < 2:
            yield read_rows(info)
            return
        rows = max(1, max_bytes * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], rows):
            yield read_rows(info, start, min(start + rows, info.shape[0]))

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise W4A8Error(f"{self.path}: has no tensor {name}")
        return self.tensors[name]

    def sidecars(self) -> list[Path]:
        """Files that belong to the model beside weights, index and config.json, relative to `path`, sorted.

        Tokenizer, generation config, chat templates, licence. Weights in other formats are not among them.
        """
        files = [p for p in self.path.iterdir() if p.is_file() and _SIDECARS.match(p.name)]
        for name in _SIDECAR_DIRECTORIES:
            directory = self.path / name
            files += [p for p in directory.rglob("*") if p.is_file()] if directory.is_dir() else []
        return sorted(p.relative_to(self.path) for p in files)

    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

    def identity(self) -> str:
        """A hash that changes when the checkpoint does: config, tensors, and each shard's size and time of change."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info} {info.file.name} {info.offset}\n".encode())
        return digest.hexdigest()

    def _read_config(self) -> dict[str, Any]:
        path = self.path / CONFIG
        if not path.is_file():
            raise W4A8Error(f"{self.path}: is no checkpoint directory: it has no {CONFIG}")
        return read_json(path)

    def _list_tensors(self) -> dict[str, TensorInfo]:
        single, index = self.path / SINGLE, self.path / INDEX
        if index.is_file():
            return self._list_shards(index)
        if single.is_file():
            return read_header(single)
        shards = sorted(p.name for p in self.path.glob("model-*.safetensors"))
        if shards:
            raise W4A8Error(f"{index}: is missing; without it the shards ({shards[0]}, ...) are no checkpoint")
        others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
        found = f"; found {others[0]}, which is not read: convert it to safetensors" if others else ""
        raise W4A8Error(f"{self.path}: has neither {SINGLE} nor {INDEX}{found}")

    def _list_shards(self, index: Path) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise W4A8Error(f"{index}: has no weight_map")
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            path = self.path / shard
            if Path(shard).name != shard:
                raise W4A8Error(f"{index}: names the shard {shard!r}, which is not a file beside it")
            if not path.is_file():
                raise W4A8Error(f"{path}: is missing, though {INDEX} names it; copy the shard again")
            header = read_header(path)
            for name, info in header.items():
                if name in tensors:
                    raise W4A8Error(f"{path}: {name} is also in {tensors[name].file.name}: a tensor in two shards")
                if name not in weight_map:
                    raise W4A8Error(f"{path}: holds {name}, which {INDEX} does not list")
                tensors[name] = info
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise W4A8Error(f"{self.path / shard}: lacks {name}, which {INDEX} says is there")
        if (self.path / SINGLE).is_file() and SINGLE not in weight_map.values():
            raise W4A8Error(f"{self.path}: has both {SINGLE} and {INDEX} with other shards; remove one of the two")
        return tensors


def resolve(path: str | Path) -> Path:
    """The directory of a checkpoint: `path` itself, or where the Hub's "org/name" was downloaded to.

    Raises:
        W4A8Error: neither is there.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise W4A8Error(f"{local}: is a file; give the checkpoint's directory")
    if not _HUB_NAME.match(str(path)):
        raise W4A8Error(f"{local}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_PATTERNS))
    except Exception as e:  # the hub raises its own, requests', OSError and ValueError
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise W4A8Error(f"{path}: no such directory, and not to be had from the Hugging Face Hub: {reason}") from e


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with our own error if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise W4A8Error(f"{path}: is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise W4A8Error(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value

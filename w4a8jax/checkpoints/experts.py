"""transformers' own layout of experts, seen as the unfused one that all else here reads and writes.

In memory, transformers 5 keeps the experts of a layer in two tensors, and saves them so on request
(`save_pretrained(..., save_original_format=False)`):

    model.layers.{i}.mlp.experts.gate_up_proj   [E, 2F, D], gate before up
    model.layers.{i}.mlp.experts.down_proj      [E, D, F]

Each expert's matrix is a contiguous piece of them, so that nothing is read or copied to take them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pallas_kernels.errors import W4A8Error

from .safetensors_format import TensorInfo

_FUSED = re.compile(r"(?P<parent>.*layers\.\d+\.mlp)\.experts\.(?P<leaf>gate_up_proj|down_proj)$")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def split_experts(tensors: Mapping[str, TensorInfo], model_type: str | None) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, with experts that are fused as one tensor each, under the family's unfused names.

    Raises:
        W4A8Error: a fused tensor has not three axes, or no two halves.
    """
    if not any(map(_FUSED.match, tensors)):
        return dict(tensors)
    result: dict[str, TensorInfo] = {}
    for info in tensors.values():
        for piece in _pieces(info):
            name = _mixtral_name(piece.name) if model_type == "mixtral" else piece.name
            if name in result:
                raise W4A8Error(f"{info.file}: {info.name} holds {name}, which is there by itself too")
            result[name] = TensorInfo(name, piece.dtype, piece.shape, piece.file, piece.offset)
    return result


def _pieces(info: TensorInfo) -> Iterator[TensorInfo]:
    match = _FUSED.match(info.name)
    if match is None:
        yield info
        return
    leaves = ("gate_proj", "up_proj") if match["leaf"] == "gate_up_proj" else ("down_proj",)
    if len(info.shape) != 3 or info.shape[1] % len(leaves):
        layout = {"gate_up_proj": "[experts, 2 * intermediate, hidden]", "down_proj": "[experts, hidden, intermediate]"}
        raise W4A8Error(f"{info.file}: {info.name}: expected {layout[match['leaf']]}, found {list(info.shape)}")
    experts, rows, columns = info.shape
    shape = (rows // len(leaves), columns)
    size = shape[0] * shape[1] * info.dtype.itemsize
    for e in range(experts):
        for i, leaf in enumerate(leaves):
            name = f"{match['parent']}.experts.{e}.{leaf}.weight"
            yield TensorInfo(name, info.dtype, shape, info.file, info.offset + (e * len(leaves) + i) * size)


def _mixtral_name(name: str) -> str:
    name = re.sub(r"(layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name)
    return re.sub(r"(\.experts\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_MIXTRAL.get(m[2], m[2])}.", name)

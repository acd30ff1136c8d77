"""The student: a W4A8 checkpoint whose linears compute from master weights, and the way back to codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from models.decoder import Decoder
from models.families import family
from models.families.common import Names
from models.parameters import Parameter, parameters
from models.sharding import Sharding
from pallas_kernels import W4A8Error, W4Weight
from pallas_kernels.straight_through import MasterWeight

from ..checkpoints.load import load
from ..checkpoints.reader import CheckpointReader
from ..quantization.rtn import quantize_weight

Arrays = dict[str, Array]


def load_pair(
    teacher: str, student: str, *, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> tuple[Decoder, Decoder, Names]:
    """Teacher and student, on the reference path, and the family's table of names.

    Raises:
        W4A8Error: the teacher is quantized, the student is not or is not W4A8, or they differ in shape.
    """
    readers = CheckpointReader(teacher), CheckpointReader(student)
    configs = [family(reader.config).decoder_config(reader.config) for reader in readers]
    for field in dataclasses.fields(configs[0]):
        theirs, ours = (getattr(config, field.name) for config in configs)
        if theirs != ours:
            raise W4A8Error(f"teacher and student differ: {field.name} is {theirs} in {teacher}, {ours} in {student}")
    original = load(teacher, dtype=dtype, kernels=False, mesh=mesh)
    if original.scheme != "bf16":
        raise W4A8Error(f"teacher: {teacher} is quantized; give the checkpoint that the student was made from")
    # "exact" numerics keep the scales as the checkpoint stores them.
    quantized = load(student, dtype=dtype, kernels=False, mesh=mesh, numerics="exact")
    if quantized.scheme != "w4a8":
        raise W4A8Error(f"student: {student} is {quantized.scheme}; give a W4A8 checkpoint, of w4a8jax quantize")
    return original.decoder, quantized.decoder, family(readers[1].config).names


class Student:
    """A decoder as a function of what is trained and of the scales.

    `trainable` holds master weights and other trained parameters in the master dtype, `scales` the group scales (bf16)
    of quantized parameters, `frozen` the other parameters; all by the parameter's path, such as
    "layers.0.attention.qkv.weight".

    Args:
        decoder: the student as loaded in "exact" numerics; it gives grid and codes to begin with.
        teacher: gives the master weights, as far as they round to the student's codes; where they do not (GPTQ), the
            codes' values do. So the student begins as it was given.
        names: of the family.
        train: further parameters to train, "norms" and "embedding".
        master_dtype: of what is trained.

    Raises:
        W4A8Error: nothing in the student is quantized, or a weight has another group size than 128.
    """

    def __init__(
        self, decoder: Decoder, teacher: Decoder, names: Names, *, train: Collection[str] = (), master_dtype: Any
    ):
        self.parameters = parameters(decoder, names)
        self._graph, state = nnx.split(decoder)
        self._state: dict[Any, Any] = dict(nnx.to_flat_state(state))
        originals: dict[Any, Any] = dict(nnx.to_flat_state(nnx.state(teacher, nnx.Param)))
        self.paths = {self.key(path): path for path in self._state}
        self.trainable: Arrays = {}
        self.scales: Arrays = {}
        self.frozen: Arrays = {}
        self._code_min: dict[str, int] = {}
        for path, variable in self._state.items():
            key, value = self.key(path), variable.get_value()
            if isinstance(value, W4Weight):
                if value.group_size != 128:
                    raise W4A8Error(f"{key}: has groups of {value.group_size}, expected 128")
                self.scales[key] = value.group_scale.astype(jnp.bfloat16)
                self._code_min[key] = value.code_min
                self.trainable[key] = _initial_master(
                    originals[path].get_value(), value.packed, self.scales[key], value.code_min, master_dtype
                )
            elif ("norms" in train and "norm" in key) or ("embedding" in train and key == "embedding"):
                self.trainable[key] = value.astype(master_dtype)
            else:
                self.frozen[key] = value
        if not self.scales:
            raise W4A8Error("student: no layer is quantized; there is nothing to train")

    @staticmethod
    def key(path: tuple[Any, ...]) -> str:
        """The name of a parameter in `trainable`, `scales` and `frozen`."""
        return ".".join(map(str, path))

    def merge(
        self, trainable: Mapping[str, Array], scales: Mapping[str, Array], frozen: Mapping[str, Array]
    ) -> Decoder:
        """The decoder that computes from these arrays, which may be tracers."""
        flat = []
        for key, path in self.paths.items():
            variable = self._state[path]
            value: Any
            if key in scales:
                value = MasterWeight(trainable[key], scales[key], self._code_min[key])
            elif key in trainable:
                # Rounded as it will be stored.
                value = trainable[key].astype(jnp.bfloat16).astype(variable.get_value().dtype)
            else:
                value = frozen[key]
            flat.append((path, variable.replace(value)))
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def refit(self, trainable: Mapping[str, Array], scales: Mapping[str, Array]) -> Arrays:
        """Scales searched anew for the master weights, placed as the old ones are."""
        result = {}
        for key, old in scales.items():
            stack = trainable[key].reshape(-1, *trainable[key].shape[-2:])
            found = [
                quantize_weight(matrix, search="fast", code_min=self._code_min[key], name=key).scale for matrix in stack
            ]
            result[key] = jax.device_put(np.stack(found).reshape(old.shape), old.sharding)
        return result

    def tensors(
        self,
        parameter: Parameter,
        trainable: Mapping[str, Array],
        scales: Mapping[str, Array],
        sharding: Sharding | None,
    ) -> dict[str, np.ndarray]:
        """The checkpoint's tensors of a parameter: codes and scales if it is quantized, else values in bf16.

        A parameter that is not trained gives none: its tensors stay as they are in the checkpoint.
        """
        key = self.key(parameter.path)
        if key not in trainable:
            return {}
        if key in scales:
            packed = _pack(trainable[key], scales[key], self._code_min[key])
            arrays = {"weight_packed": np.asarray(packed), "weight_scale": np.asarray(scales[key])}
        else:
            arrays = {parameter.suffix: np.asarray(trainable[key].astype(jnp.bfloat16))}
        order = None if sharding is None else sharding.order(parameter.path, parameter.shape[0])
        if order is not None:
            arrays = {suffix: value[np.argsort(order)] for suffix, value in arrays.items()}
        result = {}
        for suffix, value in arrays.items():
            rows, start = value.reshape(-1, value.shape[-1]) if parameter.kind == "experts" else value, 0
            for modules in parameter.modules:
                for module, count in zip(modules, parameter.rows, strict=True):
                    result[f"{module}.{suffix}"] = np.ascontiguousarray(rows[start : start + count])
                    start += count
        return result


@partial(jax.jit, static_argnums=2)
def _pack(master: Array, scale: Array, code_min: int) -> Array:
    return MasterWeight(master, scale, code_min).quantize().packed


@partial(jax.jit, static_argnums=(3, 4))
def _initial_master(original: Array, packed: Array, scale: Array, code_min: int, dtype: Any) -> Array:
    value = W4Weight.from_checkpoint(packed, scale, code_min=code_min).dequantize()
    master = original.astype(dtype)
    nearest = MasterWeight(master, scale, code_min).quantize().dequantize()
    return jnp.where(nearest == value, master, value.astype(dtype))

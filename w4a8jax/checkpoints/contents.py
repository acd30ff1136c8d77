"""Which tensors an unquantized checkpoint must hold, by its config.json; decides from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pallas_kernels.errors import W4A8Error

from .safetensors_format import TensorSpec

# Left out of what is written, ignored in what is read: recomputed from the config.
BUFFERS = ("rotary_emb.inv_freq",)
OUTPUT_HEAD = "lm_head.weight"


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, before quantization.

    Raises:
        W4A8Error: the model_type is unknown, or the config lacks a value.
    """
    from models.families import family  # brings jax along, which reading a header need not
    from models.parameters import expected_shapes as shapes

    known = family(config)
    return dict(shapes(known.decoder_config(config), known.names))


def check_contents(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Checks an unquantized checkpoint's tensors against its config.

    Raises:
        W4A8Error: the first tensor that is missing, unknown or of another shape; an unknown model_type.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise W4A8Error(f"{where}: {name} is missing; config.json says {list(shape)}")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise W4A8Error(f"{where}: {name} is {found}, but config.json says {list(shape)}")
    for name in tensors:
        if name not in expected and name != OUTPUT_HEAD and not name.endswith(BUFFERS):
            raise W4A8Error(f"{where}: {name} is unknown to a {config['model_type']} model of this config.json")

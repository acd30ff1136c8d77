"""What runs on the chip: the W4A8 weight format, its arithmetic, and the matrix products."""

from .activations import quantize_activations
from .dequantize import lut_levels
from .errors import W4A8Error
from .fragments import FragmentWeight
from .moe import moe_mlp, route, w4a8_moe_mlp
from .ops import (
    backend,
    kernel_takes,
    prepare_weight,
    w4a8_matmul,
    w4a8_ragged_matmul,
    w4a16_matmul,
    w4a16_ragged_matmul,
)
from .partition import Partition
from .rounding import to_e4m3
from .tuning import force_config
from .weight_format import GROUP_SIZE, W4Weight, convert_scales, pack_codes, unpack_codes

__all__ = [
    "GROUP_SIZE",
    "FragmentWeight",
    "Partition",
    "W4A8Error",
    "W4Weight",
    "backend",
    "convert_scales",
    "force_config",
    "kernel_takes",
    "lut_levels",
    "moe_mlp",
    "pack_codes",
    "prepare_weight",
    "quantize_activations",
    "route",
    "to_e4m3",
    "unpack_codes",
    "w4a8_matmul",
    "w4a8_moe_mlp",
    "w4a8_ragged_matmul",
    "w4a16_matmul",
    "w4a16_ragged_matmul",
]

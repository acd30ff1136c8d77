"""Makes quantized checkpoints with compressed-tensors, as llm-compressor does: make_compressed.py FOLDER

FOLDER/job.json lists them; each becomes FOLDER/NAME/. FOLDER/numerics.safetensors holds operands and results of single
operations: compressed-tensors' packing, and the scale and activation arithmetic written anew in torch.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from logits import randomize
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

E4M3_MAX = 448.0
MIN_SCALE = torch.tensor(0x36924925, dtype=torch.int32).view(torch.float32)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    save_file({**packing(), **scales(), **activations()}, folder / "numerics.safetensors")
    for case in json.loads((folder / "job.json").read_text())["cases"]:
        make_checkpoint(folder / case["name"], case)


@torch.no_grad()
def make_checkpoint(path: Path, case: dict) -> None:
    """A random bf16 model, quantized by minimum and maximum of each group unless `preset` is null.

    `fused`: transformers' own layout of experts rather than one tensor for each.
    """
    config = AutoConfig.for_model(**case["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomize(model)
    if case["preset"] is None:
        model.save_pretrained(path, save_original_format=not case["fused"])
        return
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[case["preset"]])
    scheme.weights.group_size = case["group_size"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=case["ignore"]))
    for module in model.modules():
        quantization = getattr(module, "quantization_scheme", None)
        if quantization is not None:
            groups = module.weight.unflatten(1, (-1, case["group_size"]))
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), quantization.weights)
            module.weight_scale.copy_(scale)
            module.weight_zero_point.copy_(zero_point)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)


def packing() -> dict[str, torch.Tensor]:
    """codes.I, packed.I and words.I, unpacked.I for several I."""
    codes = [torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((1, 8), (3, 16), (64, 256), (5, 1024))]
    codes += [torch.full((2, 16), code, dtype=torch.int8) for code in (-8, -1, 0, 7)]
    codes.append(torch.arange(-8, 8, dtype=torch.int8).repeat(16, 16).add(8).roll(3, 1).sub(8))
    words = [torch.randint(-(2**31), 2**31, (17, 33), dtype=torch.int32)]
    words.append(torch.tensor([[-(2**31), 2**31 - 1, 0, -1, 1]], dtype=torch.int32))
    result = {}
    for i, code in enumerate(codes):
        result |= {f"codes.{i}": code, f"packed.{i}": pack_to_int32(code, 4)}
    for i, word in enumerate(words):
        result |= {f"words.{i}": word, f"unpacked.{i}": unpack_from_int32(word, 4, (word.shape[0], 8 * word.shape[1]))}
    return {name: tensor.contiguous() for name, tensor in result.items()}


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def unit(largest: torch.Tensor) -> torch.Tensor:
    return torch.maximum(largest / E4M3_MAX, MIN_SCALE)


def scales() -> dict[str, torch.Tensor]:
    """bf16 scales [N, G] of all sizes, and what becomes of them."""
    usual = 0.01 * torch.rand(2048, 16)
    spread = torch.exp(8 * torch.randn(2048, 16))
    tiny = 1e-6 * torch.rand(256, 16)
    # Every positive finite bf16 beside a largest one that makes it normal, subnormal and zero.
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    beside = torch.stack([every, every * 448, every * 3584, every * 5000], 1)
    beside = beside[torch.isfinite(beside).all(1)].repeat_interleave(4, 1)
    scale = torch.cat([usual, spread, tiny, torch.zeros(1, 16), beside]).clamp(max=3e38).to(torch.bfloat16)
    wide = scale.float()
    c0 = unit(wide.amax(1))
    g = to_e4m3(to_e4m3(wide / c0[:, None]).float() / 8)
    return {"scale": scale, "group_scale": g.view(torch.uint8), "channel_scale": 8 * c0}


def activations() -> dict[str, torch.Tensor]:
    """bf16 activations [M, K], with ordinary tokens, outliers, tiny values and zeros."""
    x = torch.randn(512, 256) * torch.exp(3 * torch.randn(512, 1))
    x[:64, ::17] *= 100
    x[64:96] *= 1e-8
    x[96] = 0
    x = x.to(torch.bfloat16)
    token_scale = unit(x.float().abs().amax(1, keepdim=True))
    return {"x": x, "x8": to_e4m3(x.float() / token_scale).view(torch.uint8), "token_scale": token_scale}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Reads quantized checkpoints with transformers and compressed-tensors: read_compressed.py FOLDER NAME ...

For each checkpoint FOLDER/NAME it writes

    NAME.weights.safetensors  every parameter of the model, dequantized, in bf16
    NAME.logits.safetensors   tokens int64 [B, S] and fp32 logits [B, S, V]: "w4a8" with activations fake-quantized as
                              the config says, "w4a16" without, and both of the model in bf16 ("w4a8_bf16", ...);
                              those of experts never are, since transformers dequantizes experts as it loads them
    NAME.linear.safetensors   x [M, K] and y [M, N], fp32, of the first gate projection, activations quantized as said
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        result = {}
        for suffix, dtype in (("", torch.float32), ("_bf16", torch.bfloat16)):
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).eval()
            if not result:
                result["tokens"] = torch.randint(0, model.config.vocab_size, (2, 24))
            # The first call dequantizes the weights.
            result[f"w4a8{suffix}"] = model(result["tokens"]).logits.float()
            if dtype == torch.bfloat16:
                # Tied parameters are one tensor, which safetensors refuses to write twice.
                weights = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
                save_file(weights, folder / f"{name}.weights.safetensors")
            elif hasattr(model.model.layers[0].mlp, "gate_proj"):
                x = torch.randn(1, 64, model.config.hidden_size)
                y = model.model.layers[0].mlp.gate_proj(x)
                save_file({"x": x[0], "y": y[0]}, folder / f"{name}.linear.safetensors")
            for module in model.modules():
                module.quantization_enabled = False
            result[f"w4a16{suffix}"] = model(result["tokens"]).logits.float()
        save_file(result, folder / f"{name}.logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

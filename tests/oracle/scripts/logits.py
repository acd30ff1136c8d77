"""Writes random checkpoints and transformers' logits of them: logits.py FOLDER

FOLDER/job.json says what is wanted; FOLDER/NAME/ becomes the checkpoint and FOLDER/NAME.safetensors holds

    tokens  int64 [B, S]   sequences, zeros after their end
    cached  fp32 [B, S, V] logits: the prompt, the chunk and each step through transformers' own cache
    whole   fp32 [B, S, V] logits from one pass over each sequence; "dynamic" and "longrope" positions differ by this
    bf16    fp32 [B, S, V] the same of the model in bf16
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    for seed, case in enumerate(job["cases"]):
        torch.manual_seed(seed)
        checkpoint = folder / case["name"]
        checkpoint.mkdir()
        # Read from a file, as everyone's config is.
        (checkpoint / "config.json").write_text(json.dumps(case["config"]))
        config = AutoConfig.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        model.save_pretrained(checkpoint, save_original_format=case["verbatim"])
        if case["verbatim"]:
            (checkpoint / "config.json").write_text(json.dumps(case["config"]))
        lengths = [p + c + job["steps"] for p, c in zip(job["prompts"], job["chunks"], strict=True)]
        shape = (len(lengths), max(lengths))
        tokens = torch.zeros(shape, dtype=torch.int64)
        cached, whole, bf16 = (torch.zeros(*shape, config.vocab_size) for _ in range(3))
        for row, (length, prompt, chunk) in enumerate(zip(lengths, job["prompts"], job["chunks"], strict=True)):
            tokens[row, :length] = torch.randint(0, config.vocab_size, (length,))
            pieces = [prompt, chunk] + [1] * job["steps"]
            cached[row, :length] = cached_logits(model, tokens[row : row + 1, :length], pieces)
        for dtype, result in ((torch.float32, whole), (torch.bfloat16, bf16)):
            model.to(dtype)
            for row, length in enumerate(lengths):
                result[row, :length] = whole_logits(model, tokens[row : row + 1, :length])
        arrays = {"tokens": tokens, "cached": cached, "whole": whole, "bf16": bf16}
        save_file(arrays, folder / f"{case['name']}.safetensors")


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights that keep the signal's size, and norms and biases that matter."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.4 * noise)
        elif "embed" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def cached_logits(model: torch.nn.Module, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits of one sequence, [S, V], fed in pieces."""
    reset(model)
    cache = DynamicCache(config=model.config)
    logits = [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in tokens.split(pieces, 1)]
    return torch.cat(logits)


@torch.no_grad()
def whole_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence, [S, V], from one pass."""
    reset(model)
    return model(tokens, use_cache=False).logits[0].float()


@torch.no_grad()
def reset(model: torch.nn.Module) -> None:
    """Dynamic positions remember the longest sequence so far until a short one comes."""
    model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Loads W4A8 checkpoints through vLLM's own loader on a machine without a GPU, and compares what arrived.

    .venv-vllm/bin/python tests/vllm/load_check.py CHECKPOINT... [--report FILE.json] [--operands FILE.safetensors]

vLLM is told that it runs on one NVIDIA H200; no kernel is executed. For every checkpoint:
  - vLLM must accept the config and every shape,
  - every quantized linear must be served by the CUTLASS W4A8 kernel and by no fallback, and experts by its grouped one,
  - every parameter is poisoned before the load, and none may keep poison in any row: vLLM itself does not notice
    a missing tensor and would run on uninitialised memory,
  - every parameter must equal the checkpoint's tensors bit for bit, fused as vLLM fuses them (q, k, v; gate, up;
    experts),
  - every tensor of the checkpoint must have arrived in some parameter.
Exits with 1 if any checkpoint fails, after a summary of each. `--report` writes the findings as JSON, `--operands`
the codes and scales that vLLM's own conversion makes of the loaded tensors.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",  # a stream needs a GPU
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The compiled kernels need the driver's library just to be imported. Loading runs none of them: empty modules do.
for _kernels in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "vllm_flash_attn._vllm_fa3_C"):
    sys.modules[f"vllm.{_kernels}"] = types.ModuleType(f"vllm.{_kernels}")

import torch  # noqa: E402
import vllm  # noqa: E402
import vllm.platforms  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SCHEME = "CompressedTensorsW4A8Fp8"
KERNEL = "CutlassW4A8LinearKernel"
# Of attention and its KV cache: vLLM's own, with defaults where a checkpoint has none.
# Likewise the channel scales of experts, which vLLM computes after the load.
NOT_STORED = re.compile(r"\.attn\.([qkv]|prob)_(scale|zero_point)$|\.w(13|2)_weight_chan_scale$")
# A layer's experts are one parameter [E, ...]; of w13, gate and up by rows. Their names in a checkpoint:
EXPERTS = re.compile(r"(.*\.experts)\.routed_experts\.(w13|w2)_(weight_\w+)$")
EXPERT_PARTS = {
    "mlp": {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)},
    "block_sparse_moe": {"w13": ("w1", "w3"), "w2": ("w2",)},
}
MOE_METHOD = "CompressedTensorsW4A8Fp8MoEMethod"
INT_POISON = -77


@dataclasses.dataclass
class Report:
    """What vLLM made of one checkpoint."""

    checkpoint: str
    model: str = ""
    refusal: str = ""
    linears: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    equal: int = 0
    tensors: int = 0
    nbytes: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.refusal or self.problems)

    def __str__(self) -> str:
        lines = [f"{self.checkpoint}: {'ok' if self.ok else 'FAILED'}"]
        if self.refusal:
            lines.append(f"  refused by vLLM: {textwrap.shorten(self.refusal, 240)}")
        else:
            served = ", ".join(f"{count} x {name}" for name, count in self.linears.items())
            lines.append(f"  {self.model}: {served or 'no quantized linear'}")
            lines.append(
                f"  {self.equal} of {self.parameters} parameters equal the checkpoint bit for bit:"
                f" {self.tensors} tensors, {self.nbytes / 2**20:.2f} MiB"
            )
        lines += [f"  PROBLEM {problem}" for problem in self.problems]
        return "\n".join(lines)


def pretend_h200() -> None:
    """Makes vLLM and torch believe in one H200."""
    from vllm.platforms.cuda import NonNvmlCudaPlatform as Platform
    from vllm.platforms.interface import DeviceCapability

    Platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    Platform.get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200")
    Platform.get_device_total_memory = classmethod(lambda cls, device_id=0: 140 << 30)
    Platform.num_compute_units = classmethod(lambda cls, device_id=0: 132)
    vllm.platforms._current_platform = Platform()
    from vllm import _custom_ops  # noqa: F401  imported while the kernels are absent, lest it declare their shapes

    torch.ops._C = mock.MagicMock(name="torch.ops._C")  # models look their kernels up when they are built
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *args, **kwargs: "NVIDIA H200"
    torch.cuda.device_count = lambda: 1


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan") if parameter.is_floating_point() else INT_POISON)


@contextlib.contextmanager
def loaded(checkpoint: Path) -> Iterator[torch.nn.Module]:
    """vLLM's model of `checkpoint` on the CPU, as it is before its weights are reordered for the kernel."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import registry
    from vllm.utils.torch_utils import set_default_torch_dtype

    registry._run_in_subprocess = lambda function: function()  # a new process would not believe in the H200
    config = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        use_tqdm_on_load=False,
    ).create_engine_config()
    with set_current_vllm_config(config):
        if model_parallel_is_initialized():
            destroy_model_parallel()  # a model with experts needs more groups than the one before may have had
        else:
            port = 20000 + os.getpid() % 20000
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        config.device_config.device, config.device_config.device_type = torch.device("cpu"), "cpu"
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            model = initialize_model(vllm_config=config)
        poison(model)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        yield model


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not iterable
    return tensors


def stored_parts(name: str, fusions: dict[str, list[str]]) -> list[str]:
    """The checkpoint's names of the tensors that vLLM stacks by rows into its parameter `name`."""
    prefix, _, leaf = name.rpartition(".")
    parent, _, module = prefix.rpartition(".")
    return [f"{parent}.{part}.{leaf}" if parent else name for part in fusions.get(module, [module])]


def expert_parts(name: str, tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """The checkpoint's names of what vLLM stacks into the experts' parameter `name`, for each expert."""
    if (match := EXPERTS.match(name)) is None:
        return []
    experts, kind, leaf = match.groups()
    leaves = EXPERT_PARTS[experts.split(".")[-2]][kind]
    count = len({key.removeprefix(experts).split(".")[1] for key in tensors if key.startswith(f"{experts}.")})
    return [[f"{experts}.{e}.{part}.{leaf}" for part in leaves] for e in range(count)]


def unwritten_rows(value: torch.Tensor) -> str:
    """How many rows still hold poison, as "3 of 8 rows"; "" if none does."""
    rows = value.reshape(-1, value.shape[-1] if value.ndim > 1 else 1)
    poisoned = rows.isnan().any(1) if value.is_floating_point() else (rows == INT_POISON).all(1)
    return f"{int(poisoned.sum())} of {len(rows)} rows" if poisoned.any() else ""


def compare(report: Report, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Compares every parameter of the loaded `model` with the checkpoint's `tensors`."""
    arrived = set()
    for name, parameter in model.named_parameters():
        if NOT_STORED.search(name):
            continue
        value, experts = parameter.detach(), expert_parts(name, tensors)
        parts = [part for each in experts for part in each] or stored_parts(name, model.packed_modules_mapping)
        report.parameters += 1
        if rows := unwritten_rows(value):
            report.problems.append(f"{name}: {rows} never written by the load")
        arrived.update(set(parts) & set(tensors))
        if missing := [part for part in parts if part not in tensors]:
            report.problems.append(f"{name}: the checkpoint has no {', '.join(missing)}")
            continue
        stored = [tensors[part] for part in parts]
        report.nbytes += sum(part.nbytes for part in stored)
        # weight_shape is [N, K] of one part: vLLM keeps the last one's, and an expert's as floats.
        if experts and name.endswith("weight_shape"):
            expected = torch.stack([tensors[each[-1]] for each in experts]).to(value.dtype)
        elif experts:
            expected = torch.stack([torch.cat([tensors[part] for part in each]) for each in experts])
        else:
            expected = stored[-1] if name.endswith(".weight_shape") else torch.cat(stored)
        if name.endswith("gate.weight"):  # a router may be stored in fp32; vLLM rounds it
            expected = expected.to(value.dtype)
        if "embed_tokens" in name or "lm_head" in name:  # vLLM pads the vocabulary
            value = value[: len(expected)]
        if value.dtype != expected.dtype or value.shape != expected.shape:
            report.problems.append(
                f"{name}: vLLM has {value.dtype} {list(value.shape)},"
                f" the checkpoint {expected.dtype} {list(expected.shape)}"
            )
        elif not torch.equal(value.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
            report.problems.append(f"{name}: differs from the checkpoint")
        else:
            report.equal += 1
    report.tensors = len(arrived)
    report.problems += [f"{name}: in the checkpoint, in no parameter" for name in sorted(set(tensors) - arrived)]


def check_kernels(report: Report, model: torch.nn.Module) -> None:
    """Records scheme and kernel of every linear that vLLM takes for quantized, and how it computes experts."""
    chosen: collections.Counter[str] = collections.Counter()
    for name, module in model.named_modules():
        if hasattr(module, "w13_weight_packed") or hasattr(module, "w13_weight"):
            method = type(module.quant_method).__name__
            chosen[method] += 1
            if method != MOE_METHOD:
                report.problems.append(f"{name}: served by {method}")
        if (scheme := getattr(module, "scheme", None)) is None:
            continue
        scheme_name, kernel_name = type(scheme).__name__, type(getattr(scheme, "kernel", None)).__name__
        chosen[f"{scheme_name} on {kernel_name}"] += 1
        if (scheme_name, kernel_name) != (SCHEME, KERNEL):
            report.problems.append(f"{name}: served by {scheme_name} on {kernel_name}")
    if not chosen:
        report.problems.append("no quantized linear")
    report.linears = dict(chosen)


def kernel_operands(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What vLLM makes of every quantized linear after loading it, before the kernel's own order of elements.

    `.codes` int32 [N, K/8] (two's complement nibbles), `.group_scale` uint8 [N, G] (the bits of e4m3),
    `.channel_scale` fp32 [N, 1]. On the CPU vLLM's FP8 quantization multiplies by 1/x where its CUDA kernel divides.
    """
    from vllm.model_executor.layers.quantization.utils import quant_utils

    operands = {}
    for name, module in model.named_modules():
        if type(getattr(module, "scheme", None)).__name__ != SCHEME:
            continue
        with torch.no_grad(), mock.patch.object(torch.Tensor, "is_cuda", True):  # it asserts, but needs no GPU
            codes = quant_utils.convert_packed_uint4b8_to_signed_int4_inplace(module.weight_packed.data.clone())
            group_scale, channel_scale = quant_utils.convert_bf16_scales_to_fp8(
                module.scheme.kernel.quant_fp8.forward_native, module.weight_scale.data.contiguous()
            )
        operands |= {
            f"{name}.weight_packed": module.weight_packed.data,
            f"{name}.weight_scale": module.weight_scale.data,
            f"{name}.codes": codes,
            f"{name}.group_scale": group_scale.view(torch.uint8),
            f"{name}.channel_scale": channel_scale,
        }
    return operands


def check(checkpoint: Path, operands: dict[str, torch.Tensor] | None = None) -> Report:
    """Loads and compares one checkpoint; adds vLLM's operands to `operands`, if given."""
    report = Report(checkpoint.name)
    try:
        with loaded(checkpoint) as model:
            report.model = type(model).__name__
            check_kernels(report, model)
            compare(report, model, read_tensors(checkpoint))
            if operands is not None:
                operands |= {f"{checkpoint.name}/{name}": tensor for name, tensor in kernel_operands(model).items()}
    except Exception as error:  # whatever vLLM raises is the finding
        report.refusal = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Load W4A8 checkpoints through vLLM's own loader, without a GPU.")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--report", type=Path, help="write the findings as JSON")
    parser.add_argument("--operands", type=Path, help="write vLLM's codes and scales as safetensors")
    arguments = parser.parse_args()
    pretend_h200()
    print(f"vLLM {vllm.__version__}, torch {torch.__version__}, as if on one {torch.cuda.get_device_name()}")
    reports: list[Report] = []
    operands: dict[str, torch.Tensor] | None = {} if arguments.operands else None
    for checkpoint in arguments.checkpoints:
        reports.append(check(checkpoint, operands))
        print(reports[-1], flush=True)
    if arguments.report:
        findings = [dataclasses.asdict(report) | {"ok": report.ok} for report in reports]
        arguments.report.write_text(json.dumps(findings, indent=2))
    if arguments.operands:
        save_file(operands, arguments.operands)
    return int(not all(report.ok for report in reports))


if __name__ == "__main__":
    sys.exit(main())

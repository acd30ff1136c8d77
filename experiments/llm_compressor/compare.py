"""w4a8jax's GPTQ beside llm-compressor's (W4AFP8): time and quality, on the same model, calibration ids and machine.

    make llm-compressor-env
    python experiments/llm_compressor/compare.py

Each quantization runs in a process of its own, each tool in its environment, in turns, pinned to `--cores` cores with
as many threads. With several cores and other work on the machine, threads wait for one another, and wall time says
little: one core is the default, and CPU time (user and system, all threads) stands beside wall time. Whole processes
are measured, interpreter, imports, compilation and all, and of them the quantization: from the model and tokens in
memory (llm-compressor) or the path of the checkpoint (w4a8jax, which reads and writes it as it goes).

Run r of `--runs` calibrates on the windows of seed r of ../calibration.py, 128 of 512 tokens. Both checkpoints are
evaluated by w4a8jax in the arithmetic of vLLM's kernel, on the texts of ../calibration.py; llm-compressor's scales are
converted as vLLM converts them when it loads them.

llm-compressor computes in the checkpoint's bf16, for which not every processor has instructions; without them torch
takes several times as long as in fp32. The variants "fp32" load the model so: where /proc/cpuinfo has no avx512_bf16,
compare with those.

With `--synthetic HIDDEN` the model is a larger cohere2 of `--layers` layers with random weights (hidden 1024 and MLP
4096, or 4096 and 14336, Command R7B's), and only time is measured. With `--gpu` both tools run on this machine's GPU,
and `--cores` counts for nothing; llm-compressor runs in `--their-python`. Writes
experiments/results/llm_compressor.json, or llm_compressor_synthetic.json, or `--out`.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import w4a8jax

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import calibration  # noqa: E402
from synthetic import SIZES, synthetic_model  # noqa: E402

RESULTS = HERE.parent / "results"
PYTHON = {"theirs": HERE.parents[1] / ".venv-llmcompressor/bin/python", "ours": Path(sys.executable)}
AGAIN = "quantize again"
# llm-compressor's defaults are act order "static", damping 0.01, scales from the largest weight.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llm-compressor": ("theirs", {}),
    "llm-compressor, MSE observer": ("theirs", {"weight_observer": "memoryless_mse"}),
    "llm-compressor, importance observer": ("theirs", {"weight_observer": "imatrix_mse"}),
    "llm-compressor, no act order": ("theirs", {"actorder": None}),
    # The model in fp32, not as its checkpoint says: faster where the processor has no instructions for bf16.
    "llm-compressor, fp32": ("theirs", {"dtype": "float32"}),
    "llm-compressor, MSE observer, fp32": ("theirs", {"dtype": "float32", "weight_observer": "memoryless_mse"}),
    "w4a8jax": ("ours", {}),
    "w4a8jax, act order": ("ours", {"act_order": True}),
    # As llm-compressor's codes are; the kernel is faster for codes from -7 on, the default.
    "w4a8jax, codes -8..7": ("ours", {"code_min": -8}),
}


def child(side: str, job: dict[str, Any], gpu: bool, folder: Path) -> dict[str, Any]:
    """Runs one quantization; what it printed, and the whole process's wall and CPU time.

    Ours quantizes twice in its process, the second time with all compiled, which does not count for the whole.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [PYTHON[side], HERE / f"{side}.py", path]
    if not gpu:
        environment |= {"OMP_NUM_THREADS": str(job["threads"]), "JAX_PLATFORMS": "cpu"}
        allowed = sorted(os.sched_getaffinity(0))[: job["threads"]]
        command = ["taskset", "-c", ",".join(map(str, allowed)), *command]
    load, began = os.getloadavg()[0], time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    lines = (folder / "log").read_text().splitlines()
    if process.returncode:
        raise SystemExit("\n".join([*lines[-40:], f"{side}.py failed: {job}"]))
    found = json.loads(lines[-1])
    second = found["phases"].get(AGAIN, {"wall": 0.0, "cpu": 0.0})
    whole = {"wall": time.perf_counter() - began - second["wall"], "cpu": used.ru_utime + used.ru_stime - second["cpu"]}
    return {**found, "whole": whole, "load_before": load}


def evaluate(target: Path, source: Path, original: Any, texts: dict[str, str], tokens: int) -> dict[str, Any]:
    """Quality of a checkpoint; llm-compressor's gets the tokenizer of the original."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (target / name).exists():
            shutil.copy(source / name, target)
    return calibration.on_texts(w4a8jax.load(target, kernels=False), original, texts, tokens)


def machine(cores: int, gpu: bool) -> dict[str, Any]:
    """What the times depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    found = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    if not gpu:
        return found | {"cores_used": cores}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return found | {"gpu": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}


def main(options: argparse.Namespace) -> None:
    synthetic, runs, cores, gpu = options.synthetic, options.runs, options.cores, options.gpu
    PYTHON["theirs"] = options.their_python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = w4a8jax.reference_model("dense")
        if synthetic:
            source = synthetic_model(folder / "synthetic", synthetic, options.layers)
        result = options.out or RESULTS / ("llm_compressor_synthetic.json" if synthetic else "llm_compressor.json")
        texts = {} if synthetic else calibration.texts()
        original = None if synthetic else w4a8jax.load(source)
        record: dict[str, Any] = {
            "command": " ".join(["python experiments/llm_compressor/compare.py", *sys.argv[1:]]),
            "machine": machine(cores, gpu),
            "versions": {"python": platform.python_version()},
            "model": f"hidden {synthetic}, {options.layers} layers" if synthetic else "dense reference model",
            "runs": [],
        }
        if options.resume:
            kept = json.loads(result.read_text())
            record |= {part: kept[part] for part in ("versions", "runs")}
        for seed in range(runs):
            data = calibration.windows(w4a8jax.reference_model("dense"), seed)
            (folder / "tokens.json").write_text(
                json.dumps([sample.tokens.tolist() for sample in data.samples][: options.windows])
            )
            for variant, (side, recipe) in VARIANTS.items():
                known = any((row["name"], row["seed"]) == (variant, seed) for row in record["runs"])
                if known or (options.only and variant not in options.only):
                    continue
                target = folder / "quantized"
                job = {
                    "source": str(source), "target": str(target), "tokens": str(folder / "tokens.json"),
                    "threads": os.cpu_count() if gpu else cores, "options": recipe,
                }  # fmt: skip
                row = {"name": variant, "seed": seed, **child(side, job, gpu, folder)}
                record["versions"] |= row.pop("versions")
                if original is not None:
                    row["quality"] = evaluate(target, source, original, texts, options.tokens)
                record["runs"].append(row)
                for made in folder.glob("quantized*"):
                    shutil.rmtree(made)
                record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                result.write_text(json.dumps(record, indent=1) + "\n")
                print(variant, seed, row["whole"], row["phases"]["quantize"], row["load_before"], flush=True)
                print(" ", {text: round(found["kl"], 5) for text, found in row.get("quality", {}).items()}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20000, help="of each text that is evaluated")
    parser.add_argument("--synthetic", type=int, choices=SIZES, metavar="HIDDEN")
    parser.add_argument("--layers", type=int, default=4, help="of the synthetic model")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--their-python", type=Path, default=PYTHON["theirs"], help="that has llm-compressor")
    parser.add_argument("--out", type=Path, help="the record")
    parser.add_argument("--windows", type=int, default=calibration.WINDOWS, help="of calibration data")
    parser.add_argument("--resume", action="store_true", help="add to the record what it does not have")
    parser.add_argument("--only", action="append", default=[], help="a variant's name; all by default")
    jax.config.update("jax_platforms", "cpu")
    main(parser.parse_args())

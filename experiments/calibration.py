"""What calibration gains on a reference model, with the spread over calibration seeds.

    python experiments/calibration.py [--model moe]

Two experiments, on the CPU:

recipes: rounding to nearest and GPTQ, each once with the objective of plain INT4 (the stored code * scale is what is
    brought near the original, as other tools do) and once with the kernel's (e4m3(code * group_scale) * channel_scale);
    the latter with equalization too. Of the model with experts also GPTQ with every token counting alike for every
    expert. All of them run in the kernel's arithmetic. Calibration: 128 windows of 512 tokens, each from another
    document of the train split. Evaluated on three texts: the first tokens of the test split; English prose, the
    licenses in Debian's /usr/share/common-licenses; C, the headers of the Python at hand. SHA-256 of the texts are in
    the record.
masks: GPTQ on agentic traces (agentic_traces.py), with all tokens counting and with the default mask, from the same
    number of traces; evaluated on the unmasked tokens of unseen traces, whose turns are from the test split. Of the
    dense model only.

Writes experiments/results/calibration.json, or calibration_moe.json, after every run; goes on from it with --resume.
"""

import argparse
import datetime
import hashlib
import json
import platform
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import agentic_traces
import jax
import jax.numpy as jnp
import numpy as np

import w4a8jax
from w4a8jax.calibration import DEFAULT_MASK, CalibrationData
from w4a8jax.reference import reference_documents

RESULTS = Path(__file__).with_name("results")
LICENSES = Path("/usr/share/common-licenses")
WINDOWS, WINDOW = 128, 512
TRACES, UNSEEN = 16, 12
RTN = {
    "RTN, largest weight / 7": {"search": "none"},
    "RTN, plain INT4 objective": {"numerics": "exact"},
    "RTN, kernel-exact": {},
}
GPTQ = {"GPTQ, plain INT4 objective": {"numerics": "exact"}, "GPTQ, kernel-exact": {}}
ALIKE = {"GPTQ, kernel-exact, all tokens alike": {"unrouted_weight": 1.0}}
EQUALIZED = {
    "RTN, kernel-exact, equalized": {"equalize": True},
    "GPTQ, kernel-exact, equalized": {"method": "gptq", "equalize": True},
}
MASKS: dict[str, tuple[str, ...]] = {"all tokens": (), "default mask": tuple(DEFAULT_MASK)}


def texts() -> dict[str, str]:
    """What is evaluated, by name."""
    licenses = [path for path in sorted(LICENSES.glob("*")) if path.is_file() and not path.is_symlink()]
    headers = sorted(Path(sysconfig.get_path("include")).glob("*.h"))
    found = {"test split": w4a8jax.reference_text("test")}
    for name, paths in (("prose", licenses), ("C", headers)):
        if paths:
            found[name] = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return found


def windows(source: Path, seed: int) -> CalibrationData:
    """Calibration data: a window of each of some documents drawn from the train split."""
    draw, records = random.Random(seed), []
    tokenizer = w4a8jax.Tokenizer.from_directory(source)
    documents = [text for _, text in reference_documents("train") if len(text) > 8 * WINDOW]
    for text in draw.sample(documents, WINDOWS):
        begin = draw.randrange(len(text) - 8 * WINDOW + 1)
        tokens = tokenizer.encode(text[begin : begin + 8 * WINDOW], add_special_tokens=False)
        records.append({"tokens": tokens[:WINDOW]})
    return w4a8jax.load_calibration(source, records)


def quantized(source: Path, **recipe: Any) -> tuple[w4a8jax.LanguageModel, dict[str, Any]]:
    """A quantized model, as vLLM's kernel runs it, and what is known of how it was made."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        summary = w4a8jax.quantize(source, Path(folder) / "model", progress=False, **recipe)
        made = {"seconds": round(time.perf_counter() - began, 1), "calibration": summary.calibration}
        made["fallbacks"] = [layer.name for layer in summary.layers if layer.fallback]
        return w4a8jax.load(Path(folder) / "model", kernels=False), made


def on_texts(model: Any, original: Any, evaluated: dict[str, str], tokens: int) -> dict[str, dict[str, float]]:
    """Perplexity, KL and top-1 agreement on each text's first tokens."""
    found = {}
    for name, text in evaluated.items():
        result = w4a8jax.compare(model, original, text, max_tokens=tokens)
        found[name] = {
            "tokens": result.model.tokens,
            "perplexity": result.model.perplexity,
            "perplexity_bf16": result.original.perplexity,
            "kl": result.kl_mean,
            "top1": result.top1_agreement,
        }
    return found


def on_traces(model: Any, original: Any, data: CalibrationData) -> dict[str, float]:
    """The same for predictions of the tokens that count."""
    sums, count = np.zeros(4), 0
    for sample in data.samples:
        at = np.flatnonzero(sample.loss_mask[1:])
        ours, theirs = (jax.nn.log_softmax(m.logits(sample.tokens)[at], axis=-1) for m in (model, original))
        target = sample.tokens[1:][at]
        sums += [
            -float(jnp.take_along_axis(ours, target[:, None], axis=1).sum()),
            -float(jnp.take_along_axis(theirs, target[:, None], axis=1).sum()),
            float(jnp.sum(jnp.exp(theirs) * (theirs - ours))),
            float(jnp.sum(jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1))),
        ]
        count += len(at)
    ours, theirs, kl, top1 = (sums / count).tolist()
    perplexities = {"perplexity": float(np.exp(ours)), "perplexity_bf16": float(np.exp(theirs))}
    return {"tokens": count, **perplexities, "kl": kl, "top1": top1}


def main(model: str, seeds: int, tokens: int, resume: bool) -> None:
    source = w4a8jax.reference_model(model)
    file = RESULTS / ("calibration.json" if model == "dense" else f"calibration_{model}.json")
    original = w4a8jax.load(source)
    evaluated = texts()
    record: dict[str, Any] = {
        "command": f"python experiments/calibration.py --model {model} --seeds {seeds} --tokens {tokens}",
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "w4a8jax": w4a8jax.__version__},
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in evaluated.items()},
        "recipes": [],
        "masks": [],
    }
    if resume:
        earlier = json.loads(file.read_text())
        counts = {text["tokens"] for row in earlier["recipes"] for text in row["found"].values()}
        if earlier["texts"] != record["texts"] or counts - {tokens}:
            raise SystemExit(f"{file}: was made on other texts, or on {counts} tokens of each")
        record |= {part: earlier[part] for part in ("recipes", "masks")}
        record["command"] = f"{earlier['command']}; then {record['command']} --resume"
    unseen = w4a8jax.load_calibration(source, agentic_traces.traces("test", UNSEEN, 0))
    gptq = partial(quantized, source, method="gptq")

    def run(part: str, name: str, seed: int | None, make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        if any((row["name"], row["seed"]) == (name, seed) for row in record[part]):
            return
        model, made = make()
        found = on_texts(model, original, evaluated, tokens) if part == "recipes" else {}
        if part == "masks":
            found = {"unseen traces": on_traces(model, original, unseen)}
        record[part].append({"name": name, "seed": seed, **made, "found": found})
        record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(part, name, seed, made["seconds"], {k: round(v["kl"], 5) for k, v in found.items()}, flush=True)

    for name, recipe in RTN.items():
        run("recipes", name, None, partial(quantized, source, **recipe))
    for seed in range(seeds):
        data = windows(source, seed)
        for name, recipe in (GPTQ | (ALIKE if model == "moe" else {})).items():
            run("recipes", name, seed, partial(gptq, calibration=data, **recipe))
        for name, recipe in EQUALIZED.items():
            run("recipes", name, seed, partial(quantized, source, calibration=data, **recipe))
    if model == "dense":
        run("masks", "RTN, kernel-exact", None, partial(quantized, source))
        for seed in range(seeds):
            records = agentic_traces.traces("train", TRACES, seed)
            for name, mask in MASKS.items():
                data = w4a8jax.load_calibration(source, records, mask=mask)
                run("masks", name, seed, partial(gptq, calibration=data))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20000, help="of each text")
    parser.add_argument("--resume", action="store_true")
    main(**vars(parser.parse_args()))

"""Quantization-aware distillation of a reference model, and what it gives on the test split.

    python experiments/reference_models/prepare.py --out .data
    python experiments/distill.py --model dense --data .data --out OUT

Quantizes the reference model by rounding to nearest (or takes --student), distills it on the training documents, and
compares the student before and after with bf16 on the test split, which neither training nor distillation saw. Writes,
of the model "dense", OUT/distill_dense.json, OUT/distill_dense.png and OUT/student_dense, a checkpoint of about 4 MB
for `w4a8jax.load`. On a CPU, a smoke test: --steps 20 --batch 8 --length 512 --test-tokens 10000.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import w4a8jax
from w4a8jax.calibration import CalibrationData, Sample

sys.path.insert(0, str(Path(__file__).with_name("reference_models")))
from stream import Corpus, Stream


def training_data(folder: Path, mix: str, sequences: int, length: int, seed: int) -> CalibrationData:
    """Sequences of the training documents, in random order; each token counts but a sequence's first."""
    corpus = Corpus(folder, {k: float(v) for k, v in (pair.split("=") for pair in mix.split(","))})
    tokens = Stream(corpus, seed).take((1, sequences, length - 1))[0]
    return data_of("train", tokens)


def held_out_data(folder: Path, length: int, tokens: int) -> CalibrationData:
    """The first tokens of the validation split."""
    ids = np.load(folder / "validation.npy")[:tokens]
    return data_of("validation", ids[: len(ids) // length * length].reshape(-1, length))


def data_of(name: str, rows: np.ndarray) -> CalibrationData:
    kept = np.ones(rows.shape[1], bool)
    samples = tuple(Sample(row.astype(np.int32), kept, i + 1) for i, row in enumerate(rows))
    return CalibrationData(samples, name, len(samples))


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "moe"), default="dense", help="which reference model")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", help="W4A8 checkpoint to begin with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--scales", choices=("keep", "refit"), default="keep")
    parser.add_argument("--train", action="append", default=[], choices=("norms", "embedding"))
    parser.add_argument("--mix", default="library=1,tests=1,chat=0.5", help="how often each part occurs in an epoch")
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--validation-tokens", type=int, default=80000)
    parser.add_argument("--test-tokens", type=int, help="use only the first tokens of the test split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(message: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {message}", flush=True)

    teacher = w4a8jax.reference_model(arguments.model)
    options = w4a8jax.DistillationOptions(
        steps=arguments.steps, batch=arguments.batch, length=arguments.length, learning_rate=arguments.learning_rate,
        warmup=arguments.warmup, scales=arguments.scales, train=tuple(arguments.train), seed=arguments.seed,
        validate_every=arguments.validate_every, save_every=arguments.steps,
    )  # fmt: skip
    sequences = arguments.steps * arguments.batch
    data = training_data(arguments.data, arguments.mix, sequences, arguments.length, arguments.seed)
    held_out = held_out_data(arguments.data, arguments.length, arguments.validation_tokens)
    say(f"{data.describe()}; {jax.devices()[0].device_kind}")

    def progress(what: str, done: int, total: int) -> None:
        if what == "training" and (done <= 2 or done % max(1, total // 20) == 0):
            say(f"step {done} of {total}")

    with tempfile.TemporaryDirectory() as folder:
        student = arguments.student or Path(folder) / "student"
        if not arguments.student:
            w4a8jax.quantize(teacher, student, progress=False)
        target = Path(folder) / "distilled"
        record = w4a8jax.distill(
            teacher, student, data, target, validation=held_out, options=options, progress=progress
        )
        say(record.describe())
        shutil.copyfile(target / "distillation.png", arguments.out / f"distill_{arguments.model}.png")
        # Curves are in the record beside it, without this machine's paths.
        shutil.copytree(
            target, arguments.out / f"student_{arguments.model}", ignore=shutil.ignore_patterns("distillation.*"),
            dirs_exist_ok=True,
        )  # fmt: skip
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "experiments/distill.py", *map(_without_folder, sys.argv[1:])]),
            "device": jax.devices()[0].device_kind,
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "distillation": {"settings": {k: v for k, v in record.settings.items() if k not in ("teacher", "student")}}
            | {"train": record.train, "validation": record.validation, "seconds": record.seconds},
        }
        text = w4a8jax.reference_text("test")
        original = w4a8jax.load(teacher)
        for name, path in (("before", student), ("after", target)):
            found = w4a8jax.compare(w4a8jax.load(path, kernels=False), original, text, max_tokens=arguments.test_tokens)
            result[name] = json.loads(found.to_json())
            (arguments.out / f"distill_{arguments.model}.json").write_text(json.dumps(result) + "\n")
            say(
                f"test, {name}: perplexity {found.model.perplexity:.4f}, bf16 {found.original.perplexity:.4f}, ratio "
                f"{1 + found.perplexity_increase:.5f}; next token right {found.model.accuracy:.4%}, bf16 "
                f"{found.original.accuracy:.4%}, ratio {found.model.accuracy / found.original.accuracy:.5f}; KL "
                f"{found.kl_mean:.5f}; {found.model.tokens} tokens"
            )


if __name__ == "__main__":
    main()

"""What quantization costs a reference model: perplexity, KL and top-1 agreement of each recipe.

    python experiments/quality.py [dense | moe]

Quantizes to a temporary folder, evaluates on the reference text's test split, prints a Markdown table and writes
experiments/results/quality_MODEL.json. Of a mixture of experts it also records how the text divides among them.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import jax

import w4a8jax
from w4a8jax.expert_load import expert_load

RESULTS = Path(__file__).with_name("results")
RECIPES = {
    "W4A16, plain rounding": {"scheme": "w4a16", "search": "none"},
    "W4A16": {"scheme": "w4a16"},
    "W4A8, plain rounding": {"search": "none"},
    "W4A8": {},
    "W4A8, codes -8..7": {"code_min": -8},
    "W4A8, exact numerics": {"numerics": "exact"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=("dense", "moe"), default="dense")
    name_of_model = parser.parse_args().model
    source = w4a8jax.reference_model(name_of_model)
    text = w4a8jax.reference_text("test")
    original = w4a8jax.load(source)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, recipe) in enumerate(RECIPES.items()):
            target = Path(folder) / str(i)
            summary = w4a8jax.quantize(source, target, progress=False, **recipe)
            model = w4a8jax.load(target, numerics=recipe.get("numerics"))
            result = w4a8jax.compare(model, original, text)
            rows[name] = {
                "recipe": recipe,
                "weight_error": summary.relative_error,
                "comparison": json.loads(result.to_json()),
            }
            print(f"{name}: perplexity {result.model.perplexity:.3f}", flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python experiments/quality.py {name_of_model}",
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "w4a8jax": w4a8jax.__version__},
        "original": dataclasses.asdict(result.original),
        "recipes": rows,
    }
    if original.config.moe is not None:
        record["expert_load"] = [load.record() for load in expert_load(original, text)]
    (RESULTS / f"quality_{name_of_model}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: dict) -> str:
    """The record as a Markdown table."""
    lines = [
        "| | weight error | perplexity | KL to bf16, nats | same first choice |",
        "|---|---|---|---|---|",
        f"| bf16 | | {record['original']['perplexity']:.3f} | | |",
    ]
    for name, row in record["recipes"].items():
        found = row["comparison"]
        lines.append(
            f"| {name} | {row['weight_error']:.4f} | {found['model']['perplexity']:.3f} | {found['kl_mean']:.4f} "
            f"| {found['top1_agreement']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

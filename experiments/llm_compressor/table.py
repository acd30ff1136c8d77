"""The table in docs/calibration.md of llm-compressor's GPTQ beside ours: from the record of compare.py.

python experiments/llm_compressor/table.py
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from calibration_table import spread  # noqa: E402

RESULTS = HERE.parent / "results"


def seconds(rows: list[dict[str, Any]], phase: str, clock: str) -> list[float]:
    """Of a phase, or of the "whole" process."""
    return [
        (row["whole"] if phase == "whole" else row["phases"][phase])[clock]
        for row in rows
        if phase in row["phases"] | row
    ]


def quality(rows: list[dict[str, Any]]) -> list[str]:
    """Perplexity and top-1 agreement of the first text, KL of all."""
    found = [row["quality"] for row in rows]
    first, *others = found[0]
    cells = [(first, "perplexity", 3, 1), (first, "kl", 4, 1), (first, "top1", 2, 100)]
    cells += [(text, "kl", 4, 1) for text in others]
    return [spread([f[text][key] for f in found], digits, scale) for text, key, digits, scale in cells]


def table(record: dict[str, Any]) -> None:
    names = dict.fromkeys(row["name"] for row in record["runs"])
    by_name = {name: [row for row in record["runs"] if row["name"] == name] for name in names}
    heads = ["runs", "process: CPU s", "wall s", "quantization: CPU s", "wall s"]
    first = next(iter(by_name.values()))[0]
    if "quality" in first:
        main, *others = first["quality"]
        heads += [f"{main}: perplexity", "KL to bf16, nats", "same first choice, %", *(f"{o}: KL" for o in others)]
    print("| |", " | ".join(heads), "|\n|" + "---|" * (len(heads) + 1))
    for name, rows in by_name.items():
        times = [spread(seconds(rows, p, c), 1) for p in ("whole", "quantize") for c in ("cpu", "wall")]
        cells = [str(len(rows)), *times, *(quality(rows) if "quality" in first else [])]
        print("|", " | ".join([name, *cells]), "|")
    ours = by_name["w4a8jax"]
    again = seconds(ours, "quantize again", "cpu")
    print(f"\nw4a8jax, all compiled: quantization {spread(again, 1)} CPU s")
    for name, rows in by_name.items():
        for clock in ("cpu", "wall"):
            parts = {
                "process": ("whole", "whole"), "quantization": ("quantize", "quantize"),
                "quantization, compiled": ("quantize", "quantize again"),
            }  # fmt: skip
            ratios = {
                part: statistics.mean(seconds(rows, a, clock)) / statistics.mean(seconds(ours, b, clock))
                for part, (a, b) in parts.items()
            }
            print(f"{name}: {clock} time over w4a8jax's:", {part: round(ratio, 2) for part, ratio in ratios.items()})


def main() -> None:
    for name in ("llm_compressor", "llm_compressor_synthetic"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            print(f"\n{name}")
            table(json.loads(path.read_text()))


if __name__ == "__main__":
    main()

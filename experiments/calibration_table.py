"""The README's tables of calibration: from the records of calibration.py and long_traces.py.

python experiments/calibration_table.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def spread(values: list[float], digits: int, scale: float = 1) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was found of each recipe, by seed."""
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: [row["found"] for row in rows if row["name"] == name] for name in names}


def quality(rows: list[dict[str, Any]]) -> None:
    """A line for each recipe; a table for each text."""
    found = by_name(rows)
    for text in next(iter(found.values()))[0]:
        first = next(iter(found.values()))[0][text]
        print(f"\n{text}, {first['tokens']:,} tokens, bf16 perplexity {first['perplexity_bf16']:.3f}:\n")
        print("| | perplexity | KL to bf16, nats | same first choice, % |\n|---|---|---|---|")
        for name, seeds in found.items():
            columns = [[seed[text][key] for seed in seeds] for key in ("perplexity", "kl", "top1")]
            perplexity, kl, top1 = columns
            print(f"| {name} | {spread(perplexity, 3)} | {spread(kl, 4)} | {spread(top1, 2, 100)} |")


def gains(rows: list[dict[str, Any]], base: str, better: str) -> None:
    """What one recipe's KL is less than another's, seed by seed."""
    found = by_name(rows)
    for text in found[base][0]:
        pairs = list(zip(found[base], found[better], strict=True))
        less = [1 - b[text]["kl"] / a[text]["kl"] for a, b in pairs]
        print(f"{text}: KL of {better!r} below {base!r} by {spread(less, 1, 100)} %, least {100 * min(less):.1f} %")


def main() -> None:
    record = json.loads((RESULTS / "calibration.json").read_text())
    quality(record["recipes"])
    print()
    gains(record["recipes"], "GPTQ, plain INT4 objective", "GPTQ, kernel-exact")
    quality(record["masks"])
    print()
    gains(record["masks"], "all tokens", "default mask")
    record = json.loads((RESULTS / "long_traces.json").read_text())
    print("\n| tokens of the trace | peak memory, MB | calibration, s | ms a token |\n|---|---|---|---|")
    for row in record["rows"]:
        cells = f"{row['peak_bytes'] / 1e6:.0f} | {row['calibrate_seconds']:.0f} | {row['ms_per_token']:.2f}"
        packed = f", packed from {row['packed_traces']}" if row["packed_traces"] else ""
        print(f"| {row['tokens']:,}{packed} | {cells} |")
    print(f"\nPeak memory grows by {record['peak_growth']:.2f} times.")


if __name__ == "__main__":
    main()

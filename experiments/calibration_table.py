"""The tables of docs/calibration.md: from the records of calibration.py and long_traces.py.

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


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int | None, dict[str, Any]]]:
    """What was found of each recipe, by seed."""
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: {row["seed"]: row["found"] for row in rows if row["name"] == name} for name in names}


def quality(rows: list[dict[str, Any]]) -> None:
    """A line for each recipe; perplexity and top-1 agreement for the first text alone."""
    found = by_name(rows)
    first = rows[0]["found"]
    for text, values in first.items():
        print(f"\n{text}: {values['tokens']:,} tokens, bf16 perplexity {values['perplexity_bf16']:.3f}", end="")
    main, *others = first
    most = max(map(len, found.values()))
    heads = [f"{main}: perplexity", "KL to bf16, nats", "same first choice, %", *(f"{text}: KL" for text in others)]
    print("\n\n| |", " | ".join(heads), "|\n|" + "---|" * (len(heads) + 1))
    for name, seeds in found.items():
        cells = [(main, "perplexity", 3, 1), (main, "kl", 4, 1), (main, "top1", 2, 100)]
        cells += [(text, "kl", 4, 1) for text in others]
        columns = [spread([seed[text][key] for seed in seeds.values()], n, scale) for text, key, n, scale in cells]
        fewer = f" ({_seeds(len(seeds))})" if None not in seeds and len(seeds) < most else ""
        print("|", " | ".join([name + fewer, *columns]), "|")


def gains(rows: list[dict[str, Any]], base: str, better: str) -> None:
    """What one recipe's KL is less than another's, seed by seed; one without seeds is compared with each."""
    found = by_name(rows)
    seeds = [seed for seed in found[better] if seed in found[base] or None in found[base]]
    for text in rows[0]["found"]:
        pairs = [(found[base].get(seed, found[base].get(None)), found[better][seed]) for seed in seeds]
        less = [1 - b[text]["kl"] / a[text]["kl"] for a, b in pairs if a]
        values = f"{spread(less, 1, 100)} %, least {100 * min(less):.1f} %, {_seeds(len(less))}"
        print(f"{text}: KL of {better!r} below {base!r} by {values}")


def _seeds(count: int) -> str:
    return f"{count} seed" + "s" * (count != 1)


def recipes(rows: list[dict[str, Any]]) -> None:
    """The table of recipes, and what each step of them gains."""
    quality(rows)
    print()
    gains(rows, "GPTQ, plain INT4 objective", "GPTQ, kernel-exact")
    for method in ("RTN", "GPTQ"):
        gains(rows, f"{method}, kernel-exact", f"{method}, kernel-exact, equalized")


def main() -> None:
    record = json.loads((RESULTS / "calibration.json").read_text())
    recipes(record["recipes"])
    experts = json.loads((RESULTS / "calibration_moe.json").read_text())["recipes"]
    recipes(experts)
    gains(experts, "GPTQ, kernel-exact, all tokens alike", "GPTQ, kernel-exact")
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

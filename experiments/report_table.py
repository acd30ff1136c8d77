"""README's tables of quality: from the records of report.py.

    python experiments/report_table.py [--write]

Prints them, or writes them into README.md, between the lines that name this script.
"""

import argparse
import re
from pathlib import Path

import w4a8jax
from w4a8jax.reporting import tables
from w4a8jax.reporting.record import original_of
from w4a8jax.reporting.tables import Value, cell, title

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[1] / "README.md"
MODELS = ("dense", "moe")


def table_of(report: w4a8jax.Report) -> str:
    """A line for each recipe: all of the first text, KL of the others, and the cost of making it."""
    main, *others = report.texts
    bf16 = {text: original_of(next(iter(report.measured.values())), text) for text in report.texts}
    heads = ["", "weight error", f"{main}: perplexity", "over bf16's", "KL to bf16, nats", "same first choice, %"]
    heads += ["next token right, % of bf16's", *(f"{text}: KL" for text in others), "made in, s", "memory, MB"]

    def of(text: str, value: Value) -> Value:
        return lambda row: value(row["texts"][text])

    def scaled(key: str, scale: float) -> Value:
        return lambda row: None if row[key] is None else scale * row[key]

    perplexity, accuracy = bf16[main]["perplexity"], bf16[main]["accuracy"]
    columns: list[tuple[Value, int]] = [
        (scaled("weight_error", 1), 4),
        (of(main, lambda found: found["model"]["perplexity"]), 3),
        (of(main, lambda found: found["model"]["perplexity"] / perplexity), 4),
        (of(main, scaled("kl_mean", 1)), 4),
        (of(main, scaled("top1_agreement", 100)), 2),
        (of(main, lambda found: 100 * found["model"]["accuracy"] / accuracy), 2),
        *((of(text, scaled("kl_mean", 1)), 4) for text in others),
        (scaled("make_seconds", 1), 0),
        (scaled("make_peak_bytes", 1e-6), 0),
    ]
    text = tables.table(heads, ([title(rows), *(cell(rows, *c) for c in columns)] for rows in report.measured.values()))
    others_bf16 = ", ".join(f"{bf16[name]['perplexity']:.3f} ({name})" for name in others)
    note = f"{bf16[main]['tokens']:,} tokens of each text; bf16's perplexities on the others: {others_bf16}."
    if draws := tables.about_draws(report.measured):
        note += f" {draws}"
    return "\n\n".join(filter(None, (text, note, tables.experts(report.measured, main))))


def written(readme: str, name: str, text: str) -> str:
    """README with a model's table in its place."""
    begin, end = f"<!-- experiments/report_table.py: {name} -->\n", f"<!-- end: {name} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    assert re.search(pattern, readme, re.DOTALL), f"README has no place for the table of {name}"
    return re.sub(pattern, lambda _: f"{begin}\n{text}\n\n{end}", readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    write, readme = parser.parse_args().write, README.read_text(encoding="utf-8")
    for name in MODELS:
        text = table_of(w4a8jax.Report.read(RESULTS / f"report_{name}.json"))
        readme = written(readme, name, text)
        if not write:
            print(f"{name}\n\n{text}\n")
    if write:
        README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()

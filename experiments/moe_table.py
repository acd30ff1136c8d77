"""The table in docs/kernels.md of products with experts and whole MLPs, some of a record of `w4a8jax bench moe`.

python experiments/moe_table.py experiments/results/moe_h100.json
"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "grouped lut -7": "W4A8",
    "vllm cutlass w4a8": "vLLM W4A8",
    "vllm marlin w4a16": "Marlin W4A16",
    "ragged_dot bf16": "ragged_dot bf16",
    "tokamax w4a16": "tokamax W4A16",
}
TOKENS = (1, 64, 1024, 16384)


def main(path: str, routing: str = "uniform") -> None:
    points: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in json.loads(Path(path).read_text())["rows"]:
        if "us" in row and row["routing"] == routing and row["tokens"] in TOKENS:
            points.setdefault((row["model"], row["product"], row["tokens"]), {})[row["kernel"]] = row
    points = dict(sorted(points.items()))
    # Kernels that were measured at most of the points.
    columns = {
        name: t for name, t in COLUMNS.items() if 2 * sum(name in rows for rows in points.values()) > len(points)
    }
    print("| experts of | product | tokens | experts met |", " | ".join(columns.values()), "| fraction of the floor |")
    print("|" + "---|" * (len(columns) + 5))
    for (model, product, tokens), rows in points.items():
        if ours := rows.get("grouped lut -7"):
            head = [model, product, str(tokens), str(ours["touched"])]
            cells = [f"{rows[name]['us']:.1f}" if name in rows else "" for name in columns]
            print("|", " | ".join([*head, *cells, f"{ours['fraction']:.2f}"]), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])

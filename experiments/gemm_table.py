"""The table of dense products in docs/kernels.md, some of a record of `w4a8jax bench gemm`.

python experiments/gemm_table.py experiments/results/gemm_h100.json
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "w4a8 lut -7..7": "W4A8",
    "vllm cutlass w4a8": "vLLM W4A8",
    "torch fp8 rowwise, fast": "cuBLAS FP8",
    "vllm machete w4a16": "Machete W4A16",
    "torch bf16": "cuBLAS bf16",
    "triton w4a16": "Triton W4A16",
}
SHAPES = ((12288, 14336), (36864, 12288), (8192, 8192), (4096, 6144))
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


def main(path: str) -> None:
    points: dict[tuple[int, int, int], dict[str, dict[str, float]]] = {}
    for row in json.loads(Path(path).read_text())["rows"]:
        if "us" in row:
            points.setdefault((row["K"], row["N"], row["M"]), {})[row["kernel"]] = row
    columns = {name: title for name, title in COLUMNS.items() if any(name in rows for rows in points.values())}
    print("| K | N | M |", " | ".join(columns.values()), "| fraction of the floor |")
    print("|" + "---|" * (len(columns) + 4))
    for shape, rows in points.items():
        ours = rows.get("w4a8 lut -7..7")
        if ours and shape[:2] in SHAPES and shape[2] in TOKENS:
            cells = [f"{rows[name]['us']:.1f}" if name in rows else "" for name in columns]
            print("|", " | ".join([*map(str, shape), *cells, f"{ours['fraction_of_floor']:.2f}"]), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""README's table of the kernels' speed over others: geometric means over the records of `w4a8jax bench gemm` and `moe`.

python experiments/kernel_summary.py experiments/results/{gemm,moe}_{h200,h100}.json
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

DENSE = {
    "vllm cutlass w4a8": "vLLM's W4A8",
    "torch fp8 rowwise, fast": "cuBLAS FP8, rowwise scales",
    "vllm machete w4a16": "vLLM's Machete W4A16",
    "torch bf16": "cuBLAS bf16",
}
EXPERTS = {
    "vllm cutlass w4a8": "vLLM's W4A8",
    "vllm marlin w4a16": "vLLM's Marlin W4A16",
    "ragged_dot bf16": "`jax.lax.ragged_dot`, bf16",
    "tokamax w4a16": "tokamax's `ragged_dot`, W4A16",
}
RANGES = ((0, 64), (65, 1024), (1025, 1 << 60))
PRODUCTS = (("products with experts", ("gate_up", "down")), ("whole MLPs with experts", ("mlp",)))


def main(*paths: str) -> None:
    print("| W4A8, tokens: | over | on an | to 64 | 65 to 1,024 | more |\n|---|---|---|---|---|---|")
    for path in paths:
        record = json.loads(Path(path).read_text())
        rows = [row for row in record["rows"] if "us" in row]
        device = next(part for part in record["device"].split() if part[:1] == "H")
        if "model" not in rows[0]:
            for peer, title in DENSE.items():
                print(_line("dense products", title, device, rows, ("K", "N", "M"), "w4a8 lut -7..7", peer))
            continue
        for name, products in PRODUCTS:
            some = [row for row in rows if row["product"] in products]
            for peer, title in EXPERTS.items():
                found = Counter(row["kernel"] for row in some)
                if 2 * found[peer] > found["grouped lut -7"]:  # at most of the points
                    point = ("model", "product", "routing", "tokens")
                    print(_line(name, title, device, some, point, "grouped lut -7", peer))


def _line(
    name: str, title: str, device: str, rows: list[dict[str, Any]], point: tuple[str, ...], ours: str, peer: str
) -> str:
    """The last of `point` is the number of tokens."""
    times = [{tuple(r[p] for p in point): r["us"] for r in rows if r["kernel"] == kernel} for kernel in (ours, peer)]
    speeds = {where: other / times[0][where] for where, other in times[1].items() if where in times[0]}
    parts = [[v for where, v in speeds.items() if low <= where[-1] <= high] for low, high in RANGES]
    means = [f"{statistics.geometric_mean(part):.2f}" if part else "" for part in parts]
    return f"| {name} | {title} | {device} | {' | '.join(means)} |"


if __name__ == "__main__":
    main(*sys.argv[1:])

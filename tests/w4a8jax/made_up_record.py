"""A record of a benchmark whose times are easy to reckon with."""

from collections.abc import Callable
from typing import Any

from w4a8jax.benchmark import floor, summary
from w4a8jax.benchmark.record import Record

SHAPES = ((12288, 73728), (12288, 14336))
TOKENS = (1, 64, 512, 4096)
# Times by hand: ours, and each peer's multiple of it.
TIMES = {1: 100.0, 64: 200.0, 512: 400.0, 4096: 1600.0}
MULTIPLES: dict[str, Callable[[int, int], float]] = {
    summary.ROWWISE_FP8: lambda n, m: 0.5 if m == 4096 and n == 14336 else 2.0,
    summary.CUTLASS_W4A8: lambda n, m: 1.5,
    summary.MACHETE: lambda n, m: 4.0 if m == 512 else 1.0,
}


def made_up_record() -> Record:
    """Ours and three peers at each point, and a failure."""
    rows: list[dict[str, Any]] = []
    for k, n in SHAPES:
        for m in TOKENS:
            ours = {"K": k, "N": n, "M": m, "us_min": 1.0, "us_quartiles": [1.0, 2.0], "error": 1e-3, "launches": 24}
            ours |= {"same_twice": True, "kernels": ["k"], "config": None, "operand_bytes": floor.w4a8_bytes(m, n, k)}
            rows.append(ours | {"kernel": "w4a8 lut -7..7", "us": TIMES[m]})
            rows += [ours | {"kernel": name, "us": TIMES[m] * of(n, m)} for name, of in MULTIPLES.items()]
    failed = {"K": 12288, "N": 14336, "M": 4096, "kernel": "vllm marlin w4a16", "failed": "RuntimeError: [no] kernel"}
    return Record({"device": "NVIDIA H200", "date": "2026-01-01", "copy_TB_s": 4.0}, [*rows, failed])

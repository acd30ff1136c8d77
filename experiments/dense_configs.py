"""Configurations of the dense kernel at one product, in turns, beside vLLM's kernel.

    python experiments/dense_configs.py 4096,28672,512 256,1,2,4 256,1,2,4,cluster=2,lag=2 --vllm DIR

K, N, M; then configurations: tile_tokens, row_blocks, warpgroups and stages, then other fields of `TuningConfig` by
name, or `lag` for what `Pipeline.lag` is, slots between a copy and the making of its tables.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.main_loop import Pipeline
from w4a8jax.benchmark import gemm, kernels, peers


@dataclasses.dataclass(frozen=True)
class InConfig(kernels.OurKernel):
    """`dense_gemm` in a configuration, and with a lag if it is given."""

    chosen: TuningConfig | None = None
    lag: int | None = None

    def config(self, m: int, n: int, k: int) -> dict[str, Any]:
        assert self.chosen is not None
        return dataclasses.asdict(self.chosen) | ({} if self.lag is None else {"lag": self.lag})

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        assert self.chosen is not None
        with mock.patch.object(Pipeline, "lag", Pipeline.lag if self.lag is None else self.lag):
            return self.compiled(m, n, k, self.chosen)


def parsed(text: str) -> InConfig:
    first, named = [], {}
    for word in text.split(","):
        name, _, value = word.rpartition("=")
        if name:
            named[name] = int(value)
        else:
            first.append(int(value))
    lag = named.pop("lag", None)
    if lag is not None and not 1 <= lag <= first[3] - 2:
        raise SystemExit(f"{text}: lag is from 1 to stages - 2")
    named["stream_k"] = bool(named.get("stream_k", False))
    config = TuningConfig(*first, **named)  # type: ignore[arg-type]
    return InConfig(f"ours {text}", "w4a8", 0.5 + 1 / 128, 1, -7, 5.5e-3, chosen=config, lag=lag)


def main(arguments: argparse.Namespace) -> None:
    gemm.require_hopper("dense_configs.py")
    k, n, m = map(int, arguments.product.split(","))
    found: list[kernels.Kernel] = [parsed(text) for text in arguments.config]
    if arguments.vllm:
        found += [kernel for kernel in peers.vllm_kernels(arguments.vllm) if kernel.name == "vllm cutlass w4a8"]
    rows = gemm.Shape(k, n, [m]).rows(found, m)
    names = ("K", "N", "M", "kernel", "us", "us_quartiles", "error", "failed")
    for row in rows:
        print(json.dumps({name: row[name] for name in names if name in row}), flush=True)
    if arguments.out:
        path: Path = arguments.out
        record = json.loads(path.read_text()) if path.exists() else gemm.describe_run("dense_configs.py")
        record.setdefault("rows", []).extend(rows)
        path.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("product", metavar="K,N,M")
    parser.add_argument("config", nargs="+")
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--out", type=Path, help="rows are added to it")
    main(parser.parse_args())

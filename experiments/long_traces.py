"""GPTQ of the dense reference model on one trace of 8k to 64k tokens: peak memory, and time per token.

    python experiments/long_traces.py

Each length runs in a process of its own, with the search for scales that is fastest, since solving does not depend on
the trace; the peak is of the whole process. The trace is the train split's text, one document after the other; the
longest is measured once more as documents that calibration packs into one sample. Times are wall time, compilation
included. Writes experiments/results/long_traces.json.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import w4a8jax
from w4a8jax.reference import reference_documents

RESULTS = Path(__file__).with_name("results") / "long_traces.json"
LENGTHS = (8192, 16384, 32768, 65536)


def documents(tokenizer: w4a8jax.Tokenizer, length: int) -> list[list[int]]:
    """The train split's first documents, so many tokens in all."""
    found: list[list[int]] = []
    for _, text in reference_documents("train"):
        found.append(tokenizer.encode(text, add_special_tokens=False)[:length])
        length -= len(found[-1])
        if not length:
            break
    return found


def measure(length: int, packed: bool) -> dict[str, Any]:
    """Quantizes, in this process."""
    source = w4a8jax.reference_model("dense")
    found = documents(w4a8jax.Tokenizer.from_directory(source), length)
    if packed:
        data = w4a8jax.load_calibration(source, [{"tokens": tokens} for tokens in found], pack=length)
    else:
        data = w4a8jax.load_calibration(source, [{"tokens": [token for tokens in found for token in tokens]}])
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        summary = w4a8jax.quantize(
            source, Path(folder) / "model", method="gptq", calibration=data, search="none", progress=False
        )
    seconds = summary.seconds["calibrate"]
    return {
        "tokens": summary.calibration_tokens,
        "samples": len(data.samples),
        "packed_traces": data.traces if packed else 0,
        "peak_bytes": _peak(),
        "peak_bytes_before": before,
        "calibrate_seconds": seconds,
        "ms_per_token": 1000 * seconds / length,
        "total_seconds": summary.seconds["total"],
        "layers_by_gptq": sum(not layer.fallback for layer in summary.layers),
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def main() -> None:
    rows = []
    for length, packed in [*((length, False) for length in LENGTHS), (LENGTHS[-1], True)]:
        command = [sys.executable, __file__, "--length", str(length), *["--packed"] * packed]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(rows[-1], flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python experiments/long_traces.py",
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "w4a8jax": w4a8jax.__version__},
        "peak_growth": max(row["peak_bytes"] for row in rows) / rows[0]["peak_bytes"],
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, help="measure this one alone, and print it")
    parser.add_argument("--packed", action="store_true")
    arguments = parser.parse_args()
    if arguments.length:
        print(json.dumps(measure(arguments.length, arguments.packed)))
    else:
        main()

"""What each recipe costs a reference model, on three texts: `w4a8jax.report` with this project's texts and data.

    python experiments/report.py dense
    python experiments/report.py moe --checkpoint w4a8-qad-gpu=DIR --resume

Texts as in calibration.py: the first tokens of the test split, English prose, C. GPTQ is calibrated on 128 windows of
512 tokens, each from another document of the train split, drawn with each of 5 seeds. Students that were distilled on a
GPU (distill.py) come as --checkpoint TITLE=DIR. Writes experiments/results/report_MODEL.md, .png and .json, the
latter after each recipe; --resume goes on. README's tables are made of it by report_table.py.
"""

import argparse
import sys
import time
from pathlib import Path

from calibration import texts, windows

import w4a8jax

RESULTS = Path(__file__).with_name("results")
RECIPES = (
    "bf16", "w4a16-rtn-plain", "w4a16-rtn", "w4a8-rtn-plain", "w4a8-rtn", "w4a8-rtn-code8", "w4a8-exact",
    "w4a8-gptq-plain", "w4a8-gptq", "w4a8-gptq-equalized",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("dense", "moe"))
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only these; may be repeated")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="TITLE=DIR", help="may be repeated")
    parser.add_argument("--seeds", type=int, default=5, help="of calibration data")
    parser.add_argument("--tokens", type=int, default=20000, help="of each text")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    source = w4a8jax.reference_model(arguments.model)
    began, said = time.monotonic(), set()

    def progress(row: str, done: int, total: int) -> None:
        if done == total and row not in said:
            said.add(row)
            print(f"{time.monotonic() - began:5.0f} s  {row}", flush=True)

    recipes = arguments.recipe or RECIPES
    calibrated = any("gptq" in name for name in recipes)
    found = w4a8jax.report(
        source, RESULTS / f"report_{arguments.model}.md", texts=texts(), recipes=recipes,
        checkpoints=dict(pair.split("=", 1) for pair in arguments.checkpoint),
        calibration=[windows(source, seed) for seed in range(arguments.seeds)] if calibrated else None,
        max_tokens=arguments.tokens, overwrite=arguments.overwrite, resume=arguments.resume, progress=progress,
    )  # fmt: skip
    for name, message in found.failures.items():
        print(f"{name}: {message}", file=sys.stderr)
    return bool(found.failures)


if __name__ == "__main__":
    sys.exit(main())

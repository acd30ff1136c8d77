"""w4a8jax's GPTQ in a process of its own: ours.py JOB, a JSON file of compare.py.

Prints, as the last line of its output, seconds of wall and CPU time of each phase, and versions. It quantizes twice:
the second time all is compiled.
"""

from timing import Phases  # first: its clock starts when it is imported

phases = Phases()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402

import w4a8jax  # noqa: E402

phases.done("import")


def main(job: dict) -> None:
    records = [{"tokens": sample} for sample in json.loads(Path(job["tokens"]).read_text())]
    data = w4a8jax.load_calibration(job["source"], records)
    phases.done("load")

    def quantize(target: str) -> None:
        w4a8jax.quantize(
            job["source"], target, method="gptq", calibration=data, progress=False, **job["options"]
        )  # writes the checkpoint too

    quantize(job["target"])
    phases.done("quantize")
    quantize(job["target"] + "-again")
    phases.done("quantize again")
    versions = {"w4a8jax": w4a8jax.__version__, "jax": jax.__version__}
    print("\n" + json.dumps({"phases": phases.found, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

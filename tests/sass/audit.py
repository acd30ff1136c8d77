"""Compiles kernels for Hopper without a GPU and says what the hardware would execute.

    python tests/sass/audit.py [WORD ...]

prints a table of the configurations whose names hold all the words. `make sass-env` builds what compiles.
"""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sass import Findings, find

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-sass"
PROCESSES = 2


def ready() -> bool:
    return (ENVIRONMENT / ".ready").exists()


def audit(target: str, arguments: dict[str, Any]) -> Findings:
    """Compiles `MODULE:FUNCTION(**arguments)` in a process of its own.

    Raises:
        RuntimeError: it does not compile, or not by the compiler that was meant.
    """
    command = [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("compile_kernel.py"), target]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*command, json.dumps(arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{target} {arguments} does not compile:\n{done.stderr[-4000:]}\n{done.stdout[-1000:]}")
    return find(done.stdout)


def audit_case(case: Any) -> Findings:
    """Of a `kernel_cases.Case`."""
    arguments = dataclasses.asdict(case)
    if case.experts:
        return audit("kernel_cases:grouped", arguments)
    del arguments["experts"]
    return audit("kernel_cases:dense", arguments)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from kernel_cases import all_cases

    cases = [case for case in all_cases() if all(word in str(case) for word in sys.argv[1:])]
    print("per wgmma | exposed/alu | exposed/dequantizing | hazards | notes | spilled | registers | case")
    with ThreadPoolExecutor(PROCESSES) as pool:
        for case, found in zip(cases, pool.map(audit_case, cases), strict=True):
            print(
                f"{found.instructions:9.2f} | {len(found.exposed):3}/{found.alu:<7}"
                f" | {len(found.operands_exposed):7}/{found.operands:<12} | {len(found.hazards):7}"
                f" | {len(found.notes):5} | {found.spilled:7} | {found.highest_register:9} | {case}"
            )
            mix = "  ".join(f"{name} {count:.2f}" for name, count in found.mix.items() if count >= 0.25)
            print(f"          {' '.join(found.wgmma)}: {mix}", flush=True)
            for line in found.hazards[:3] + found.notes + found.exposed[:3]:
                print(f"          {line}")


if __name__ == "__main__":
    main()

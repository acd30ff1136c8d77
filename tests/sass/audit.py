"""Compiles kernels for Hopper without a GPU and says what the hardware would execute.

    python tests/sass/audit.py [WORD ...]

prints a table of the configurations whose names hold all the words. `make sass-env` builds what compiles.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sass import Findings, find

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-sass"
PROCESSES = 2


def ready() -> bool:
    return (ENVIRONMENT / ".ready").exists()


class Compiler:
    """A process of `compile_kernel.py`, which lives as long as this one."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("compile_kernel.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, target: str, arguments: dict[str, Any]) -> tuple[int | None, str]:
        """The exit status of the compilation, None if the process itself ended, and what it wrote."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            request = {"target": target, "arguments": arguments, "output": output.name}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            status = self.process.stdout.readline()
            return int(status) if status else None, output.read()


_of_thread = threading.local()


def audit(target: str, arguments: dict[str, Any]) -> Findings:
    """Compiles `MODULE:FUNCTION(**arguments)` in a process of its own, of this thread's compiler.

    Raises:
        RuntimeError: it does not compile, or not by the compiler that was meant.
    """
    compiler: Compiler | None = getattr(_of_thread, "compiler", None)
    if compiler is None or compiler.process.poll() is not None:
        compiler = _of_thread.compiler = Compiler()
    status, text = compiler(target, arguments)
    if status != 0:
        raise RuntimeError(f"{target} {arguments} does not compile ({status}):\n{text[-5000:]}")
    return find(text)


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

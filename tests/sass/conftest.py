"""Compiles the kernels of a module's tests that will run, two at a time, while the first are being looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from audit import ENVIRONMENT, PROCESSES, audit, audit_case, ready
from sass import Findings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.sass)


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Findings]]:
    """A function from a test's `case` (of `kernel_cases`) or `fault` (of `bad_kernels`) to what was found in it."""
    if not ready():
        pytest.skip(f"no {ENVIRONMENT.name} with CUDA's compiler: make sass-env builds it")
    with ThreadPoolExecutor(PROCESSES) as pool:
        started: dict[Any, Future[Findings]] = {}
        for item in request.session.items:
            parameters = getattr(item, "callspec", None) and item.callspec.params
            if item.path == request.path and "findings" in getattr(item, "fixturenames", ()) and parameters:
                if case := parameters.get("case"):
                    started.setdefault(case, pool.submit(audit_case, case))
                elif fault := parameters.get("fault"):
                    started.setdefault(fault, pool.submit(audit, "bad_kernels:kernel", {"fault": fault}))
        yield lambda key: started[key].result()
        pool.shutdown(cancel_futures=True)

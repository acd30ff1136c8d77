"""`import w4a8jax` costs nothing, touches nothing, and offers everything."""

import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import w4a8jax


def python(code: str) -> Any:
    """Runs code in a new interpreter; what it prints as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def quickest(code: str) -> Any:
    """What takes the fewest seconds of processor time of three runs: other tests run beside this one."""
    return min((python(code) for _ in range(3)), key=lambda found: found["seconds"])


def test_import_is_quick_and_loads_no_jax() -> None:
    code = """
import json, sys, time
start = time.process_time()
import w4a8jax
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "jax": "jax" in sys.modules, "flax": "flax" in sys.modules}))
"""
    found = quickest(code)
    assert found["seconds"] < 0.5
    assert not found["jax"]
    assert not found["flax"]


def test_all_of_it_adds_less_than_jax_and_flax_take_and_touches_no_device() -> None:
    code = """
import json, sys, time
times = [time.process_time()]
import jax, flax.nnx, matplotlib
times.append(time.process_time())
import w4a8jax
for name in w4a8jax.__all__:
    getattr(w4a8jax, name)
times.append(time.process_time())
from jax._src import xla_bridge
others, seconds = times[1] - times[0], times[2] - times[1]
print(json.dumps({"others": others, "seconds": seconds, "backends": list(xla_bridge._backends)}))
"""
    found = quickest(code)
    assert found["seconds"] < found["others"]
    assert found["backends"] == []


def test_public_names() -> None:
    assert set(dir(w4a8jax)) == set(w4a8jax.__all__)
    for name in ("load", "quantize", "inspect", "verify", "evaluate", "compare", "reference_model", "reference_text"):
        assert callable(getattr(w4a8jax, name)), name
    assert issubclass(w4a8jax.W4A8Error, ValueError)
    assert w4a8jax.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = w4a8jax.quantise


def test_no_submodule_takes_the_place_of_a_public_name() -> None:
    """Importing a submodule sets an attribute of the package: it must not be one that users call."""
    submodules = {module.name for module in pkgutil.iter_modules(w4a8jax.__path__)}
    assert submodules
    assert not submodules & set(w4a8jax.__all__)


def test_cli_help_loads_no_jax() -> None:
    code = """
import json, sys
import w4a8jax.cli
print(json.dumps([name for name in ("jax", "flax", "numpy", "matplotlib") if name in sys.modules]))
"""
    assert python(code) == []

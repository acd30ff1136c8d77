"""Present so that pytest puts this folder on the path: `numpy_twin` is imported from tests in folders below."""

import os
from pathlib import Path

# Threads of XLA's CPU client, which reads this once: each warpgroup of an interpreted kernel blocks one.
os.environ.setdefault("NPROC", "16")

# Most of the time goes into compiling, and the same programs come up in many tests, processes and runs. The size of the
# cache has no limit: with one, JAX would look at all files again for each that it adds.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache/compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# On a CPU, unoptimized programs: they take less time to compile, and are run once or twice. XLA reads this once.
if not Path("/dev/nvidiactl").exists():
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

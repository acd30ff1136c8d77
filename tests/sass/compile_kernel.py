"""Compiles Pallas Mosaic-GPU kernels for a Hopper GPU on a machine without one.

    .venv-sass/bin/python tests/sass/compile_kernel.py

reads requests, a JSON object in each line: {"target": "MODULE:FUNCTION", "arguments": {"ARGUMENT": VALUE, ...},
"output": FILE}. FUNCTION(**arguments) returns a function and its abstract arguments. The file gets PTX, ptxas's log and
SASS, or why the kernel does not compile; then an exit status is printed in a line. Each kernel is compiled in a fork of
what has imported JAX once: Mosaic compiles, and dumps, a kernel that it has seen before only once.
"""

import importlib
import json
import os
import signal
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

CUDA = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the CUDA plugin is there to compile, and would look for a driver
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "CUDA_ROOT": str(CUDA),
    "XLA_FLAGS": "",  # those of other tests make XLA optimize less
    "PATH": f"{CUDA / 'bin'}:{os.environ['PATH']}",  # the first ptxas on the path is taken
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_SASS_CTRL": "1",
}
TARGET = """
platform_name: "CUDA"
gpu_device_info {
  name: "Hopper"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
dnn_version_info { major: 9 minor: 10 patch: 0 }
"""


SECONDS = 300  # more for one kernel is a failure


def main() -> None:
    os.environ.update(ENVIRONMENT)
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parents[1])]
    importlib.import_module("jax.experimental.topologies")
    # JAX warns of forks, since its backends have threads; this process starts none.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    for line in sys.stdin:
        request = json.loads(line)
        importlib.import_module(request["target"].partition(":")[0])
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                compile_kernel(request["target"], request["arguments"])
            except Exception:
                traceback.print_exc()
                sys.exit(1)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def compile_kernel(target: str, arguments: dict[str, Any]) -> None:
    import jax
    from jax.experimental import topologies

    module, function = target.split(":")
    compiled, abstract = getattr(importlib.import_module(module), function)(**arguments)
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), abstract)
    jax.jit(compiled).lower(*abstract).compile()


if __name__ == "__main__":
    main()

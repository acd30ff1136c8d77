"""Compiles divided products for two Hopper GPUs on a machine without one: what each program sends, JSON on stdout.

.venv-sass/bin/python tests/sass/compile_divided.py
"""

import json
import os
import re
import sys
from pathlib import Path

from compile_kernel import ENVIRONMENT, TARGET


def main() -> None:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if "DUMP" not in name})
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels import Partition, W4Weight, divided, moe_mlp, w4a8_matmul

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x2")
    mesh = topologies.make_mesh(topology, (2,), ("device",))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def divided_as(w, partition):
        return jax.tree.map(lambda a, spec: array(a.shape, a.dtype, spec), w, divided.specs(w, partition))

    def weight(partition, *shape):
        *lead, k = shape
        parts = jax.ShapeDtypeStruct((*lead, k // 8), jnp.int32), jax.ShapeDtypeStruct((*lead, k // 128), jnp.bfloat16)
        w = divided_as(jax.eval_shape(W4Weight.from_checkpoint, *parts), partition)
        repacked = jax.eval_shape(lambda w: divided.repack(w, "w4a8", partition), w)
        return w, divided_as(repacked, partition)

    def sent(function, *arguments):
        text = function.lower(*arguments).compile().as_text()
        names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        found = re.findall(rf"= (\w+\[[\d,]*\])\S* ({names})(?:-done)?\(", text)
        return sorted(f"{name} {shape}" for shape, name in found)

    rows, columns, experts = (Partition(mesh, **{axis: "device"}) for axis in ("rows", "columns", "experts"))
    whole = PartitionSpec()
    x, router = array((64, 512), jnp.bfloat16, whole), array((4, 512), jnp.float32, whole)
    found = {"repack": sent(divided.repack, weight(columns, 512, 1024)[0], "w4a8", columns)}
    for name, partition in (("rows", rows), ("columns", columns)):
        found[name] = sent(jax.jit(w4a8_matmul), x, weight(partition, 1024, 512)[1])
    for name, of_gate_up, of_down in (("experts", experts, experts), ("width", rows, columns)):
        weights = weight(of_gate_up, 4, 1024, 512)[1], weight(of_down, 4, 512, 512)[1]
        mlp = jax.jit(lambda x, router, gate_up, down: moe_mlp(x, router, gate_up, down, top_k=2))
        found[name] = sent(mlp, x, router, *weights)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

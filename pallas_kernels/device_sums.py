"""Sums across blocks of a grid: partial accumulators in global memory, and counters that say when they are there.

A stored fp32 accumulator [64, tokens] is [64 * tokens], each thread's registers in pieces of 16 bytes: thread t's piece
i is at 4 * (128 * i + t), so that a warpgroup reads and writes whole lines.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_ACCUMULATOR = plgpu.Layout.WGMMA
_EACH_THREAD = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


@plgpu.inline_mgpu(arg_types=(_ACCUMULATOR, plgpu.RefType()))
def store_partial(_: Any, accumulator: Any, ref: Any) -> None:
    """Stores an accumulator fp32 [64, tokens] in global memory [64 * tokens]."""
    address = _address(ref)
    for i, piece in enumerate(_pieces(accumulator)):
        llvm.store(piece, mgpu.utils.getelementptr(address, [128 * i], piece.type))


def add_partials(accumulator: jax.Array, refs: list[Any], weights: list[Any]) -> jax.Array:
    """`accumulator` [64, tokens] plus each stored one times its weight, an fp32 scalar, in the order given.

    Each load is small, so that as many are in flight as there are registers for.
    """
    return_type = plgpu.ShapeDtypeStruct(accumulator.shape, jnp.float32, layout=_ACCUMULATOR)
    types = (_ACCUMULATOR, [plgpu.RefType()] * len(refs), [_EACH_THREAD] * len(refs))

    @plgpu.inline_mgpu(arg_types=types, return_type=return_type)
    def added(_: Any, accumulator: Any, refs: Any, weights: Any) -> Any:
        sums = _pieces(accumulator)
        for ref, weight in zip(refs, weights, strict=True):
            address = _address(ref)
            weight = vector.broadcast(sums[0].type, _scalar(weight))
            for i, piece in enumerate(sums):
                part = llvm.load(piece.type, mgpu.utils.getelementptr(address, [128 * i], piece.type))
                sums[i] = arith.addf(piece, arith.mulf(weight, part))
        old = accumulator.registers
        width = ir.VectorType(old.flat[0].type).shape[0]
        values = [vector.extract(piece, [], [i]) for piece in sums for i in range(4)]
        registers = np.empty(old.shape, dtype=object)
        for i in range(registers.size):
            registers.flat[i] = vector.from_elements(old.flat[0].type, values[width * i : width * (i + 1)])
        return mgpu.FragmentedArray(_registers=registers, _layout=accumulator.layout, _is_signed=None)

    return added(accumulator, refs, [_to_each_thread(w) for w in weights])


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def signal(_: Any, counter: Any) -> None:
    """Adds one to a counter, after all that the warpgroup has stored."""
    mgpu.utils.warpgroup_barrier()
    mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")


def wait(counter: Any, count: Any) -> None:
    """Waits until a counter has reached `count`, an int32 scalar, and clears it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _EACH_THREAD))
    def waited(_: Any, counter: Any, count: Any) -> None:
        pointer = mgpu.utils.memref_ptr(counter)
        mgpu.utils.SemaphoreRef(pointer).wait(_scalar(count), decrement=True, memory_scope="gpu")

    waited(counter, _to_each_thread(count))


def _to_each_thread(scalar: Any) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(scalar, (128,), ()), _EACH_THREAD)


def _scalar(of_thread: Any) -> Any:
    return vector.extract(of_thread.registers.flat[0], [], [0])


def _pieces(accumulator: Any) -> list[Any]:
    """A thread's registers as vectors of four."""
    registers = accumulator.registers.flat
    values = [vector.extract(v, [], [i]) for v in registers for i in range(ir.VectorType(v.type).shape[0])]
    four = ir.VectorType.get((4,), ir.F32Type.get())
    return [vector.from_elements(four, values[i : i + 4]) for i in range(0, len(values), 4)]


def _address(ref: Any) -> Any:
    """Of the thread's first piece."""
    i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.F32Type.get())
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, i32))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [thread], four)

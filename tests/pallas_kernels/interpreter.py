"""Runs the dense and the grouped kernel on a CPU, in JAX's interpreter of Mosaic GPU kernels, with its race detection.

The interpreter models warpgroups, barriers, copies, both kinds of memory, and clusters, and runs the grid block after
block. It knows neither inline PTX nor wgmma with an operand in registers. So the functions of the kernel that are made
of PTX are replaced here by ones in jnp, and the interpreter is extended:

- wgmma takes its A operand from registers, and is asynchronous: it reads its B operand when issued, and again when
  waited for, so that a slot released before is a race.
- Copies to shared memory may follow reads of it without a fence, which the hardware does not ask for.
- A producer need not wait for the last release of a slot.
- Blocks run in order: what a block waits for from others must be there already.

What is not tested: PTX, registers in flight (`tests/sass`), memory order between blocks, and anything of time.
"""

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense_gemm, group_schedule, grouped_gemm, main_loop
from pallas_kernels.fragments import FLAGS
from pallas_kernels.group_schedule import GroupSchedule
from pallas_kernels.register_dequantize import table_words

Interpreter: Any = jaxpr_interpret.JaxprInterpreter
Key: Any = gpu_callbacks.HostAllocationKey
CopyIn: Any = gpu_callbacks.AsyncCopyGmemToSmemTask

# Each copy has a clock of its own as long as this lasts; when clocks are shared, races go unnoticed.
COPIES = 512
# Seconds that a kernel may take.
LIMIT = 30


def run(monkeypatch: pytest.MonkeyPatch, function: Callable[..., jax.Array], *args: Any) -> tuple[np.ndarray, bool]:
    """The result of a function that calls a kernel, and whether a race was found, which is printed then."""
    with monkeypatch.context() as patch:
        _extend_interpreter(patch)
        for stand_in in (dequantize_tile, build_tables, load_tables, computed_here):
            patch.setattr(main_loop, stand_in.__name__, stand_in)
        for stand_in in (store_partial, add_partials, signal, wait):
            patch.setattr(dense_gemm, stand_in.__name__, stand_in)
            patch.setattr(grouped_gemm, stand_in.__name__, stand_in)
        for stand_in in (scan, total, store_rows, cluster_rank):
            patch.setattr(grouped_gemm, stand_in.__name__, stand_in)
        for stand_in in (take, keep, total):
            patch.setattr(group_schedule, stand_in.__name__, stand_in)
        parameters = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=COPIES)
        deadline = threading.Timer(LIMIT, _give_up)
        deadline.start()
        try:
            with plgpu.force_gpu_interpret_mode(parameters):
                result = np.asarray(function(*args))
            return result, gpu_callbacks.get_races().races_found
        finally:
            deadline.cancel()
            gpu_callbacks.reset_gpu_interpret_mode_state()


def _give_up() -> None:
    deadlock = TimeoutError(f"no end after {LIMIT} s: a deadlock")
    gpu_callbacks._get_shared_memory().set_failed(deadlock, None, top_level=False)


# Stand-ins for what is PTX


def dequantize_tile(words: jax.Array, tables: list[jax.Array], form: str) -> jax.Array:
    if form == "bf16":
        return dequantize_to_bf16(words, *tables)
    # vector, warp, lane row, lane column, word, half, code
    words = words.reshape(2, 4, 8, 4, 4, 1, 1)
    code, half = jnp.arange(4, dtype=jnp.uint32), jnp.arange(2, dtype=jnp.uint32)[:, None]
    if form in ("subnormal", "subnormal_8"):
        rotated = jnp.where(half == 1, words << 4 | words >> 28, words)
        values = rotated >> 8 * code & 0x87
        values = values + (values >> 7) if form == "subnormal_8" else values
    else:
        nibbles = words >> 4 * (code + 4 * half) & 15
        # The first four codes' signs are at 7, 15, 23 and 31, the others' at 3, 11, 19 and 27.
        negative = (words >> 7 + 8 * code - 4 * half if form == "sign_magnitude" else nibbles >> 2) & 1
        index = nibbles & 7 if form == "sign_magnitude" else 4 * (nibbles >> 3) + (nibbles & 3)
        # warp, lane row, half, byte
        table = (tables[0].reshape(4, 8, 2, -1, 1)[..., :2, :] >> 8 * code & 255).reshape(4, 8, 2, 8)
        table = table[None, :, :, None, None, :, None]
        values = sum((index == i) * table[..., i] for i in range(8)) | negative << 7
        if form == "two_tables":
            values = jnp.where(nibbles == 0, 0, values)
    # warp, half, lane row, vector, word, lane column, code
    values = values.transpose(1, 5, 2, 0, 4, 3, 6).reshape(64, 128)
    return jax.lax.bitcast_convert_type(values.astype(jnp.uint8), jnp.float8_e4m3fn)


def dequantize_to_bf16(words: jax.Array, scales: jax.Array) -> jax.Array:
    # vector, warp, lane row, lane column, word, half, pair, code
    code, pair, half = jnp.ogrid[:2, :2, :2]
    shift = (4 * (4 * code + 2 * pair + half)).astype(jnp.uint32).transpose(2, 1, 0)
    codes = (words.reshape(2, 4, 8, 4, 4, 1, 1, 1) >> shift & 15).astype(jnp.float32) - 8
    # warp, half, lane row, vector, word, pair, lane column, code
    codes = codes.transpose(1, 5, 2, 0, 4, 6, 3, 7).reshape(64, 128)
    scales = scales.reshape(4, 8, 2).transpose(0, 2, 1).reshape(64, 1).astype(jnp.float32)
    return (codes * scales).astype(jnp.bfloat16)


def build_tables(scales: jax.Array, form: str) -> jax.Array:
    codes = jnp.arange(8, dtype=jnp.float32)
    if form == "two_tables":
        codes = jnp.where(codes == 0, 8, codes)
    scale = jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32)
    # The products are exact in fp16, from where XLA rounds once.
    products = (scale[..., None] * codes).astype(jnp.float16).astype(jnp.float8_e4m3fn)
    products = jax.lax.bitcast_convert_type(products, jnp.uint8).astype(jnp.uint32).reshape(*scales.shape, 2, 4)
    words = jnp.sum(products << 8 * jnp.arange(4, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jnp.pad(words, ((0, 0),) * 3 + ((0, table_words(form) - 2),))


def load_tables(tables: Any, form: str) -> list[jax.Array]:
    return [tables[...]] if table_words(form) or form == "bf16" else []


def computed_here(value: Any) -> Any:
    return value


def store_partial(accumulator: jax.Array, ref: Any) -> None:
    ref[...] = accumulator.reshape(-1)


def add_partials(accumulator: jax.Array, refs: list[Any], weights: list[Any]) -> jax.Array:
    for ref, weight in zip(refs, weights, strict=True):
        accumulator = accumulator + weight * ref[...].reshape(accumulator.shape)
    return accumulator


def signal(counter: Any) -> None:
    counter[...] = counter[...] + 1


def wait(counter: Any, count: Any) -> None:
    # Lower blocks have run. That it was they who signalled, the result says, and the counters' ends.
    counter[...] = counter[...] - count


def scan(sizes: Any, rows: Any, before: Any, sums: Any, schedule: GroupSchedule, m: int) -> None:
    size = jnp.maximum(sizes[...], 0)
    ends = jnp.minimum(jnp.cumsum(size), m)
    firsts = jnp.minimum(jnp.cumsum(size) - size, m)
    spans = ends - firsts // 8 * 8
    tiles = jnp.where(ends > firsts, -(-spans // schedule.tile_tokens), 0)
    halves = (ends > firsts) & ((spans - 1) % schedule.tile_tokens < schedule.tile_tokens // 2)
    counts = [tiles - halves, halves.astype(jnp.int32)] if schedule.halves_last else [tiles]
    past = schedule.table_size - schedule.groups
    rows[...] = jnp.concatenate([firsts, jnp.full(past, ends[-1])]).astype(jnp.int32)
    tables = [part for n in counts for part in (jnp.cumsum(n) - n, jnp.full(past, jnp.sum(n)))]
    before[...] = jnp.concatenate(tables).astype(jnp.int32)


def cluster_rank() -> Any:
    return jax.lax.axis_index("rank")


def total(table: Any, at: int) -> Any:
    return table[at]


def take(table: Any, at: jax.Array) -> jax.Array:
    return table[...][at]


def keep(values: tuple[jax.Array, ...], places: Any, at: Any) -> None:
    count = group_schedule.LOOKED_UP
    places[:, pl.ds(at, count)] = jnp.stack([value[:count] for value in values])


def store_rows(values: jax.Array, out: Any, token: Any, column: Any, low: Any, high: Any) -> None:
    for i in range(8):

        @pl.when((low <= token + i) & (token + i < high))
        def _(i: int = i) -> None:
            out[token + i, pl.ds(column, 64)] = values[:, i]


# Extensions of the interpreter


class _Wgmmas:
    """wgmmas in flight, by warpgroup: what they read from shared memory."""

    def __init__(self) -> None:
        self.reads: Any = collections.defaultdict(collections.deque)

    def issue(
        self,
        *,
        token: Any,
        mesh_location: Any,
        thread: Any,
        acc_allocation_key_as_array: Any,
        acc_transforms: Any,
        a_allocation_key_as_array: Any,
        a_transforms: Any,
        b_allocation_key_as_array: Any,
        b_transforms: Any,
        source_info: Any = None,
    ) -> Any:
        shared = gpu_callbacks._get_shared_memory()
        logging = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)

        def content(key: Any, transforms: Any) -> tuple[Any, Any, np.ndarray]:
            key = Key.from_array(key)
            access = shared.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
            return key, access, np.asarray(shared.get_buffer_content(key, access, thread, logging_info=logging)[0])

        *b_read, b = content(b_allocation_key_as_array, b_transforms)
        b = b.copy()
        *accumulator_place, accumulator = content(acc_allocation_key_as_array, acc_transforms)
        result = accumulator + np.asarray(a_allocation_key_as_array, np.float32) @ b.astype(np.float32)
        shared.store_buffer_content(*accumulator_place, result, thread, logging_info=logging)

        def read() -> None:
            clock = shared.incr_clock(thread).generic_clock
            gpu_callbacks.get_races().check_read(thread, clock, *b_read, source_info=source_info)
            # A write may come between, and be before the last read all the same.
            now, _, _ = shared.get_buffer_content(*b_read, thread, logging_info=logging)
            if np.asarray(now).tobytes() != b.tobytes():
                raise AssertionError("an operand of wgmma has changed before the wgmma was waited for")

        read()
        self.reads[thread].append(read)
        return token

    def wait(self, *, token: Any, thread: Any, in_flight: int) -> Any:
        while len(self.reads[thread]) > in_flight:
            self.reads[thread].popleft()()
        return token


def _extend_interpreter(patch: pytest.MonkeyPatch) -> None:
    wgmmas = _Wgmmas()
    interpret, dereference = Interpreter.interpret, Interpreter._interpret_wgmma_accumulator_deref_p

    def wait_for_wgmmas(interpreter: Any, token: Any, in_flight: int) -> Any:
        waited = gpu_callbacks.fail_on_exception(functools.partial(wgmmas.wait, in_flight=in_flight))
        return jaxpr_interpret.callback.io_callback(
            waited, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, thread=interpreter.thread
        )

    def interpret_waits(interpreter: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
        # The interpreter skips waits. It hands on PTX, of which nothing is left.
        equations = [
            equation.replace(primitive=primitives.inline_mgpu_p)
            if equation.primitive is primitives.wgmma_wait_p
            else equation
            for equation in jaxpr.eqns
        ]
        return interpret(interpreter, jaxpr.replace(eqns=equations), token, *args)

    def wait(interpreter: Any, equation: Any, token: Any, _: Any) -> Any:
        return wait_for_wgmmas(interpreter, token, equation.params["n"]), []

    def read_accumulator(interpreter: Any, equation: Any, token: Any, values: Any) -> Any:
        waited = wait_for_wgmmas(interpreter, token, equation.params["wait_n"])
        return dereference(interpreter, equation, waited, values)

    patch.setattr(gpu_callbacks, "wgmma", gpu_callbacks.fail_on_exception(wgmmas.issue))
    patch.setattr(Interpreter, "interpret", interpret_waits)
    patch.setattr(Interpreter, "_interpret_inline_mgpu_p", wait)
    patch.setattr(Interpreter, "_interpret_wgmma_accumulator_deref_p", read_accumulator)

    def write_copy(copy: Any, tma_thread: int, _: Any) -> None:
        copy.clock.inc(tma_thread)
        clock = copy.clock.generic_clock.copy()
        gpu_callbacks.get_races().check_write(
            copy.thread, clock, copy.dst_allocation_key, copy.dst_access, source_info=copy.source_info
        )

    patch.setattr(CopyIn, "post_read", write_copy)

    deallocate = shared_memory.Barrier.deallocate

    def deallocate_unobserved(barrier: Any) -> None:
        if barrier.ref_count == 1:
            for thread, phase in barrier.last_observed_phase_by_thread.items():
                if phase == barrier.phase - 1:
                    barrier.last_observed_phase_by_thread[thread] = barrier.phase
        deallocate(barrier)

    patch.setattr(shared_memory.Barrier, "deallocate", deallocate_unobserved)

    reset = shared_memory.GPUSharedMemory.reset_per_cluster_state

    def reset_accesses(shared: Any) -> None:
        # Clocks start anew with each block, so that accesses of different blocks cannot be compared.
        reset(shared)
        races = gpu_callbacks.get_races()
        races.reads.clear()
        races.writes.clear()

    patch.setattr(shared_memory.GPUSharedMemory, "reset_per_cluster_state", reset_accesses)

    clean_up = gpu_callbacks._clean_up_shared_memory

    def check_counters(token: Any) -> Any:
        for memory in gpu_callbacks._get_shared_memory().mem.values():
            content = getattr(memory, "content", None)
            if content is not None and content.shape == (FLAGS,) and content.dtype == np.int32:
                assert not content.any(), "counters must be left at zero"
        return clean_up(token)

    patch.setattr(gpu_callbacks, "_clean_up_shared_memory", check_counters)

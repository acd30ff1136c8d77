"""Device time of kernels, whichever framework launches them, by CUPTI."""

from __future__ import annotations

import dataclasses
import fcntl
import getpass
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pallas_kernels.errors import W4A8Error

# Operands are rotated until they exceed this many bytes, twice the L2 cache of an H200 and more, so that nothing of a
# launch's operands is left in the cache from the last one that used them.
ROTATED_BYTES = 160e6


@dataclasses.dataclass(frozen=True)
class Timing:
    """Device time of one function.

    Attributes:
        us: median over the launches, microseconds; of each launch, its kernels' times are added.
        us_min: least.
        us_quartiles: the first and the third.
        launches: how many were timed.
        kernels: names of the kernels of a launch.
        times: of each launch, microseconds.
    """

    us: float
    us_min: float
    us_quartiles: tuple[float, float]
    launches: int
    kernels: tuple[str, ...]
    times: tuple[float, ...] = ()

    @classmethod
    def of(cls, times: Sequence[float], kernels: Sequence[str]) -> Timing:
        """From the times of launches, microseconds."""
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3
        median, around = statistics.median(times), (quartiles[0], quartiles[2])
        return cls(median, min(times), around, len(times), tuple(kernels), tuple(times))


@contextmanager
def exclusive() -> Iterator[None]:
    """Within it, no other process of this user on this machine is within it: measurements do not disturb each other."""
    with (Path(tempfile.gettempdir()) / f"w4a8jax-device-{getpass.getuser()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def rotations(nbytes: float) -> int:
    """How many sets of operands of so many bytes exceed the cache."""
    return max(1, -int(-ROTATED_BYTES // nbytes))


def measure(
    launch: Callable[[int], Any],
    *,
    synchronize: Callable[[Any], Any] | None = None,
    launches: int = 24,
    warm_up: int = 3,
) -> Timing:
    """Times a function over many launches in one CUPTI session.

    Args:
        launch: launches the function on set i of its operands, asynchronously; i counts up from 0.
        synchronize: given the last result, waits for all launches; default: `jax.block_until_ready`.
        launches: how many to time.
        warm_up: how many to launch before.

    Raises:
        W4A8Error: JAX here has no CUPTI, or the kernels recorded are not so many a launch.
    """
    import jax

    try:
        from jax._src.lib import mosaic_gpu
    except ImportError as e:
        raise W4A8Error("timing: JAX has no GPU plugin here; install w4a8jax[cuda13]") from e
    cupti = mosaic_gpu._mosaic_gpu_ext
    synchronize = synchronize or jax.block_until_ready

    def session() -> Timing:
        result = None
        for i in range(warm_up):
            result = launch(i)
        synchronize(result)
        cupti._cupti_init()
        try:
            for i in range(launches):
                # Only the last result is kept: all of them may not fit in memory.
                result = launch(warm_up + i)
            synchronize(result)
        finally:
            records = cupti._cupti_get_timings(True)
        return aggregate(records, launches)

    try:
        return session()
    except W4A8Error:
        # CUPTI records the whole process: another thread may have run a kernel.
        return session()


def aggregate(records: Sequence[tuple[str, float]], launches: int) -> Timing:
    """The times of launches from the records of their kernels.

    Args:
        records: (kernel, milliseconds) in the order of execution; kernels of different streams may interleave.
        launches: how many launches they are of.

    Raises:
        W4A8Error: there are none, or some kernel did not run the same number of times in each launch.
    """
    if not records:
        raise W4A8Error("timing: CUPTI recorded no kernel; is another profiler running?")
    by_name: dict[str, list[float]] = {}
    for name, milliseconds in records:
        by_name.setdefault(name, []).append(milliseconds)
    totals = [0.0] * launches
    kernels: list[str] = []
    for name, times in by_name.items():
        count, rest = divmod(len(times), launches)
        if rest:
            raise W4A8Error(f"timing: {len(times)} runs of kernel {name[:80]} in {launches} launches")
        kernels += [name] * count
        for i in range(launches):
            totals[i] += 1e3 * sum(times[i * count : (i + 1) * count])
    return Timing.of(totals, kernels)


def copy_rate() -> float:
    """Bytes per second that the device reads and writes, in a copy of 1 GiB that adds 1 to fp32 numbers.

    Raises:
        W4A8Error: see `measure`.
    """
    import jax
    import jax.numpy as jnp

    source = jax.random.normal(jax.random.key(0), (2**28,), jnp.float32)
    add = jax.jit(lambda v: v + 1)
    timing = measure(lambda i: add(source))
    return 2 * source.nbytes / timing.us * 1e6

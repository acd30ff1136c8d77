"""How a row of a record comes about: compile, check against float64, time in turns with the other kernels."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

from . import timing

# Kernels are timed in turns, so that each has the others' heat, each of them its part: see `in_turn`. More turns where
# launches above so many operations, some hundred microseconds, heat the card until its clock falls. A shorter one that
# had a single turn was once measured 1.25 times slower than in another run.
TURNS = 3
HOT, HOT_TURNS = 4e11, 6
# A launch above so many operations takes milliseconds: fewer launches are steady enough.
LONG = 5e12


@dataclasses.dataclass
class Checked:
    """A kernel whose result is right, and how long it took.

    Attributes:
        launch: launches it on set i of its operands, asynchronously.
        synchronize: given the last result, waits for all launches.
        error: relative, from float64 of the same operands.
        same_twice: whether two launches gave the same bits.
        timings: of its turns so far.
    """

    launch: Callable[[int], Any]
    synchronize: Callable[[Any], None]
    error: float
    same_twice: bool
    timings: list[timing.Timing] = dataclasses.field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Its part of a row: over the launches of all turns."""
        times = self.timings[0]
        if len(self.timings) > 1:
            times = timing.Timing.of([us for turn in self.timings for us in turn.times], times.kernels)
        return {
            "us": times.us,
            "us_min": times.us_min,
            "us_quartiles": list(times.us_quartiles),
            "launches": times.launches,
            "error": self.error,
            "same_twice": self.same_twice,
            "kernels": [name[:80] for name in times.kernels],
        }


def fill(
    rows: Sequence[dict[str, Any]],
    attempts: Sequence[tuple[Callable[[], Any], Callable[[Any], Checked]]],
    time: Callable[[Checked], None],
    turns: int,
) -> None:
    """Adds to each row what its kernel's checks and times give, or `failed`.

    Whatever ails one of them is a result of the benchmark, and not its end.

    Args:
        rows: one for each kernel.
        attempts: for each, what compiles it, beside other processes, and what checks the compiled function, alone.
        time: adds a timing to what was checked.
        turns: how often each is timed, all of them in turn.
    """
    checked: list[Checked | None] = []
    for row, (compiled, check) in zip(rows, attempts, strict=True):
        try:
            function = compiled()
            with timing.exclusive():
                checked.append(check(function))
        except Exception as e:
            row["failed"] = message(e)
            checked.append(None)
    with timing.exclusive():
        for turn in range(turns):
            for row, found in in_turn(list(zip(rows, checked, strict=True)), turn):
                if found is None or "failed" in row:
                    continue
                try:
                    time(found)
                except Exception as e:
                    row["failed"] = f"in turn {turn}: {message(e)}"
    for row, found in zip(rows, checked, strict=True):
        if found is not None and "failed" not in row:
            row.update(found.result())


def in_turn[T](kernels: Sequence[T], turn: int) -> list[T]:
    """The order of kernels in a turn: every other one backwards, every second one begun with the next kernel.

    Of three kernels in six turns, each follows each other one two or three times, and itself once. Were the first one
    always the same, it would never follow the last one, and have only the second one's heat and its own.
    """
    first = turn // 2 % max(1, len(kernels))
    order = [*kernels[first:], *kernels[:first]]
    return order[::-1] if turn % 2 else order


def turns(flops: float) -> int:
    """How often a product of so many operations is timed."""
    return HOT_TURNS if flops >= HOT else TURNS


def message(e: Exception) -> str:
    """An error in one line, as a row has it."""
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:400]


def now() -> str:
    """The time, as a row has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

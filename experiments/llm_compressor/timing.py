"""Seconds of a process's phases. Needs nothing but Python's standard library: two environments use it."""

import resource
import time


class Phases:
    """Wall and CPU time between marks; the first phase begins where this is made.

    Attributes:
        found: of each phase, seconds of "wall" time, and of "cpu" time of all threads, user and system.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._last = self._now()

    def done(self, phase: str) -> None:
        """The phase ends here."""
        now = self._now()
        self.found[phase] = {name: now[name] - self._last[name] for name in now}
        self._last = now

    def _now(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {"wall": time.perf_counter(), "cpu": used.ru_utime + used.ru_stime}

"""Functions under jit whose programs are compiled before they are needed: outside the time that a process has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


class Ahead:
    """A function under `jax.jit`; calls run the program that `prepare` compiled for such arguments, if it did.

    Compiling takes a second or more, in which other processes could measure, and needs no device.
    """

    def __init__(self, function: Callable[..., Any], static: int = 0) -> None:
        """static: how many of the first arguments are static."""
        self._static = static
        self._jitted = jax.jit(function, static_argnums=tuple(range(static)))
        self._programs: dict[Any, Any] = {}

    def prepare(self, *arguments: Any) -> Any:
        """Compiles for arguments, arrays or what stands for them; returns what stands for the result."""
        key = self._key(arguments)
        if key not in self._programs:
            lowered = self._jitted.lower(*arguments)
            # Measuring algorithms would disturb other processes, and what is made this way is not timed.
            compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
            self._programs[key] = compiled, lowered.out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._programs[key][1])

    def __call__(self, *arguments: Any) -> Any:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments[self._static :]))
        program = None if traced else self._programs.get(self._key(arguments))
        return self._jitted(*arguments) if program is None else program[0](*arguments[self._static :])

    def _key(self, arguments: tuple[Any, ...]) -> Any:
        leaves, structure = jax.tree.flatten(arguments[self._static :])
        return arguments[: self._static], structure, tuple((x.shape, str(x.dtype)) for x in leaves)

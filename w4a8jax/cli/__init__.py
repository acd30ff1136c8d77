"""The command line, `w4a8jax`: each command is a function of the package with its result printed."""

from .app import app, main

__all__ = ["app", "main"]

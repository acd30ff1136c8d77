"""`python -m w4a8jax`."""

from .cli import main

main()

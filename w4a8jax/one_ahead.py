"""Keeps a device busy while the host handles what it computed."""

from collections.abc import Iterable, Iterator


def one_ahead[T](items: Iterable[T]) -> Iterator[T]:
    """The same items, each taken while the next is already being computed: JAX computes it in the background."""
    iterator = iter(items)
    for previous in iterator:
        for item in iterator:
            yield previous
            previous = item
        yield previous

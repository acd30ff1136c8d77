"""Each item is handed over once the next one is begun."""

from collections.abc import Iterator

from w4a8jax.one_ahead import one_ahead


def test_the_next_is_begun_before_an_item_is_used() -> None:
    events = []

    def items() -> Iterator[int]:
        for i in range(3):
            events.append(f"begin {i}")
            yield i

    for i in one_ahead(items()):
        events.append(f"use {i}")
    assert events == ["begin 0", "begin 1", "use 0", "begin 2", "use 1", "use 2"]


def test_few_items() -> None:
    assert [list(one_ahead(range(n))) for n in range(3)] == [[], [0], [0, 1]]

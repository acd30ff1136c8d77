"""Every K step of every tile is done once, and blocks that share a tile know each other."""

from itertools import pairwise

import numpy as np
import pytest

from pallas_kernels.schedule import Schedule

CASES = [
    Schedule(1, 1, 132, True),
    Schedule(12, 8, 132, True),
    Schedule(96, 96, 132, True),
    Schedule(112, 96, 132, False),
    Schedule(132, 5, 132, True),
    Schedule(133, 5, 132, True),
    Schedule(1128, 8, 132, True),
    *(
        Schedule(int(tiles), int(steps), int(blocks), True)
        for tiles, steps, blocks in np.random.default_rng(0).integers(1, (300, 30, 70), (40, 3))
    ),
]


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_all_is_done_once_and_sums_wait_for_lower_blocks_only(schedule: Schedule) -> None:
    done: dict[tuple[int, int], int] = {}
    first_contribution: dict[int, list[int]] = {}
    for block in range(schedule.grid):
        for index in range(int(schedule.segments(block))):
            tile, low, high = (int(v) for v in schedule.segment(block, index))
            for step in range(low, high):
                assert (tile, step) not in done
                done[tile, step] = block
            if high < schedule.k_steps:
                # Given before any wait: it is the first thing that a block does of the tail.
                assert index == schedule.waves
                first_contribution.setdefault(tile, []).append(block)
    assert len(done) == schedule.tiles * schedule.k_steps
    for tile in range(schedule.tiles - schedule.tail, schedule.tiles):
        blocks = [done[tile, step] for step in range(schedule.k_steps)]
        assert all(a <= b for a, b in pairwise(blocks))
        assert (int(schedule.first_peer(tile)), int(schedule.owner(tile))) == (blocks[0], blocks[-1])
        assert first_contribution.get(tile, []) == list(range(blocks[0], blocks[-1]))


def test_tails_are_even() -> None:
    schedule = Schedule(96, 96, 132, True)
    shares = [sum(int(high - low) for _, low, high in _segments(schedule, block)) for block in range(schedule.grid)]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == 96 * 96


def _segments(schedule: Schedule, block: int) -> list[tuple[int, int, int]]:
    return [schedule.segment(block, i) for i in range(int(schedule.segments(block)))]

"""Every K step of every tile is done once, and blocks that share a tile know each other."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.schedule import DeviceSchedule, Schedule

CASES = [
    Schedule(1, 1, 132, True),
    Schedule(12, 8, 132, True),
    Schedule(96, 96, 132, True),
    Schedule(48, 96, 132, True, 4),
    Schedule(96, 96, 132, True, 200),
    Schedule(2, 3, 6, True, 1),
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
    slots: list[int] = []
    first_contribution: dict[int, list[int]] = {}
    for block in range(schedule.grid):
        for index in range(int(schedule.segments(block))):
            tile, low, high = (int(v) for v in schedule.segment(block, index))
            for step in range(low, high):
                assert (tile, step) not in done
                done[tile, step] = block
            if high < schedule.k_steps:
                # Given before any wait: it is the first thing that a block does of the tail, or the block never waits.
                assert index == schedule.waves or block < schedule.helpers < schedule.grid
                first_contribution.setdefault(tile, []).append(block)
    assert len(done) == schedule.tiles * schedule.k_steps
    for tile in range(schedule.tiles - schedule.tail, schedule.tiles):
        blocks = [done[tile, step] for step in range(schedule.k_steps)]
        assert all(a <= b for a, b in pairwise(blocks))
        first, last = (int(peer) for peer in schedule.peers(tile))
        assert int(schedule.owner(tile)) == blocks[-1]
        contributors = [block for block in range(first, last + 1) if block != blocks[-1]]
        assert first_contribution.get(tile, []) == contributors == sorted({*blocks} - {blocks[-1]})
        for block in contributors:
            slots.append(int(schedule.slot(tile, block)))
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < schedule.slots for slot in slots)


def test_tails_are_even() -> None:
    schedule = Schedule(96, 96, 132, True)
    shares = [sum(int(high - low) for _, low, high in _segments(schedule, block)) for block in range(schedule.grid)]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == 96 * 96


def test_owners_do_more_than_others() -> None:
    schedule = Schedule(48, 96, 132, True, 4)
    shares = [sum(int(high - low) for _, low, high in _segments(schedule, block)) for block in range(schedule.grid)]
    assert schedule.helpers == 84
    assert {*shares[:84]} <= {33, 34}
    assert {*shares[84:]} == {37}
    assert sum(shares) == 48 * 96


@pytest.mark.parametrize(
    ("tiles", "k_steps", "blocks"),
    [
        (0, 3, 4), (1, 1, 132), (1, 3, 132), (64, 56, 132), (160, 56, 132), (224, 16, 132), (132, 5, 132),
        (263, 7, 132), (1128, 8, 132), *np.random.default_rng(1).integers(1, (300, 30, 70), (20, 3)).tolist(),
    ],
)  # fmt: skip
def test_the_device_finds_the_same(tiles: int, k_steps: int, blocks: int) -> None:
    """As `Schedule` has it, and nothing where there are no tiles."""
    found, expected = DeviceSchedule(jnp.int32(tiles), k_steps, blocks), Schedule(tiles, k_steps, blocks, True)
    all_blocks, index = jnp.arange(blocks)[:, None], jnp.arange(tiles + 1)
    counts = np.asarray(found.segments(all_blocks))[:, 0]
    numbers = [found.tile(all_blocks, index), *found.steps(all_blocks, index)]
    segments = np.stack([np.broadcast_to(v, (blocks, tiles + 1)) for v in numbers], -1)
    for block in range(blocks):
        works = tiles > 0 and block < expected.grid
        right = [[int(v) for v in segment] for segment in (_segments(expected, block) if works else [])]
        assert segments[block, : counts[block]].tolist() == right
    tail = jnp.arange(tiles - expected.tail if tiles else 0, tiles)
    if expected.splits and tiles:
        peers = np.stack([found.first_peer(tail), found.owner(tail)], -1)
        assert peers.tolist() == [[int(v) for v in expected.peers(int(tile))] for tile in tail]


def _segments(schedule: Schedule, block: int) -> list[tuple[int, int, int]]:
    return [schedule.segment(block, i) for i in range(int(schedule.segments(block)))]

"""The grouped kernel's tiles: they hold each row of each group once, and no more of them than there must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import W4A8Error, tuning
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.group_schedule import GroupSchedule
from pallas_kernels.grouped_gemm import check


def tables(sizes: list[int], schedule: GroupSchedule) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel's scan makes, from its definition."""
    rows, before, halves = (np.zeros(schedule.table_size, np.int32) for _ in "123")
    for group, size in enumerate(sizes):
        first = rows[group]
        rows[group + 1 :] += size
        tiles, rest = divmod(first % 8 + size, schedule.tile_tokens) if size else (0, 0)
        half = schedule.halves_last and 0 < rest <= schedule.tile_tokens // 2
        halves[group + 1 :] += half
        before[group + 1 :] += tiles + (rest > 0 and not half)
    return rows, np.concatenate([before, halves]) if schedule.halves_last else before


def take(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    return table[at]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40) | st.integers(800, 1200), min_size=1, max_size=9),
    st.sampled_from([8, 16, 24, 128, 512]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([100, 1024, 2048]),
)
def test_each_row_once(sizes: list[int], tile_tokens: int, n_tiles: int, halves_last: bool, strip_tokens: int) -> None:
    schedule = GroupSchedule(len(sizes), n_tiles, tile_tokens, halves_last, strip_tokens)
    rows, before = tables(sizes, schedule)
    seen = np.zeros((sum(sizes), n_tiles), np.int32)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    weights: list[tuple[int, int]] = []
    whole = before[schedule.table_size - 1] * n_tiles
    tiles = whole + (before[-1] * n_tiles if halves_last else 0)
    for tile in range(tiles):
        group, n_tile, token, low, high = (int(v) for v in schedule.tile(np.int32(tile), rows, before, take))
        assert token % 8 == 0
        assert token <= low < high <= token + tile_tokens
        assert np.all(owner[low:high] == group)
        if halves_last:
            assert (tile >= whole) == (high - token <= tile_tokens // 2)
        seen[low:high, n_tile] += 1
        weights += [(group, n_tile)] if weights[-1:] != [(group, n_tile)] else []
    assert np.all(seen == 1)
    if max(sizes) + 7 <= schedule.strip * tile_tokens and not halves_last:
        assert len(set(weights)) == len(weights), "tiles of the same weights follow each other"
    assert tiles <= n_tiles * sum(-(-(size + 7) // tile_tokens) for size in sizes if size)


@pytest.mark.parametrize("groups", [1, 127, 128, 255, 256, 1023])
def test_tables_hold_a_total_past_the_last_group(groups: int) -> None:
    schedule = GroupSchedule(groups, 1, 8)
    assert schedule.table_size > groups
    assert schedule.table_size % 128 == 0
    rows, before = tables([1] * groups, schedule)
    last = before[-1] - 1
    assert schedule.tile(np.int32(last), rows, before, take)[0] == groups - 1


@pytest.mark.parametrize(
    ("config", "groups", "message"),
    [
        (TuningConfig(128, stream_k=True), 8, "up to 64 tokens even shares only"),
        (TuningConfig(16, stream_k=True, lead=2), 8, "up to 64 tokens even shares only"),
        (TuningConfig(16, 2, 1), 1024, "1 to 1023 groups"),
        (TuningConfig(16, 2, 3), 8, "no multiple of 384 rows"),
        (TuningConfig(16, 2, 2, cluster=2), 8, "no multiple of 512 rows"),
        (TuningConfig(16, 2, 1, 21), 1023, "bytes of shared memory"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config: TuningConfig, groups: int, message: str) -> None:
    with pytest.raises(W4A8Error, match=message):
        check(config, groups, 256, 256, "sign_magnitude")


@pytest.mark.parametrize(("m", "shape", "shared"), [(2, (8, 4096, 14336), True), (8, (128, 1536, 2048), False)])
def test_tiles_are_shared_where_most_blocks_would_be_idle(m: int, shape: tuple[int, int, int], shared: bool) -> None:
    """Mixtral's `down` with one token; not Qwen3's `gate_up`, too short, though it leaves as many idle."""
    assert tuning.heuristic_grouped(m, *shape, "sign_magnitude").stream_k == shared
    assert not tuning.heuristic_grouped(m, *shape, "bf16").stream_k


@pytest.mark.parametrize("form", ["sign_magnitude", "two_tables", "subnormal", "subnormal_8", "bf16"])
def test_the_heuristics_configurations_fit(form: str) -> None:
    for n, k in ((128, 128), (384, 256), (1536, 2048), (28672, 4096)):
        for groups in (1, 8, 128, 1023):
            tokens = []
            for m in (1, 8, 64, 512, 4096, 2**14, 2**17):
                config = tuning.heuristic_grouped(m, groups, n, k, form)
                check(config, groups, n, k, form)
                tokens.append(config.tile_tokens)
            assert tokens == sorted(tokens)

"""The choice of a kernel's configuration: tables, buckets, precedence, and what a wrong table says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import W4A8Error, force_config, tuning, tuning_tables
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Entry, Table

N, K, FORM = 14336, 12288, "sign_magnitude"
A = TuningConfig(16, 2, 1, 8)
B = TuningConfig(64, 2, 1, 6)
C = TuningConfig(128, 2, 2, 4)


def entry(m: int, tuned: TuningConfig, **other: Any) -> dict[str, Any]:
    return {"form": FORM, "N": N, "K": K, "M": m, "config": dataclasses.asdict(tuned)} | other


def write(path: Path, *entries: Any, device: str = "NVIDIA H200") -> Path:
    path.write_text(json.dumps({"device": device, "entries": list(entries)}))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "table.json", entry(16, A, us=23.5), entry(64, B), entry(4096, C))


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (16, A),
        (9, A),
        (1, None),  # few tokens count as 8, of which 16 is twice
        (17, None),
        (32, None),
        (33, B),
        (64, B),
        (65, None),
        (3072, None),  # 4096 is 4/3 of it
        (3073, C),
        (4096, C),
        (100_000, C),  # beyond all, and 4096 is many
    ],
)
def test_buckets(table: Path, m: int, config: TuningConfig | None) -> None:
    assert tuning_tables.read(table).lookup(m, N, K, FORM) == config


def test_beyond_few_tokens_nothing_is_known(tmp_path: Path) -> None:
    found = tuning_tables.read(write(tmp_path / "t.json", entry(16, A)))
    assert found.lookup(17, N, K, FORM) is None


def test_another_weight_or_form_is_another_entry(table: Path) -> None:
    found = tuning_tables.read(table)
    assert found.lookup(16, N, K + 128, FORM) is None
    assert found.lookup(16, N - 128, K, FORM) is None
    assert found.lookup(16, N, K, "two_tables") is None


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"form": FORM, "N": N, "K": K, "M": 16, "config": {"tile_tokens": 16}})
    assert tuning_tables.read(path).lookup(16, N, K, FORM) == TuningConfig(16)


def test_tables_write_what_they_read_and_merge(table: Path, tmp_path: Path) -> None:
    first = tuning_tables.read(table)
    merged = first.merged([Entry(FORM, N, K, 16, B, {"us": 20.0}), Entry("two_tables", N, K, 16, C)])
    merged.write(tmp_path / "merged.json")
    again = tuning_tables.read(tmp_path / "merged.json")
    assert again.device == "NVIDIA H200"
    assert again.entries == merged.entries
    assert len(again.entries) == 4
    assert again.lookup(16, N, K, FORM) == B
    assert again.entries[FORM, N, K, 16].more == {"us": 20.0}
    assert first.lookup(16, N, K, FORM) == A


def test_a_changed_file_is_read_again(table: Path) -> None:
    assert tuning_tables.read(table).lookup(16, N, K, FORM) == A
    Table("x", [Entry(FORM, N, K, 16, B)]).write(table)
    assert tuning_tables.read(table).lookup(16, N, K, FORM) == B


def test_precedence(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(m: int = 16) -> TuningConfig:
        return tuning.choose(m, N, K, FORM)

    monkeypatch.delenv("W4A8JAX_TUNED", raising=False)
    monkeypatch.setattr(tuning_tables, "_FOLDER", tmp_path / "tuned")
    assert chosen() == tuning.heuristic(16, N, K, FORM)
    (tmp_path / "tuned").mkdir()
    write(tmp_path / "tuned" / f"{tuning_tables.slug(jax.devices()[0].device_kind)}.json", entry(16, B), entry(4096, C))
    assert chosen() == B
    monkeypatch.setenv("W4A8JAX_TUNED", str(table))
    assert chosen() == A
    assert chosen(4096) == C  # the user's table reaches no further than its 4096, which is many
    assert chosen(256) == tuning.heuristic(256, N, K, FORM)
    with force_config(C):
        assert chosen() == C


def test_what_ships_is_right() -> None:
    for path in Path(tuning_tables.__file__).with_name("tuned").glob("*.json"):
        table = tuning_tables.read(path)
        assert table.entries
        assert path.name == f"{tuning_tables.slug(table.device)}.json"


EXPERTS = 8


def grouped(m: int, tuned: TuningConfig, **other: Any) -> dict[str, Any]:
    return entry(m, tuned, **other) | {"E": EXPERTS}


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (7, None),  # less than half of 16
        (8, A),
        (16, A),
        (31, A),
        (32, A),  # twice 16, half of 64: the first
        (33, B),
        (128, B),
        (129, None),
        (2048, C),
        (4096, C),
        (1 << 20, C),  # beyond all, and 4096 rows are 512 an expert
    ],
)
def test_grouped_entries_serve_rows_near_theirs(tmp_path: Path, m: int, config: TuningConfig | None) -> None:
    rows = [grouped(16, A), grouped(64, B), grouped(4096, C), entry(16, C)]
    table = tuning_tables.read(write(tmp_path / "t.json", *rows))
    assert table.lookup_grouped(m, EXPERTS, N, K, FORM) == config
    assert table.lookup_grouped(m, EXPERTS + 1, N, K, FORM) is None
    assert table.lookup(16, N, K, FORM) == C


def test_few_rows_an_expert_say_nothing_of_many(tmp_path: Path) -> None:
    table = tuning_tables.read(write(tmp_path / "t.json", grouped(1024, C)))
    assert table.lookup_grouped(2048, EXPERTS, N, K, FORM) == C
    assert table.lookup_grouped(4096, EXPERTS, N, K, FORM) is None


def test_grouped_entries_are_written_and_divided(tmp_path: Path) -> None:
    table = Table("x", [Entry(FORM, N, K, 16, A), Entry(FORM, N, K, 16, B, {"us": 3.0}, EXPERTS)])
    table.write(tmp_path / "t.json")
    again = tuning_tables.read(tmp_path / "t.json")
    assert again.entries == table.entries
    assert again.entries[FORM, N, K, 16, EXPERTS].more == {"us": 3.0}
    assert list(again.part(K, N, [16]).entries) == [(FORM, N, K, 16)]
    assert list(again.part_grouped(EXPERTS, N, K, [16]).entries) == [(FORM, N, K, 16, EXPERTS)]
    assert not again.part_grouped(EXPERTS, N, K, [17]).entries


def test_grouped_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> TuningConfig:
        return tuning.choose_grouped(16, EXPERTS, N, K, FORM)

    monkeypatch.delenv("W4A8JAX_TUNED", raising=False)
    monkeypatch.setattr(tuning_tables, "_FOLDER", tmp_path)
    assert chosen() == tuning.heuristic_grouped(16, EXPERTS, N, K, FORM)
    write(tmp_path / f"{tuning_tables.slug(jax.devices()[0].device_kind)}.json", grouped(16, B))
    assert chosen() == B
    monkeypatch.setenv("W4A8JAX_TUNED", str(write(tmp_path / "mine.json", grouped(16, A))))
    assert chosen() == A
    with force_config(C):
        assert chosen() == C


@pytest.mark.parametrize("form", [FORM, "subnormal", "subnormal_8", "bf16"])
@pytest.mark.parametrize(("experts", "n", "k"), [(8, 28672, 4096), (128, 2048, 768), (4, 128, 128)])
@pytest.mark.parametrize("m", [8, 100, 2048, 131072])
def test_grouped_candidates_fit(m: int, experts: int, n: int, k: int, form: str) -> None:
    found = tuning.candidates_grouped(m, experts, n, k, form)
    assert 1 <= len(found) <= 18
    assert len(set(found)) == len(found)
    for config in found:
        assert tuning_tables.misfit(config, n, k, form, experts) is None
        assert not config.stream_k or config.tile_tokens <= 64
        assert config.cluster == 1 or config.tile_tokens >= 128


def test_slug() -> None:
    assert tuning_tables.slug("NVIDIA H200") == "nvidia_h200"
    assert tuning_tables.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_force_config_nests_and_is_undone_by_errors() -> None:
    def chosen() -> TuningConfig:
        return tuning.choose(16, N, K, FORM)

    plain = chosen()
    with force_config(C):
        with pytest.raises(ZeroDivisionError), force_config(B):
            _ = 1 // (chosen() != B)
        assert chosen() == C
        with force_config(None):
            assert chosen() == plain
        assert chosen() == C
    assert chosen() == plain


def test_force_config_reaches_compiled_functions() -> None:
    seen: list[TuningConfig] = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        seen.append(tuning.choose(16, N, K, FORM))
        return x + 1

    x = jnp.zeros(2)
    f(x)
    with force_config(C):
        f(x)
        f(x)
    f(x)
    assert seen == [tuning.choose(16, N, K, FORM), C]


def test_a_forced_config_that_does_not_fit_is_refused() -> None:
    with force_config(TuningConfig(16, 2, 3)), pytest.raises(W4A8Error, match=r"force_config: .*384 rows"):
        tuning.choose(16, N, K, FORM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'expected {"device": NAME'),
        ('{"device": "x"}', 'expected {"device": NAME'),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(W4A8Error, match=r"bad\.json") as caught:
        tuning_tables.read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "expected an object"),
        ({"N": 256}, "expected a string as form"),
        (entry(0, A), "M: expected a positive integer, found 0"),
        (entry(16, A, K="12288"), "K: expected a positive integer, found '12288'"),
        (entry(16, A, config=None), "expected an object as config"),
        (entry(16, A, config={"tile_tokens": 16, "swizzle": 3}), "unknown fields swizzle; known are tile_tokens"),
        (entry(16, A, config={"stages": 4}), "tile_tokens"),
        (entry(16, A, config={"tile_tokens": 16.0}), "tile_tokens: expected int, found 16.0"),
        (entry(16, A, config={"tile_tokens": 12}), "tile_tokens must be a multiple of 8"),
        (entry(16, A, config={"tile_tokens": 128, "stages": 40}), "bytes of shared memory"),
        (entry(16, A, config={"tile_tokens": 16, "warpgroups": 3}), "384 rows"),
        (entry(4096, C, form="bf16"), "bytes of shared memory"),  # fits FP8 tokens only
        (entry(16, A, E=0), "E: expected a positive integer, found 0"),
        (entry(16, A, E=4096), "1 to 1023 groups, found 4096"),
        (entry(16, TuningConfig(128, stream_k=True), E=8), "even shares only"),
    ],
)
def test_a_wrong_entry_is_named(table: Path, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(table.with_name("bad.json"), entry(16, A), bad)
    monkeypatch.setenv("W4A8JAX_TUNED", str(table.with_name("bad.json")))
    with pytest.raises(W4A8Error, match=r"bad\.json: entry 1 ") as caught:
        tuning.choose(16, N, K, FORM)
    assert message in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A8JAX_TUNED", str(tmp_path / "missing.json"))
    with pytest.raises(W4A8Error, match=r"missing\.json: cannot be read"):
        tuning.choose(16, N, K, FORM)


@pytest.mark.parametrize("form", [FORM, "bf16"])
@pytest.mark.parametrize("m", [1, 8, 24, 64, 65, 128, 512, 4096, 16384])
@pytest.mark.parametrize(("n", "k"), [(14336, 12288), (4096, 14336), (128, 256), (384, 384)])
def test_candidates_fit(m: int, n: int, k: int, form: str) -> None:
    found = tuning.candidates(m, n, k, form)
    assert found
    assert len(found) <= 50
    assert len(set(found)) == len(found)
    for config in found:
        assert tuning_tables.misfit(config, n, k, form) is None
        assert config.tile_tokens < 2 * max(m, 8)


def test_w4a16_has_tiles_of_its_own() -> None:
    """Those of W4A8 with 3 warpgroups have no registers for a bf16 operand."""
    tiles = {(c.tile_tokens, c.row_blocks, c.warpgroups) for c in tuning.candidates(4096, 12288, K, "bf16")}
    assert (96, 2, 3) not in tiles
    assert (160, 2, 1) in tiles


def test_candidates_vary_what_the_kernel_has() -> None:
    found = tuning.candidates(4096, N, K, FORM)
    assert {c.stream_k for c in found} == {False, True}
    assert {c.cluster for c in found} == {1, 2}
    few = tuning.candidates(8, N, K, FORM)
    assert {c.cluster for c in few} == {1}
    assert {c.slot_steps for c in few} == {1, 2}


@pytest.mark.parametrize("form", [FORM, "two_tables", "subnormal", "subnormal_8", "bf16"])
@pytest.mark.parametrize("n", [128, 256, 384, 12288, 14336])
@pytest.mark.parametrize("m", [1, 9, 17, 64, 65, 128, 1000, 16384])
def test_the_heuristic_fits(m: int, n: int, form: str) -> None:
    assert tuning_tables.misfit(tuning.heuristic(m, n, 4096, form), n, 4096, form) is None

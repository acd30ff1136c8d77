"""The benchmark's runs, without a GPU: rows, processes, and the choice of configurations."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from made_up_record import SHAPES, made_up_record

from pallas_kernels import W4A8Error, tuning, w4a8_matmul
from pallas_kernels.tuning_tables import Entry, Table
from w4a8jax.benchmark import gemm, kernels, operands, parts, rows, timing, tune
from w4a8jax.benchmark.record import Record


@pytest.fixture
def record() -> Record:
    return made_up_record()


def fake_measure(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
    for i in range(3):
        synchronize(launch(i))
    return timing.Timing.of([10.0] * launches, ("kernel",))


@dataclasses.dataclass(frozen=True)
class Broken(kernels.JaxDot):
    """Runs, and is wrong by a factor."""

    factor: float = 1.5

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        dot = super().function(m, n, k)
        if self.factor == 0:
            raise RuntimeError("no such\nkernel")
        return lambda x, w: dot(x, w) * self.factor


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1e5)


@pytest.mark.usefixtures("small_cache")
class TestRun:
    def test_rows(self) -> None:
        chosen = [*kernels.jax_kernels(), Broken("wrong", "fp8", 1, 1), Broken("broken", "bf16", 2, 2, factor=0)]
        record, lines, saved = Record({"copy_TB_s": 3.0}), [], []
        gemm.run(
            record,
            chosen,
            [(256, 128), (128, 256)],
            [1, 24],
            save=lambda r: saved.append(len(r.rows)),
            progress=lines.append,
            measure=fake_measure,
        )
        assert len(record.rows) == len(lines) == 16
        assert saved == [4, 8, 12, 16]
        for row in record.rows:
            if row["kernel"] == "wrong":
                assert re.match(r"W4A8Error: wrong: relative error (4\.9|5\.0)", row["failed"])
            elif row["kernel"] == "broken":
                assert row["failed"] == "RuntimeError: no such kernel"
            else:
                assert row["us"] == 10
                assert row["error"] < 5e-3
                assert row["same_twice"] is True
        assert "failed: RuntimeError" in lines[3]
        json.dumps(record.rows)

    def test_long_products_are_timed_in_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every other turn backwards. Here each is slower; a kernel that fails in the second has no time."""
        monkeypatch.setattr(rows, "HOT", 0)
        order: list[Any] = []

        def measure(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
            order.append(synchronize.__self__.name)
            if len(order) == 3:
                raise W4A8Error("timing: CUPTI recorded no kernel")
            return timing.Timing.of([10.0 * len(order)] * launches, ("kernel",))

        chosen = kernels.jax_kernels()[:2]
        record = gemm.run(Record({"copy_TB_s": 3.0}), chosen, [(128, 256)], [1], measure=measure)
        a, b = (kernel.name for kernel in chosen)
        assert order == [a, b, b, a, *[a] * 4]
        found = {row["kernel"]: row for row in record.rows}
        assert found[b]["failed"] == "in turn 1: W4A8Error: timing: CUPTI recorded no kernel"
        assert (found[a]["us"], found[a]["us_min"], found[a]["launches"]) == (55.0, 10.0, 144)

    def test_resume_measures_what_is_missing_or_failed(self) -> None:
        (kernel,) = kernels.selected(kernels.jax_kernels(), ["bf16"])
        record = Record({"copy_TB_s": 3.0})
        record.add({"K": 128, "N": 128, "M": 1, "kernel": kernel.name, "us": 5.0, "operand_bytes": 1.0})
        record.add({"K": 128, "N": 128, "M": 2, "kernel": kernel.name, "failed": "out of memory"})
        lines: list[str] = []
        gemm.run(record, [kernel], [(128, 128)], [1, 2, 4], progress=lines.append, measure=fake_measure)
        assert {key[2]: row["us"] for key, row in record.measured.items()} == {1: 5.0, 2: 10.0, 4: 10.0}
        assert len(lines) == 2

    def test_weights_are_rotated(self) -> None:
        (kernel,) = kernels.selected(kernels.jax_kernels(), ["fp8"])
        shape = gemm.Shape(128, 128, [1])
        assert len(shape.prepared(kernel)) == math.ceil(1e5 / 128**2)
        assert shape.tokens(1).fp8[0][0].shape == (1, 128)


def test_kernels_are_chosen_by_words_of_their_names() -> None:
    every = [*kernels.our_kernels(), *kernels.jax_kernels()]
    assert kernels.selected(every, []) == every
    assert [x.name for x in kernels.selected(every, ["lut", "fp8"])] == ["w4a8 lut -7..7", "w4a8 lut -8..7", "jax fp8"]
    with pytest.raises(W4A8Error, match="kernel 'w2': there is none; there are w4a8 lut"):
        kernels.selected(every, ["w2"])


def test_our_kernels_run_what_is_chosen() -> None:
    every = [x for x in kernels.our_kernels() if isinstance(x, kernels.OurKernel)]
    forms = ["sign_magnitude", "two_tables", "subnormal", "subnormal_8", "bf16"]
    assert [x.form(256, 256) for x in every] == forms
    first = every[0]
    assert first.config(16, 256, 256) == dataclasses.asdict(tuning.choose(16, 256, 256, "sign_magnitude"))


def test_each_kernel_has_the_others_heat() -> None:
    order = [kernel for turn in range(rows.HOT_TURNS) for kernel in rows.in_turn("abc", turn)]
    follows = Counter(itertools.pairwise(order))
    assert Counter(order) == {kernel: rows.HOT_TURNS for kernel in "abc"}
    assert all(follows[pair] >= 2 for pair in itertools.permutations("abc", 2))


class TestParts:
    def test_split(self) -> None:
        shapes = [(256, 128), (128, 256)]
        assert parts.split(shapes, [1, 2, 4], 1) == [((256, 128), [1, 2, 4]), ((128, 256), [1, 2, 4])]
        found = parts.split(shapes, [1, 2, 4], 5)
        assert sorted(found) == [((128, 256), [1, 4]), ((128, 256), [2]), ((256, 128), [1, 4]), ((256, 128), [2])]
        assert len(parts.split(shapes, [1, 2, 4], 99)) == 6

    def test_results_are_added_up(self, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each process replaces its own rows, and no others."""

        def process(words: list[str], progress: Callable[[str], None]) -> list[str]:
            given = dict(zip(words[1::2], words[2::2], strict=True))
            assert given["--processes"] == "1"
            part = Record.read(given["--out"])
            points = {(row["K"], row["N"], row["M"]) for row in part.rows}
            assert points == {(12288, int(given["--shape"][6:]), int(m)) for m in given["--tokens"].split(",")}
            for row in part.rows:
                row["us"] = 1.0 + row["M"]
            part.write(given["--out"])
            progress("K ...")
            return [] if row["M"] != 512 else ["it failed"]

        monkeypatch.setattr(parts, "_run", process)
        lines: list[str] = []
        with pytest.raises(W4A8Error, match="2 of 4 processes failed; it failed"):
            parts.run(record, ["bench"], SHAPES, (1, 512), 4, save=lambda r: None, progress=lines.append)
        assert len(lines) == 4
        for row in record.measured.values():
            changed = row["M"] in (1, 512)
            assert (row["us"] == 1.0 + row["M"]) == changed

    def test_what_is_found_so_far_is_saved(self, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run that is cut off loses little: here a process waits until its rows were saved."""
        saved = threading.Event()

        def process(words: list[str], progress: Callable[[str], None]) -> list[str]:
            part = Record.read(words[-1])
            part.rows[0]["us"] = 7.0
            part.write(words[-1])
            return [] if saved.wait(30) else ["nothing was saved"]

        def save(found: Record) -> None:
            if any(row.get("us") == 7 for row in found.rows):
                saved.set()

        monkeypatch.setattr(parts, "_run", process)
        monkeypatch.setattr(parts, "_SAVED_EVERY", 0.05)
        parts.run(record, ["bench"], SHAPES[:1], (1,), 1, save=save, progress=print)

    def test_a_failed_process_says_why(self) -> None:
        lines: list[str] = []
        (failure,) = parts._run(["tune", "--tokens", "0"], lines.append)
        assert "--tokens 0: expected positive integers" in failure
        assert lines == []

    def test_measurements_exclude_each_other(self) -> None:
        code = "from w4a8jax.benchmark import timing\nwith timing.exclusive(): print('in')"
        with timing.exclusive():
            other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(timeout=2)
        assert other.communicate(timeout=60)[0] == b"in\n"


def test_tables_add_up(tmp_path: Path) -> None:
    config = tuning.candidates(16, 256, 256, "sign_magnitude")[0]
    entries = [Entry("sign_magnitude", n, 256, m, config) for n in (256, 512) for m in (1, 16)]
    table = Table("x", entries)
    part = table.part(256, 512, [16])
    assert list(part.entries) == [("sign_magnitude", 512, 256, 16)]
    other = Table("x", [dataclasses.replace(entries[3], m=64)])
    other.write(tmp_path / "part.json")
    table.update(tmp_path / "part.json")
    assert len(table.entries) == 5


@pytest.mark.usefixtures("small_cache")
def test_tune_takes_the_fastest_right_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates stand for products with times of their own; the quickest of all is wrong, another does not compile."""
    configs = tuning.candidates(64, 256, 256, "sign_magnitude")
    wrong, broken, best = configs[0], configs[1], configs[2]
    times = iter(range(1000))

    def compiled(self: Any, m: int, n: int, k: int, config: Any) -> Callable[[Any, Any], Any]:
        if config == broken:
            raise W4A8Error("does not fit")

        def product(inputs: Any, w: Any) -> Any:
            product.config = config  # type: ignore[attr-defined]
            out = w4a8_matmul(operands.Tokens(operands.Activations(k, m), m, 1).bf16[0], w)
            return 2 * out if config == wrong else out

        current.append(config)
        return product

    def measure(launch: Any, *, synchronize: Any, launches: int) -> timing.Timing:
        turn, place = divmod(next(times), len(measured))
        found = measured[-1 - place if turn % 2 else place]
        return timing.Timing.of([5.0 if found == best else 50.0 + place], ("k",))

    current: list[Any] = []
    kernel = next(k for k in kernels.our_kernels() if isinstance(k, kernels.OurKernel))
    measured = [c for c in tune.configurations(kernel, 64, 256, 256) if c not in (wrong, broken)]
    monkeypatch.setattr(kernels.OurKernel, "compiled", compiled)
    monkeypatch.setattr(kernels.OurKernel, "weight", lambda self, weights, i: weights.quantized(i)[0])
    lines: list[str] = []
    saved: list[Table] = []
    table = tune.run(
        Table("x"), [kernel], [(256, 256)], [64], save=saved.append, progress=lines.append, measure=measure
    )
    (entry,) = table.entries.values()
    assert entry.key == ("sign_magnitude", 256, 256, 64)
    assert entry.config == best
    assert entry.more["us"] == 5
    assert saved[-1].entries == table.entries
    assert any("relative error" in text for text in lines)
    assert any("does not fit" in text for text in lines)
    count = len(current)
    assert tune.run(table, [kernel], [(256, 256)], [64], resume=True, measure=measure) is table
    assert len(current) == count


def test_jax_products_need_no_gpu() -> None:
    assert jax.devices()
    for kernel in kernels.jax_kernels():
        assert kernel.inputs(operands.Tokens(operands.Activations(128, 2), 2, 1))

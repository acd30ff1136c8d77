"""The benchmark, without a GPU: its arithmetic, its record, what it prints and draws, and how it refuses."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from pallas_kernels import W4A8Error, tuning, w4a8_matmul
from pallas_kernels.tuning_tables import Entry, Table
from w4a8jax.benchmark import floor, gemm, kernels, operands, parts, summary, timing, tune
from w4a8jax.benchmark.plot import plot
from w4a8jax.benchmark.record import Record
from w4a8jax.cli import app
from w4a8jax.cli.bench import parse_shapes, parse_tokens

no_gpu = pytest.mark.skipif(tuning.hopper(), reason="there is a Hopper GPU")


def cli(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: Any) -> str:
    result = cli(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


class TestTiming:
    def test_launches_of_several_kernels(self) -> None:
        found = timing.aggregate([("a", 0.001), ("b", 0.010), ("a", 0.003), ("b", 0.020)], 2)
        assert found.us == pytest.approx(17)
        assert found.us_min == pytest.approx(11)
        assert found.kernels == ("a", "b")
        assert found.launches == 2

    def test_streams_may_interleave_and_names_repeat(self) -> None:
        records = [("a", 0.001), ("a", 0.002), ("a", 0.004), ("b", 0.1), ("a", 0.008), ("b", 0.2)]
        found = timing.aggregate(records, 2)
        assert found.us == pytest.approx((103 + 212) / 2)
        assert found.kernels == ("a", "a", "b")

    def test_median_and_quartiles(self) -> None:
        found = timing.aggregate([("k", t / 1000) for t in (5, 1, 2, 3, 4)], 5)
        assert found.us == pytest.approx(3)
        assert found.us_quartiles == pytest.approx((2, 4))
        assert timing.aggregate([("k", 0.005)], 1).us_quartiles == pytest.approx((5, 5))

    def test_kernels_that_do_not_divide_among_launches(self) -> None:
        with pytest.raises(W4A8Error, match="3 runs of kernel a in 2 launches"):
            timing.aggregate([("a", 1.0)] * 3, 2)
        with pytest.raises(W4A8Error, match="recorded no kernel"):
            timing.aggregate([], 2)

    def test_rotations_exceed_the_cache(self) -> None:
        for nbytes in (1e6, 88e6, 120e6, 1e9):
            sets = timing.rotations(nbytes)
            assert sets * nbytes >= 2 * 60e6
            assert sets == 1 or (sets - 1) * nbytes < timing.ROTATED_BYTES

    @no_gpu
    def test_without_a_gpu(self) -> None:
        with pytest.raises(W4A8Error, match="timing: "):
            timing.measure(lambda i: jnp.zeros(1) + i)


class TestFloor:
    def test_bytes_by_hand(self) -> None:
        # 16 * 256 / 2 codes, 16 * 2 scales, 4 * 256 activations, 2 * 4 * 16 outputs
        assert floor.w4a8_bytes(4, 16, 256) == 2048 + 32 + 1024 + 128
        assert floor.operand_bytes(4, 16, 256, 2, 2) == 8192 + 2048 + 128
        assert floor.flops(4, 16, 256) == 32768

    def test_command_a_gate_up(self) -> None:
        # 452,984,832 + 7,077,888 + 12,288 + 147,456 bytes at 4.3 TB/s; 2 * 16384 * 73728 * 12288 flops at 1300 TFLOP/s
        device = floor.Device(4.3e12, 1300e12)
        assert device.floor_us(1, 73728, 12288) == pytest.approx(107.027, rel=1e-4)
        assert device.floor_us(16384, 73728, 12288) == pytest.approx(22836.2, rel=1e-4)
        # 452,984,832 + 7,077,888 + 201,326,592 + 2,415,919,104 bytes
        assert floor.Device(4.3e12).floor_us(16384, 73728, 12288) == pytest.approx(715.653, rel=1e-5)


SHAPES = ((12288, 73728), (12288, 14336))
TOKENS = (1, 64, 512, 4096)
# Times by hand: ours, and each peer's multiple of it.
TIMES = {1: 100.0, 64: 200.0, 512: 400.0, 4096: 1600.0}
MULTIPLES: dict[str, Callable[[int, int], float]] = {
    summary.ROWWISE_FP8: lambda n, m: 0.5 if m == 4096 and n == 14336 else 2.0,
    summary.CUTLASS_W4A8: lambda n, m: 1.5,
    summary.MACHETE: lambda n, m: 4.0 if m == 512 else 1.0,
}


@pytest.fixture
def record() -> Record:
    rows: list[dict[str, Any]] = []
    for k, n in SHAPES:
        for m in TOKENS:
            ours = {"K": k, "N": n, "M": m, "us_min": 1.0, "us_quartiles": [1.0, 2.0], "error": 1e-3, "launches": 24}
            ours |= {"same_twice": True, "kernels": ["k"], "config": None, "operand_bytes": floor.w4a8_bytes(m, n, k)}
            rows.append(ours | {"kernel": "w4a8 lut -7..7", "us": TIMES[m]})
            rows += [ours | {"kernel": name, "us": TIMES[m] * of(n, m)} for name, of in MULTIPLES.items()]
    failed = {"K": 12288, "N": 14336, "M": 4096, "kernel": "vllm marlin w4a16", "failed": "RuntimeError: [no] kernel"}
    return Record({"device": "NVIDIA H200", "date": "2026-01-01", "copy_TB_s": 4.0}, [*rows, failed])


def test_summary_by_hand(record: Record) -> None:
    record.derive()
    found = {x.title: x for x in summary.summarize(record)}
    assert {x.kernel for x in found.values()} == {"w4a8 lut -7..7"}

    def of_copy(m: int, n: int) -> float:
        return floor.w4a8_bytes(m, n, 12288) / TIMES[m] / 4e6

    big = found["decode, M <= 64, big shapes: fraction of the copy rate"]
    assert big.points == 2
    assert big.mean == pytest.approx(math.sqrt(of_copy(1, 73728) * of_copy(64, 73728)))
    assert big.worst == pytest.approx(of_copy(64, 73728))
    assert big.where == (12288, 73728, 64)
    small = found["decode, M <= 64, small shapes: fraction of the copy rate"]
    assert small.worst == pytest.approx(of_copy(64, 14336))
    prefill = found["prefill, M >= 2048: speed over rowwise FP8"]
    assert (prefill.mean, prefill.worst) == (pytest.approx(1.0), pytest.approx(0.5))
    assert prefill.where == (12288, 14336, 4096)
    middle = found["512 <= M < 2048: speed over rowwise FP8"]
    assert (middle.mean, middle.worst, middle.points) == (pytest.approx(2.0), pytest.approx(2.0), 2)
    cutlass = found["all M: speed over vLLM CUTLASS W4A8"]
    assert (cutlass.mean, cutlass.worst, cutlass.points) == (pytest.approx(1.5), pytest.approx(1.5), 8)
    machete = found["M >= 256: speed over Machete W4A16"]
    assert (machete.mean, machete.worst, machete.points) == (pytest.approx(2.0), pytest.approx(1.0), 4)


def test_floors_follow_the_best_cublas_fp8(record: Record) -> None:
    record.derive()
    # Rowwise FP8 at K 12288, N 73728, M 512: 800 us; M 4096: 3200 us, the best.
    best = floor.flops(4096, 73728, 12288) / 3200e-6
    assert record.about["cublas_fp8_TFLOP_s"] == pytest.approx(best / 1e12)
    row = record.measured[12288, 73728, 4096, "w4a8 lut -7..7"]
    assert row["fraction_of_floor"] == pytest.approx(2.0)
    assert row["tflops"] == pytest.approx(2 * best / 1e12)
    decode = record.measured[12288, 73728, 1, "w4a8 lut -7..7"]
    assert decode["floor_us"] == pytest.approx(floor.w4a8_bytes(1, 73728, 12288) / 4e6)
    assert decode["gbps"] == pytest.approx(floor.w4a8_bytes(1, 73728, 12288) / 1e5)


def test_a_kernel_without_peers_has_a_summary() -> None:
    rows = [{"K": 256, "N": 256, "M": 1, "kernel": "w4a8 lut -8..7", "us": 5.0, "operand_bytes": 1.0}]
    record = Record({"copy_TB_s": 3.0}, rows)
    record.derive()
    assert all(x.mean is None and x.points == 0 for x in summary.summarize(record))
    summary.render(record, Console(file=io.StringIO()))


def test_render_names_failures(record: Record) -> None:
    record.rows[0]["same_twice"] = False
    text = io.StringIO()
    summary.render(record, Console(file=text, width=200))
    shown = text.getvalue()
    assert "failed: K 12288 N 14336 M 4096 vllm marlin w4a16: RuntimeError: [no] kernel" in shown
    assert "not the same bits in two runs: K 12288 N 73728 M 1 w4a8 lut -7..7" in shown
    assert re.search(
        r"prefill, M >= 2048: speed over rowwise FP8 +w4a8 lut -7..7 +1.000 +0.500 +12288, 14336, 4096", shown
    )


def test_records_are_read_as_written(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    again = Record.read(path)
    assert again.about == record.about
    assert again.rows == record.rows
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_replaces_one_of_its_kernel_and_point(record: Record) -> None:
    count = len(record.rows)
    record.add({"K": 12288, "N": 14336, "M": 4096, "kernel": "vllm marlin w4a16", "us": 7.0})
    assert len(record.rows) == count
    assert record.measured[12288, 14336, 4096, "vllm marlin w4a16"]["us"] == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no record of"),
        ('{"rows": []}', "is no record of"),
        ('{"copy_TB_s": 3, "rows": [{"K": 1}]}', "row 0: expected K, N, M and kernel"),
        ('{"copy_TB_s": 3, "rows": [{"K": 1, "N": 1, "M": 1, "kernel": "x"}]}', "row 0: expected us"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    assert message in refusal("bench", "gemm", "--summarize", path)


def test_plot(record: Record, tmp_path: Path) -> None:
    path = plot(record, tmp_path / "plot.png")
    with Image.open(path) as image:
        assert image.size[0] > 700
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    with pytest.raises(W4A8Error, match=r"ends in \.png"):
        plot(record, tmp_path / "plot.txt")
    with pytest.raises(W4A8Error, match="no times to draw"):
        plot(Record({"copy_TB_s": 1.0}), tmp_path / "plot.png")


def test_summarize_needs_no_gpu(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path / "record.json")
    result = cli("bench", "gemm", "--summarize", tmp_path / "record.json", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert "NVIDIA H200, 2026-01-01: copy 4.00 TB/s, best cuBLAS FP8 2319 TFLOP/s" in result.stdout
    assert "speed over rowwise" in result.stdout
    assert f"wrote {tmp_path / 'plot.png'}" in " ".join(result.stdout.split())


@no_gpu
def test_commands_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "bench gemm: needs a Hopper GPU" in refusal("bench", "gemm", "--tokens", "1")
    assert "tune: needs a Hopper GPU" in refusal("tune", "--shape", "256,256")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "gemm", "--shape", "12288"), "--shape 12288: expected K,N"),
        (("bench", "gemm", "--shape", "100,256"), "--shape 100,256: expected K,N, two multiples of 128"),
        (("tune", "--tokens", "1,x"), "--tokens 1,x: expected positive integers"),
        (("tune", "--tokens", "0"), "--tokens 0: expected positive integers"),
        (("bench", "gemm", "--resume"), "--resume: needs --out"),
        (("bench", "gemm", "--out", "missing/r.json"), "--out missing/r.json: the folder does not exist"),
        (("tune", "--out", "missing/t.json"), "--out missing/t.json: the folder does not exist"),
        (("bench", "gemm", "--plot", "plot.txt"), "plot.txt: expected a name that ends in .png"),
        (("bench", "gemm", "--plot", "missing/p.png"), "missing/p.png: the folder does not exist"),
        (("bench", "gemm", "--summarize", "missing.json"), "missing.json: cannot be read"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(*arguments)


def test_arguments() -> None:
    assert parse_shapes(["12288,14336", "256,128"]) == [(12288, 14336), (256, 128)]
    assert parse_shapes(None) == []
    assert parse_tokens("1,16,4096") == [1, 16, 4096]
    assert parse_tokens(None) == []


def test_help_names_the_options() -> None:
    for arguments, options in (
        (("bench", "gemm"), ("--shape", "--tokens", "--vllm", "--out", "--plot", "--resume", "--summarize")),
        (("tune",), ("--shape", "--tokens", "--out")),
    ):
        shown = cli(*arguments, "--help").stdout
        assert all(option in shown for option in options)


def fake_measure(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
    for i in range(3):
        synchronize(launch(i))
    return timing.Timing(10.0, 9.0, (9.5, 10.5), launches, ("kernel",))


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
        """Here each turn is slower; a kernel that fails in the second has no time."""
        monkeypatch.setattr(gemm, "_HOT", 0)
        order: list[Any] = []

        def measure(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
            order.append(synchronize.__self__.name)
            if len(order) == 4:
                raise W4A8Error("timing: CUPTI recorded no kernel")
            return timing.Timing.of([10.0 * len(order)] * launches, ("kernel",))

        chosen = kernels.jax_kernels()[:2]
        record = gemm.run(Record({"copy_TB_s": 3.0}), chosen, [(128, 256)], [1], measure=measure)
        a, b = (kernel.name for kernel in chosen)
        assert order == [a, b, a, b, a]
        rows = {row["kernel"]: row for row in record.rows}
        assert rows[b]["failed"] == "in turn 1: W4A8Error: timing: CUPTI recorded no kernel"
        assert (rows[a]["us"], rows[a]["us_min"], rows[a]["launches"]) == (30.0, 10.0, 72)

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
        us = next(times)
        return timing.Timing(5.0 if us == position else 50.0 + us, 1.0, (1.0, 1.0), launches, ("k",))

    current: list[Any] = []
    kernel = next(k for k in kernels.our_kernels() if isinstance(k, kernels.OurKernel))
    measured = [c for c in tune.configurations(kernel, 64, 256, 256) if c not in (wrong, broken)]
    position = measured.index(best)
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

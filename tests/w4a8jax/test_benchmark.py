"""The benchmark, without a GPU: its arithmetic, its record, what it prints and draws, and how it refuses."""

import io
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from made_up_record import TIMES, made_up_record
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from pallas_kernels import W4A8Error, tuning
from w4a8jax.benchmark import floor, summary, timing
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


@pytest.fixture
def record() -> Record:
    return made_up_record()


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

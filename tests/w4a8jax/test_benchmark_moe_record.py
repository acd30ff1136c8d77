"""What the benchmark of experts records and prints, how it divides its work among processes, and how it refuses."""

import io
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from pallas_kernels import W4A8Error, tuning
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Entry, Table
from w4a8jax.benchmark import gemm, moe_summary, parts
from w4a8jax.benchmark.moe_plot import plot
from w4a8jax.benchmark.moe_points import Model, Point
from w4a8jax.benchmark.moe_record import MoeRecord
from w4a8jax.benchmark.record import Record
from w4a8jax.cli import app
from w4a8jax.cli.bench_moe import parse_points, parse_routings

TOY = Model("toy", 256, 128, 8, 2)
no_gpu = pytest.mark.skipif(tuning.hopper(), reason="there is a Hopper GPU")


def cli(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: Any) -> str:
    result = cli(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_bytes_by_hand() -> None:
    # 3 experts of 256 x 256 codes and 512 scales; 10 rows of 256 FP8, 10 of 256 bf16
    assert Point(TOY, "gate_up", 5, "zipf").bytes(3) == 3 * (32768 + 512) + 10 * 256 + 2 * 10 * 256
    # and 3 of 256 x 128; 5 tokens of 256 bf16, in and out
    assert Point(TOY, "mlp", 5, "zipf").bytes(3) == 3 * (32768 + 512 + 16384 + 256) + 5 * 256 * 4
    assert Point(TOY, "mlp", 5, "zipf").flops == 2 * 10 * (256 * 256 + 256 * 128)


def made_up() -> MoeRecord:
    """Ours takes 100 us at 4 tokens, 1000 at 1024; vLLM's twice that but for one point, Marlin's three times."""
    rows: list[dict[str, Any]] = []
    for model in ("command-a-plus", "qwen3-30b-a3b"):
        for product in ("gate_up", "mlp"):
            for tokens, us in ((4, 100.0), (1024, 1000.0)):
                where = {"model": model, "product": product, "tokens": tokens, "routing": "zipf", "touched": 8}
                row = where | {"bytes": 3e8 if tokens == 4 else 6e8, "flops": 1e12, "same_twice": True}
                slow = 0.9 if (model, product, tokens) == ("qwen3-30b-a3b", "gate_up", 1024) else 2.0
                for name, factor in (
                    ("grouped lut -7", 1.0),
                    (moe_summary.CUTLASS_W4A8, slow),
                    (moe_summary.MARLIN, 3),
                ):
                    rows.append(row | {"kernel": name, "us": us * factor})
    failed = rows[0] | {"kernel": "tokamax w4a16", "failed": "NotImplementedError: [no] kernel"}
    about = {"device": "NVIDIA H200", "date": "2026-01-01", "copy_TB_s": 4.0, "cublas_fp8_TFLOP_s": 1250.0}
    return MoeRecord(about, [*rows, failed])


class TestSummary:
    def test_by_hand(self) -> None:
        found = {x.title: x for x in moe_summary.summarize(made_up())}
        decode = found["products, tokens <= 64, Command A+ and Mixtral: fraction of the copy rate"]
        # 3e8 bytes in 100 us are 3 TB/s.
        assert (decode.points, decode.mean, decode.worst) == (1, pytest.approx(0.75), pytest.approx(0.75))
        peer = found["products, all: speed over vLLM CUTLASS W4A8"]
        assert (peer.points, peer.worst) == (4, pytest.approx(0.9))
        assert peer.mean == pytest.approx((2**3 * 0.9) ** 0.25)
        assert peer.where == "qwen3-30b-a3b gate_up 1024 zipf"
        marlin = found["whole MLP, tokens >= 256: speed over Marlin W4A16"]
        assert (marlin.points, marlin.mean) == (2, pytest.approx(3.0))

    def test_floors(self) -> None:
        record = made_up()
        record.derive()
        few = record.measured["command-a-plus", "mlp", 4, "zipf", "grouped lut -7"]
        # 1e12 operations at 1250 TFLOP/s take longer than 3e8 bytes at 4 TB/s.
        assert few["floor_us"] == pytest.approx(800)
        record.about["cublas_fp8_TFLOP_s"] = None
        record.derive()
        assert few["floor_us"] == pytest.approx(75)
        assert few["ratios"] == {moe_summary.CUTLASS_W4A8: 2.0, moe_summary.MARLIN: 3.0}

    def test_printed_and_drawn(self, tmp_path: Path) -> None:
        text = io.StringIO()
        record = made_up()
        record.rows[0]["same_twice"] = False
        moe_summary.render(record, Console(file=text, width=200))
        assert (
            "failed: command-a-plus gate_up tokens 4 zipf tokamax w4a16: NotImplementedError: [no]" in text.getvalue()
        )
        assert "not the same bits in two runs: command-a-plus gate_up tokens 4 zipf grouped lut" in text.getvalue()
        record.write(tmp_path / "r.json")
        assert MoeRecord.read(tmp_path / "r.json").rows == record.rows
        result = cli("bench", "moe", "--summarize", tmp_path / "r.json", "--plot", tmp_path / "p.png")
        assert result.exit_code == 0, result.output
        assert "mean 1.1 / 1.3, worst 0.95 / 1" in result.stdout
        with Image.open(tmp_path / "p.png") as image:
            assert image.size[0] > 700
        with pytest.raises(W4A8Error, match="no times to draw"):
            plot(MoeRecord({"copy_TB_s": 1.0}), tmp_path / "p.png")

    def test_a_record_of_single_products_is_refused(self, tmp_path: Path) -> None:
        Record({"copy_TB_s": 4.0}, [{"K": 1, "N": 1, "M": 1, "kernel": "x", "us": 1.0, "operand_bytes": 1}]).write(
            tmp_path / "r.json"
        )
        message = "row 0: expected model, product, tokens, routing and kernel"
        assert message in refusal("bench", "moe", "--summarize", tmp_path / "r.json")

    def test_readme_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made_up().write(tmp_path / "r.json")
        script = Path(__file__).parents[2] / "experiments" / "moe_table.py"
        runpy.run_path(str(script))["main"](str(tmp_path / "r.json"), "zipf")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("| experts of | product | tokens | experts met | W4A8 | vLLM W4A8 | Marlin W4A16 |")
        assert "| qwen3-30b-a3b | gate_up | 1024 | 8 | 1000.0 | 900.0 | 3000.0 | 0.80 |" in lines


class TestProcesses:
    def test_each_goes_on_from_its_rows(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Each process replaces its own rows, and no others."""
        words: list[list[str]] = []

        def process(command: list[str], progress: Callable[[str], None]) -> list[str]:
            words.append(command)
            part = MoeRecord.read(command[-1])
            for row in part.rows:
                row["us"] = 7.0
            part.write(command[-1])
            return []

        monkeypatch.setattr(parts, "_run", process)
        monkeypatch.setattr(gemm, "require_hopper", lambda command: None)
        record = made_up()
        record.about |= gemm.describe_run("x")
        record.write(tmp_path / "r.json")
        given = ["--model", "command", "--product", "gate_up", "--product", "mlp", "--tokens", "4,1024"]
        result = cli("bench", "moe", *given, "--processes", 4, "--resume", "--out", tmp_path / "r.json")
        assert result.exit_code == 0, result.output
        assert len(words) == 4
        assert {word for command in words for word in command if word in ("4", "1024")} == {"4", "1024"}
        for row in MoeRecord.read(tmp_path / "r.json").rows:
            if "failed" not in row:
                assert (row["us"] == 7) == (row["model"] == "command-a-plus")

    def test_what_failed_beside_others_is_measured_alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Once, and not what is refused, or wrong, which would be so again."""
        errors = {4: "JaxRuntimeError: out of memory", 16: "W4A8Error: wrong: relative error 1"}
        words: list[list[str]] = []

        def process(command: list[str], progress: Callable[[str], None]) -> list[str]:
            words.append(command)
            given = dict(zip(command[3::2], command[4::2], strict=True))
            part = MoeRecord.read(command[-1])
            for tokens in map(int, given["--tokens"].split(",")):
                row = {"model": given["--model"], "product": given["--product"], "tokens": tokens, "routing": "zipf"}
                row |= {"kernel": "grouped lut -7", "bytes": 1.0, "flops": 1.0}
                alone = len(words) > 4
                part.add(row | ({"failed": errors[tokens]} if tokens in errors and not alone else {"us": 7.0}))
            part.write(command[-1])
            return []

        monkeypatch.setattr(parts, "_run", process)
        monkeypatch.setattr(gemm, "require_hopper", lambda command: None)
        record = MoeRecord(gemm.describe_run("x") | {"copy_TB_s": 4.0}, [])
        record.write(tmp_path / "r.json")
        given = ["--model", "qwen", "--model", "mixtral", "--product", "down", "--product", "mlp", "--tokens", "1,4,16"]
        given += ["--routing", "zipf", "--kernel", "lut -7", "--processes", 4, "--resume", "--out", tmp_path / "r.json"]
        result = cli("bench", "moe", *given)
        assert result.exit_code == 0, result.output
        assert [command[command.index("--tokens") + 1] for command in words] == ["1,4,16"] * 4 + ["4"] * 4
        rows = MoeRecord.read(tmp_path / "r.json").rows
        assert {row["tokens"] for row in rows if "failed" in row} == {16}
        assert len(rows) == 12

    def test_tuning_divides_tables(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        config = TuningConfig(16)

        def process(command: list[str], progress: Callable[[str], None]) -> list[str]:
            (tokens,) = (command[i + 1] for i, word in enumerate(command) if word == "--tokens")
            entries = [Entry("sign_magnitude", 2048, 768, 8 * int(t), config, {}, 128) for t in tokens.split(",")]
            Table("", entries).write(command[-1])
            return []

        monkeypatch.setattr(parts, "_run", process)
        monkeypatch.setattr(gemm, "require_hopper", lambda command: None)
        given = ["--model", "qwen", "--product", "down", "--tokens", "1,16", "--processes", 2]
        result = cli("tune", "--moe", *given, "--out", tmp_path / "t.json")
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "t.json").read_text())["entries"]
        assert [(e["E"], e["N"], e["K"], e["M"]) for e in written] == [(128, 2048, 768, 8), (128, 2048, 768, 128)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "moe", "--model", "gpt"), "--model gpt: there is none; there are command-a-plus, mixtral"),
        (("bench", "moe", "--product", "up"), "--product up: there is none; there are gate_up, down, mlp"),
        (("bench", "moe", "--routing", "even"), "--routing even: there is none; there are uniform, zipf"),
        (("bench", "moe", "--tokens", "0"), "--tokens 0: expected positive integers"),
        (("bench", "moe", "--resume"), "--resume: needs --out"),
        (("bench", "moe", "--out", "missing/r.json"), "--out missing/r.json: the folder does not exist"),
        (("bench", "moe", "--plot", "p.txt"), "p.txt: expected a name that ends in .png"),
        (("tune", "--moe", "--product", "mlp"), "--product mlp: what is tuned are its products"),
        (("tune", "--moe", "--shape", "256,256"), "--shape is for single products"),
        (("tune", "--model", "qwen"), "--model and --product are for --moe"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(*arguments)


@no_gpu
def test_commands_without_a_gpu() -> None:
    assert "bench moe: needs a Hopper GPU" in refusal("bench", "moe", "--tokens", "1")
    assert "tune: needs a Hopper GPU" in refusal("tune", "--moe")


def test_arguments() -> None:
    models, products, tokens = parse_points(["qwen"], None, "1,16")
    assert ([m.name for m in models], products, tokens) == (["qwen3-30b-a3b"], ["gate_up", "down", "mlp"], [1, 16])
    assert parse_routings(None) == ["uniform", "zipf"]

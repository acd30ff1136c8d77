"""The benchmark of experts, without a GPU: routes, what products should be, rows, floors, summary, tuning, refusals."""

import dataclasses
import io
import json
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from pallas_kernels import W4A8Error, moe_mlp, tuning, w4a8_ragged_matmul
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Entry, Table
from w4a8jax.benchmark import gemm, moe, moe_kernels, moe_operands, moe_points, moe_summary, parts, timing, tune_moe
from w4a8jax.benchmark.moe_plot import plot
from w4a8jax.benchmark.moe_points import MODELS, Model, Point, points
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


def fake_measure(launch: Callable[[int], Any], *, synchronize: Any, launches: int) -> timing.Timing:
    for i in range(3):
        synchronize(launch(i))
    return timing.Timing.of([10.0] * launches, ("kernel",))


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1e5)


@dataclasses.dataclass(frozen=True)
class Reference(moe_kernels.OurExperts):
    """Ours on the reference arithmetic, off by a factor."""

    factor: float = 1.0

    def weight(self, weights: Sequence[moe_operands.ExpertWeights], i: int) -> Any:
        return [w.quantized(i, self.numerics)[0] for w in weights]

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        if self.factor == 0:
            raise RuntimeError("no such\nkernel")
        return super().function(point) if point.product != "mlp" else self.mlp(point)

    def mlp(self, point: Point) -> Callable[[Any, Any], Any]:
        options: Any = {"top_k": point.model.top_k, "selection": point.model.selection}
        return jax.jit(lambda inputs, w: self.factor * moe_mlp(*inputs, *w, **options))

    def compiled(self, point: Point, config: TuningConfig) -> Callable[[Any, Any], Any]:
        def product(inputs: Any, w: Any) -> Any:
            x8, token_scale, sizes = inputs
            # The op quantizes again, to the same numbers.
            x = x8.astype(jnp.float32) * token_scale
            return self.factor * w4a8_ragged_matmul(x, w[0], sizes)

        return jax.jit(product)


def reference(**options: Any) -> Reference:
    return Reference("grouped lut -7", "w4a8", 0.5 + 1 / 128, 1, -7, 5.5e-3, **options)


class TestRoutes:
    @pytest.mark.parametrize("routing", moe_points.ROUTINGS)
    @pytest.mark.parametrize("tokens", [1, 5, 64])
    def test_sets_are_the_same_with_other_names(self, routing: Any, tokens: int) -> None:
        routes = Point(TOY, "gate_up", tokens, routing).routes
        for i in range(3):
            ids = routes.ids(i)
            assert ids.shape == (tokens, 2)
            assert np.all(ids[:, 0] != ids[:, 1])
            assert sorted(routes.names(i)) == list(range(8))
            np.testing.assert_array_equal(routes.sizes(i), np.bincount(ids.ravel(), minlength=8))
            assert sorted(routes.sizes(i)) == sorted(routes.sizes(0))
        assert routes.touched == np.count_nonzero(routes.sizes(0))

    def test_few_tokens_read_all_experts_in_turn(self) -> None:
        """A token of 8 experts that meets 2: four launches read them all, the fifth reads another copy."""
        routes = Point(TOY, "gate_up", 1, "uniform").routes
        assert (routes.turnover, routes.sets) == (4, 4)
        met = [set(np.flatnonzero(routes.sizes(i))) for i in range(4)]
        assert set().union(*met) == set(range(8))
        assert all(a.isdisjoint(b) for i, a in enumerate(met) for b in met[:i])
        assert routes.copies == timing.rotations(8 * 256 * 256 * (0.5 + 1 / 128))
        assert [routes.launch(i) for i in (0, 3, 4, 9)] == [(0, 0), (3, 0), (0, 1), (1, 2)]

    def test_large_experts_need_few_sets(self) -> None:
        routes = Point(MODELS["mixtral-8x7b"], "gate_up", 1, "uniform").routes
        # Two experts of 117 million weights are 119 MB.
        assert (routes.touched, routes.sets, routes.copies) == (2, 2, 1)

    def test_zipf_is_skewed(self) -> None:
        even, skewed = (Point(MODELS["qwen3-30b-a3b"], "down", 4096, r).routes.sizes(0) for r in moe_points.ROUTINGS)
        assert even.sum() == skewed.sum() == 8 * 4096
        assert even.max() < 2 * even.min()
        assert skewed.max() > 10 * np.median(skewed)

    def test_sampled_rows_are_ends_of_groups(self) -> None:
        routes = Point(MODELS["qwen3-30b-a3b"], "down", 256, "zipf").routes
        sizes, sample = routes.sizes(0), routes.sample()
        ends = np.cumsum(sizes)
        assert len(sample) == 8
        assert {int(np.flatnonzero(sizes)[0]), int(np.flatnonzero(sizes)[-1]), int(np.argmax(sizes))} <= set(sample)
        for expert, rows in sample.items():
            assert rows[0] == ends[expert] - sizes[expert]
            assert rows[-1] == ends[expert] - 1
            assert len(rows) <= 4

    def test_command_a_plus_has_its_size(self) -> None:
        model = MODELS["command-a-plus"]
        of_expert = 32 * 3 * model.hidden * model.inner
        rest = 218e9 - model.experts * of_expert
        assert model.top_k * of_expert + rest == pytest.approx(25e9, rel=0.02)


class TestExpected:
    def test_rows_are_the_ops(self) -> None:
        point = Point(TOY, "gate_up", 24, "zipf")
        weights = moe_operands.ExpertWeights(8, *TOY.shape("gate_up"))
        tokens = moe.Tokens(moe.Activations(256, point.padded_rows), point.padded_rows, 1)
        rows = np.concatenate(list(point.routes.sample().values()))
        sizes = jnp.asarray(point.routes.sizes(0))
        w, _ = weights.quantized(0)
        found = np.asarray(w4a8_ragged_matmul(tokens.bf16[0], w, sizes, out_dtype=jnp.float32), np.float64)[rows]
        expected = moe_operands.expected_rows("w4a8", weights, tokens, point.routes)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
        plain = np.asarray(w.codes, np.float64) * np.repeat(np.asarray(weights.quantized(0)[1], np.float64), 128, 2)
        experts = np.repeat(np.arange(8), sizes)[rows]
        expected = moe_operands.expected_rows("w4a16", weights, tokens, point.routes)
        x = np.asarray(tokens.bf16[0], np.float64)[rows]
        np.testing.assert_allclose(expected, np.einsum("rk,rnk->rn", x, plain[experts]), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("selection", ["softmax", "sigmoid"])
    def test_tokens_are_the_mlps(self, selection: Any) -> None:
        model = dataclasses.replace(TOY, selection=selection)
        point = Point(model, "mlp", 24, "uniform")
        gate_up, down = (moe_operands.ExpertWeights(8, n, k, seed=i) for i, (n, k) in enumerate(point.shapes))
        inputs = moe_operands.MlpInputs(point)
        expected = moe_operands.expected_mlp("w4a8", gate_up, down, inputs, point)
        weights = gate_up.quantized(0)[0], down.quantized(0)[0]
        found = moe_mlp(inputs.x, inputs.routers[0], *weights, top_k=2, selection=selection)
        found = np.asarray(found, np.float64)[moe_operands.sample_tokens(point)]
        assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)

    def test_routers_send_tokens_where_routes_say(self) -> None:
        point = Point(TOY, "mlp", 3, "zipf")
        inputs = moe_operands.MlpInputs(point)
        for i, router in enumerate(inputs.routers):
            _, found = jax.lax.top_k(inputs.x.astype(jnp.float32) @ router.T, 2)
            np.testing.assert_array_equal(found, point.routes.ids(i))


@pytest.mark.usefixtures("small_cache")
class TestRun:
    def test_rows(self) -> None:
        (ragged_dot,) = (k for k in moe_kernels.jax_experts() if k.name == "ragged_dot bf16")
        chosen = [
            reference(),
            dataclasses.replace(reference(factor=1.5), name="wrong"),
            dataclasses.replace(reference(factor=0.0), name="broken"),
            ragged_dot,
        ]
        record, lines, saved = MoeRecord({"copy_TB_s": 3.0, "cublas_fp8_TFLOP_s": 1000.0}), [], []
        work = [Point(TOY, "down", 1, "uniform"), Point(TOY, "down", 12, "zipf"), Point(TOY, "mlp", 12, "zipf")]
        moe.run(
            record,
            chosen,
            work,
            save=lambda r: saved.append(len(r.rows)),
            progress=lines.append,
            measure=fake_measure,
        )
        # ragged_dot has no MLP.
        assert len(record.rows) == len(lines) == 4 + 4 + 3
        assert saved == [4, 8, 11]
        for row in record.rows:
            if row["kernel"] == "wrong":
                assert re.match(r"W4A8Error: wrong: relative error (4\.9|5\.0)", row["failed"])
            elif row["kernel"] == "broken":
                assert row["failed"] == "RuntimeError: no such kernel"
            else:
                assert (row["us"], row["launches"], row["same_twice"]) == (10.0, 24, True)
                assert row["error"] < 5e-3
        assert all(text.startswith(parts.RESULT) for text in lines)
        json.dumps(record.rows)
        count = len(lines)
        moe.run(record, [chosen[0]], work, progress=lines.append, measure=fake_measure)
        assert len(lines) == count

    def test_compiled_once_for_both_routings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[int] = []
        original = Reference.compiled

        def counted(self: Reference, point: Point, config: TuningConfig) -> Any:
            compiled.append(point.tokens)
            return original(self, point, config)

        monkeypatch.setattr(Reference, "compiled", counted)
        work = points([TOY], ["down"], [1, 12], ["uniform", "zipf"])
        moe.run(MoeRecord({"copy_TB_s": 3.0}), [reference()], work, measure=fake_measure)
        assert compiled == [1, 12]

    def test_ragged_dot_that_needs_too_much_is_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(moe_kernels, "_MOST_TEMPORARY", -1)
        record = MoeRecord({"copy_TB_s": 3.0})
        moe.run(record, moe_kernels.jax_experts()[:1], [Point(TOY, "down", 1, "zipf")], measure=fake_measure)
        assert "of temporary memory" in record.rows[0]["failed"]


def test_our_kernels_run_what_is_chosen() -> None:
    point = Point(MODELS["qwen3-30b-a3b"], "down", 64, "uniform")
    every = [k for k in moe_kernels.our_experts() if isinstance(k, moe_kernels.OurExperts)]
    assert [k.form(point) for k in every] == ["sign_magnitude", "two_tables", "subnormal"]
    chosen = tuning.choose_grouped(512, 128, 2048, 768, "sign_magnitude")
    assert every[0].config(point) == dataclasses.asdict(chosen)
    mlp = dataclasses.replace(point, product="mlp")
    assert [k.takes(mlp) for k in every] == [True, False, False]
    assert len(every[0].config(mlp)) == 2
    assert every[0].limit(mlp) > every[0].limit(point)


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


class TestTune:
    @pytest.mark.usefixtures("small_cache")
    def test_takes_the_fastest_right_candidate_over_both_routings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = points([TOY], ["down"], [12], ["uniform", "zipf"])
        kernel = reference()
        configs = tune_moe.configurations(kernel, work[0])
        assert len(configs) > 4
        wrong, broken, best, uneven = configs[:4]
        # What is chosen now is the first.
        monkeypatch.setattr(tuning, "candidates_grouped", lambda *_: [broken, best, uneven])
        running: list[TuningConfig] = []

        def compiled(self: Reference, point: Point, config: TuningConfig) -> Any:
            if config == broken:
                raise W4A8Error("does not fit")
            product = original(self, point, config)

            def run(inputs: Any, w: Any) -> Any:
                running.append(config)
                return (2 if config == wrong else 1) * product(inputs, w)

            return run

        def measure(launch: Any, *, synchronize: Any, launches: int) -> timing.Timing:
            launch(0)
            # One is quicker with one of the routings, and slower with the other.
            measured.append(running[-1])
            us = {best: 20.0, uneven: 1.0 if running[-1] not in measured[:-1] else 900.0}.get(running[-1], 50.0)
            return timing.Timing.of([us], ("k",))

        measured: list[TuningConfig] = []
        original = Reference.compiled
        monkeypatch.setattr(Reference, "compiled", compiled)
        lines: list[str] = []
        saved: list[Table] = []
        table = tune_moe.run(Table("x"), [kernel], work, save=saved.append, progress=lines.append, measure=measure)
        (entry,) = table.entries.values()
        assert entry.key == ("sign_magnitude", 256, 128, 24, 8)
        assert entry.config == best
        assert entry.more["us"] == 20
        assert saved[-1].entries == table.entries
        assert any("relative error" in text for text in lines)
        assert any("does not fit" in text for text in lines)
        count = len(measured)
        assert tune_moe.run(table, [kernel], work, resume=True, measure=measure) is table
        assert len(measured) == count


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

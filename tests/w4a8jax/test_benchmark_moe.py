"""The benchmark of experts, without a GPU: routes, what products and MLPs should be, rows, tuning."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import W4A8Error, moe_mlp, tuning, w4a8_ragged_matmul, w4a16_ragged_matmul
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Table
from w4a8jax.benchmark import ahead, kernels, moe, moe_kernels, moe_operands, moe_points, parts, timing, tune_moe
from w4a8jax.benchmark.moe_points import MODELS, Model, Point, points
from w4a8jax.benchmark.moe_record import MoeRecord

TOY = Model("toy", 256, 128, 8, 2)


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
        options: Any = {"top_k": point.model.top_k, "selection": point.model.selection, "scheme": self.scheme}
        return jax.jit(lambda inputs, w: self.factor * moe_mlp(*inputs, *w, **options))

    def compiled(self, point: Point, config: TuningConfig) -> Callable[[Any, Any], Any]:
        def product(inputs: Any, w: Any) -> Any:
            x, token_scale, sizes = inputs
            if self.scheme == "w4a16":
                return self.factor * w4a16_ragged_matmul(x, w[0], sizes)
            # The op quantizes again, to the same numbers.
            return self.factor * w4a8_ragged_matmul(x.astype(jnp.float32) * token_scale, w[0], sizes)

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
                assert (row["us"], row["launches"], row["same_twice"]) == (10.0, 72, True)
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
        work = points([TOY], ["down"], [1, 12], ["zipf"])
        (kernel,) = (k for k in moe_kernels.jax_experts() if k.name == "ragged_dot bf16")
        bench = moe.Experts(work, fake_measure)
        assert "us" in bench.rows([kernel], work[0])[0]
        assert kernel.name in bench._prepared
        monkeypatch.setattr(moe_kernels, "_MOST_TEMPORARY", -1)
        assert "of temporary memory" in bench.rows([kernel], work[1])[0]["failed"]
        assert kernel.name not in bench._prepared


def test_programs_are_compiled_ahead() -> None:
    traced: list[tuple[int, ...]] = []

    def scaled(factor: int, x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return factor * x

    function = ahead.Ahead(scaled, 1)
    assert function.prepare(3, jax.ShapeDtypeStruct((2,), jnp.float32)).shape == (2,)
    assert function(3, jnp.ones(2)).tolist() == [3, 3]
    assert traced == [(2,)]
    assert function(2, jnp.ones(2)).tolist() == [2, 2]
    assert len(traced) == 2
    # A compiled program takes no tracers.
    assert jax.jit(lambda x: function(3, x))(jnp.ones(2)).tolist() == [3, 3]


def test_our_kernels_run_what_is_chosen() -> None:
    point = Point(MODELS["qwen3-30b-a3b"], "down", 64, "uniform")
    every = [k for k in moe_kernels.our_experts() if isinstance(k, moe_kernels.OurExperts)]
    assert [k.form(point) for k in every] == ["sign_magnitude", "two_tables", "subnormal", "bf16"]
    chosen = tuning.choose_grouped(512, 128, 2048, 768, "sign_magnitude")
    assert every[0].config(point) == dataclasses.asdict(chosen)
    mlp = dataclasses.replace(point, product="mlp")
    assert [k.takes(mlp) for k in every] == [True, False, False, True]
    assert [k.takes(point) for k in every] == [True, True, True, True]
    assert len(every[0].config(mlp)) == 2
    assert every[0].limit(mlp) > every[0].limit(point)
    assert [k.name for k in kernels.selected(every, ["w4a16 -8"])] == ["grouped w4a16 -8"]


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_w4a16_is_compared_with_products_of_bf16(factor: float) -> None:
    """In a product and in an MLP; a result that is wrong by 2 in 100 is noticed."""
    kernel = Reference("grouped w4a16 -8", "w4a16", 0.5 + 2 / 128, 2, -8, 4e-3, "exact", factor=factor)
    record = MoeRecord({"copy_TB_s": 3.0, "cublas_fp8_TFLOP_s": 1000.0})
    work = [Point(TOY, product, 12, "zipf") for product in ("gate_up", "mlp")]
    moe.run(record, [kernel], work, measure=fake_measure)
    assert len(record.rows) == 2
    assert all(("failed" in row) == (factor != 1) for row in record.rows)


def test_what_our_kernels_are_given() -> None:
    """Weights as the scheme's kernel takes them, and inputs of the dtypes that they are compiled for."""
    point = Point(TOY, "gate_up", 5, "uniform")
    tokens = moe.Tokens(moe.Activations(256, point.padded_rows), point.padded_rows, 1)
    for name, dtypes in (("exact", ["float8_e4m3fn", "float32", "int32"]), ("w4a16", ["bfloat16", "int32"])):
        (kernel,) = kernels.selected(moe_kernels.our_experts(), [f"grouped {name}"])
        assert [str(v.dtype) for v in jax.tree.leaves(kernel.inputs(point, tokens)[0])] == dtypes
        weights = [moe_operands.ExpertWeights(8, *TOY.shape("gate_up"), kernel.code_min)]
        kernel.prepare(weights)
        (w,) = kernel.weight(weights, 0)
        assert (w.scheme, w.form) == (kernel.scheme, kernel.form(point))


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

"""A report's rows are what the functions it is made of say, it goes on where it stopped, and it says what failed."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import refusal, run
from text_checkpoint import text_checkpoint

import w4a8jax
from w4a8jax.reporting import runner, tables, worker
from w4a8jax.reporting.plan import draws
from w4a8jax.reporting.recipes import RECIPES, check_known, default_recipes, select
from w4a8jax.reporting.record import spread

TEXTS = {"prose": "The quick brown fox jumps over the lazy dog.", "C": "int main(void) { return 0; }"}
CHEAP = ("bf16", "w4a8-rtn-plain")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return text_checkpoint(tmp_path_factory.mktemp("report") / "toy")


@pytest.fixture(scope="module")
def plain(source):
    target = source.parent / "plain"
    w4a8jax.quantize(source, target, search="none", progress=False)
    return target


@pytest.fixture
def jobs(monkeypatch):
    """Runs rows in this process, and lists their jobs: a process for each takes seconds to begin."""
    seen = []

    def here(job, folder, update):
        seen.append(dict(job))
        for name in job["texts"]:
            update(name, 1, 1)
        return worker.outcome(job)

    monkeypatch.setattr(runner, "_in_child", here)
    return seen


@pytest.fixture
def constant(monkeypatch):
    """Rows that cost nothing: lists the jobs."""
    seen = []

    def made_up(job, folder, update):
        seen.append(dict(job))
        return _row(job["texts"])

    monkeypatch.setattr(runner, "_in_child", made_up)
    return seen


def _row(texts):
    evaluation = {"perplexity": 8.0, "accuracy": 0.5, "tokens": 10, "bytes": 10, "context": 64}
    found = {"model": evaluation, "original": evaluation, "kl_mean": 0.1, "top1_agreement": 0.9}
    numbers = dict.fromkeys(("nbytes", "bits_per_weight", "make_seconds", "make_peak_bytes", "weight_error"), 1.0)
    numbers |= dict.fromkeys(("evaluate_seconds", "evaluate_peak_bytes", "cores"), 1)
    rest = {"device": "cpu", "device_peak_bytes": None, "fallbacks": [], "expert_load": None}
    return {"texts": dict.fromkeys(texts, found), "layer_errors": {}, "residual_errors": [], **numbers, **rest}


def _records(count=6):
    return [{"tokens": np.random.default_rng(i).integers(3, 259, 48).tolist()} for i in range(count)]


def test_rows_are_what_the_functions_say(source, plain, jobs, tmp_path):
    calls = []
    found = w4a8jax.report(
        source, tmp_path / "r.md", texts=TEXTS, recipes=CHEAP, checkpoints={"theirs": plain},
        progress=lambda *step: calls.append(step),
    )  # fmt: skip
    assert [row["name"] for row in found.rows] == [*CHEAP, "theirs"]
    original, model = w4a8jax.load(source), w4a8jax.load(plain)
    bf16, ours, theirs = found.rows
    for name, text in TEXTS.items():
        expected = json.loads(w4a8jax.compare(model, original, text).to_json())
        assert ours["texts"][name] == theirs["texts"][name] == expected
        assert bf16["texts"][name]["model"] == dataclasses.asdict(w4a8jax.evaluate(original, text))
    errors = w4a8jax.verify(plain, source, max_tokens=0).layer_errors
    assert ours["layer_errors"] == theirs["layer_errors"] == errors
    summary = json.loads((plain / "quantization_summary.json").read_text())
    assert ours["nbytes"] == summary["target_bytes"]
    sizes = np.array([layer["shape"][0] * layer["shape"][1] for layer in summary["layers"]])
    squares = np.array([layer["relative_error"] ** 2 for layer in summary["layers"]])
    assert ours["weight_error"] == pytest.approx((squares @ sizes / sizes.sum()) ** 0.5, rel=1e-5)
    bits = np.array([layer["bits_per_weight"] for layer in summary["layers"]])
    assert ours["bits_per_weight"] == pytest.approx(bits @ sizes / sizes.sum())
    assert ours["make_seconds"] > 0 < ours["make_peak_bytes"] <= ours["evaluate_peak_bytes"]
    assert theirs["make_seconds"] is None
    assert calls[0] == ("bf16", 0, 300)
    assert calls[-1] == ("theirs", 300, 300)
    assert not list(tmp_path.glob(".*"))  # nothing is left to go on with

    document = (tmp_path / "r.md").read_text()
    first = ours["texts"]["prose"]
    ratio = first["model"]["perplexity"] / first["original"]["perplexity"]
    cells = f"{first['model']['perplexity']:.3f} | {ratio:.4f} | {first['kl_mean']:.4f}"
    assert f"| W4A8, RTN, largest weight / 7 | {cells} |" in document
    assert f"| {ours['nbytes'] / 2**20:.2f} | {ours['bits_per_weight']:.3f} |" in document
    assert "![" in document
    assert "(r.png)" in document
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[0] > 1000
    again = w4a8jax.Report.read(tmp_path / "r.json")
    assert (again.about, again.rows) == (found.about, found.rows)


def test_a_process_of_its_own(source, tmp_path):
    """Time and peak memory are the process's: its peak is not that of the process that began it."""
    ballast = np.ones(2**30, np.uint8)
    assert worker.peak_bytes() > ballast.nbytes
    calls = []
    found = w4a8jax.report(
        source, tmp_path / "r.md", texts=TEXTS, recipes=["bf16"], progress=lambda *step: calls.append(step)
    )
    (row,) = found.rows
    assert "failed" not in row
    assert 2**26 < row["evaluate_peak_bytes"] < ballast.nbytes
    assert ("bf16", 200, 300) in calls  # what the process said
    expected = w4a8jax.evaluate(w4a8jax.load(source), TEXTS["C"])
    assert row["texts"]["C"]["model"] == dataclasses.asdict(expected)


def test_goes_on(source, plain, constant, tmp_path):
    path = tmp_path / "r.md"
    data = w4a8jax.load_calibration(source, _records())
    w4a8jax.report(source, path, texts=TEXTS, recipes=["w4a8-rtn"])
    first = w4a8jax.Report.read(tmp_path / "r.json").rows
    more = {"texts": TEXTS, "resume": True, "recipes": ["w4a8-rtn", "bf16", "w4a8-gptq"], "calibration": data}
    found = w4a8jax.report(source, path, checkpoints={"theirs": plain}, seeds=2, samples=3, **more)
    assert [(job["name"], "calibration" in job) for job in constant] == [
        ("w4a8-rtn", False), ("bf16", False), ("w4a8-gptq", True), ("w4a8-gptq", True), ("theirs", False)
    ]  # fmt: skip
    rows = [(row["name"], row["seed"]) for row in found.rows]
    assert rows == [("bf16", None), ("w4a8-rtn", None), ("w4a8-gptq", 0), ("w4a8-gptq", 1), ("theirs", None)]
    assert found.rows[1] == first[0]
    # Other data is another row's settings; a recipe that is not asked for stays.
    del constant[:]
    found = w4a8jax.report(source, path, checkpoints={"theirs": plain}, seeds=2, samples=4, **more)
    assert [job["name"] for job in constant] == ["w4a8-gptq"] * 2
    w4a8jax.report(source, path, texts=TEXTS, recipes=["bf16"], resume=True)
    assert len(constant) == 2
    assert [(row["name"], row["seed"]) for row in w4a8jax.Report.read(tmp_path / "r.json").rows] == rows
    for change, message in (
        ({"texts": {"prose": "Another."}}, "other texts"),
        ({"texts": TEXTS, "max_tokens": 9}, "other max_tokens"),
    ):
        with pytest.raises(w4a8jax.W4A8Error, match=rf"r\.json: is a report on {message}; --overwrite begins anew"):
            w4a8jax.report(source, path, resume=True, **change)


def test_the_same_checkpoint_elsewhere_is_the_same(source, plain, constant, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(plain, folder)
    options = {"texts": TEXTS, "recipes": [], "resume": True}
    w4a8jax.report(source, tmp_path / "r.md", checkpoints={"theirs": first}, **options)
    w4a8jax.report(source, tmp_path / "r.md", checkpoints={"theirs": second}, **options)
    assert len(constant) == 1
    (weights,) = second.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    w4a8jax.report(source, tmp_path / "r.md", checkpoints={"theirs": second}, **options)
    assert len(constant) == 2


def test_interrupted(source, constant, tmp_path, monkeypatch):
    """What was finished is in the JSON, and is not measured again."""
    made_up = runner._in_child

    def interrupted(job, folder, update):
        if job["name"] == "w4a8-rtn":
            raise KeyboardInterrupt
        return made_up(job, folder, update)

    monkeypatch.setattr(runner, "_in_child", interrupted)
    options = {"texts": TEXTS, "recipes": ["bf16", "w4a8-rtn", "w4a16-rtn"]}
    with pytest.raises(KeyboardInterrupt) as error:
        w4a8jax.report(source, tmp_path / "r.md", **options)
    assert error.value.__notes__ == ["2 of 3 rows are kept; go on with --resume"]
    assert [row["name"] for row in w4a8jax.Report.read(tmp_path / "r.json").rows] == ["bf16", "w4a16-rtn"]
    monkeypatch.setattr(runner, "_in_child", made_up)
    found = w4a8jax.report(source, tmp_path / "r.md", resume=True, **options)
    assert [job["name"] for job in constant] == ["bf16", "w4a16-rtn", "w4a8-rtn"]
    assert not found.failures


def test_one_process_at_a_time(source, tmp_path, monkeypatch):
    def second(job, folder, update):
        with pytest.raises(w4a8jax.W4A8Error, match=r"r\.md: another process is writing this report"):
            w4a8jax.report(source, tmp_path / "r.md", texts=TEXTS, recipes=["bf16"], resume=True)
        return _row(job["texts"])

    monkeypatch.setattr(runner, "_in_child", second)
    assert not w4a8jax.report(source, tmp_path / "r.md", texts=TEXTS, recipes=["bf16"]).failures


def test_a_recipe_that_fails_does_not_stop_the_others(source, constant, tmp_path, monkeypatch):
    made_up = runner._in_child

    def failing(job, *rest):
        return {"failed": "why"} if job["name"] == "bf16" else made_up(job, *rest)

    monkeypatch.setattr(runner, "_in_child", failing)
    options = {"texts": TEXTS, "recipes": CHEAP}
    found = w4a8jax.report(source, tmp_path / "r.md", **options)
    assert found.failures == {"bf16": "why"}
    assert list(found.measured) == ["w4a8-rtn-plain"]
    assert "- bf16: why" in (tmp_path / "r.md").read_text()
    del constant[:]
    monkeypatch.setattr(runner, "_in_child", made_up)
    found = w4a8jax.report(source, tmp_path / "r.md", resume=True, **options)
    assert [job["name"] for job in constant] == ["bf16"]
    assert not found.failures


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "its process was ended by SIGKILL, for lack of memory?"),
        ("echo one >&2; echo boom >&2; exit 3", "its process ended with 3: boom"),
    ],
)
def test_a_process_that_dies(script, message, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(program))
    assert runner._in_child({}, tmp_path, lambda *_: None) == {"failed": message}


def test_distills_from_what_it_made(source, jobs, tmp_path, monkeypatch):
    """The training begins with the recipe asked for, on the data given; made once though it is interrupted."""
    calls = []

    def distill(teacher, student, data, output, *, options, progress, **rest):
        calls.append((data.digest(), options, json.loads((Path(student) / "quantization_summary.json").read_text())))
        assert rest == {"resume": True, "overwrite": True}
        if len(calls) == 1:
            raise KeyboardInterrupt
        Path(student).rename(output)
        return w4a8jax.DistillationRecord({}, seconds=1000.0)

    monkeypatch.setattr(w4a8jax, "distill", distill, raising=False)
    data = w4a8jax.load_calibration(source, _records(), pack=64)
    options = w4a8jax.DistillationOptions(steps=3, length=64, train=("norms",))
    arguments = {"texts": TEXTS, "recipes": ["w4a8-qad"], "distill_data": data, "distill_from": "w4a8-rtn-plain"}
    with pytest.raises(KeyboardInterrupt):
        w4a8jax.report(source, tmp_path / "r.md", distillation=options, **arguments)
    found = w4a8jax.report(source, tmp_path / "r.md", distillation=options, resume=True, **arguments)
    assert not found.failures
    assert [call[:2] for call in calls] == [(data.digest(), options)] * 2
    assert calls[0][2]["search"] == "none"
    assert calls[0] == calls[1]
    assert found.rows[0]["make_seconds"] > 1000


def test_draws_of_calibration_data(source):
    reader = w4a8jax.CheckpointReader(source)
    data = w4a8jax.load_calibration(source, _records())
    assert draws(reader, data, 1, None) == [(None, data)]
    found = draws(reader, data, 3, 2)
    assert [seed for seed, _ in found] == [0, 1, 2]
    for _, drawn in found:
        lines = [sample.line for sample in drawn.samples]
        assert len(set(lines)) == len(lines) == 2
    assert len({drawn.digest() for _, drawn in found}) > 1
    assert [d.digest() for _, d in draws(reader, data, 3, 2)] == [d.digest() for _, d in found]
    assert draws(reader, [data, data], 1, None) == [(0, data), (1, data)]


def test_recipes():
    assert default_recipes(False, False) == ["bf16", "w4a16-rtn", "w4a8-rtn-plain", "w4a8-rtn", "w4a8-exact"]
    assert set(default_recipes(True, True)) | {"w4a16-rtn-plain", "w4a8-rtn-code8"} == set(RECIPES)
    names = [recipe.name for recipe in select(["w4a8-rtn", "bf16"], "w4a8-rtn", calibration=False, distillation=False)]
    assert names == ["bf16", "w4a8-rtn"]
    for recipe in RECIPES.values():
        if not recipe.equalized:
            check_known(recipe.options or {})
    with pytest.raises(w4a8jax.W4A8Error, match="quantize has no option 'polish' in this version"):
        check_known({"polish": True})
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ["w4a8-best"]}, "recipe 'w4a8-best': is unknown; there are bf16, w4a16-rtn-plain, "),
        ({"recipes": ["bf16", "bf16"]}, "recipe bf16: is given twice"),
        ({"recipes": ["w4a8-gptq"]}, "w4a8-gptq: needs calibration data; give --calibration"),
        ({"recipes": ["w4a8-qad"]}, "w4a8-qad: needs data to train on; give --distill-data"),
        (
            {"recipes": ["w4a8-qad"], "distill_from": "w4a8-gptq"},
            "w4a8-qad, which begins with w4a8-gptq: needs calibration data; give --calibration",
        ),
        (
            {"recipes": ["w4a8-qad"], "distill_from": "w4a16-rtn"},
            "w4a8-qad: expected a W4A8 recipe to begin with, found w4a16-rtn",
        ),
        ({"recipes": []}, "recipes: expected at least one, or a checkpoint"),
        ({"texts": {}}, "texts: expected at least one"),
        ({"texts": {"empty": " \n"}}, "text empty: is empty"),
        ({"checkpoints": {"bf16": "x"}}, "checkpoint 'bf16': give it a name that no recipe has"),
        ({"checkpoints": {"theirs": "nowhere"}}, "nowhere: no such directory"),
        ({"max_tokens": 0}, "max_tokens: expected a positive number, found 0"),
        ({"samples": 2}, "samples: are drawn from one set of calibration data; give one"),
        ({"calibration": _records, "seeds": 2}, "seeds: to draw 2 times, say how many samples; "),
        ({"calibration": _records, "samples": 9}, "samples: expected at most 6, which calibration has, found 9"),
        ({"output": "r.txt"}, "r.txt: expected a name that ends in .md"),
        ({"output": "nowhere/r.md"}, "nowhere/r.md: its folder does not exist"),
        ({"output": "old.md"}, "old.json: exists; --resume goes on with it, --overwrite replaces it"),
        ({"output": "old.md", "resume": True}, "old.json: is no record of `w4a8jax report`: expected rows and job"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(change, message, source, constant, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    options = {"texts": TEXTS, **change}
    output = tmp_path / options.pop("output", "r.md")
    if callable(options.get("calibration")):
        options["calibration"] = w4a8jax.load_calibration(source, _records())
    with pytest.raises(w4a8jax.W4A8Error, match=re.escape(message)):
        w4a8jax.report(source, output, **options)
    assert not constant


def test_models_that_cannot_be_reported_on(source, plain, tmp_path):
    with pytest.raises(w4a8jax.W4A8Error, match="is quantized itself; give the checkpoint that it was made from"):
        w4a8jax.report(plain, tmp_path / "r.md", texts=TEXTS)
    bare = text_checkpoint(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(w4a8jax.W4A8Error, match=r"has no tokenizer\.json, without which texts cannot be read"):
        w4a8jax.report(bare, tmp_path / "r.md", texts=TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"job": {}, "rows": [{}]}', "row 0: expected name, seed and settings"),
        ('{"job": {}, "rows": [{"name": "a", "seed": null, "settings": ""}]}', "row 0: expected texts, or failed"),
    ],
)
def test_reading_a_damaged_record(content, message, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(w4a8jax.W4A8Error, match=rf"r\.json: {re.escape(message)}"):
        w4a8jax.Report.read(tmp_path / "r.json")
    with pytest.raises(w4a8jax.W4A8Error, match=r"none\.json: cannot be read"):
        w4a8jax.Report.read(tmp_path / "none.json")


def test_pictures_that_cannot_be_drawn(tmp_path):
    report = w4a8jax.Report({"job": {"texts": {}}})
    with pytest.raises(w4a8jax.W4A8Error, match=r"expected a name that ends in \.png, \.svg or \.pdf"):
        report.plot(tmp_path / "r.txt")
    with pytest.raises(w4a8jax.W4A8Error, match="has no row to draw"):
        report.plot(tmp_path / "r.png")


def test_the_command(source, plain, constant, tmp_path):
    files = {name: tmp_path / f"{name}.txt" for name in TEXTS}
    for name, file in files.items():
        file.write_text(TEXTS[name])
    words = ["report", source, "-o", tmp_path / "r.md", "--text", files["prose"], "--text", f"code={files['C']}"]
    words += ["--recipe", "bf16", "--checkpoint", f"theirs={plain}", "--quiet"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "## code" in result.stdout
    assert set(result.stdout.splitlines()[:-1]) < set((tmp_path / "r.md").read_text().splitlines())
    assert [job["checkpoint"] for job in constant] == [None, str(plain)]
    found = json.loads(run(*words, "--resume", "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["bf16", "theirs"]
    assert len(constant) == 2
    assert refusal(*words).endswith("r.md: exists; --resume goes on with it, --overwrite replaces it")
    assert refusal(*words[:4], "--checkpoint", plain) == f"--checkpoint {plain}: expected NAME=DIR"
    twice = "--text: the name prose is given twice; write NAME=PATH"
    assert refusal(*words, "--text", files["prose"]) == twice


def test_the_command_fails_with_a_recipe(source, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_in_child", lambda *_: {"failed": "why"})
    result = run("report", source, "-o", tmp_path / "r.md", "--recipe", "bf16", "--max-tokens", 9, "--quiet")
    assert result.exit_code == 1
    assert "error: bf16: why" in result.stderr
    assert "- bf16: why" in (tmp_path / "r.md").read_text()


def test_calibration_data_reaches_the_row(source, jobs, tmp_path, monkeypatch):
    """What the parent process read, ids and masks, is what `quantize` gets."""
    records = [record | {"loss_mask": [0] * 8 + [1] * 40} for record in _records(4)]
    data = w4a8jax.load_calibration(source, records)
    quantize, seen = w4a8jax.quantize, []

    def cheap(src, dst, *, calibration, numerics="lut", method, **options):
        seen.append((calibration.digest(), numerics, method))
        return quantize(src, dst, search="none", **options)

    monkeypatch.setattr(w4a8jax, "quantize", cheap)
    recipes = ["w4a8-gptq-plain", "w4a8-gptq"]
    found = w4a8jax.report(source, tmp_path / "r.md", texts=TEXTS, recipes=recipes, calibration=data)
    assert not found.failures
    assert seen == [(data.digest(), "exact", "gptq"), (data.digest(), "lut", "gptq")]


def test_load_of_experts_is_reported():
    load = {"layer": 1, "min_share": 0.301, "max_share": 0.38, "mean_share": 1 / 3}
    row = _row(["prose"]) | {"expert_load": [load]}
    expected = "In layer 1 each expert meets 30 to 38 % of the tokens (prose; 33 % if all were used alike)."
    assert tables.experts({"bf16": [row]}, "prose") == expected
    assert tables.experts({"bf16": [_row(["prose"])]}, "prose") == ""


def test_what_spreads_are_over():
    rows = {name: [{"title": name}] * count for name, count in (("a", 1), ("b", 3), ("c", 3))}
    assert tables.about_draws({"a": rows["a"]}) is None
    assert tables.about_draws(rows).endswith("over 3 draws of calibration data.")
    assert tables.about_draws(rows | {"d": [{"title": "d"}] * 2}).endswith("(b: 3; c: 3; d: 2).")

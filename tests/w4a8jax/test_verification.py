"""`verify`: what it finds in sound and in damaged checkpoints."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from text_checkpoint import text_checkpoint
from toy import save_file

import w4a8jax
from pallas_kernels import W4Weight
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.verification import Check, Verification

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verification")
    original = text_checkpoint(folder / "bf16", model_type="llama")
    for scheme in ("w4a8", "w4a16"):
        w4a8jax.quantize(original, folder / scheme, scheme=scheme, search="none", progress=False)
    return {name: folder / name for name in ("bf16", "w4a8", "w4a16")}


def check(result: Verification, name: str) -> Check:
    return next(c for c in result.checks if c.name == name)


def altered(
    source: Path,
    target: Path,
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    config: Callable[[dict], object] = lambda config: None,
) -> Path:
    """A copy, in one file, with tensors and config.json changed in place."""
    shutil.copytree(source, target)
    reader = CheckpointReader(source)
    tensors = {name: reader.read(name) for name in reader.tensors}
    change(tensors)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(target / "model.safetensors", tensors)
    values = json.loads((target / "config.json").read_text())
    config(values)
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "bf16"])
def test_sound_checkpoints(paths: dict[str, Path], scheme: str) -> None:
    result = w4a8jax.verify(paths[scheme])
    assert result.ok
    assert result.servable
    assert result.scheme == scheme
    assert result.verdict.startswith("vLLM would serve this checkpoint: yes")
    assert all(c.status != "failed" for c in result.checks)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("numerics", ["lut", "exact"])
def test_against_original(paths: dict[str, Path], scheme: str, numerics: str) -> None:
    result = w4a8jax.verify(paths[scheme], paths["bf16"], TEXT, numerics=numerics)
    assert result.ok
    reader, original = CheckpointReader(paths[scheme]), CheckpointReader(paths["bf16"])
    packed, scale = reader.read(f"{Q}.weight_packed"), reader.read(f"{Q}.weight_scale")
    used = numerics if scheme == "w4a8" else "exact"
    value = np.asarray(W4Weight.from_checkpoint(packed, scale, numerics=used).dequantize(), np.float64)
    weight = original.read(f"{Q}.weight").astype(np.float64)
    assert result.layer_errors[Q] == pytest.approx(np.linalg.norm(value - weight) / np.linalg.norm(weight), rel=1e-5)
    assert len(result.layer_errors) == 14
    assert result.comparison is not None
    assert result.comparison.kl_mean > 0
    assert f"{used} numerics" in check(result, "predictions").detail
    assert "the text given" in check(result, "predictions").detail


def test_default_text_is_the_start_of_the_reference_text(paths: dict[str, Path]) -> None:
    result = w4a8jax.verify(paths["w4a8"], paths["bf16"], max_tokens=50, context=64)
    assert "50 tokens of the reference text's test split" in check(result, "predictions").detail


def test_predictions_can_be_left_out(paths: dict[str, Path]) -> None:
    result = w4a8jax.verify(paths["w4a8"], paths["bf16"], max_tokens=0)
    assert result.ok
    assert result.comparison is None
    assert check(result, "predictions").status == "skipped"
    assert check(result, "quantized weights").status == "ok"


def test_perplexity_limit(paths: dict[str, Path]) -> None:
    result = w4a8jax.verify(paths["w4a8"], paths["bf16"], TEXT, max_perplexity_increase=-0.9)
    assert check(result, "predictions").status == "failed"
    assert result.servable
    assert not result.ok


def remove(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: value})


def edit(name: str, index: int, value: float) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "failed", "problem"),
    [
        (remove(f"{Q}.weight_packed"), "tensors", f"{Q}.weight_packed: is missing"),
        (remove(f"{Q}.weight_scale"), "tensors", f"{Q}.weight_scale: is missing"),
        (remove(f"{Q}.weight_shape"), "tensors", f"{Q}.weight_shape: is missing"),
        (remove("model.norm.weight"), "tensors", "model.norm.weight: is missing"),
        (put("model.extra.weight", np.zeros(3, np.float32)), "tensors", "model.extra.weight: is there, but"),
        (put("model.norm.weight", np.zeros(3, np.float32)), "tensors", "model.norm.weight: must be [256], found [3]"),
        (
            put(f"{Q}.weight_scale", np.ones((256, 2), np.float32)),
            "tensors",
            "must be bfloat16 [256, 2], found float32",
        ),
        (edit(f"{Q}.weight_shape", 0, 255), "quantized layers", ""),
        (edit(f"{Q}.weight_scale", 3, np.nan), "values", f"{Q}.weight_scale: 1 scales are negative, NaN or infinite"),
        (edit(f"{Q}.weight_scale", 3, -1), "values", f"{Q}.weight_scale: 1 scales are negative, NaN or infinite"),
        (edit("model.norm.weight", 3, np.inf), "values", "model.norm.weight: 1 values are NaN or infinite"),
    ],
)
def test_damage_is_found(
    paths: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], object],
    failed: str,
    problem: str,
) -> None:
    result = w4a8jax.verify(altered(paths["w4a8"], tmp_path / "altered", change))
    found = check(result, failed)
    assert found.status == "failed"
    assert problem in " | ".join(found.problems)
    assert not result.servable
    assert not result.ok
    assert failed in result.verdict


def test_all_problems_are_listed(paths: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith("weight_shape")]:
            del tensors[name]

    result = w4a8jax.verify(altered(paths["w4a8"], tmp_path / "altered", change))
    assert len(check(result, "tensors").problems) == 14
    console = Console(file=StringIO(), width=100)
    result.render(console)
    assert "... and 9 more" in console.file.getvalue()
    result.render(console, details=True)
    assert "model.layers.1.self_attn.v_proj.weight_shape: is missing" in console.file.getvalue()


def test_unknown_model_type(paths: dict[str, Path], tmp_path: Path) -> None:
    path = altered(paths["w4a8"], tmp_path / "altered", config=lambda c: c.update(model_type="gpt5"))
    result = w4a8jax.verify(path)
    assert "model_type 'gpt5' is unknown" in check(result, "config.json").detail
    assert not result.servable


def test_config_that_contradicts_the_weights(paths: dict[str, Path], tmp_path: Path) -> None:
    path = altered(paths["w4a8"], tmp_path / "altered", config=lambda c: c.update(num_hidden_layers=3))
    problems = check(w4a8jax.verify(path), "tensors").problems
    assert "model.layers.2.self_attn.q_proj.weight_packed: is missing" in problems


def test_vllm_rules(paths: dict[str, Path]) -> None:
    result = w4a8jax.verify(paths["w4a8"], tensor_parallel=4)
    assert check(result, "vLLM's rules").status == "failed"
    assert "on 4 GPUs" in check(result, "vLLM's rules").detail
    assert result.verdict == "vLLM would serve this checkpoint: no (vLLM's rules)"


def test_tokenizer_and_generation_config(paths: dict[str, Path], tmp_path: Path) -> None:
    path = altered(paths["w4a8"], tmp_path / "altered")
    (path / "tokenizer.json").unlink()
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}')
    result = w4a8jax.verify(path)
    assert "the tokenizer is missing" in check(result, "tokenizer").detail
    assert "eos_token_id 9999 is no token" in check(result, "generation config").detail
    (path / "generation_config.json").unlink()
    assert check(w4a8jax.verify(path), "generation config").status == "note"
    path = altered(paths["bf16"], tmp_path / "small", config=lambda c: c.update(vocab_size=100))
    assert "259 tokens, but config.json says vocab_size 100" in check(w4a8jax.verify(path), "tokenizer").detail


def test_weak_scales_are_noted(paths: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        scale = np.ones((256, 2), np.float32)
        scale[:, 1] = 1 / 4000
        tensors[f"{Q}.weight_scale"] = scale.astype(ml_dtypes.bfloat16)

    result = w4a8jax.verify(altered(paths["w4a8"], tmp_path / "altered", change))
    found = check(result, "scale precision")
    assert found.status == "note"
    assert f"most in {Q}: 50.00%" in found.detail
    assert result.ok


def test_weights_of_another_model_are_found(paths: dict[str, Path], tmp_path: Path) -> None:
    other = text_checkpoint(tmp_path / "other", model_type="llama", seed=1)
    result = w4a8jax.verify(paths["w4a8"], other, max_tokens=0)
    found = check(result, "quantized weights")
    assert found.status == "failed"
    assert len(found.problems) == 14
    assert "expected at most 0.25" in found.problems[0]
    assert "model.embed_tokens.weight: differs" in " | ".join(check(result, "other weights").problems)
    assert result.servable


def test_original_of_another_shape(paths: dict[str, Path], tmp_path: Path) -> None:
    other = altered(paths["bf16"], tmp_path / "other", put(f"{Q}.weight", np.zeros((128, 256), ml_dtypes.bfloat16)))
    problems = check(w4a8jax.verify(paths["w4a8"], other, max_tokens=0), "quantized weights").problems
    assert problems == (f"{Q}.weight: expected [256, 256] in the original, found [128, 256]",)


def test_refusals(paths: dict[str, Path], tmp_path: Path) -> None:
    def refusal(*arguments: object, **options: object) -> str:
        with pytest.raises(w4a8jax.W4A8Error) as error:
            w4a8jax.verify(*arguments, **options)  # type: ignore[arg-type]
        return str(error.value)

    assert "no such directory" in refusal(tmp_path / "missing")
    assert "is quantized itself" in refusal(paths["w4a8"], paths["w4a16"])
    assert "text: is empty" in refusal(paths["w4a8"], paths["bf16"], " \n")
    assert "numerics" in refusal(paths["w4a8"], numerics="best")
    assert "tensor_parallel" in refusal(paths["w4a8"], tensor_parallel=0)
    assert "max_tokens" in refusal(paths["w4a8"], max_tokens=-1)


def test_json_and_progress(paths: dict[str, Path]) -> None:
    steps: dict[str, tuple[int, int]] = {}

    def progress(name: str, done: int, total: int) -> None:
        steps[name] = (done, total)

    result = w4a8jax.verify(paths["w4a8"], paths["bf16"], TEXT, context=64, progress=progress)
    assert set(steps) == {"reading", "comparing weights", "comparing predictions"}
    assert all(done == total for done, total in steps.values())
    record = json.loads(result.to_json())
    assert record["servable"] is True
    assert record["comparison"]["kl_mean"] == result.comparison.kl_mean  # type: ignore[union-attr]
    assert {c["name"] for c in record["checks"]} >= {"tensors", "values", "vLLM's rules"}
    assert "yes" in repr(result)

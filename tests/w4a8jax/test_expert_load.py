"""The tokens that each expert meets, against a count made from what the experts' layers were given."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from text_checkpoint import text_checkpoint
from toy import EXPERTS, MOE
from typer.testing import CliRunner

import models.layers.moe
import w4a8jax
from pallas_kernels import W4A8Error
from w4a8jax.cli import app
from w4a8jax.expert_load import ExpertLoad, expert_load

TEXT = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    for kind in (*MOE, "cohere2"):
        text_checkpoint(folder / kind, model_type=kind)
    w4a8jax.quantize(folder / "qwen3_moe", folder / "qwen3_moe-w4a8", search="none", progress=False)
    return folder


@pytest.mark.parametrize("name", [*MOE, "qwen3_moe-w4a8"])
def test_counts(checkpoints: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    model = w4a8jax.load(checkpoints / name, dtype="float32")
    found = expert_load(model, TEXT)
    seen, moe_mlp = [], models.layers.moe.moe_mlp

    def noting(x, router, *weights, **options):
        seen.append(np.asarray(x)[0] @ np.asarray(router, np.float64).T)
        return moe_mlp(x, router, *weights, **options)

    monkeypatch.setattr(models.layers.moe, "moe_mlp", noting)
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(TEXT)
    model.decoder.hidden_states(jnp.asarray([tokens]))
    assert [load.layer for load in found] == ([1] if name == "cohere2_moe" else [0, 1])
    for load, logits in zip(found, seen, strict=True):
        chosen = np.argsort(-logits[1:], axis=-1)[:, :2]  # the BOS token is none of the text's
        assert load.tokens == len(tokens) - 1 == len(TEXT)
        expected = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
        # Sums in another order may turn a near tie.
        np.testing.assert_allclose(load.counts, expected, atol=1)
        assert sum(load.counts) == 2 * load.tokens


def test_each_token_is_counted_once_over_windows(checkpoints: Path):
    model = w4a8jax.load(checkpoints / "mixtral")
    for options in ({"context": 16}, {"context": 64, "max_tokens": 150}):
        for load in expert_load(model, TEXT, **options):
            assert load.tokens == w4a8jax.evaluate(model, TEXT, **options).tokens
            assert sum(load.counts) == 2 * load.tokens
            assert max(load.counts) <= load.tokens


def test_unused_experts(checkpoints: Path):
    model = w4a8jax.load(checkpoints / "qwen3_moe")
    mlp = model.decoder.layers[1].mlp
    mlp.router = nnx.Param(jnp.zeros((EXPERTS, 256)))  # of equal experts the first are taken
    load = expert_load(model, TEXT)[1]
    n = len(TEXT)
    assert load == ExpertLoad(1, n, (n, n, 0, 0))
    assert (load.shares, load.mean_share, load.unused) == ((1, 1, 0, 0), 0.5, 2)
    assert expert_load(model, TEXT)[0].unused == 0
    assert isinstance(model.decoder.layers[1].mlp, models.layers.moe.MoE), "the model itself was changed"


def test_inspect(checkpoints: Path, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    path = checkpoints / "cohere2_moe"
    expected = expert_load(w4a8jax.load(path), TEXT)
    inspection = w4a8jax.inspect(path, text=TEXT)
    assert inspection.expert_load == expected
    result = CliRunner().invoke(app, ["inspect", str(path), "--text", str(file), "--json"])
    assert result.exit_code == 0, result.output
    (load,) = json.loads(result.stdout)["expert_load"]
    assert load["counts"] == list(expected[0].counts)
    assert load["max_share"] == max(expected[0].counts) / len(TEXT)
    assert (load["mean_share"], load["unused"]) == (0.5, 0)
    console = Console(file=StringIO(), width=80)
    inspection.render(console)
    shown = console.file.getvalue()
    assert f"Load of experts, of {len(TEXT)} tokens" in shown
    assert f"{min(expected[0].shares):.2%}" in shown
    assert w4a8jax.inspect(path).expert_load is None


def test_refusals(checkpoints: Path):
    with pytest.raises(W4A8Error, match="cohere2: has no experts"):
        w4a8jax.inspect(checkpoints / "cohere2", text=TEXT)
    with pytest.raises(W4A8Error, match="context: expected 2 to 512"):
        w4a8jax.inspect(checkpoints / "mixtral", text=TEXT, context=1024)

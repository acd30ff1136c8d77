"""Perplexity and comparison, against sums over single sequences."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from text_checkpoint import text_checkpoint

import w4a8jax
from models.functional import Structure, split
from w4a8jax.evaluation import compare, evaluate

TEXT = "The quick brown fox jumps over the lazy dog. " * 20 + "äöü €"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    original = text_checkpoint(folder / "bf16")
    w4a8jax.quantize(original, folder / "w4a8", search="none", progress=False)
    return {"bf16": original, "w4a8": folder / "w4a8", "no_bos": text_checkpoint(folder / "no_bos", add_bos=False)}


@pytest.fixture(scope="module")
def model(paths: dict[str, Path]) -> w4a8jax.LanguageModel:
    return w4a8jax.load(paths["bf16"], dtype="float32")


def log_probabilities(model: w4a8jax.LanguageModel, ids: list[int]) -> np.ndarray:
    """float64 [len(ids), V]; padded to few lengths, so that little is compiled."""
    width = 64 if len(ids) <= 64 else 128 if len(ids) <= 128 else 512
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    structure, leaves = split(model.decoder)
    logits = forward(structure, leaves, tokens, np.array([len(ids)], np.int32))
    return np.asarray(jax.nn.log_softmax(logits[0, : len(ids)], axis=-1), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def forward(structure: Structure, leaves: list, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return structure.merge(leaves)(tokens, lengths=lengths)[0]


def by_hand(model: w4a8jax.LanguageModel, ids: list[int], lead: list[int], context: int, stride: int) -> list[float]:
    """Each token's log probability, from the definition: the first window that holds it decides."""
    body = context - len(lead)
    scores: dict[int, float] = {}
    for start in range(0, len(ids), stride):
        window = lead + ids[start : start + body]
        log_p = log_probabilities(model, window)
        for place in range(1, len(window)):
            scores.setdefault(start + place - len(lead), log_p[place - 1, window[place]])
    return [scores[i] for i in sorted(scores)]


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (64, 63), (50, 7), (512, 100)])
def test_perplexity_is_that_of_the_protocol(model: w4a8jax.LanguageModel, context: int, stride: int) -> None:
    text = TEXT[:300]
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    expected = by_hand(model, ids, [1], context, stride)
    found = evaluate(model, text, context=context, stride=stride)
    assert found.tokens == len(expected) == len(ids)
    assert math.log(found.perplexity) == pytest.approx(-np.mean(expected), rel=1e-5)
    assert found.bytes == len(text.encode())
    assert found.bits_per_byte == pytest.approx(-np.sum(expected) / math.log(2) / found.bytes, rel=1e-5)
    assert (found.context, found.stride) == (context, stride)


def test_without_bos_the_first_token_is_not_scored(paths: dict[str, Path]) -> None:
    model = w4a8jax.load(paths["no_bos"], dtype="float32")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    expected = by_hand(model, ids, [], 128, 64)
    found = evaluate(model, TEXT, context=128)
    assert found.tokens == len(ids) - 1 == len(expected)
    assert found.bytes == len(TEXT.encode()) - 1
    assert math.log(found.perplexity) == pytest.approx(-np.mean(expected), rel=1e-5)


def test_batch_does_not_matter_and_results_repeat(model: w4a8jax.LanguageModel) -> None:
    one = evaluate(model, TEXT, context=64, batch=1)
    five = evaluate(model, TEXT, context=64, batch=5)
    assert one.perplexity == pytest.approx(five.perplexity, rel=1e-6)
    assert five == evaluate(model, TEXT, context=64, batch=5)


def test_chunks_of_logits_do_not_matter(model: w4a8jax.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(model, TEXT, context=64, batch=2)
    monkeypatch.setattr(
        "w4a8jax.evaluation._LOGITS", 320 * 2 * 11
    )  # 11 positions at a time, which 63 is no multiple of
    assert evaluate(model, TEXT, context=64, batch=2).perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_max_tokens(model: w4a8jax.LanguageModel) -> None:
    found = evaluate(model, TEXT, context=64, max_tokens=100)
    assert found == evaluate(model, TEXT[:100], context=64)
    assert found.tokens == found.bytes == 100


def test_progress_counts_windows(model: w4a8jax.LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, TEXT, context=64, batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_compare_with_itself_is_exactly_nothing(model: w4a8jax.LanguageModel) -> None:
    found = compare(model, model, TEXT, context=64)
    assert (found.kl_mean, found.kl_max, found.top1_agreement, found.perplexity_increase) == (0, 0, 1, 0)
    assert found.model == found.original == evaluate(model, TEXT, context=64)


def test_compare_with_original(paths: dict[str, Path], model: w4a8jax.LanguageModel) -> None:
    quantized = w4a8jax.load(paths["w4a8"], dtype="float32")
    text = TEXT[:60]
    found = compare(quantized, model, text)
    ids = [1, *model.tokenizer.encode(text, add_special_tokens=False)]
    p, q = log_probabilities(model, ids)[:-1], log_probabilities(quantized, ids)[:-1]
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert found.kl_mean > 0
    assert found.top1_agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)), abs=1e-9)
    assert found.original.perplexity == pytest.approx(evaluate(model, text).perplexity, rel=1e-5)
    assert found.model.perplexity == pytest.approx(evaluate(quantized, text).perplexity, rel=1e-3)
    assert json.loads(found.to_json())["kl_mean"] == found.kl_mean


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text: has 0 tokens"),
        ("abc", {"context": 513}, "context: expected 2 to 512"),
        ("abc", {"context": 1}, "context: expected 2 to 512"),
        ("abc", {"context": 64, "stride": 64}, "stride: expected 1 to 63"),
        ("abc", {"stride": 0}, "stride: expected 1"),
        ("abc", {"batch": 0}, "batch: expected a positive number"),
        ("abc", {"max_tokens": 0}, "max_tokens: expected a positive number"),
    ],
)
def test_refusals(model: w4a8jax.LanguageModel, text: str, options: dict, message: str) -> None:
    with pytest.raises(w4a8jax.W4A8Error, match=message):
        evaluate(model, text, **options)


def test_no_bos_needs_two_tokens(paths: dict[str, Path]) -> None:
    with pytest.raises(w4a8jax.W4A8Error, match="text: has 1 tokens"):
        evaluate(w4a8jax.load(paths["no_bos"]), "a")


def test_other_tokenizer_is_not_compared(paths: dict[str, Path], model: w4a8jax.LanguageModel) -> None:
    with pytest.raises(w4a8jax.W4A8Error, match="different tokens"):
        compare(model, w4a8jax.load(paths["no_bos"]), TEXT)

"""The reference models and their tokenizer, read by us and by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import w4a8jax
from models.functional import split

CONVERSATIONS: list[tuple[list[dict[str, str]], dict[str, Any]]] = [
    ([{"role": "user", "content": "  What is a generator?\n"}], {"add_generation_prompt": True}),
    (
        [
            {"role": "system", "content": "You know Python."},
            {"role": "user", "content": "import os"},
            {"role": "assistant", "content": "os.path <EOS_TOKEN> \N{SNAKE}"},
        ],
        {"add_generation_prompt": False},
    ),
]


def texts() -> list[str]:
    held_out = w4a8jax.reference_text("test")
    return [
        held_out[:3000],
        "",
        " ",
        "\n\n\tdef f(x):\r\n    return x\n",
        "naïve café, \N{SNAKE} \N{FAMILY}, 漢字, \N{ZERO WIDTH JOINER}",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|> text of special tokens <EOS_TOKEN>",
        held_out[-500:],
    ]


@pytest.fixture(scope="session", params=["dense", "moe"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    try:
        return w4a8jax.reference_model(request.param)
    except w4a8jax.W4A8Error as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def reference(checkpoint: Path, torch_oracle: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that scripts/read_reference.py filled."""
    folder = tmp_path_factory.mktemp("reference")
    job = {"checkpoint": str(checkpoint), "texts": texts(), "conversations": CONVERSATIONS}
    (folder / "job.json").write_text(json.dumps(job))
    torch_oracle("read_reference.py", folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> w4a8jax.LanguageModel:
    return w4a8jax.load(checkpoint, dtype="float32")


def test_tokenizer(reference: Path, model: w4a8jax.LanguageModel):
    tokenizer = model.tokenizer
    assert tokenizer is not None
    read = json.loads((reference / "read.json").read_text())
    for text, (with_special, without), decoded in zip(texts(), read["ids"], read["decoded"], strict=True):
        assert tokenizer.encode(text) == with_special
        assert tokenizer.encode(text, add_special_tokens=False) == without
        assert [tokenizer.decode(with_special, skip_special_tokens=skip) for skip in (True, False)] == decoded
    assert tokenizer.vocab_size == read["vocab_size"]
    assert tokenizer.bos_token_id == read["special"]["bos"]
    assert tokenizer.eos_token_id == read["special"]["eos"]


def test_chat_template(reference: Path, model: w4a8jax.LanguageModel):
    tokenizer = model.tokenizer
    assert tokenizer is not None
    read = json.loads((reference / "read.json").read_text())
    for (chat, options), expected, ids in zip(CONVERSATIONS, read["chats"], read["chat_ids"], strict=True):
        found = tokenizer.apply_chat_template(chat, **options)
        assert found == expected
        assert tokenizer.encode(found, add_special_tokens=False) == ids


def test_logits_of_real_text(reference: Path, model: w4a8jax.LanguageModel):
    tokens = json.loads((reference / "read.json").read_text())["ids"][0][0]
    assert model.config.sliding_window is not None
    assert len(tokens) > model.config.sliding_window, "the text should cross the sliding window"
    expected = load_file(reference / "logits.safetensors")["logits"]
    structure, leaves = split(model.decoder)
    forward = jax.jit(lambda leaves, tokens: structure.merge(leaves)(tokens)[0])
    found = np.asarray(forward(leaves, jnp.asarray([tokens])))[0]
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    # The same greatest logits, but where two are some units in the last place apart.
    behind = expected.max(-1) - expected[np.arange(len(found)), found.argmax(-1)]
    assert np.all(behind <= 1e-6 * np.abs(expected).max(-1))
    assert np.mean(behind > 0) < 0.01

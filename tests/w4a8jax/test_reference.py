"""The reference text's splits and the shipped reference model."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from pallas_kernels.errors import W4A8Error
from w4a8jax import reference

SPLITS: tuple[reference.Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return {split: dict(reference.reference_documents(split)) for split in SPLITS}


def module(name: str) -> str:
    return name.split(".")[0]


def test_splits_share_no_module(texts):
    for a, b in combinations(SPLITS, 2):
        assert not {module(name) for name in texts[a]} & {module(name) for name in texts[b]}


def test_splits_share_little_text(texts):
    # Licences and imports recur; more than that would be a copy of a held-out module in the train split.
    def long_lines(split: str) -> list[str]:
        return [line for text in texts[split].values() for line in text.split("\n") if len(line.strip()) > 30]

    train = set(long_lines("train"))
    for split in ("validation", "test"):
        lines = long_lines(split)
        assert sum(line in train for line in lines) < 0.06 * len(lines)


def test_held_out_splits_are_there_on_every_python(texts):
    # Names, not sizes: the split of a module does not depend on the Python that reads it.
    assert {"shutil", "ftplib", "concurrent", "_strptime"} <= {module(name) for name in texts["test"]}
    assert {"socket", "threading", "uuid", "weakref"} <= {module(name) for name in texts["validation"]}
    for split in ("validation", "test"):
        assert {module(name) for name in texts[split]} <= sys.stdlib_module_names
        assert 150_000 < len(reference.reference_text(split)) < 500_000
    assert any(name.startswith("pydoc_data.topics:") for name in texts["train"])
    assert len(reference.reference_text("train")) > 3_000_000


def test_text_is_the_same_in_every_process(texts):
    program = (
        "import hashlib, w4a8jax.reference as r; print(hashlib.sha256(r.reference_text('test').encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert reference.reference_text("test") == "\n".join(texts["test"].values())


def test_generated_and_foreign_modules_are_left_out():
    assert reference.reference_split("encodings") is None
    assert reference.reference_split("site-packages") is None
    assert reference.reference_split("numpy") is None
    assert reference.reference_split("test") == "train"


def test_unknown_split():
    with pytest.raises(W4A8Error, match=r"split 'dev' is unknown: expected one of 'train', 'validation', 'test'"):
        next(reference.reference_documents("dev"))  # type: ignore[arg-type]


def test_python_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr(reference.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(W4A8Error, match="no standard library source in"):
        reference.reference_text("test")


def test_unknown_model():
    with pytest.raises(W4A8Error, match=r"reference model 'sparse' is not in .*'dense'"):
        reference.reference_model("sparse")


def test_model_with_a_file_missing(tmp_path, monkeypatch):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    monkeypatch.setattr(reference, "_MODELS", tmp_path)
    with pytest.raises(W4A8Error, match=r"model\.safetensors is missing; reinstall w4a8jax"):
        reference.reference_model("dense")


def test_dense_model_is_whole_and_small():
    path = reference.reference_model("dense")
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000_000
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Cohere2ForCausalLM"]
    assert {"sliding_attention", "full_attention"} == set(config["layer_types"])
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        assert len(list(file.keys())) == 2 + 8 * config["num_hidden_layers"]
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"


def test_tokenizer_gives_back_every_text(texts):
    path = reference.reference_model("dense")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for text in (*texts["test"].values(), "naïve — 日本語\t\r\n\x00 \u00a0 e\u0301 🙂  "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == config["bos_token_id"]
        assert tokenizer.decode(ids) == text

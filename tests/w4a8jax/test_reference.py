"""The reference text's splits and the shipped reference models."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import w4a8jax
from pallas_kernels.errors import W4A8Error
from w4a8jax import reference
from w4a8jax.expert_load import expert_load

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


def test_moe_model_is_whole_and_small():
    path = reference.reference_model("moe")
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000_000
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Cohere2MoeForCausalLM"]
    assert {"sliding_attention", "full_attention"} == set(config["layer_types"])
    experts, sparse = config["num_experts"], config["mlp_layer_types"].count("sparse")
    assert (experts, sparse, config["num_experts_per_tok"], config["num_shared_experts"]) == (6, 2, 2, 1)
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    routers = {name for name in dtypes if name.endswith("mlp.gate.weight")}
    assert len(routers) == sparse
    # Every layer: a norm and four of attention; one MLP, or in sparse layers a router, the experts and the shared one.
    assert len(dtypes) == 2 + 5 * config["num_hidden_layers"] + 3 + sparse * (1 + 3 * (experts + 1))
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == routers
    assert {dtype for name, dtype in dtypes.items() if name not in routers} == {"BF16"}


@pytest.fixture(scope="module")
def moe() -> w4a8jax.LanguageModel:
    return w4a8jax.load(reference.reference_model("moe"))


def test_moe_model_predicts_text_it_was_not_trained_on(moe):
    # 5.99 and 61.6 % on Python 3.12.1; the text differs a little among versions. Guessing gives 3840.
    found = w4a8jax.evaluate(moe, reference.reference_text("test"), max_tokens=4096)
    assert found.perplexity < 7
    assert found.accuracy > 0.57


def test_moe_model_uses_every_expert(moe):
    # A token meets two of six, a third of the tokens each if all are used alike; found: 0.21 to 0.40.
    loads = expert_load(moe, reference.reference_text("test"), max_tokens=4096)
    assert [load.layer for load in loads] == [1, 2]
    for load in loads:
        assert sum(load.counts) == 2 * load.tokens
        assert min(load.shares) > 0.1
        assert max(load.shares) < 0.6


def test_moe_model_writes_python(moe):
    one, other = moe.generate(["import os\n", "try:\n    import json\n"], max_new_tokens=16)
    assert one.text.startswith("import sys\nimport ")
    assert other.text.startswith("except ImportError:\n    ")


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_tokenizer_gives_back_every_text(name, texts):
    path = reference.reference_model(name)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for text in (*texts["test"].values(), "naïve — 日本語\t\r\n\x00 \u00a0 e\u0301 🙂  "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == config["bos_token_id"]
        assert tokenizer.decode(ids) == text

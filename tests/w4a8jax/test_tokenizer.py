"""Tokenizer: files, special tokens, streaming, chat templates; and the same as transformers."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models
from toy_tokenizer import CONFIG, TEMPLATE, write_tokenizer

from pallas_kernels.errors import W4A8Error
from w4a8jax.tokenizer import Tokenizer

ORACLE = Path(__file__).parents[2] / ".venv-oracle" / "bin" / "python"
TEXTS = ["", "The fox", "  x =\t1\n\n\n", "naïve café ☕ 日本語 🙂🏽", "<eos> in a text", "a\r\nb", "x" * 100]
MESSAGES = [{"role": "user", "content": "Hi <b>&'\"</b>"}, {"role": "assistant", "content": "Ja, 日本\n"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>" + text
    assert tokenizer.decode(ids) == text.replace("<eos>", "")


def test_special_tokens(tokenizer):
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert (tokenizer.eos_token_id, tokenizer.token_id("<|end|>"), tokenizer.token_id("<no>")) == (2, 5, None)
    assert tokenizer.vocab_size == 320


def test_special_tokens_map_fills_in(tmp_path):
    write_tokenizer(tmp_path, config={"eos_token": "<eos>"})
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<pad>"})
    )
    assert Tokenizer.from_directory(tmp_path).special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}


def test_tokenizer_json_alone_is_enough(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a")[0] == 1
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (None, None)


def test_tokenizer_json_alone_says_what_is_put_around_a_text(tmp_path):
    config = CONFIG | {"add_bos_token": False, "add_eos_token": True}
    for post_processor, start in ((True, [1]), (False, [])):
        tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, config=config, post_processor=post_processor))
        assert tokenizer.encode("The fox") == start + tokenizer.encode("The fox", add_special_tokens=False)


def test_tokens_that_only_the_config_names_are_added(tmp_path):
    token = {"content": "<new>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config = CONFIG | {"added_tokens_decoder": {"320": token}, "additional_special_tokens": ["<other>"]}
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, config=config))
    assert tokenizer.encode("<new>a<other>", add_special_tokens=False)[::2] == [320, 321]
    assert tokenizer.vocab_size == 322


def test_streaming_gives_whole_characters_and_the_same_text(tokenizer):
    text = "naïve café ☕ 日本語 🙂🏽 The dog" * 2
    ids = tokenizer.encode(text)
    rng = random.Random(0)
    for _ in range(20):
        stream, pieces, at = tokenizer.stream(), [], 0
        while at < len(ids):
            count = rng.randint(1, 5)
            pieces.append(stream.add(ids[at : at + count]))
            at += count
        pieces.append(stream.finish())
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
    assert len([p for p in map(tokenizer.stream().add, ([i] for i in ids)) if p]) > 20


def test_streaming_an_incomplete_character_ends_in_a_replacement(tokenizer):
    ids = tokenizer.encode("a☕", add_special_tokens=False)[:-1]
    stream = tokenizer.stream()
    assert stream.add(ids) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    # Bytes that turn out to be no character come out with what follows.
    stream = tokenizer.stream()
    assert [stream.add([i]) for i in [*ids, *tokenizer.encode("b", add_special_tokens=False)]][-1] == "\ufffdb"


def test_streaming_keeps_spaces_that_a_decoder_strips_at_the_beginning():
    vocabulary = {"▁the": 0, "▁dog": 1, "s": 2, "<0xE2>": 3, "<0x98>": 4, "<0x95>": 5, "▁": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer = Tokenizer(backend)
    ids = [0, 1, 2, 6, 3, 4, 5, 1, 1]
    stream = tokenizer.stream()
    pieces = [stream.add([i]) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "the dogs ☕ dog dog"
    assert pieces[4:7] == ["", "", "☕"]


def test_chat_template(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES) == (
        "<bos><|user|>Hi <b>&'\"</b><|end|>\n<|model|>Ja, 日本\n<|end|>\n<|model|>"
    )
    assert not tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("<|model|>")
    assert tokenizer.apply_chat_template(MESSAGES, template="{{ messages|length }} {{ x }}", x=3) == "2 3"


def test_what_templates_can_do(tokenizer):
    def render(template, **variables):
        return tokenizer.apply_chat_template(MESSAGES[:1], template=template, **variables)

    assert render("{{ messages[0].content|tojson }}") == '"Hi <b>&\'\\"</b>"'
    assert render("{{ x|tojson(indent=2) }}", x={"ü": [1]}) == '{\n  "ü": [\n    1\n  ]\n}'
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{% generation %}{{ eos_token }}{% endgeneration %}!") == "<eos>!"
    assert render("{{ strftime_now('%Y') | int > 2000 }}") == "True"
    assert render("{% set ns = namespace(n=0) %}{% set ns.n = 4 %}{{ ns.n }}") == "4"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "chat template: roles must alternate"),
        ("a\n{% if %}", "chat template: line 2: Expected an expression, got 'end of statement block'"),
        ("{{ messages[5].content }}", "chat template: list object has no element 5"),
        ("{{ 1 / 0 }}", "chat template: fails on these messages: ZeroDivisionError: division by zero"),
        ("{{ messages.append(1) }}", "chat template: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.__mro__ }}", "chat template: access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_templates_that_fail(tokenizer, template, message):
    with pytest.raises(W4A8Error) as e:
        tokenizer.apply_chat_template(MESSAGES, template=template)
    assert str(e.value) == message


def test_template_values_are_json_alone(tokenizer):
    with pytest.raises(W4A8Error, match=r"^chat template: messages, tools and variables must be JSON, found PosixPath"):
        tokenizer.apply_chat_template(MESSAGES, template="{{ x }}", x=Path("a"))


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "T{{ tools|length }}"}, {"name": "default", "template": "D"}]
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, config=CONFIG | {"chat_template": named}))
    assert tokenizer.apply_chat_template([]) == "D"
    assert tokenizer.apply_chat_template([], tools=[{"name": "f"}]) == "T1"
    assert tokenizer.apply_chat_template([], template="tool_use", tools=[]) == "T0"


def test_where_templates_come_from(tmp_path):
    write_tokenizer(tmp_path)
    assert Tokenizer.from_directory(tmp_path).chat_template == TEMPLATE
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.from_directory(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert Tokenizer.from_directory(tmp_path).chat_templates == {"default": "jinja", "rag": "rag"}


def test_bad_directories(tmp_path):
    def error() -> str:
        with pytest.raises(W4A8Error) as e:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(e.value)
        return str(e.value).replace(f"{tmp_path}{os.sep}", "")

    assert error() == "tokenizer.json: the tokenizer is missing; copy the original checkpoint's there"
    (tmp_path / "tokenizer.model").write_text("")
    assert error().startswith(
        "tokenizer.json: the tokenizer is missing; make it from tokenizer.model with transformers"
    )
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert error().startswith("tokenizer.json: is no tokenizer: ")
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert error().startswith("tokenizer_config.json: is no JSON: ")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert error() == "tokenizer_config.json: expected a JSON object, found list"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    assert error() == "tokenizer_config.json: chat_template: expected a template, or a list of named ones"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(W4A8Error, match=r"^chat template: the checkpoint has none; give a prompt instead, or a"):
        Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES)


_ASK = """
import json, sys
from transformers import AutoTokenizer
asked = json.load(sys.stdin)
answers = []
for path in asked["paths"]:
    t = AutoTokenizer.from_pretrained(path)
    answers.append({
        "ids": [t.encode(x) for x in asked["texts"]],
        "bare": [t.encode(x, add_special_tokens=False) for x in asked["texts"]],
        "decoded": [t.decode(t.encode(x), skip_special_tokens=True) for x in asked["texts"]],
        "special": t.special_tokens_map,
        "chat": t.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True),
    })
print(json.dumps(answers))
"""


@pytest.mark.oracle
@pytest.mark.skipif(not ORACLE.exists(), reason="the environment with transformers is missing (make oracle)")
def test_transformers_agrees(tmp_path):
    new = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    variants = [
        (CONFIG, True),
        (CONFIG | {"add_bos_token": True, "add_eos_token": True}, False),
        (CONFIG | {"add_bos_token": False}, True),
        (CONFIG | {"added_tokens_decoder": {"320": new}, "additional_special_tokens": ["<other>"]}, True),
    ]
    paths = [
        write_tokenizer(tmp_path / str(i), config=config, post_processor=post)
        for i, (config, post) in enumerate(variants)
    ]
    texts = [*TEXTS, "a <new>b<other>c"]
    asked = {"paths": list(map(str, paths)), "texts": texts, "messages": MESSAGES}
    run = subprocess.run(
        [ORACLE, "-c", _ASK], input=json.dumps(asked), capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for path, theirs in zip(paths, json.loads(run.stdout.splitlines()[-1]), strict=True):
        ours = Tokenizer.from_directory(path)
        for i, text in enumerate(texts):
            # tokenizer.json asks for truncation to 8 tokens, which transformers ignores too.
            assert ours.encode(text) == theirs["ids"][i]
            assert ours.encode(text, add_special_tokens=False) == theirs["bare"][i]
            assert ours.decode(ours.encode(text)) == theirs["decoded"][i]
        roles = {name: text for name, text in theirs["special"].items() if name.endswith("_token")}
        assert ours.special_tokens == roles
        assert ours.apply_chat_template(MESSAGES) == theirs["chat"]

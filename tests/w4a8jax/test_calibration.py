"""Calibration data: what is read, what counts, and what is refused."""

import json

import numpy as np
import pytest
from text_checkpoint import save_byte_tokenizer

from pallas_kernels import W4A8Error
from w4a8jax import Tokenizer
from w4a8jax.calibration import KINDS, read_calibration
from w4a8jax.calibration.masks import repeated_prefixes

CHATML = """{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content | trim }}{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>
{% elif m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [{"name": "look_up", "description": "finds a word"}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is é? \n"},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "look_up", "word": "é"}]},
    {"role": "tool", "content": "a letter"},
    {"role": "assistant", "content": " A letter."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, with the ChatML-like template."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    (path / "chat_template.jinja").write_text(CHATML)
    return Tokenizer.from_directory(path)


def _write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _kept(tokenizer, record, mask, **options):
    data = read_calibration([record], tokenizer, vocab_size=320, mask=mask, **options)
    (sample,) = data.samples
    return [tokenizer.decode(run, skip_special_tokens=False) for run in _runs(sample)]


def _runs(sample):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(int), [0]])))
    return [sample.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]


CHAT = {"messages": MESSAGES, "tools": TOOLS}
CALL = '<call>{"name": "look_up", "word": "é"}</call>'


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (
            ("system", "tools", "template"),
            ["What is é?", f"I look.{CALL}<|im_end|>", "a letter", "A letter.<|im_end|>"],
        ),
        (("system", "tools", "template", "user", "tool_results"), [f"I look.{CALL}<|im_end|>", "A letter.<|im_end|>"]),
        (
            ("tools", "template"),
            ["Be brief.", "What is é?", f"I look.{CALL}<|im_end|>", "a letter", "A letter.<|im_end|>"],
        ),
    ],
)
def test_parts_of_a_conversation(tokenizer, mask, kept):
    assert _kept(tokenizer, CHAT, mask) == kept


def test_each_flag_masks_its_part_alone(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, add_generation_prompt=False)
    assert _kept(tokenizer, CHAT, ()) == [text]
    assert _kept(tokenizer, CHAT, ("system",)) == text.split("Be brief.")
    before, after = _kept(tokenizer, CHAT, ("tools",))
    assert "look_up" not in before
    assert "finds a word" not in before + after
    assert before.endswith("Be brief.")
    assert _kept(tokenizer, CHAT, ("tool_results",)) == text.split("a letter")
    assert _kept(tokenizer, CHAT, ("user",)) == text.split("What is é?")
    assert set(KINDS) >= {"system", "tools", "template", "user", "tool_results", "prefix"}


def test_a_template_that_changes_contents(tokenizer):
    """Contents are then looked for; one that is not there cannot be masked apart from the template."""
    lower = Tokenizer(
        tokenizer._backend,
        chat_templates={"default": "{% for m in messages %}[{{ m.content[:5] }}]{% endfor %}"},
    )
    record = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]}
    assert _kept(lower, record, ("template",)) == ["hello"]
    with pytest.raises(W4A8Error, match=r"line 1: message 0 \(system\)"):
        _kept(lower, record, ("system",))


def test_text_without_the_tokens_around_it(tokenizer):
    assert _kept(tokenizer, {"text": "ab c"}, ("template",)) == ["ab c"]
    assert _kept(tokenizer, {"text": "ab c"}, ()) == ["<bos>ab c"]


def test_given_mask_is_taken_as_it_is(tokenizer):
    record = {"tokens": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 1]}
    data = read_calibration([record, record] * 20, None, vocab_size=320, mask=KINDS)
    assert all(sample.loss_mask.tolist() == [False, True, False, True] for sample in data.samples)
    assert (data.tokens, data.counted) == (160, 80)


def test_repeated_prefixes():
    prompt = list(range(100, 120))
    samples = [[*prompt, 1, 2], [9], [*prompt, 1, 3], [*prompt, 4], [*prompt, 1, 2], prompt[:10]]
    assert list(repeated_prefixes(np.array(s) for s in samples)) == [0, 0, 21, 20, 22, 0]
    records = [{"tokens": s} for s in samples]
    data = read_calibration(records, None, vocab_size=320, mask=("prefix",))
    assert data.dropped == 1  # the one that is a whole prefix
    assert [int(s.loss_mask.sum()) for s in data.samples] == [22, 1, 1, 1, 10]


def test_packing_and_cutting():
    records = [{"tokens": list(range(n)), "loss_mask": [i % 2 for i in range(n)]} for n in (5, 1, 6)]
    packed = read_calibration(records, None, vocab_size=320, pack=4)
    assert packed.dropped == 1
    assert [s.tokens.tolist() for s in packed.samples] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 5]]
    assert [s.line for s in packed.samples] == [1, 1, 3]
    assert packed.samples[1].loss_mask.tolist() == [False, False, True, False]
    cut = read_calibration(records, None, vocab_size=320, max_length=2)
    assert cut.cut == 2
    assert [len(s.tokens) for s in cut.samples] == [2, 2]
    assert len(read_calibration(records, None, vocab_size=320, max_samples=1).samples) == 1
    assert cut.digest() != packed.digest()
    assert "1 of 3 traces dropped" in packed.describe()


GOOD = {"tokens": [1, 2]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([GOOD, "", "{no"], "line 3: is no JSON"),
        ([GOOD, "[1]"], "line 2: expected a JSON object, found list"),
        ([{"tokens": [1, 2], "loss_mask": [1]}], "line 1: loss_mask: has 1 entries, but there are 2 tokens"),
        ([{"text": "abc", "loss_mask": [1, 1]}], "line 1: loss_mask: has 2 entries, but there are 4 tokens"),
        ([{"tokens": [1, 2], "loss_mask": [1, 2]}], "line 1: loss_mask: expected a list of 0 and 1"),
        ([{"tokens": [1, 2], "loss_mask": [0, 0]}] * 2, "nothing counts: all tokens of its 2 traces"),
        ([GOOD, {"tokens": [1, 320]}], r"line 2: token 1 has id 320, but the model's vocabulary is 0 \.\. 319"),
        ([{"tokens": [1, -1]}], "token 1 has id -1"),
        ([{"tokens": [1, 10**30]}], "token 1 has id"),
        ([{"tokens": [1.5]}], "expected integers"),
        ([{"tokens": "12"}], "expected a list of ids"),
        ([{"text": 5}], "line 1: text: expected a string"),
        ([{"words": "a"}], "line 1: expected one of text, tokens, messages, found none"),
        ([{"text": "a", "tokens": [1]}], "found text and tokens"),
        ([{"messages": []}], "messages: expected a list of objects"),
        ([{"messages": MESSAGES, "tools": "x"}], "tools: expected a list of objects"),
    ],
)
def test_bad_files(tokenizer, tmp_path, lines, message):
    with pytest.raises(W4A8Error, match=message):
        read_calibration(_write(tmp_path / "data.jsonl", *lines), tokenizer, vocab_size=320)


def test_other_errors(tokenizer, tmp_path):
    with pytest.raises(W4A8Error, match="cannot be read: No such file"):
        read_calibration(tmp_path / "none.jsonl", tokenizer, vocab_size=320)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(W4A8Error, match="is not UTF-8"):
        read_calibration(tmp_path / "latin.jsonl", tokenizer, vocab_size=320)
    with pytest.raises(W4A8Error, match="'tool' is unknown"):
        read_calibration([GOOD], tokenizer, vocab_size=320, mask=["tool"])
    with pytest.raises(W4A8Error, match="pack: expected at most 8"):
        read_calibration([GOOD], tokenizer, vocab_size=320, pack=9, max_length=8)
    with pytest.raises(W4A8Error, match="has no tokenizer"):
        read_calibration([{"text": "a"}], None, vocab_size=320)

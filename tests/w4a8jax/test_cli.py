"""The command line: what it prints, where, and how it ends."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from text_checkpoint import text_checkpoint
from typer.testing import CliRunner, Result

import w4a8jax
from w4a8jax.cli import app
from w4a8jax.cli.app import describe

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
COMMANDS = ("quantize", "calibrate", "generate", "inspect", "verify", "eval", "report", "reference-model")


def run(*arguments: Any, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input)


def output(*arguments: Any, input: str | None = None) -> str:
    """stdout of a command that must succeed."""
    result = run(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: Any, input: str | None = None) -> str:
    """The one line on stderr of a command that must fail, with nothing on stdout."""
    result = run(*arguments, input=input)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("cli") / "bf16")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    target = source.parent / "w4a8"
    output("quantize", source, target, "--search", "none", "--quiet")
    return target


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_help_names_every_command_and_option() -> None:
    top = output("--help")
    for name in COMMANDS:
        assert name in top
        text = output(name, "--help")
        options = set(re.findall(r"--[a-z][a-z0-9-]+", text))
        assert "--help" in options
    assert {"--scheme", "--numerics", "--code-min", "--ignore", "--search", "--overwrite", "--resume"} <= set(
        re.findall(r"--[a-z][a-z0-9-]+", output("quantize", "--help"))
    )


def test_version() -> None:
    assert output("--version").strip() == f"w4a8jax {w4a8jax.__version__}"


def test_quantize(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shown = output("quantize", source, target, "--search", "none", "--code-min", "-8", "--ignore", "re:.*down_proj")
    assert f"wrote {target}" in shown
    found = w4a8jax.inspect(target)
    assert found.scheme == "w4a8"
    assert found.histogram[0] > 0
    assert {x.scheme for x in found.layers if x.name.endswith("down_proj")} == {"bf16"}


def test_quantize_json(source: Path, tmp_path: Path) -> None:
    shown = output("quantize", source, tmp_path / "target", "--scheme", "w4a16", "--search", "none", "--json")
    record = json.loads(shown)
    assert record["scheme"] == "w4a16"
    assert len(record["layers"]) == 14


def test_generate(quantized: Path) -> None:
    model = w4a8jax.load(quantized)
    expected = model.generate("def", max_new_tokens=8).text
    result = run("generate", quantized, "--prompt", "def", "-n", 8)
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert "4 + 8 tokens, length" in result.stderr
    assert output("generate", quantized, "-p", "def", "-n", 8, "--echo", "-q") == f"def{expected}\n"
    assert output("generate", quantized, "-p", "-", "-n", 8, input="def\n") == expected + "\n"


def test_generate_json_and_sampling(quantized: Path) -> None:
    arguments = ("generate", quantized, "-p", "def", "-n", 8, "--json")
    first, again, other = (json.loads(output(*arguments, "--seed", seed)) for seed in (5, 5, 6))
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert first["seed"] == 5
    greedy = json.loads(output(*arguments))
    assert greedy["tokens"] == list(w4a8jax.load(quantized).generate("def", max_new_tokens=8).tokens)
    assert json.loads(output(*arguments, "--top-k", 1, "--seed", 9))["tokens"] == greedy["tokens"]
    exact = json.loads(output(*arguments, "--numerics", "exact", "--scheme", "w4a16", "--dtype", "float32"))
    assert len(exact["tokens"]) == 8


def test_chat(quantized: Path) -> None:
    model = w4a8jax.load(quantized)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = model.chat(messages, max_new_tokens=6).text
    assert (
        output("generate", quantized, "--chat", "--system", "Be brief.", "-p", "Hello", "-n", 6, "-q") == answer + "\n"
    )


def test_conversation_remembers_until_reset(quantized: Path) -> None:
    model = w4a8jax.load(quantized)
    first = model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=6).text
    messages = [("user", "Hello"), ("assistant", first), ("user", "More")]
    second = model.chat([{"role": r, "content": c} for r, c in messages], max_new_tokens=6).text
    lines = "Hello\n\nMore\n/reset\nHello\n/exit\nignored\n"
    shown = output("generate", quantized, "--chat", "-n", 6, "-q", input=lines)
    assert shown == f"{first}\n{second}\n{first}\n"


def test_inspect(quantized: Path, tmp_path: Path) -> None:
    shown = output("inspect", quantized, "--plot", tmp_path / "plot.png", "--details")
    assert "layers.1.mlp.up_proj" in shown
    assert "wrote" in shown
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 1000
    assert "layers.*.mlp.up_proj" in output("inspect", quantized, "--by-kind")
    record = json.loads(output("inspect", quantized, "--json"))
    assert record["parameters"] == w4a8jax.inspect(quantized).parameters


def test_verify(source: Path, quantized: Path, text: Path) -> None:
    shown = output("verify", quantized, "--against", source, "--text", text)
    assert "vLLM would serve this checkpoint: yes (w4a8)" in shown
    assert "top-1 agreement" in shown
    record = json.loads(output("verify", quantized, "--against", source, "--max-tokens", 0, "--json"))
    assert record["ok"] is True


def test_verify_ends_in_1_if_not_all_is_well(quantized: Path) -> None:
    result = run("verify", quantized, "--tensor-parallel", 8)
    assert result.exit_code == 1
    assert "vLLM would serve this checkpoint: no (vLLM's rules)" in result.stdout
    assert result.stderr == ""


def test_eval(source: Path, quantized: Path, text: Path) -> None:
    expected = w4a8jax.evaluate(w4a8jax.load(quantized), TEXT)
    assert f"perplexity     {expected.perplexity:.4f}" in output("eval", quantized, "--text", text)
    assert json.loads(output("eval", quantized, "--text", "-", "--json", input=TEXT)) == json.loads(expected.to_json())
    shown = output("eval", quantized, "--against", source, "--max-tokens", 100, "--context", 64, "--stride", 32)
    assert "KL from original" in shown
    assert "100 tokens, 100 bytes, in windows of 64 every 32" in shown


def test_reference_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(w4a8jax, "reference_model", lambda name: tmp_path / name)
    assert output("reference-model").strip() == str(tmp_path / "dense")


def test_no_such_model(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (
        ("quantize", missing, tmp_path / "t"),
        ("generate", missing, "-p", "x"),
        ("inspect", missing),
        ("verify", missing),
        ("eval", missing),
    ):
        assert refusal(*command) == f"{missing}: no such directory"
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_in_the_directory(tmp_path: Path) -> None:
    for command in (("inspect", tmp_path), ("verify", tmp_path), ("generate", tmp_path, "-p", "x")):
        assert refusal(*command) == f"{tmp_path}: is no checkpoint directory: it has no config.json"


def test_existing_target(source: Path, quantized: Path) -> None:
    before = (quantized / "config.json").stat().st_mtime_ns
    message = refusal("quantize", source, quantized, "--search", "none")
    assert message == f"{quantized}: exists; give another name, or --overwrite to replace it"
    assert (quantized / "config.json").stat().st_mtime_ns == before


def test_quantized_source(quantized: Path, tmp_path: Path) -> None:
    assert "is quantized already" in refusal("quantize", quantized, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_unknown_model_type(source: Path, tmp_path: Path) -> None:
    path = text_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gpt5"}))
    expected = "model_type 'gpt5' is unknown; known are"
    assert expected in refusal("generate", path, "-p", "x")
    assert expected in refusal("eval", path)
    assert expected in refusal("quantize", path, tmp_path / "target")
    result = run("verify", path)
    assert result.exit_code == 1
    assert "model_type 'gpt5' is unknown" in result.stdout


def test_missing_tokenizer(tmp_path: Path, text: Path) -> None:
    path = text_checkpoint(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    assert "tokenizer" in refusal("generate", path, "-p", "x")
    assert "tokenizer" in refusal("generate", path, "-p", "x", "--chat")
    assert "tokenizer" in refusal("eval", path, "--text", text)


def test_prompt_longer_than_the_context(quantized: Path) -> None:
    message = refusal("generate", quantized, "-p", "x" * 600)
    assert "has 601 tokens, but the context of 512 tokens takes 511" in message
    message = refusal("generate", quantized, "-p", "x" * 100, "--max-context", 64)
    assert "context of 64 tokens" in message
    assert "found 4096" in refusal("generate", quantized, "-p", "x", "--max-context", 4096)


def test_text_missing_empty_or_binary(quantized: Path, tmp_path: Path) -> None:
    missing, empty, binary = tmp_path / "missing", tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"ab\xff")
    for command in ("eval", "verify"):
        assert refusal(command, quantized, "--text", missing) == (
            f"--text {missing}: cannot be read: No such file or directory"
        )
        assert refusal(command, quantized, "--text", empty) == f"--text {empty}: is empty; give a text"
        assert "is not UTF-8 text: invalid start byte at byte 2" in refusal(command, quantized, "--text", binary)
        assert "cannot be read: Is a directory" in refusal(command, quantized, "--text", tmp_path)
    assert refusal("eval", quantized, "--text", "-", input="") == "--text -: is empty; give a text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "generate: give --prompt TEXT (- for stdin) or --chat"),
        (("-p", "x", "--system", "y"), "--system: needs --chat"),
        (("--chat", "--json"), "--json: needs --prompt"),
        (("-p", "x", "--top-p", "1.5"), "top_p: expected a number above 0 and at most 1, found 1.5"),
        (("-p", "x", "--temperature", "-1"), "temperature: expected 0 (greedy) or a positive number, found -1.0"),
    ],
)
def test_generate_refusals(quantized: Path, arguments: tuple[str, ...], message: str) -> None:
    assert refusal("generate", quantized, *arguments) == message


def test_usage_errors_end_in_2(quantized: Path) -> None:
    for arguments in (
        ("generate",),
        ("eval", quantized, "--numerics", "best"),
        ("quantize", "a", "b", "--code-min", "-9"),
    ):
        assert run(*arguments).exit_code == 2


def test_interrupt(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        error = KeyboardInterrupt()
        error.add_note("3 of 7 shards are kept; go on with --resume")
        raise error

    monkeypatch.setattr(w4a8jax, "quantize", interrupted)
    result = run("quantize", source, "target")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n3 of 7 shards are kept; go on with --resume\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from w4a8jax.cli import main; main()"]
    plain = subprocess.run([*command, "inspect", tmp_path], capture_output=True, text=True)
    debug = subprocess.run([*command, "--debug", "inspect", tmp_path], capture_output=True, text=True)
    assert plain.returncode == debug.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "W4A8Error" in debug.stderr


def test_errors_in_one_line() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/model")
    assert describe(full) == "/data/model: the disk is full"
    assert describe(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt")) == (
        "a.txt: no such file or directory"
    )
    assert describe(w4a8jax.W4A8Error("first\n  second")) == "first second"
    assert describe(MemoryError()) == "out of memory"
    assert describe(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")) == (
        "out of device memory: RESOURCE_EXHAUSTED: Out of memory allocating"
    )
    assert describe(RuntimeError("a bug")) is None


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(w4a8jax, "inspect", broken)
    assert isinstance(run("inspect", source).exception, ZeroDivisionError)


def test_help_is_quick() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "from w4a8jax.cli import main; main()", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not re.search(r"\| +(jax|flax|numpy)$", result.stderr, re.MULTILINE)

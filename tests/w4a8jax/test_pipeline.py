"""`quantize`: from a bf16 checkpoint directory to a W4A8 one."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from toy import contents, save_checkpoint, toy_checkpoint, toy_config, toy_shapes, toy_tensors

import w4a8jax.checkpoints.writer as writer_module
from pallas_kernels.errors import W4A8Error
from w4a8jax.checkpoints.compressed_tensors import DEFAULT_IGNORE, build, is_linear, parse, quantized_modules
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorInfo
from w4a8jax.checkpoints.servable import problems
from w4a8jax.quantization import pipeline
from w4a8jax.quantization.pipeline import quantize, select
from w4a8jax.quantization.rtn import quantize_weight

BF16 = np.dtype(ml_dtypes.bfloat16)
DOWN = "model.layers.1.mlp.down_proj"


def run(src: Path, dst: Path, **options: Any):
    return quantize(src, dst, **({"search": "none", "progress": False} | options))


def refusal(src: Path, dst: Path, **options: Any) -> str:
    with pytest.raises(W4A8Error) as error:
        run(src, dst, **options)
    assert "\n" not in str(error.value)
    assert not [p for p in dst.parent.iterdir() if p.name.startswith(f".{dst.name}.")]
    return str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "cohere2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantizes(tmp_path: Path, model_type: str, dtype: str) -> None:
    src = toy_checkpoint(tmp_path, model_type=model_type, dtype=dtype, sharded=dtype == "float16")
    before = contents(src)
    summary = run(src, tmp_path / "out", max_shard_bytes=200_000)
    assert contents(src) == before
    source, result = CheckpointReader(src), CheckpointReader(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2

    modules = quantized_modules(result)
    assert set(modules) == {n.removesuffix(".weight") for n in source.tensors if is_linear(n.removesuffix(".weight"))}
    assert len(modules) == 14
    assert problems(result.config, result.tensors) == []
    for name in source.tensors:
        module = name.removesuffix(".weight")
        if module in modules:
            expected = quantize_weight(source.read(name), search="none")
            np.testing.assert_array_equal(result.read(f"{module}.weight_packed"), expected.packed)
            np.testing.assert_array_equal(result.read(f"{module}.weight_scale"), expected.scale)
            assert result.read(f"{module}.weight_shape").tolist() == list(source.tensors[name].shape)
        else:
            assert result.tensors[name].dtype == BF16
            np.testing.assert_array_equal(result.read(name), source.read(name).astype(BF16))
    kept = {k: v for k, v in result.config.items() if k != "quantization_config"}
    assert kept == source.config | {"dtype": "bfloat16"}
    assert result.config["quantization_config"] == build("w4a8", DEFAULT_IGNORE)
    for name in result.sidecars():
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()
    assert result.sidecars() == source.sidecars()

    assert len(summary.layers) == 14
    assert summary.bits_per_weight == pytest.approx(4.125, abs=0.01)
    assert 0.05 < summary.relative_error < 0.2
    assert summary.source_bytes == sum(i.nbytes for i in source.tensors.values())
    assert summary.target_bytes == sum(i.nbytes for i in result.tensors.values())
    assert all(sum(layer.histogram) == layer.parameters for layer in summary.layers)
    assert bool(summary.warnings) == (dtype != "bfloat16")
    assert not [p for p in tmp_path.iterdir() if p.name not in ("source", "out")]


def test_summary(tmp_path: Path) -> None:
    summary = run(toy_checkpoint(tmp_path), tmp_path / "out", ignore=("re:.*layers\\.0\\.mlp",))
    assert summary.skipped["model.embed_tokens.weight"] == "embedding"
    assert summary.skipped["lm_head.weight"] == "output head"
    assert summary.skipped["model.norm.weight"] == "not a matrix"
    assert summary.skipped["model.layers.0.mlp.up_proj.weight"] == "ignored by re:.*layers\\.0\\.mlp"
    assert set(summary.seconds) == {"read", "quantize", "write", "check", "total"}
    loaded = json.loads(summary.to_json())
    assert loaded["layers"][0]["name"] == summary.layers[0].name
    stored = json.loads((tmp_path / "out" / "quantization_summary.json").read_text())
    assert stored["layers"] == loaded["layers"]
    assert not {"seconds", "source", "target", "resumed_shards"} & stored.keys()
    for details, expected in ((False, "│ self_attn.q_proj │     2 │"), (True, "model.layers.1.self_attn.q_proj")):
        console = Console(file=io.StringIO(), width=120)
        summary.render(console, details=details)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert expected in text
        assert "not quantized: model.embed_tokens.weight: embedding" in text


def test_w4a16_minimizes_what_it_runs(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path)
    summary = run(src, tmp_path / "out", scheme="w4a16", search="fast", code_min=-8)
    assert summary.numerics == "exact"
    result = CheckpointReader(tmp_path / "out")
    config = parse(result.config)
    assert config is not None
    assert config.scheme == "w4a16"
    expected = quantize_weight(
        CheckpointReader(src).read(f"{DOWN}.weight"), numerics="exact", search="fast", code_min=-8
    )
    np.testing.assert_array_equal(result.read(f"{DOWN}.weight_packed"), expected.packed)


def test_ignore(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path)
    run(src, tmp_path / "out", ignore=(DOWN, "re:.*layers\\.0\\.self_attn\\.(q|k|v)_proj"))
    result = CheckpointReader(tmp_path / "out")
    assert len(quantized_modules(result)) == 10
    assert result.config["quantization_config"]["ignore"][len(DEFAULT_IGNORE) :] == [
        DOWN,
        "re:.*layers\\.0\\.self_attn\\.(q|k|v)_proj",
    ]
    assert problems(result.config, result.tensors) == []


def test_biases_are_kept_and_buffers_dropped(tmp_path: Path) -> None:
    config = toy_config() | {"attention_bias": True}
    tensors = toy_tensors(config)
    for i in range(2):
        for name, width in (("q", 256), ("k", 128), ("v", 128), ("o", 256)):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.bias"] = np.full(width, 0.5, BF16)
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    src = save_checkpoint(tmp_path / "source", config, tensors)
    summary = run(src, tmp_path / "out")
    result = CheckpointReader(tmp_path / "out")
    assert result.read("model.layers.1.self_attn.k_proj.bias").tolist() == [0.5] * 128
    assert not [name for name in result.tensors if "inv_freq" in name]
    assert summary.skipped["model.layers.0.self_attn.rotary_emb.inv_freq"].startswith("dropped")


def test_older_torch_dtype(tmp_path: Path) -> None:
    config = toy_config(dtype="float16")
    config["torch_dtype"] = config.pop("dtype")
    run(save_checkpoint(tmp_path / "source", config, toy_tensors(config)), tmp_path / "out")
    result = CheckpointReader(tmp_path / "out").config
    assert (result["dtype"], result["torch_dtype"]) == ("bfloat16", "bfloat16")


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, BF16, shape, Path("x"), 0) for name, shape in shapes.items()}


def test_selects_experts_and_not_routers() -> None:
    layer = "model.layers.0"
    items, dropped = select(
        infos(
            {
                f"{layer}.mlp.experts.10.up_proj.weight": (256, 256),
                f"{layer}.mlp.experts.2.up_proj.weight": (256, 256),
                f"{layer}.block_sparse_moe.experts.0.w1.weight": (256, 256),
                f"{layer}.mlp.gate.weight": (4, 256),
                f"{layer}.block_sparse_moe.gate.weight": (4, 256),
                f"{layer}.mlp.shared_expert_gate.weight": (1, 256),
            }
        )
    )
    assert {
        item.info.name.removeprefix(f"{layer}."): (item.module and "quantized") or item.reason for item in items
    } == {
        "block_sparse_moe.experts.0.w1.weight": "quantized",
        "block_sparse_moe.gate.weight": "router",
        "mlp.experts.2.up_proj.weight": "quantized",
        "mlp.experts.10.up_proj.weight": "quantized",
        "mlp.gate.weight": "router",
        "mlp.shared_expert_gate.weight": "not a linear layer of the decoder",
    }
    assert dropped == {}
    config = pipeline.quantized_config({}, items, "w4a8")["quantization_config"]
    assert config["ignore"] == [*DEFAULT_IGNORE, f"{layer}.mlp.shared_expert_gate"]


def test_k_not_a_multiple_of_128(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path, intermediate=320)
    message = refusal(src, tmp_path / "out")
    assert message == (
        "model.layers.0.mlp.down_proj.weight: K must be a multiple of 128, found shape [256, 320]; "
        "leave it in bf16 with --ignore model.layers.0.mlp.down_proj"
    )
    run(src, tmp_path / "out", ignore=["re:.*down_proj"])


def test_what_vllm_could_not_serve(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path, intermediate=384)
    message = refusal(src, tmp_path / "out")
    assert message == (
        "vLLM could not serve the result: model.layers.0.mlp.down_proj: K = 384 is not a multiple of 256 "
        "(and 1 more); --allow-unservable writes it anyway"
    )
    assert "o_proj: K = 128 on each of 2 GPUs" in refusal(
        toy_checkpoint(tmp_path, name="b"), tmp_path / "out", tensor_parallel=2
    )
    run(src, tmp_path / "out", allow_unservable=True)
    result = CheckpointReader(tmp_path / "out")
    assert len(problems(result.config, result.tensors)) == 2


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(tmp_path: Path, name: str, bad: float) -> None:
    tensor = toy_tensors(toy_config())[name]
    tensor[(3, 5)[: tensor.ndim]] = bad
    message = refusal(toy_checkpoint(tmp_path, **{name: tensor}), tmp_path / "out", max_shard_bytes=100_000)
    at = [3, 5] if tensor.ndim == 2 else [3]
    assert message == f"{name}: has NaN or Inf (or a value beyond bf16's range) at {at}; expected finite weights"
    assert os.listdir(tmp_path) == ["source"]


def test_beyond_bf16(tmp_path: Path) -> None:
    tensor = np.full(256, 3.4e38, np.float32)
    tensor[7] = np.finfo(np.float32).max
    src = toy_checkpoint(tmp_path, dtype="float32", **{"model.norm.weight": tensor})
    assert "model.norm.weight: has NaN or Inf (or a value beyond bf16's range) at [0]" in refusal(src, tmp_path / "out")


def test_unknown_model_type(tmp_path: Path) -> None:
    config = toy_config()
    src = save_checkpoint(tmp_path / "source", config | {"model_type": "gpt_oss"}, toy_tensors(config))
    assert "model_type 'gpt_oss' is unknown; known are cohere2, " in refusal(src, tmp_path / "out")


def test_config_contradicts_the_weights(tmp_path: Path) -> None:
    config = toy_config()
    tensors = toy_tensors(config)
    cases = [
        ({"intermediate_size": 768}, "mlp.gate_proj.weight is [512, 256], but config.json says [768, 256]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing; config.json says [256]"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is unknown to a llama model"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is [256, 256], but config.json says [300, 256]"),
        ({"model_type": "qwen3"}, "q_norm.weight is missing"),
    ]
    for i, (change, message) in enumerate(cases):
        src = save_checkpoint(tmp_path / f"source{i}", config | change, tensors)
        assert message in refusal(src, tmp_path / "out"), change


def test_already_quantized(tmp_path: Path) -> None:
    run(toy_checkpoint(tmp_path), tmp_path / "out")
    message = refusal(tmp_path / "out", tmp_path / "again")
    assert message.endswith("out: is quantized already (compressed-tensors); give the unquantized checkpoint")
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert "weight_packed is quantized already" in refusal(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w8a8"}, "scheme: must be w4a8 or w4a16, found 'w8a8'"),
        ({"numerics": "x"}, "numerics: must be lut or exact, found 'x'"),
        ({"code_min": -6}, "code_min: must be -7 or -8, found -6"),
        ({"search": "slow"}, "search: must be full or fast or none, found 'slow'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: must be positive, found 0"),
        ({"ignore": ["down_proj"]}, "--ignore 'down_proj': matches no module; give an exact name, or re:"),
        ({"ignore": ["re:("]}, "'re:(' is no regular expression"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refusal(toy_checkpoint(tmp_path), tmp_path / "out", **options)


def test_target_and_source(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path)
    before = contents(src)
    for dst in (src, tmp_path):
        assert "is or contains the source" in refusal(src, dst, overwrite=True)
    assert contents(src) == before
    run(src, tmp_path / "out")
    result = contents(tmp_path / "out")
    assert refusal(src, tmp_path / "out", code_min=-8).endswith(
        "exists; give another name, or --overwrite to replace it"
    )
    assert contents(tmp_path / "out") == result
    run(src, tmp_path / "out", code_min=-8, overwrite=True)
    assert contents(tmp_path / "out") != result


def test_missing_tokenizer_is_a_warning(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path)
    (src / "tokenizer.json").unlink()
    assert "has no tokenizer.json; the result generates no text" in run(src, tmp_path / "out").warnings[0]


def test_damaged_source(tmp_path: Path) -> None:
    src = toy_checkpoint(tmp_path)
    (src / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes()[:-1])
    assert "model.safetensors: truncated safetensors file" in refusal(src, tmp_path / "out")


def test_interrupted_and_resumed_is_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = toy_checkpoint(tmp_path)
    whole = run(src, tmp_path / "whole", max_shard_bytes=100_000)
    real = pipeline._quantize

    def interrupting(reader: Any, writer: Any, item: Any, *args: Any, **options: Any) -> None:
        if item.module == DOWN:
            raise KeyboardInterrupt
        real(reader, writer, item, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_quantize", interrupting)
        with pytest.raises(KeyboardInterrupt) as error:
            run(src, tmp_path / "out", max_shard_bytes=100_000)
    assert "go on with --resume" in error.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(W4A8Error, match="code_min was -7, is -8 now"):
        run(src, tmp_path / "out", max_shard_bytes=100_000, resume=True, code_min=-8)
    resumed = run(src, tmp_path / "out", max_shard_bytes=100_000, resume=True)
    assert resumed.resumed_shards > 5
    assert resumed.layers == whole.layers
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_changed_source_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = toy_checkpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.CheckpointWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(src, tmp_path / "out")
    toy_checkpoint(tmp_path)
    with pytest.raises(W4A8Error, match="is another job: source was "):
        run(src, tmp_path / "out", resume=True)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = toy_checkpoint(tmp_path)
    calls = iter(range(1000))
    pwrite = writer_module._pwrite

    def failing(fd: int, data: Any, offset: int) -> None:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_pwrite", failing)
        with pytest.raises(W4A8Error, match="out: the disk is full; make room, and go on with --resume"):
            run(src, tmp_path / "out", max_shard_bytes=100_000)
    assert not (tmp_path / "out").exists()
    assert run(src, tmp_path / "out", max_shard_bytes=100_000, resume=True).resumed_shards > 1


SCRIPT = """
import sys
from w4a8jax.quantization.pipeline import quantize
try:
    quantize(sys.argv[1], sys.argv[2], search="fast", progress=False, max_shard_bytes=2**19)
except KeyboardInterrupt as e:
    print(*e.__notes__)
    sys.exit(130)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(tmp_path: Path, kind: signal.Signals) -> None:
    src = toy_checkpoint(tmp_path, hidden=512, intermediate=1536, layers=8)
    command = [sys.executable, "-c", SCRIPT, str(src), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and len(journal.read_text().splitlines()) > 3):
        assert process.poll() is None, "finished before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    if kind == signal.SIGINT:
        assert "shards are kept; go on with --resume" in output
    assert not (tmp_path / "out").exists()
    options: dict[str, Any] = {"search": "fast", "progress": False, "max_shard_bytes": 2**19}
    assert quantize(src, tmp_path / "out", resume=True, **options).resumed_shards >= 3
    quantize(src, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


MEMORY = """
import re, sys
from w4a8jax.quantization.pipeline import quantize
quantize(sys.argv[1], sys.argv[2], search="none", progress=False)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])  # ru_maxrss would be the parent's
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 20):  # of 8.4 million parameters, 16 MiB
        src = tmp_path / f"source{layers}"
        config = toy_config(hidden=1024, intermediate=2048, layers=layers)
        noise = (np.random.default_rng(0).standard_normal(2048 * 1024, np.float32) * 0.02).astype(BF16)
        tensors = {name: noise[: int(np.prod(shape))].reshape(shape) for name, shape in toy_shapes(config).items()}
        save_checkpoint(src, config, tensors)
        del tensors
        command = [sys.executable, "-c", MEMORY, str(src), str(tmp_path / f"out{layers}")]
        peaks[layers] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1024
    assert (tmp_path / "source20/model.safetensors").stat().st_size > 280 * 2**20
    assert peaks[20] < peaks[2] + 60, f"peak resident MiB by layers: {peaks}"

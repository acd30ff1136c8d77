"""Reading Hugging Face checkpoint directories, whole and damaged."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from toy import DTYPES, contents, save_file, toy_checkpoint, toy_config, toy_shapes, toy_tensors

from pallas_kernels.errors import W4A8Error
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorSpec, layout, natural_key, read_header, read_rows


def refusal(path: str | Path) -> str:
    with pytest.raises(W4A8Error) as error:
        CheckpointReader(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor(tmp_path: Path, dtype: str, sharded: bool) -> None:
    path = toy_checkpoint(tmp_path, dtype=dtype, sharded=sharded)
    reader = CheckpointReader(path)
    config = toy_config(dtype=dtype)
    expected = toy_tensors(config, dtype)
    assert reader.config == config
    assert {name: info.shape for name, info in reader.tensors.items()} == toy_shapes(config)
    for name, array in expected.items():
        read = reader.read(name)
        assert read.dtype == DTYPES[dtype] == reader.tensors[name].dtype
        assert reader.tensors[name].nbytes == array.nbytes
        assert read.tobytes() == array.tobytes()


def test_reads_rows_and_blocks(tmp_path: Path) -> None:
    reader = CheckpointReader(toy_checkpoint(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = reader.read(name)
    np.testing.assert_array_equal(reader.read_rows(name, 5, 9), whole[5:9])
    np.testing.assert_array_equal(reader.read_rows(name, 500, 900), whole[500:])
    blocks = list(reader.blocks(name, 100 * 256 * 2))
    assert [len(b) for b in blocks] == [100] * 5 + [12]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert len(list(reader.blocks("model.norm.weight", 10))) == 1


def test_unknown_tensor(tmp_path: Path) -> None:
    reader = CheckpointReader(toy_checkpoint(tmp_path))
    with pytest.raises(W4A8Error, match=r"source: has no tensor model\.layers\.9\.x"):
        reader.read("model.layers.9.x")


def test_file_agrees_with_safetensors_both_ways(tmp_path: Path) -> None:
    arrays = {
        "half": np.arange(3, dtype=np.float16),
        "long": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int32),
        "bytes": np.arange(7, dtype=np.uint8),
    }
    save_file(tmp_path / "ours.safetensors", arrays)
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="np") as f:
        assert {name: f.get_tensor(name).tolist() for name in f.keys()}  # noqa: SIM118 == {k: v.tolist() for k, v in arrays.items()}
    from safetensors.numpy import save_file as their_save

    their_save(arrays, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "theirs.safetensors")
    assert {name: read_rows(info).tolist() for name, info in header.items()} == {
        k: v.tolist() for k, v in arrays.items()
    }


def test_fp8_and_bf16(tmp_path: Path) -> None:
    arrays = {
        "e4m3": np.array([448, -0.5], ml_dtypes.float8_e4m3fn),
        "e5m2": np.array([[2.0]], ml_dtypes.float8_e5m2),
        "bf16": np.array([1.5, np.nan], ml_dtypes.bfloat16),
    }
    save_file(tmp_path / "x.safetensors", arrays)
    for name, info in read_header(tmp_path / "x.safetensors").items():
        assert info.dtype == arrays[name].dtype
        assert read_rows(info).tobytes() == arrays[name].tobytes()


def test_planned_layout_is_aligned() -> None:
    specs = [TensorSpec("a", np.dtype(np.int8), (3,)), TensorSpec("b", np.dtype(np.int64), (2,))]
    _, offsets, size = layout(specs)
    assert offsets["b"] % 8 == 0
    assert size == offsets["a"] + 3


def test_sidecars(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "chat_template.json"):
        (path / name).write_text("x")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "optimizer.pt",
        "training_args.bin",
        "README.md",
        "trainer_state.json",
    ):
        (path / name).write_text("x")
    (path / "original").mkdir()
    (path / "original" / "tokenizer.model").write_text("x")
    assert [str(p) for p in CheckpointReader(path).sidecars()] == [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    before = CheckpointReader(path).identity()
    assert CheckpointReader(path).identity() == before
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    assert CheckpointReader(path).identity() != before


def test_natural_order() -> None:
    assert sorted(["l.10.a", "l.2.b", "l.2.a"], key=natural_key) == ["l.2.a", "l.2.b", "l.10.a"]


def test_no_such_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing").endswith("nothing: no such directory")


def test_a_file(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path) / "model.safetensors"
    assert refusal(path).endswith("model.safetensors: is a file; give the checkpoint's directory")


def test_hub_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_checkpoint(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(path))
    assert CheckpointReader("org/some-model").path == path
    assert asked == ["org/some-model"]


def test_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: object) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = refusal("org/some-model")
    assert (
        message == "org/some-model: no such directory, and not to be had from the Hugging Face Hub: no network at all"
    )


def test_config_missing(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    (path / "config.json").unlink()
    assert refusal(path).endswith("source: is no checkpoint directory: it has no config.json")


@pytest.mark.parametrize(("text", "why"), [("{", "is not JSON: "), ("[]", "must hold a JSON object, holds list")])
def test_config_is_no_json_object(tmp_path: Path, text: str, why: str) -> None:
    path = toy_checkpoint(tmp_path)
    (path / "config.json").write_text(text)
    assert f"config.json: {why}" in refusal(path)


def test_no_weights(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    message = refusal(path)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "found pytorch_model.bin, which is not read: convert it to safetensors" in message


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated_file(tmp_path: Path, sharded: bool, keep: int) -> None:
    path = toy_checkpoint(tmp_path, sharded=sharded)
    file = max(path.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert f"{file.name}: truncated safetensors file" in refusal(path)


def corrupt_header(path: Path, change: object) -> str:
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    raw = change(header)  # type: ignore[operator]
    raw = json.dumps(header).encode() if raw is None else raw
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    return refusal(path)


def test_corrupt_headers(tmp_path: Path) -> None:
    name = "model.norm.weight"

    def changed(**entry: object):
        return lambda header: header[name].update(entry)

    cases = {
        "is not JSON or text": (lambda h: b"\xff\xfe{}", "corrupt safetensors header"),
        "list": (lambda h: b"[1]", "corrupt safetensors header: not an object"),
        "dtype": (changed(dtype="F4"), f"{name} has dtype F4; readable are BOOL, U8"),
        "shape": (changed(shape=[255]), f"{name} is bfloat16 [255], but has 512 bytes"),
        "negative": (changed(shape=[-256]), f"the entry of {name} is malformed"),
        "offsets": (changed(data_offsets=[0]), f"the entry of {name} is malformed"),
        "overlap": (changed(data_offsets=[0, 512]), "does not start where the one before ends"),
    }
    for case, (change, message) in cases.items():
        path = toy_checkpoint(tmp_path, name=case)
        assert message in corrupt_header(path, change), case


def test_tensor_twice_in_one_header(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    entry = b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    message = corrupt_header(path, lambda h: b"{" + entry + b"," + entry + b"}")
    assert "corrupt safetensors header: x is listed twice" in message


def test_garbage_and_longer_file(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"x")
    assert "corrupt safetensors file: its header describes" in refusal(path)
    file.write_bytes(b"\xff" * 1000)
    assert "not a safetensors file, or corrupt" in refusal(path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`" in refusal(path)


def test_shrinks_after_opening(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    reader = CheckpointReader(path)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(W4A8Error, match=r"model\.safetensors: truncated while reading model\.norm\.weight"):
        reader.read("model.norm.weight")
    (path / "model.safetensors").unlink()
    with pytest.raises(W4A8Error, match=r"cannot read model\.norm\.weight: No such file"):
        reader.read("model.norm.weight")


def test_shard_missing(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, sharded=True)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: is missing, though model.safetensors.index.json names it" in refusal(path)


def test_index_missing(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, sharded=True)
    (path / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json: is missing; without it the shards (model-00001" in refusal(path)


def edit_index(path: Path, change: object) -> str:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])  # type: ignore[operator]
    file.write_text(json.dumps(index))
    return refusal(path)


def test_index_contradicts_the_shards(tmp_path: Path) -> None:
    norm, head = "model.norm.weight", "lm_head.weight"
    second = "model-00002-of-00002.safetensors"
    cases = {
        "unlisted": (
            lambda m: m.pop(norm),
            f"{second}: holds {norm}, which model.safetensors.index.json does not list",
        ),
        "absent": (lambda m: m.update(extra=second), f"{second}: lacks extra, which model.safetensors.index.json says"),
        "elsewhere": (lambda m: m.update({head: second}), f"{second}: lacks {head}, which"),
        "outside": (lambda m: m.update({head: "../x"}), "names the shard '../x', which is not a file beside it"),
        "empty": (lambda m: m.clear(), "model.safetensors.index.json: has no weight_map"),
    }
    for case, (change, message) in cases.items():
        assert message in edit_index(toy_checkpoint(tmp_path, sharded=True, name=case), change), case


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, sharded=True)
    (path / "model-00002-of-00002.safetensors").write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    assert "is also in model-00001-of-00002.safetensors: a tensor in two shards" in refusal(path)


def test_single_file_beside_other_shards(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, sharded=True)
    (path / "model.safetensors").write_bytes(b"")
    assert "has both model.safetensors and model.safetensors.index.json with other shards" in refusal(path)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path)
    before = contents(path)
    reader = CheckpointReader(path)
    for name in reader.tensors:
        reader.read(name)
    assert contents(path) == before

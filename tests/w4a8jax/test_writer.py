"""Writing a checkpoint: planned, resumable, checked whole, and never half there."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from toy import contents, save_checkpoint, toy_config, toy_tensors

import w4a8jax.checkpoints.writer as writer_module
from pallas_kernels.errors import W4A8Error
from w4a8jax.checkpoints.plan import plan_shards
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.checkpoints.safetensors_format import TensorSpec
from w4a8jax.checkpoints.workspace import Workspace
from w4a8jax.checkpoints.writer import CheckpointWriter

SHARDS, UNIT_BYTES = 5, 64 * 4 + 32 * 2
CONFIG = {"model_type": "llama"}
JOB = {"source": "abc", "code_min": -7}


def units() -> list[list[TensorSpec]]:
    return [
        [
            TensorSpec(f"layers.{i}.x", np.dtype(np.int32), (16, 4)),
            TensorSpec(f"layers.{i}.weight_scale", np.dtype(ml_dtypes.bfloat16), (32,)),
        ]
        for i in range(SHARDS)
    ]


def value(spec: TensorSpec) -> np.ndarray:
    return (np.arange(spec.size) + len(spec.name)).astype(spec.dtype).reshape(spec.shape)


def open_writer(target: Path, **options: Any) -> CheckpointWriter:
    options = {"config": CONFIG, "job": JOB, "max_shard_bytes": UNIT_BYTES} | options
    return CheckpointWriter(target, units(), **options)


def write(target: Path, stop_at: str = "", error: BaseException | None = None, **options: Any) -> CheckpointWriter:
    """Writes the checkpoint; raises `error` instead of writing the tensor `stop_at`."""
    with open_writer(target, **options) as writer:
        for unit in writer.remaining():
            for spec in unit:
                if error and spec.name == stop_at:
                    raise error
                writer.write(spec.name, value(spec), note=spec.name)
        writer.finish()
    return writer


def partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def interrupted(target: Path, at: str = "layers.3.weight_scale", **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(target, at, KeyboardInterrupt(), **options)


def refusal(target: Path, **options: Any) -> str:
    with pytest.raises(W4A8Error) as error:
        write(target, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plan() -> None:
    shards = plan_shards(units(), 2 * UNIT_BYTES)
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(s.units) for s in shards] == [2, 2, 1]
    assert len(plan_shards(units(), 1)) == SHARDS  # a unit is never cut
    assert len(plan_shards(units())) == 1
    with pytest.raises(W4A8Error, match=r"layers\.0\.weight_scale: would be written twice"):
        plan_shards(units() + units()[:1])
    with pytest.raises(W4A8Error, match="max_shard_bytes: must be positive, found 0"):
        plan_shards(units(), 0)
    with pytest.raises(W4A8Error, match="a checkpoint without tensors"):
        plan_shards([])


def test_writes_a_checkpoint(tmp_path: Path) -> None:
    side = tmp_path / "tok"
    side.write_text("tokens")
    target = tmp_path / "out"
    write(target, sidecars={"sub/tokenizer.json": side}, extra={"extra.json": lambda: {"n": 1}})
    reader = CheckpointReader(target)
    assert reader.config == CONFIG
    for unit in units():
        for spec in unit:
            np.testing.assert_array_equal(reader.read(spec.name), value(spec))
    assert (target / "sub/tokenizer.json").read_text() == "tokens"
    assert json.loads((target / "extra.json").read_text()) == {"n": 1}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == SHARDS * UNIT_BYTES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tok"]


def test_writes_blocks(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", max_shard_bytes=10**6) as writer:
        for unit in writer.remaining():
            for spec in unit:
                array = value(spec)
                writer.write(spec.name, iter([array[:3], array[3:]]))
        writer.finish()
    reader = CheckpointReader(tmp_path / "out")
    np.testing.assert_array_equal(reader.read("layers.2.x"), value(units()[2][0]))


@pytest.mark.parametrize("at", ["layers.1.x", "layers.3.weight_scale", "layers.4.x"])
def test_interrupted_and_resumed_is_identical(tmp_path: Path, at: str) -> None:
    whole = write(tmp_path / "whole")
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as error:
        write(target, at, KeyboardInterrupt())
    done = int(at.split(".")[1])
    assert error.value.__notes__ == [f"{done} of 5 shards are kept; go on with --resume"]
    assert not target.exists()
    with pytest.raises(W4A8Error):
        CheckpointReader(partial(target))
    with pytest.raises(W4A8Error):
        CheckpointReader(partial(target) / "checkpoint")
    assert not list(partial(target).rglob("*.tmp"))
    writer = write(target, resume=True)
    assert writer.resumed == done
    assert writer.notes == whole.notes == [spec.name for unit in units() for spec in unit]
    assert contents(target) == contents(tmp_path / "whole")
    assert not partial(target).exists()


def test_interrupted_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "layers.0.weight_scale")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(W4A8Error, match="bad weights"):
        write(tmp_path / "out", "layers.3.x", W4A8Error("bad weights"))
    assert list(tmp_path.iterdir()) == []


def test_unfinished_job_is_in_the_way(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(target)
    assert refusal(target).endswith(
        f"out: an unfinished job is in {partial(target)}; go on with --resume, or --overwrite"
    )
    assert write(target, overwrite=True).resumed == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"job": JOB | {"code_min": -8}}, "code_min was -7, is -8 now"),
        ({"job": JOB | {"source": "x"}}, 'source was "abc", is "x" now'),
        ({"max_shard_bytes": 2 * UNIT_BYTES}, "plan was"),
    ],
)
def test_resume_refuses_another_job(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    target = tmp_path / "out"
    interrupted(target)
    before = contents(partial(target))
    message = refusal(target, resume=True, **change)
    assert named in message
    assert message.endswith("use the same source and options, or discard it by --overwrite without --resume")
    before.pop("lock")
    assert {k: v for k, v in contents(partial(target)).items() if k != "lock"} == before
    assert write(target, resume=True).resumed == 3


def test_resume_without_a_job_starts_one(tmp_path: Path) -> None:
    assert write(tmp_path / "out", resume=True).resumed == 0


def test_damaged_shards_are_made_again(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    target = tmp_path / "out"
    interrupted(target, "layers.4.x")
    shards = sorted(partial(target).rglob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    data = bytearray(shards[2].read_bytes())
    data[-1] ^= 1
    shards[2].write_bytes(data)
    assert write(target, resume=True).resumed == 1
    assert contents(target) == contents(tmp_path / "whole")


def test_torn_journal(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    target = tmp_path / "out"
    interrupted(target, "layers.4.x")
    journal = partial(target) / "journal.jsonl"
    journal.write_text(journal.read_text()[:-7])
    interrupted(target, "layers.4.x", resume=True)
    assert write(target, resume=True).resumed == 4
    assert contents(target) == contents(tmp_path / "whole")


def test_existing_target(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path / "out", toy_config(), toy_tensors(toy_config()))
    before = contents(target)
    assert refusal(target).endswith("out: exists; give another name, or --overwrite to replace it")
    assert refusal(target, resume=True).endswith("--overwrite to replace it")
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["out"]
    interrupted(target, overwrite=True)
    assert contents(target) == before
    assert write(target, overwrite=True, resume=True).resumed == 3
    assert CheckpointReader(target).config == CONFIG
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    assert "exists and is no checkpoint (no config.json)" in refusal(target, overwrite=True)
    assert contents(target) == {"thesis.tex": b"x"}
    file = tmp_path / "file"
    file.write_text("x")
    assert "exists and is no checkpoint" in refusal(file, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    assert "exists and is no checkpoint" in refusal(link, overwrite=True)


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").config == CONFIG


def test_no_parent(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no" / "out").endswith("no/out: its parent directory does not exist")


def test_dies_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save_checkpoint(tmp_path / "out", toy_config(), toy_tensors(toy_config()))
    before = contents(target)
    rename = os.rename
    calls: list[Any] = []

    def dying(a: Any, b: Any) -> None:
        calls.append(b)
        if Path(b) == target and len(calls) > SHARDS + 1:
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        # Nothing is cleaned up, as if the process were killed.
        patch.setattr(Workspace, "close", lambda self, discard=False: os.close(self._lock))
        with pytest.raises(KeyboardInterrupt):
            write(target, overwrite=True)
    assert not target.exists()
    assert refusal(target).endswith("--overwrite to replace it")  # and the old one is back
    assert contents(target) == before
    assert write(target, overwrite=True, resume=True).resumed == SHARDS
    assert os.listdir(tmp_path) == ["out"]


def test_interrupted_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save_checkpoint(tmp_path / "out", toy_config(), toy_tensors(toy_config()))
    before = contents(target)
    rename = os.rename

    def dying(a: Any, b: Any) -> None:
        if Path(b) == target and Path(a).name == "checkpoint":
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            write(target, overwrite=True)
    assert contents(target) == before


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Writes of tensors fail after so many."""
    calls = iter(range(10**9))
    pwrite = writer_module._pwrite

    def failing(fd: int, data: Any, offset: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pwrite(fd, data, offset)

    monkeypatch.setattr(writer_module, "_pwrite", failing)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_disk(patch, after=7)
        message = refusal(target)
    assert message.endswith(
        "out: the disk is full; make room, and go on with --resume (was at model-00003-of-00005.safetensors)"
    )
    assert not target.exists()
    assert not list(partial(target).rglob("*.tmp"))
    assert write(target, resume=True).resumed == 2
    assert contents(target) == contents(tmp_path / "whole")


def test_full_disk_at_the_first_shard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, after=1)
    assert "the disk is full" in refusal(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "out: needs 0.0 MiB more on its disk, which has 0.0 MiB free" in refusal(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_really_full_disk(small_disk: Path) -> None:
    big = [[TensorSpec(f"t{i}", np.dtype(np.uint8), (2**20,))] for i in range(4)]
    target = small_disk / "out"

    def run(**options: Any) -> None:
        with CheckpointWriter(target, big, config=CONFIG, job=JOB, max_shard_bytes=2**20, **options) as writer:
            for (spec,) in writer.remaining():
                writer.write(spec.name, np.zeros(spec.shape, spec.dtype))
            writer.finish()

    with pytest.raises(W4A8Error, match=r"out: needs 4\.0 MiB more on its disk, which has 3\.0 MiB free"):
        run()
    assert os.listdir(small_disk) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "_check_space", lambda self: None)
        with pytest.raises(W4A8Error, match="the disk is full; make room, and go on with --resume"):
            run()
    assert os.listdir(small_disk) == [".out.partial"]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    run(resume=True)
    assert len(CheckpointReader(target).tensors) == 4


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "cannot write there: Permission denied" in refusal(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("layers.0.x", np.zeros((16, 4), np.int64), r"layers\.0\.x: planned as int32 \[16, 4\], given int64"),
        ("layers.0.x", np.zeros((16, 5), np.int32), r"given int32 \[16, 5\]"),
        ("layers.0.x", np.zeros((17, 4), np.int32), r"given int32 \[17, 4\]"),
        ("layers.0.x", np.zeros((15, 4), np.int32), r"given 240 of 256 bytes"),
        ("layers.9.x", np.zeros((16, 4), np.int32), r"layers\.9\.x: is not planned for model-00001"),
    ],
)
def test_only_what_is_planned(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(W4A8Error, match=message), open_writer(tmp_path / "out") as writer:
        writer.write(name, array)
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_planned_and_once(tmp_path: Path) -> None:
    first = units()[0][0]
    with open_writer(tmp_path / "out") as writer:
        with pytest.raises(W4A8Error, match=r"layers\.0\.x: was not written"):
            writer.finish()
        writer.write(first.name, value(first))
        with pytest.raises(W4A8Error, match=r"layers\.0\.x: written twice"):
            writer.write(first.name, value(first))
    assert list(tmp_path.iterdir()) == []


def write_all(writer: CheckpointWriter, **changed: np.ndarray) -> None:
    for unit in writer.remaining():
        for spec in unit:
            writer.write(spec.name, changed.get(spec.name, value(spec)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scales_are_not_published(tmp_path: Path, bad: float) -> None:
    target, name = tmp_path / "out", "layers.2.weight_scale"
    scale = value(units()[2][1])
    scale[5] = bad
    with open_writer(target) as writer:
        write_all(writer, **{name: scale})
        with pytest.raises(W4A8Error, match=r"layers\.2\.weight_scale: has scales that are negative, infinite or NaN"):
            writer.finish()
    assert not target.exists()


def test_what_reads_back_differently_is_not_published(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_writer(target) as writer:
        write_all(writer)
        shard = next(partial(target).rglob("model-00002*"))
        data = bytearray(shard.read_bytes())
        data[-80] ^= 1
        shard.write_bytes(data)
        with pytest.raises(W4A8Error, match=r"layers\.1\.x reads back from disk other than it was written"):
            writer.finish()
    assert not target.exists()


def _hold(target: Path, started: Any, stop: Any) -> None:
    with open_writer(target):
        started.set()
        stop.wait(30)


def test_two_writers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, stop = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", started, stop))
    process.start()
    try:
        assert started.wait(60)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            assert f"out: another process (pid {process.pid}) is writing it" in refusal(tmp_path / "out", **options)
    finally:
        stop.set()
        process.join(30)
    write(tmp_path / "out")


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_writer
from w4a8jax.checkpoints.writer import CheckpointWriter
with test_writer.open_writer(Path({target!r})) as writer:
    for unit in writer.remaining():
        for spec in unit:
            if spec.name == "layers.3.weight_scale":
                os.kill(os.getpid(), 9)
            writer.write(spec.name, test_writer.value(spec), note=spec.name)
"""


def test_killed(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    target = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parent), target=str(target))
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert not target.exists()
    assert list(partial(target).rglob("*.tmp"))
    assert "an unfinished job is in" in refusal(target)
    assert write(target, resume=True).resumed == 3
    assert contents(target) == contents(tmp_path / "whole")

"""What `inspect` counts, against counts made from the tensors themselves."""

import json
import shutil
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from text_checkpoint import text_checkpoint
from toy import save_file

import w4a8jax
from pallas_kernels import convert_scales, unpack_codes
from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.inspection import KINDS, merge
from w4a8jax.inspection_tables import size, sparkline

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspection")
    original = text_checkpoint(folder / "bf16", model_type="qwen3")
    for scheme in ("w4a8", "w4a16"):
        w4a8jax.quantize(original, folder / scheme, scheme=scheme, code_min=-8, search="none", progress=False)
    return {name: folder / name for name in ("bf16", "w4a8", "w4a16")}


def changed(source: Path, target: Path, **tensors: np.ndarray) -> Path:
    """A copy in one file with some tensors replaced."""
    shutil.copytree(source, target)
    reader = CheckpointReader(source)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(target / "model.safetensors", {name: reader.read(name) for name in reader.tensors} | tensors)
    return target


def text_of(inspection: w4a8jax.Inspection, width: int = 140, **options: bool) -> str:
    console = Console(file=StringIO(), width=width)
    inspection.render(console, **options)
    return console.file.getvalue()


def test_codes_and_scales(paths: dict[str, Path]) -> None:
    reader = CheckpointReader(paths["w4a8"])
    layer = next(x for x in w4a8jax.inspect(paths["w4a8"]).layers if x.name == Q)
    codes = np.asarray(unpack_codes(reader.read(f"{Q}.weight_packed")))
    scale = reader.read(f"{Q}.weight_scale")
    assert layer.codes is not None
    assert layer.codes.histogram.tolist() == [int((codes == c).sum()) for c in range(-8, 8)]
    assert layer.codes.scale_quantiles[0] == float(scale.min())
    assert layer.codes.scale_quantiles[-1] == float(scale.max())
    channel = np.asarray(convert_scales(scale)[1])
    assert layer.codes.channel_scale == (float(channel.min()), float(channel.max()))
    assert layer.codes.groups == layer.codes.spread.sum() == scale.size
    assert (layer.codes.bad_scales, layer.codes.weak_groups, layer.codes.lost_groups) == (0, 0, 0)
    assert layer.shape == codes.shape
    assert layer.scheme == "w4a8"
    assert layer.bits_per_weight == 8 * (codes.size / 2 + 2 * scale.size + 16) / codes.size


def test_totals_are_those_of_the_files(paths: dict[str, Path]) -> None:
    for scheme, path in paths.items():
        reader, found = CheckpointReader(path), w4a8jax.inspect(path)
        total = sum(info.nbytes for info in reader.tensors.values())
        assert found.nbytes == sum(found.bytes_by_kind.values()) == total
        assert set(found.bytes_by_kind) == set(KINDS)
        assert found.scheme == scheme
        assert found.parameters == w4a8jax.inspect(paths["bf16"]).parameters
        assert found.bits_per_weight == pytest.approx(8 * total / found.parameters)
    assert found.bytes_by_kind["embeddings"] == 2 * 2 * 320 * 256
    assert found.quantized_bits_per_weight == pytest.approx(4.125, abs=0.01)
    plain = w4a8jax.inspect(paths["bf16"])
    assert plain.quantized_bits_per_weight is None
    assert plain.bits_per_weight == 16
    assert plain.histogram.sum() == 0


def test_float_statistics(paths: dict[str, Path]) -> None:
    values = CheckpointReader(paths["bf16"]).read(f"{Q}.weight").astype(np.float64)
    layer = next(x for x in w4a8jax.inspect(paths["bf16"]).layers if x.name == Q)
    assert layer.codes is None
    assert layer.values is not None
    assert layer.values.rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-6)
    assert layer.values.largest == np.abs(values).max()
    assert (layer.kind, layer.scheme) == ("unquantized linears", "bf16")


def test_weak_lost_and_bad_scales_are_counted(paths: dict[str, Path], tmp_path: Path) -> None:
    name = f"{Q}.weight_scale"
    reader = CheckpointReader(paths["w4a8"])
    scale = reader.read(name).astype(np.float32)
    packed = reader.read(f"{Q}.weight_packed").copy()
    scale[0] = [1.0, 1 / 4000]  # subnormal e4m3
    scale[1] = [1 / 100000, 1.0]  # zero
    scale[2] = [1.0, 1 / 100000]  # zero, and does not matter: all its codes are 0
    packed[2, 16:] = np.uint32(0x88888888).view(np.int32)
    scale[3] = [np.nan, 1.0]
    scale[4] = [-1.0, np.inf]
    tensors = {name: scale.astype(ml_dtypes.bfloat16), f"{Q}.weight_packed": packed}
    path = changed(paths["w4a8"], tmp_path / "changed", **tensors)
    found = w4a8jax.inspect(path)
    codes = next(x for x in found.layers if x.name == Q).codes
    assert codes is not None
    assert (codes.bad_scales, codes.lost_groups) == (3, 1)
    assert codes.weak_groups == 2
    assert "3 bad scales" in text_of(found, details=True)


def test_order_is_the_models(paths: dict[str, Path]) -> None:
    names = [layer.name for layer in w4a8jax.inspect(paths["w4a8"]).layers]
    assert names[0] == "model.embed_tokens"
    assert names[-2:] == ["model.norm", "lm_head"]


def test_merge_keeps_totals(paths: dict[str, Path]) -> None:
    found = w4a8jax.inspect(paths["w4a8"])
    merged = merge(found.layers)
    assert sum(x.nbytes for x in merged) == found.nbytes
    assert sum(x.count for x in merged) == len(found.layers)
    row = next(x for x in merged if x.name == "model.layers.*.self_attn.q_proj")
    assert row.count == 2
    assert row.codes is not None
    assert row.codes.histogram.sum() == 2 * 256 * 256


def test_tables(paths: dict[str, Path]) -> None:
    found = w4a8jax.inspect(paths["w4a8"])
    wide, narrow = text_of(found, details=True), text_of(found, width=80, details=False)
    assert "layers.1.mlp.down_proj" in wide
    assert "channel scale" in wide
    assert "layers.*.mlp.down_proj" in narrow
    assert "layers.1.mlp.down_proj" not in narrow
    assert all(len(line.rstrip()) <= 80 for line in narrow.splitlines())
    assert "w4a8" in repr(found)
    assert "Quantized" not in text_of(w4a8jax.inspect(paths["bf16"]))


def test_sparkline_and_size() -> None:
    assert sparkline(np.array([0, 1, 1000, 500])) == " ▁█▄"
    assert sparkline(np.zeros(2, int)) == "  "
    assert [size(x) for x in (5, 2048, 3 * 2**20, 5 * 2**40)] == ["5 B", "2.0 KiB", "3.0 MiB", "5120.0 GiB"]


def test_json(paths: dict[str, Path]) -> None:
    found = w4a8jax.inspect(paths["w4a8"])
    record = json.loads(found.to_json())
    assert record["parameters"] == found.parameters
    assert len(record["layers"]) == len(found.layers)
    assert sum(record["code_histogram"]) == sum(
        2 * n * k for n, k in [(256, 256)] * 2 + [(128, 256)] * 2 + [(512, 256)] * 3
    )


@pytest.mark.parametrize("scheme", ["bf16", "w4a8"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(paths: dict[str, Path], tmp_path: Path, scheme: str, suffix: str) -> None:
    path = w4a8jax.plot_inspection(w4a8jax.inspect(paths[scheme]), tmp_path / f"plot{suffix}")
    if suffix == ".svg":
        assert "<svg" in path.read_text()[:1000]
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 800
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_plot_refusals(paths: dict[str, Path], tmp_path: Path) -> None:
    found = w4a8jax.inspect(paths["bf16"])
    with pytest.raises(w4a8jax.W4A8Error, match=r"plot.bmp: expected a name that ends in"):
        w4a8jax.plot_inspection(found, tmp_path / "plot.bmp")
    with pytest.raises(w4a8jax.W4A8Error, match="cannot be written: No such file"):
        w4a8jax.plot_inspection(found, tmp_path / "missing" / "plot.png")

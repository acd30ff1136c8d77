"""What stands around the comparison with llm-compressor: its clock, its larger model, its table."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "llm_compressor"))
import synthetic
import table
from timing import Phases

from w4a8jax.checkpoints.reader import CheckpointReader
from w4a8jax.quantization.pipeline import select


def test_phases_tell_waiting_from_computing():
    phases = Phases()
    time.sleep(0.1)
    phases.done("wait")
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    phases.done("compute")
    wait, compute = phases.found["wait"], phases.found["compute"]
    assert wait["wall"] >= 0.1 > wait["cpu"]
    assert compute["cpu"] == pytest.approx(0.1, abs=0.05)


def test_the_synthetic_model_is_one_that_gptq_takes(tmp_path, monkeypatch):
    sizes = {"intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    monkeypatch.setitem(synthetic.SIZES, 256, sizes)
    reader = CheckpointReader(synthetic.synthetic_model(tmp_path / "model", 256, 4))
    items, _ = select(reader.tensors)
    shapes = {item.module: item.info.shape for item in items if item.module}
    assert len(shapes) == 28
    assert shapes["model.layers.3.mlp.down_proj"] == (256, 384)
    assert reader.has_tokenizer()


def test_table(capsys):
    def run(name, seed, cpu):
        clocks = {"cpu": cpu, "wall": 2 * cpu}
        phases = {"quantize": clocks} | ({"quantize again": {"cpu": cpu / 2, "wall": cpu}} if name == "w4a8jax" else {})
        quality = {"test split": {"perplexity": 7 + seed, "kl": 0.02, "top1": 0.9}, "C": {"kl": 0.03}}
        return {"name": name, "seed": seed, "phases": phases, "whole": clocks, "quality": quality}

    rows = [run(name, seed, cpu) for name, cpu in (("llm-compressor", 30), ("w4a8jax", 10)) for seed in range(2)]
    table.table(json.loads(json.dumps({"runs": rows})))
    printed = capsys.readouterr().out
    assert "| llm-compressor | 2 | 30.0 ± 0.0 | 60.0 ± 0.0 | 30.0 ± 0.0 | 60.0 ± 0.0 | 7.500 ± 0.707 |" in printed
    assert "'process': 3.0, 'quantization': 3.0, 'quantization, compiled': 6.0" in printed

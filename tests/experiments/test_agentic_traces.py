"""The generator of agentic traces: seeded, one prompt for all, real turns, masked as it should be."""

import sys
from pathlib import Path

import numpy as np
import pytest

import w4a8jax

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import agentic_traces


@pytest.fixture(scope="module")
def made():
    return agentic_traces.traces("validation", 4, seed=3)


def test_seeds_and_splits(made):
    assert made == agentic_traces.traces("validation", 4, seed=3)
    assert made != agentic_traces.traces("validation", 4, seed=4)
    answers = {split: {a for _, _, a in agentic_traces._answers(split)} for split in ("validation", "test")}
    assert answers["validation"]
    assert not answers["validation"] & answers["test"]
    drawn = [m["content"] for trace in made for m in trace["messages"] if m["content"].startswith("Write the function")]
    assert len(drawn) == len(set(drawn))


def test_the_mask_leaves_the_turns(made):
    source = w4a8jax.reference_model("dense")
    masked, whole = (w4a8jax.load_calibration(source, made, **options) for options in ({}, {"mask": ()}))
    assert whole.counted == whole.tokens == masked.tokens
    assert len({trace["messages"][0]["content"] for trace in made}) == 1
    tokenizer = w4a8jax.Tokenizer.from_directory(source)
    for trace, sample in zip(made, masked.samples, strict=True):
        assert sample.loss_mask.mean() < 0.4  # most of a trace is what repeats
        text = tokenizer.decode(sample.tokens[np.flatnonzero(sample.loss_mask)].tolist())
        assert "Tools:" not in text
        assert all(m["content"].strip()[:40] in text for m in trace["messages"][1:])

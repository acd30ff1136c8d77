"""What the training reports: losses on held-out text, load of experts, samples, the machine, the picture.

    python experiments/reference_models/report.py OUT/NAME_training.json

draws the picture of a training on a machine that had no matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_model import Model, Params
from stream import Corpus, windows

PROMPTS = (
    "def read_lines(path):\n",
    'class Stack:\n    """A last-in, first-out queue."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Write the function `is_prime`. Return True if n is a prime number."
    "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)


@partial(jax.jit, static_argnums=0)
def token_losses(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    """Cross entropy, in nats, at each position of tokens [B, T + 1]: [B, T]."""
    logits = model.logits(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].astype(jnp.int32))


@partial(jax.jit, static_argnums=0)
def choices(model: Model, params: Params, tokens: jax.Array, counted: jax.Array) -> jax.Array | None:
    """How many of the counted (bool [B, T]) tokens [B, T] each expert meets: int32 [S, E]; None without experts."""
    chosen = model.forward(params, tokens).chosen
    return None if chosen is None else jnp.sum(chosen & counted[..., None], axis=(1, 2), dtype=jnp.int32)


class Evaluator:
    """Losses on the held-out splits, read in consecutive windows that know nothing of one another."""

    def __init__(self, model: Model, data: Path, length: int):
        self._model, self._length = model, length
        self._ids = {name: np.load(data / f"{name}.npy") for name in ("validation", "test")}
        self._bytes = {
            name: part["bytes"] for name, part in json.loads((data / "corpus.json").read_text())["parts"].items()
        }

    def _losses(self, ids: np.ndarray, params: Params, length: int) -> np.ndarray:
        """[windows, T], NaN where a window has no target."""
        rows = []
        for tokens, counts in _batches(ids, length):
            losses = np.asarray(token_losses(self._model, params, jnp.asarray(tokens)), np.float64)
            rows.append(np.where(np.arange(length) < counts[:, None], losses, np.nan)[counts > 0])
        return np.concatenate(rows)

    def loss(self, split: str, params: Params) -> float:
        """Mean loss in nats per token."""
        return float(np.nanmean(self._losses(self._ids[split], params, self._length)))

    def summary(self, split: str, params: Params) -> dict[str, float]:
        losses = self._losses(self._ids[split], params, self._length)
        mean = float(np.nanmean(losses))
        summary = {
            "window": self._length,
            "loss": mean,
            "perplexity": float(np.exp(mean)),
            "bits_per_byte": float(np.nansum(losses) / np.log(2) / self._bytes[split]),
        }
        print(split, summary, flush=True)
        return summary

    def expert_load(self, split: str, params: Params) -> list[list[int]] | None:
        """Tokens that each expert of each layer with experts meets; None without experts."""
        total = None
        for tokens, counts in _batches(self._ids[split], self._length):
            counted = np.arange(self._length) < counts[:, None]
            if (found := choices(self._model, params, jnp.asarray(tokens[:, :-1]), jnp.asarray(counted))) is None:
                return None
            total = np.asarray(found, np.int64) + (0 if total is None else total)
        return None if total is None else total.tolist()

    def context(self, params: Params, length: int) -> dict[str, Any]:
        """Perplexity of both held-out splits in windows of `length`, whole and in the windows' last quarter."""
        ids = np.concatenate([self._ids["test"], self._ids["validation"]])
        try:
            losses = self._losses(ids, params, length)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:  # scores of a long context may not fit
            return {"failed": str(error).splitlines()[0]}
        last = losses[:, 3 * length // 4 :]
        return {
            "perplexity": float(np.exp(np.nanmean(losses))),
            "last_quarter": float(np.exp(np.nanmean(last))) if np.isfinite(last).any() else None,
        }


def _batches(ids: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows in batches of one shape, [B, T + 1], and how many targets each has, int [B]; 0 fills the last batch."""
    padded, counts = map(np.asarray, zip(*windows(ids, length), strict=True))
    batch = max(1, min(len(padded), 32768 // length))
    for start in range(0, len(padded), batch):
        tokens, real = padded[start : start + batch], counts[start : start + batch]
        missing = batch - len(real)
        yield np.pad(tokens, ((0, missing), (0, 0))), np.pad(real, (0, missing))


@partial(jax.jit, static_argnums=0)
def _next_token(
    model: Model, params: Params, tokens: jax.Array, count: jax.Array, key: jax.Array, temperature: jax.Array
) -> jax.Array:
    logits = model.logits(params, tokens[None])[0, count - 1]
    noise = jax.random.gumbel(jax.random.fold_in(key, count), logits.shape)
    return tokens.at[count].set(jnp.argmax(logits + temperature * noise).astype(tokens.dtype))


def samples(model: Model, params: Params, data: Path, length: int = 256) -> list[dict[str, str]]:
    """Continuations of `PROMPTS`, greedy and at temperature 0.7."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        print("no tokenizers: no samples", flush=True)
        return []
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    results = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        result = {"prompt": prompt}
        for name, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
            tokens = jnp.zeros((length,), jnp.int32).at[: len(ids)].set(jnp.asarray(ids))
            for count in range(len(ids), length):
                tokens = _next_token(
                    model, params, tokens, jnp.int32(count), jax.random.key(0), jnp.float32(temperature)
                )
            text = tokens.tolist()[len(ids) :]
            result[name] = tokenizer.decode(text, skip_special_tokens=False).split("<EOS_TOKEN>")[0]
            print(f"--- {name}\n{prompt}{result[name]}", flush=True)
        results.append(result)
    return results


def environment(arguments: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """When, where and how the training ran; without the output folder, which says only where it lay on one machine."""
    device = jax.devices()[0]
    command = [
        "$OUT" if Path(a) == arguments.out else "--out=$OUT" if a.startswith("--out=") else a for a in sys.argv[1:]
    ]
    recorded = {name: str(value) for name, value in vars(arguments).items()} | {"out": "$OUT"}
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "model": arguments.model,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", Path(sys.argv[0]).name, *command]),
        "arguments": recorded,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "corpus": json.loads((arguments.data / "corpus.json").read_text()),
        "mix": corpus.mix,
        "tokens_per_epoch": corpus.epoch_tokens,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss curves of every run, dashed the training loss, with dropout; beside them, where tokens went on the test."""
    try:
        import matplotlib
    except ImportError:
        print(f"no matplotlib: {path.name} is left to report.py", flush=True)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    load = report.get("expert_load")
    figure, grid = plt.subplots(1, 2 if load else 1, figsize=(12 if load else 8, 5), squeeze=False)
    axes = grid[0, 0]
    for i, record in enumerate(report["runs"]):
        settings = record["settings"]
        label = f"{record['epochs']:.0f} epochs, dropout {settings['dropout']:g}, decay {settings['weight_decay']:g}"
        label += " (chosen)" if report.get("chosen") == i else ""
        tokens, losses = np.array(record["train"]).T
        axes.plot(tokens / 1e6, losses, "--", color=f"C{i}", linewidth=0.7, alpha=0.7)
        tokens, losses = np.array(record["validation"]).T
        axes.plot(tokens / 1e6, losses, color=f"C{i}", label=label)
    lows = [record["best_validation_loss"] for record in report["runs"]]
    axes.set_ylim(min(min(lows), 1.5) - 0.5, max(min(lows) + 2.0, 3.0))
    axes.set(xlabel="tokens trained on (millions)", ylabel="loss (nats per token)")
    name = report.get("model", "dense")
    axes.set_title(f"{name} reference model on {report['device']['kind']}: validation, and training (dashed)")
    if load:
        _plot_load(grid[0, 1], np.array(load["test"]))
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_load(axes: Any, load: np.ndarray) -> None:
    layers, experts = load.shape
    width = 0.8 / layers
    for i, counts in enumerate(load):
        places = np.arange(experts) + (i - (layers - 1) / 2) * width
        axes.bar(places, counts / counts.sum(), width, label=f"layer {i + 1} with experts")
    axes.axhline(1 / experts, color="black", linewidth=0.8, label="all alike")
    axes.set(xlabel="expert", ylabel="share of the choices", title="test split: where tokens went")


if __name__ == "__main__":
    record = Path(sys.argv[1])
    plot(json.loads(record.read_text(encoding="utf-8")), record.with_suffix(".png"))

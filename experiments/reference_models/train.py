"""Trains a reference model.

    python experiments/reference_models/prepare.py --out .data
    python experiments/reference_models/train.py --model dense --data .data --out OUT

Runs one or more trainings (--run) within --max-seconds and keeps the checkpoint of the lowest validation loss. AdamW on
fp32 parameters, bf16 arithmetic; warmup, then a cosine to zero; the last part of each run is on long sequences. A run
is cut to the time that is left by shortening its schedule, never by stopping it with a high learning rate. Experts
train with a balancing loss (experts.py), counted neither in the losses reported nor in the choice of a checkpoint.

Of --model NAME, writes OUT/NAME (the checkpoint), OUT/NAME_training.json (what was run, on what, losses, perplexities,
the experts' load) and OUT/NAME_training.png (the curves; without matplotlib, later: report.py). On a CPU, a smoke test:
--steps 4 --batch 2 --length 256 --long-length 512 --contexts 512.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import Evaluator, environment, plot, samples
from small_model import MODELS, Model, Params, hf_config, init_params, save_checkpoint
from stream import Corpus, Stream

import models.layers.attention

UNDECAYED = ("embed_tokens.weight", "mlp.gate.weight")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8))


@dataclasses.dataclass(frozen=True)
class Run:
    """What may differ from one training to the next; none of it is compiled in."""

    epochs: float = 40.0
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    balance: float = 0.01
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Run:
        values = dict(pair.split("=") for pair in text.split(","))
        seed = int(values.pop("seed", "0"))
        return cls(seed=seed, **{name: float(value) for name, value in values.items()})


class Clock:
    """Seconds left until a deadline that is relative to the start of the program."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.seconds - self.elapsed()


class Losses(NamedTuple):
    """Of a step, or stacked of several: cross entropy in nats; balancing loss; share of choices by expert [S, E]."""

    cross_entropy: jax.Array
    balance: jax.Array
    load: jax.Array | None


def loss_of(
    model: Model, hyper: dict[str, jax.Array], params: Params, tokens: jax.Array, key: jax.Array
) -> tuple[jax.Array, Losses]:
    """What is minimized, of tokens [B, T + 1], and its parts."""
    found = model.forward(params, tokens[:, :-1], hyper["dropout"], key)
    targets = tokens[:, 1:].astype(jnp.int32)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found.logits, targets))
    load = None
    if found.chosen is not None:
        load = found.chosen.mean((1, 2), dtype=jnp.float32) / model.config["num_experts_per_tok"]
    return loss + hyper["balance"] * found.balance, Losses(loss, found.balance, load)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_chunk(
    model: Model, params: Params, state: Any, batches: jax.Array, start: jax.Array, hyper: dict[str, jax.Array]
) -> tuple[Params, Any, Losses]:
    """Several steps, one per batch of batches [steps, B, T + 1]; their mean losses."""

    def step(carry: tuple[Params, Any, jax.Array], tokens: jax.Array) -> tuple[Any, Losses]:
        params, state, index = carry
        key = jax.random.fold_in(jax.random.key(hyper["seed"]), index)
        gradient, losses = jax.grad(partial(loss_of, model, hyper), has_aux=True)(params, tokens, key)
        updates, state = OPTIMIZER.update(gradient, state, params)
        warm = (index + 1) / hyper["warmup"]
        progress = jnp.clip((index - hyper["warmup"]) / jnp.maximum(hyper["total"] - hyper["warmup"], 1), 0, 1)
        rate = hyper["lr"] * jnp.minimum(warm, 0.5 + 0.5 * jnp.cos(jnp.pi * progress))

        def apply(name: str, value: jax.Array) -> jax.Array:
            decay = hyper["weight_decay"] if value.ndim == 2 and not name.endswith(UNDECAYED) else 0.0
            return value - rate * (updates[name] + decay * value)

        return ({name: apply(name, value) for name, value in params.items()}, state, index + 1), losses

    (params, state, _), losses = jax.lax.scan(step, (params, state, start), batches)
    return params, state, jax.tree.map(lambda x: x.mean(0), losses)


def train(
    run: Run, model: Model, corpus: Corpus, evaluator: Evaluator, arguments: argparse.Namespace, seconds: float
) -> tuple[dict[str, Any], Params]:
    """One training of at most `seconds`; returns its record and the parameters of the lowest validation loss."""
    clock = Clock(seconds)
    params = init_params(model.config, jax.random.key(run.seed))
    state = OPTIMIZER.init(params)
    stream = Stream(corpus, run.seed)
    chunk, tokens_per_step = arguments.chunk, arguments.batch * arguments.length
    long_batch = max(1, tokens_per_step // arguments.long_length)
    total = arguments.steps or max(4 * chunk, int(run.epochs * corpus.epoch_tokens / tokens_per_step))
    warmup = min(arguments.warmup, max(1, total // 10))
    record: dict[str, Any] = {"settings": dataclasses.asdict(run), "train": [], "validation": [], "load": []}
    best: Params | None = None
    best_loss = np.inf
    constants = {name: value for name, value in dataclasses.asdict(run).items() if name not in ("epochs", "seed")}
    constants["warmup"] = warmup
    step, tokens, next_eval = 0, 0, 0
    compiled: set[tuple[int, int]] = set()
    timed_tokens, timed_seconds, pace, compilation = 0, 0.0, 0.0, 0.0
    while step < total:
        is_long = step >= total * (1 - arguments.long_fraction)
        batch, length = (long_batch, arguments.long_length) if is_long else (arguments.batch, arguments.length)
        steps = min(chunk, total - step) if arguments.steps else chunk
        hyper = {name: jnp.float32(value) for name, value in (constants | {"total": total}).items()}
        hyper["seed"] = jnp.uint32(run.seed)
        began = clock.elapsed()
        batches = jnp.asarray(stream.take((steps, batch, length)))
        params, state, losses = train_chunk(model, params, state, batches, jnp.int32(step), hyper)
        step, tokens = step + steps, tokens + steps * batch * length
        record["train"].append((tokens, float(losses.cross_entropy)))
        took = clock.elapsed() - began
        if (steps, length) not in compiled:
            compiled.add((steps, length))
            compilation = 0.0 if is_long else took
            print(f"  first {steps} steps of {batch} x {length}: {took:.1f} s", flush=True)
        else:
            timed_seconds, timed_tokens = timed_seconds + took, timed_tokens + steps * batch * length
            pace = 0.8 * pace + 0.2 * took / steps if pace else took / steps
            # Not for training: the second shape's compilation, as long as the first, and 5 % for evaluations.
            affordable = step + int(0.95 * max(clock.left() - compilation, 0.0) / pace)
            if affordable < total:
                total = max(step, affordable)
        if step >= next_eval:
            next_eval = step + max(chunk, total // arguments.evaluations)
            loss = evaluator.loss("validation", params)
            record["validation"].append((tokens, loss))
            if losses.load is not None:
                record["load"].append((tokens, np.asarray(losses.load, np.float64).round(4).tolist()))
            if loss < best_loss:
                best_loss, best = loss, jax.tree.map(jnp.copy, params)
            speed = timed_tokens / timed_seconds if timed_seconds else 0.0
            print(
                f"  step {step}/{total} epoch {tokens / corpus.epoch_tokens:.2f} train {record['train'][-1][1]:.4f} "
                f"validation {loss:.4f} balance {float(losses.balance):.4f} {speed:,.0f} tokens/s "
                f"{clock.elapsed():.0f} s",
                flush=True,
            )
    loss = evaluator.loss("validation", params)
    record["validation"].append((tokens, loss))
    if best is None or loss < best_loss:
        best_loss, best = loss, params
    record |= {
        "steps": step,
        "tokens": tokens,
        "epochs": tokens / corpus.epoch_tokens,
        "seconds": clock.elapsed(),
        "tokens_per_second": timed_tokens / timed_seconds if timed_seconds else None,
        "best_validation_loss": best_loss,
    }
    return record, best


def fused_attention_works(length: int) -> bool:
    """Whether the attention that the decoder takes here agrees with XLA's, forward and backward."""

    def run(implementation: Any, window: int | None) -> list[np.ndarray]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            y = models.layers.attention.causal_attention(q, k, v, jnp.full((2,), length, jnp.int32), window)
            return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(length)[:, None, None] + jnp.arange(64)))

        chosen, models.layers.attention._implementation = models.layers.attention._implementation, implementation
        try:
            return [np.asarray(x, np.float32) for x in jax.jit(jax.grad(total, (0, 1, 2)))(*qkv)]
        finally:
            models.layers.attention._implementation = chosen

    if models.layers.attention._implementation(jnp.zeros((1, 64), jnp.bfloat16)) is None:
        return True
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (2, length, heads, 64), jnp.bfloat16) for key, heads in zip(keys, (4, 2, 2), strict=True)
    ]
    for window in (512, None):
        try:
            fused, plain = run(models.layers.attention._implementation, window), run(lambda q: None, window)
        except Exception as error:  # whatever the compiler says, there is another way
            print(f"attention: fused, window {window}, failed: {str(error).splitlines()[0]}", flush=True)
            return False
        errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(fused, plain, strict=True)]
        print(f"attention: fused, window {window}, gradients' relative error {max(errors):.2e}", flush=True)
        if not max(errors) < 3e-2:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", action="append", help="e.g. epochs=40,dropout=0.1,weight_decay=0.1,lr=3e-3,seed=0")
    parser.add_argument("--max-seconds", type=float, default=540.0, help="for everything, compilation included")
    parser.add_argument("--reserve", type=float, default=100.0, help="seconds of these for the final evaluation")
    parser.add_argument("--batch", type=int, default=32, help="sequences of --length")
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--long-length", type=int, default=16384, help="tokens of the last part's sequences")
    parser.add_argument("--long-fraction", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=0, help="instead of the run's epochs")
    parser.add_argument("--chunk", type=int, default=16, help="steps per call")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--mix", default="library=1,tests=1,chat=0.5", help="how often each part occurs in an epoch")
    parser.add_argument("--contexts", default="512,1024,2048,4096,8192,16384,32768,65536", help="tokens, evaluated")
    parser.add_argument("--attention", choices=("auto", "xla"), default="auto")
    arguments = parser.parse_args()
    if arguments.steps:
        arguments.chunk = min(arguments.chunk, max(1, arguments.steps // 2))

    clock = Clock(arguments.max_seconds)
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    if arguments.attention == "xla" or not fused_attention_works(arguments.length):
        print("attention: XLA's; sequences of at most 4096 tokens", flush=True)
        models.layers.attention._implementation = lambda q: None
        arguments.long_length = min(arguments.long_length, 4096)
    model = Model(hf_config(arguments.model))
    corpus = Corpus(arguments.data, {k: float(v) for k, v in (pair.split("=") for pair in arguments.mix.split(","))})
    evaluator = Evaluator(model, arguments.data, arguments.length)
    runs = [Run.parse(text) for text in arguments.run or ["epochs=40"]]
    report: dict[str, Any] = environment(arguments, corpus) | {"runs": []}
    print(json.dumps(report["device"]), f"{corpus.epoch_tokens:,} tokens per epoch", flush=True)

    best: Params | None = None
    best_loss = np.inf
    for i, run in enumerate(runs):
        share = run.epochs / sum(other.epochs for other in runs[i:])
        print(f"run {i + 1} of {len(runs)}: {run}", flush=True)
        record, params = train(run, model, corpus, evaluator, arguments, share * (clock.left() - arguments.reserve))
        report["runs"].append(record)
        if record["best_validation_loss"] < best_loss:
            best, best_loss, report["chosen"] = params, record["best_validation_loss"], i
            folder = arguments.out / arguments.model
            report["checkpoint_bytes"] = save_checkpoint(params, model.config, arguments.data, folder)
        write(report, arguments.out)
    assert best is not None
    report["train_seconds"] = sum(record["seconds"] for record in report["runs"])
    for name in ("validation", "test"):
        report[name] = evaluator.summary(name, best)
    if (load := {name: evaluator.expert_load(name, best) for name in ("validation", "test")})["test"] is not None:
        report["expert_load"] = load
        print("expert load", load, flush=True)
    write(report, arguments.out)
    report["samples"] = samples(model, best, arguments.data)
    write(report, arguments.out)
    report["contexts"] = {}
    for context in map(int, arguments.contexts.split(",")):
        if context > 8192 and jax.default_backend() == "cpu":
            print(f"context {context}: not on a CPU, whose attention holds all scores", flush=True)
            continue
        if clock.left() < 15:
            print(f"context {context}: no time left", flush=True)
            continue
        report["contexts"][context] = evaluator.context(best, context)
        print(f"context {context}: {report['contexts'][context]}", flush=True)
        report["wall_seconds"] = clock.elapsed()
        write(report, arguments.out)


def write(report: dict[str, Any], out: Path) -> None:
    record = out / f"{report['model']}_training.json"
    record.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, record.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Quantizes the reference model, runs it beside the original, and measures both. Needs no GPU: `make demo`."""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import w4a8jax

OUT = Path(__file__).parents[1] / "demo" / "reference-dense-w4a8"
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n    with open(path',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
)
NEW_TOKENS = 32

console = Console()


def main() -> None:
    started = time.perf_counter()
    logging.getLogger("jax").setLevel(logging.ERROR)
    source = w4a8jax.reference_model("dense")
    OUT.parent.mkdir(exist_ok=True)

    console.rule("1. quantize")
    w4a8jax.quantize(source, OUT, overwrite=True).render(console)

    console.rule("2. generate, greedily, with bf16 and with W4A8")
    models = {"bf16": w4a8jax.load(source), "W4A8": w4a8jax.load(OUT)}
    greedy = w4a8jax.SamplingParams(temperature=0.0)
    texts = {
        name: model.generate(list(PROMPTS), max_new_tokens=NEW_TOKENS, sampling=greedy)
        for name, model in models.items()
    }
    table = Table(*texts, show_lines=True, expand=True)
    for i, prompt in enumerate(PROMPTS):
        table.add_row(*(f"[dim]{_plain(prompt)}[/dim]{_plain(results[i].text)}" for results in texts.values()))
    console.print(table)

    console.rule("3. compare on the reference text's test split, which neither has seen")
    result = w4a8jax.compare(models["W4A8"], models["bf16"], w4a8jax.reference_text("test"))
    inspections = {"bf16": w4a8jax.inspect(source), "W4A8": w4a8jax.inspect(OUT)}
    table = Table("", "perplexity", "bits per byte", "size", "bits per weight", "of quantized layers")
    for name, evaluation in (("bf16", result.original), ("W4A8", result.model)):
        found = inspections[name]
        table.add_row(
            name,
            f"{evaluation.perplexity:.3f}",
            f"{evaluation.bits_per_byte:.4f}",
            f"{found.nbytes / 2**20:.2f} MiB",
            f"{found.bits_per_weight:.2f}",
            f"{found.quantized_bits_per_weight:.3f}" if found.quantized_bits_per_weight else "",
        )
    console.print(table)
    console.print(
        f"{result.model.tokens:,} tokens; KL(bf16 || W4A8) {result.kl_mean:.4f} nats, "
        f"same first choice for {result.top1_agreement:.2%} of tokens"
    )

    console.rule("4. verify: would vLLM serve it?")
    report = w4a8jax.verify(OUT)
    report.render(console)

    console.print(f"\nthe checkpoint is in [bold]{OUT}[/bold]; {time.perf_counter() - started:.0f} s in all")
    raise SystemExit(not report.ok)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()

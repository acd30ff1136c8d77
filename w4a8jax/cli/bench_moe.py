"""`w4a8jax bench moe`, and `w4a8jax tune --moe`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from .bench import (
    Kernels,
    Out,
    Plot,
    Resume,
    Summarize,
    VllmFolder,
    check_folder,
    command_line,
    open_table,
    parse_tokens,
    say,
)

Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="WORD", help="Only models with WORD in their names; repeat it.")
]
Products = Annotated[
    list[str] | None,
    typer.Option("--product", metavar="NAME", help="gate_up, down or mlp, the whole MLP; repeat it. Default: all."),
]
Tokens = Annotated[
    str | None, typer.Option("--tokens", metavar="T,...", help="Numbers of tokens; default: 1,4,16,...,16384.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that compile; they measure one at a time, and each holds a layer's experts on the device. "
        "Default: one for each model and product, at most one a core.",
    ),
]


def moe(
    model: Models = None,
    product: Products = None,
    tokens: Tokens = None,
    routing: Annotated[
        list[str] | None, typer.Option("--routing", metavar="NAME", help="uniform or zipf; repeat it. Default: both.")
    ] = None,
    kernel: Kernels = None,
    vllm: VllmFolder = None,
    fp8: Annotated[
        float | None,
        typer.Option("--fp8", metavar="TFLOP/s", help="cuBLAS's rate in FP8, for floors. Default: measure it."),
    ] = None,
    out: Out = None,
    plot: Plot = None,
    resume: Resume = False,
    summarize: Summarize = None,
    processes: Processes = None,
) -> None:
    """Measure products with experts and whole MLPs of them, beside JAX and vLLM.

    Models are Qwen3-30B-A3B, Mixtral-8x7B and one of Command A+'s size;
    experts are chosen uniformly or by Zipf's law. Device time, by CUPTI. Every
    result is compared with float64 before it is timed. The record is written
    after each point: a run that was stopped goes on with --resume.
    """
    from pallas_kernels.errors import W4A8Error

    if plot is not None:
        # Minutes of measurements should not end in a path that cannot be written.
        from ..benchmark.plot import check_name

        check_name(plot)
    if summarize is not None:
        from ..benchmark.moe_record import MoeRecord

        _show(MoeRecord.read(summarize), plot)
        return
    if resume and out is None:
        raise W4A8Error("--resume: needs --out")
    if out is not None:
        check_folder("--out", out)
    # Other processes, and torch, allocate on the same device. This is read when JAX first touches it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from ..benchmark import gemm, kernels, moe_points, parts, peers
    from ..benchmark import moe as benchmark

    work = moe_points.points(*parse_points(model, product, tokens), parse_routings(routing))
    gemm.require_hopper("bench moe")
    chosen = kernels.selected(benchmark.kernels_for(vllm), kernel or [])
    options = [("--model", model), ("--product", product), ("--routing", routing), ("--kernel", kernel)]
    words = [word for name, values in options for value in values or [] for word in (name, value)]
    command = command_line("bench moe", words, tokens, vllm)
    record = benchmark.start(command, out if resume else None, fp8)
    if vllm is not None:
        record.about["vllm"] = peers.VLLM
    typer.echo(f"{record.about['device']}: copy {record.about['copy_TB_s']:.2f} TB/s")

    def save(record: Any) -> None:
        if out is not None:
            record.write(out)

    groups = list(dict.fromkeys((point.model.name, point.product) for point in work))
    if (count := processes or _default(len(groups))) > 1:
        words = ["bench", "moe", "--resume", *([] if vllm is None else ["--vllm", vllm])]
        words += [word for name, values in options[2:] for value in values or [] for word in (name, value)]
        names = {kernel.name for kernel in chosen}

        def run(points: list[Any], at_a_time: int) -> None:
            jobs = []
            for name, product_name, some in _divide(points, at_a_time):

                def mine(row: dict[str, Any], of: Any = (name, product_name), some: Any = some) -> bool:
                    return (row["model"], row["product"]) == of and row["tokens"] in some

                jobs.append((record.only(mine), [*words, *_of(name, product_name, some)]))
            parts.run_jobs(record, jobs, at_a_time, save=save, progress=say)

        run(work, count)
        # Beside other processes, there may have been too little memory, for a kernel or for CUPTI.
        wanting = {record.key_of(row)[:-1] for row in record.rows if row["kernel"] in names and _may_do_alone(row)}
        if again := [point for point in work if benchmark.key_of(point) in wanting]:
            typer.echo(f"failed beside other processes, measured again alone: kernels at {len(again)} points")
            run(again, 1)
    else:
        benchmark.run(record, chosen, work, save=save, progress=say)
    _show(record, plot)
    if out is not None:
        record.write(out)
        typer.echo(f"wrote {out}")


def tune_moe(
    models: list[str] | None,
    products: list[str] | None,
    tokens: str | None,
    kernel: list[str] | None,
    out: str | None,
    resume: bool,
    processes: int | None,
) -> None:
    """`w4a8jax tune --moe`: see `bench.tune`.

    Raises:
        W4A8Error: an option names what does not exist, there is no Hopper GPU, or the table is of another device.
    """
    from pallas_kernels.errors import W4A8Error

    if "mlp" in (products or []):
        raise W4A8Error("--product mlp: what is tuned are its products, gate_up and down")
    chosen_models, chosen_products, some_tokens = parse_points(models, products or ["gate_up", "down"], tokens)
    if tokens is None:
        some_tokens = some_tokens[:-1]  # with the next fewer, experts get so many rows that more make no difference
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from ..benchmark import gemm, kernels, moe_kernels, moe_points, parts, tune_moe

    gemm.require_hopper("tune")
    path, table = open_table(out)
    # The fast form by default: tables of all of them take three times as long.
    names = kernel or [moe_kernels.our_experts()[0].name]
    chosen = [k for k in kernels.selected(moe_kernels.our_experts(), names) if isinstance(k, moe_kernels.OurExperts)]
    work = moe_points.points(chosen_models, chosen_products, some_tokens, moe_points.ROUTINGS)
    groups = {(point.model.name, point.product) for point in work}
    if (count := processes or os.cpu_count() or 1) > 1:
        jobs = []
        for name, product, part in _divide(work, max(count, len(groups))):
            model = moe_points.MODELS[name]
            shape, rows = model.shape(product), [t * model.top_k for t in part]
            words = ["tune", "--moe", *(["--resume"] if resume else []), *_of(name, product, part)]
            words += [word for name in names for word in ("--kernel", name)]
            jobs.append((table.part_grouped(model.experts, *shape, rows), words))
        parts.run_jobs(table, jobs, count, save=lambda t: t.write(path), progress=say)
    else:
        tune_moe.run(table, chosen, work, resume=resume, save=lambda t: t.write(path), progress=say)
    typer.echo(f"wrote {path}")


def parse_points(
    models: list[str] | None, products: list[str] | None, tokens: str | None
) -> tuple[list[Any], list[str], list[int]]:
    """Models, products and numbers of tokens of the options; all where there are none.

    Raises:
        W4A8Error: there is no such model or product, or tokens are not positive integers.
    """
    from pallas_kernels.errors import W4A8Error

    from ..benchmark import moe_points

    names = list(moe_points.MODELS)
    for word in models or []:
        if not any(word in name for name in names):
            raise W4A8Error(f"--model {word}: there is none; there are {', '.join(names)}")
    for product in products or []:
        if product not in moe_points.PRODUCTS:
            raise W4A8Error(f"--product {product}: there is none; there are {', '.join(moe_points.PRODUCTS)}")
    chosen = [m for name, m in moe_points.MODELS.items() if not models or any(word in name for word in models)]
    return chosen, list(products or moe_points.PRODUCTS), parse_tokens(tokens) or list(moe_points.TOKENS)


def parse_routings(routings: list[str] | None) -> list[Any]:
    """The routings of the option; all where there are none.

    Raises:
        W4A8Error: there is no such routing.
    """
    from pallas_kernels.errors import W4A8Error

    from ..benchmark.moe_points import ROUTINGS

    for routing in routings or []:
        if routing not in ROUTINGS:
            raise W4A8Error(f"--routing {routing}: there is none; there are {', '.join(ROUTINGS)}")
    return list(routings or ROUTINGS)


def _divide(work: list[Any], processes: int) -> list[tuple[str, str, list[int]]]:
    """Parts of the work, a model and product with some of the tokens each: as `parts.split` has it for shapes."""
    groups: dict[tuple[str, str], dict[int, None]] = {}
    for point in work:
        groups.setdefault((point.model.name, point.product), {})[point.tokens] = None
    each = max(1, processes // len(groups))
    divided = [(*group, list(tokens)[i::each]) for i in range(each) for group, tokens in groups.items()]
    return [part for part in divided if part[2]]


def _may_do_alone(row: dict[str, Any]) -> bool:
    """Whether a row failed, and not by a refusal or a wrong result, which would be the same again."""
    return "failed" in row and "W4A8Error" not in row["failed"]


def _of(model: str, product: str, tokens: list[int]) -> list[str]:
    return ["--model", model, "--product", product, "--tokens", ",".join(map(str, tokens))]


def _default(groups: int) -> int:
    return max(1, min(groups, os.cpu_count() or 1))


def _show(record: Any, path: str | None) -> None:
    from ..benchmark import moe_plot, moe_summary

    moe_summary.render(record)
    if path is not None:
        typer.echo(f"wrote {moe_plot.plot(record, path)}")

"""`report`: each recipe in a process of its own, one after the other, so that time and peak memory are its own."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.errors import W4A8Error

from ..calibration.data import CalibrationData
from ..checkpoints.compressed_tensors import find
from ..checkpoints.reader import CheckpointReader
from ..distillation.options import DistillationOptions
from .plan import Calibration, Unit, draws, plan
from .recipes import RECIPES, default_recipes, select
from .record import Report, Row
from .worker import RESULT

# Called with what is being done, how much of it is done, and all of it.
Progress = Callable[[str, int, int], None]

_SAMPLE_BYTES = 2**16


def report(
    model: str | Path,
    output: str | Path,
    *,
    texts: Mapping[str, str] | None = None,
    recipes: Sequence[str] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    calibration: Calibration | Sequence[Calibration] | None = None,
    seeds: int = 1,
    samples: int | None = None,
    distill_data: Calibration | None = None,
    distill_from: str | None = None,
    distillation: DistillationOptions | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    kernels: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantizes a model in several ways and measures what each costs: quality on texts, size, time, memory.

    Writes `output` (Markdown), and beside it a picture (.png) and all numbers (.json), the latter after each recipe. A
    recipe that fails has a row that says why, and the others go on.

    Args:
        model: the checkpoint that is not quantized, a directory or Hub name.
        output: a file's name that ends in .md.
        texts: by name; by default the reference text's test split.
        recipes: names in `w4a8jax.reporting.recipes`; by default those that can be run with the data there is.
        checkpoints: of the same model, made elsewhere, by the name that their row gets.
        calibration: data for GPTQ, of `load_calibration` or a JSONL file; several: GPTQ runs once with each, and the
            report has the spread.
        seeds: or so many draws from it, each of `samples` samples.
        samples: of a draw; all of them by default.
        distill_data: what "w4a8-qad" trains on, as for `distill`.
        distill_from: the recipe that it begins with; by default "w4a8-gptq" (on the first draw) if there is
            calibration data, else "w4a8-rtn".
        distillation: its options.
        max_tokens: only the first tokens of each text; all by default.
        context: tokens of a window, see `evaluate`.
        kernels: run on this device's kernels where it has any.
        overwrite: replace an existing report.
        resume: go on with an existing one: rows that it has of the same recipes and data are not measured again, and
            those of other recipes stay.
        progress: called with a row's name, what of it is done, and all of it.

    Raises:
        W4A8Error: a name is unknown or given twice; data is missing, damaged or not for this model; the model is
            quantized or has no tokenizer; the output exists, or is a report on another model or other texts.
        KeyboardInterrupt: rows that were finished are kept for `resume`.
    """
    target = _target(output, overwrite=overwrite, resume=resume)
    reader = CheckpointReader(model)
    if find(reader.config) is not None:
        raise W4A8Error(f"{reader.path}: is quantized itself; give the checkpoint that it was made from")
    if not reader.has_tokenizer():
        raise W4A8Error(f"{reader.path}: has no tokenizer.json, without which texts cannot be read")
    if texts is None:
        from ..reference import reference_text

        texts = {"test split": reference_text("test")}
    _check(texts, checkpoints or {}, {"max_tokens": max_tokens, "seeds": seeds, "samples": samples})
    drawn = draws(reader, calibration, seeds, samples)
    start = distill_from or ("w4a8-gptq" if drawn else "w4a8-rtn")
    given = {"calibration": bool(drawn), "distillation": distill_data is not None}
    chosen = select(default_recipes(**given) if recipes is None else recipes, start, **given)
    record = Report(_about(reader, texts, max_tokens, context))
    if resume and target.with_suffix(".json").exists():
        record.rows = _rows_to_keep(target.with_suffix(".json"), record.about["job"])
    others = {name: CheckpointReader(path) for name, path in (checkpoints or {}).items()}
    units = plan(
        reader, chosen, {name: (other.path, fingerprint(other)) for name, other in others.items()}, drawn, start,
        distill_data, distillation or DistillationOptions(), kernels,
    )  # fmt: skip
    if not units:
        raise W4A8Error("recipes: expected at least one, or a checkpoint")
    job: dict[str, Any] = {"model": str(reader.path), "max_tokens": max_tokens, "context": context, "kernels": kernels}
    with _workplace(target, keep=resume) as work:
        job["texts"] = _write_texts(work, texts)
        try:
            for unit in units:
                if not _has(record, unit):
                    record.add(_measure(unit, job, work, 1 + len(texts), progress), _order)
                    record.write(target.with_suffix(".json"))
        except KeyboardInterrupt as e:
            done = sum(_has(record, unit) for unit in units)
            e.add_note(f"{done} of {len(units)} rows are kept; go on with --resume")
            raise
        _write(record, target)
        shutil.rmtree(work, ignore_errors=True)
    return record


def _write(record: Report, target: Path) -> None:
    picture = None
    if record.measured:
        picture = record.plot(target.with_suffix(".png")).name
    try:
        target.write_text(record.to_markdown(picture), encoding="utf-8")
    except OSError as e:
        raise W4A8Error(f"{target}: cannot be written: {e.strerror or e}") from e
    record.write(target.with_suffix(".json"))


@contextmanager
def _workplace(target: Path, *, keep: bool) -> Iterator[Path]:
    """The hidden folder beside a report that is being made, which one process at a time may use.

    Args:
        target: the report.
        keep: what an interrupted run left there.
    """
    work = target.with_name(f".{target.stem}.partial")
    try:
        work.mkdir(exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as e:
        raise W4A8Error(f"{work}: cannot write there: {e.strerror or e}") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise W4A8Error(f"{target}: another process is writing this report") from None
        for left in [] if keep else work.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        yield work


def fingerprint(reader: CheckpointReader) -> str:
    """A hash of a checkpoint's config and the beginning of each tensor: the same wherever the checkpoint lies."""
    digest = hashlib.sha256(json.dumps(reader.config, sort_keys=True).encode())
    for name, info in sorted(reader.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        rows = max(1, _SAMPLE_BYTES * info.shape[0] // max(info.nbytes, 1)) if info.shape else 1
        data = reader.read_rows(name, 0, min(rows, info.shape[0])) if info.shape else reader.read(name)
        digest.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).tobytes())
    return digest.hexdigest()


def _target(output: str | Path, *, overwrite: bool, resume: bool) -> Path:
    target = Path(output).expanduser().absolute()
    if target.suffix != ".md":
        raise W4A8Error(f"{output}: expected a name that ends in .md")
    if not target.parent.is_dir():
        raise W4A8Error(f"{output}: its folder does not exist")
    files = [target.with_suffix(suffix) for suffix in (".md", ".png", ".json")]
    for file in files:
        if file.exists() and not overwrite and not (resume and files[-1].exists()):
            raise W4A8Error(f"{file}: exists; --resume goes on with it, --overwrite replaces it")
    return target


def _check(texts: Mapping[str, str], checkpoints: Mapping[str, str | Path], numbers: Mapping[str, int | None]) -> None:
    if not texts:
        raise W4A8Error("texts: expected at least one")
    for name, text in texts.items():
        if not text.strip():
            raise W4A8Error(f"text {name}: is empty")
    for name in checkpoints:
        if name in RECIPES or not name:
            raise W4A8Error(f"checkpoint {name!r}: give it a name that no recipe has")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise W4A8Error(f"{name}: expected a positive number, found {value}")


def _about(
    reader: CheckpointReader, texts: Mapping[str, str], max_tokens: int | None, context: int | None
) -> dict[str, Any]:
    hashes = {name: hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for name, text in texts.items()}
    return {
        "model": reader.path.resolve().name,
        "model_type": reader.config.get("model_type", "model"),
        "parameters": sum(info.size for info in reader.tensors.values()),
        "nbytes": sum(info.nbytes for info in reader.tensors.values()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "w4a8jax")},
        "job": {"model": fingerprint(reader), "texts": hashes, "max_tokens": max_tokens, "context": context},
    }


def _rows_to_keep(path: Path, job: dict[str, Any]) -> list[Row]:
    old = Report.read(path)
    for part, value in job.items():
        if old.about["job"].get(part) != value:
            what = "another model" if part == "model" else f"other {part}"
            raise W4A8Error(f"{path}: is a report on {what}; --overwrite begins anew")
    return old.rows


def _write_texts(work: Path, texts: Mapping[str, str]) -> dict[str, str]:
    files = {name: str(work / f"text_{i}") for i, name in enumerate(texts)}
    for name, text in texts.items():
        Path(files[name]).write_bytes(text.encode("utf-8", "replace"))
    return files


def _has(record: Report, unit: Unit) -> bool:
    """Whether a unit was measured, with the same settings, and did not fail."""
    key = unit.name, unit.seed, unit.settings
    return any((row["name"], row["seed"], row["settings"]) == key and "failed" not in row for row in record.rows)


def _order(row: Row) -> tuple[int, int]:
    names = list(RECIPES)
    return names.index(row["name"]) if row["name"] in names else len(names), row["seed"] or 0


def _measure(unit: Unit, job: Mapping[str, Any], work: Path, steps: int, progress: Progress | None) -> Row:
    """A row. Its folder stays if it is interrupted, and the next run goes on in it."""
    folder = work / hashlib.sha256(f"{unit.name} {unit.seed} {unit.settings}".encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    label = unit.name if unit.seed is None else f"{unit.name}, draw {unit.seed}"
    places = {"making": 0} | {name: 1 + i for i, name in enumerate(job["texts"])}

    def update(step: str, done: int, total: int) -> None:
        if progress is not None and step in places:
            progress(label, int(100 * (places[step] + done / max(total, 1))), 100 * steps)

    if progress is not None:
        progress(label, 0, 100 * steps)
    files = {part: _write_data(folder / f"{part}.jsonl", data) for part, data in unit.data.items()}
    words = {**job, **unit.job, **files, "folder": str(folder)}
    result = _in_child(words, folder, update)
    if progress is not None:
        progress(label, 100 * steps, 100 * steps)
    shutil.rmtree(folder, ignore_errors=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"name": unit.name, "title": unit.title, "seed": unit.seed, "settings": unit.settings, "date": date}
    return row | result


def _write_data(path: Path, data: CalibrationData) -> str:
    with path.open("w", encoding="utf-8") as file:
        for sample in data.samples:
            line = {"tokens": sample.tokens.tolist(), "loss_mask": sample.loss_mask.astype(int).tolist()}
            file.write(json.dumps(line) + "\n")
    return str(path)


def _in_child(job: Mapping[str, Any], folder: Path, update: Progress) -> dict[str, Any]:
    """Runs worker.py; a process that dies gives a row that failed."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    result, log = folder / RESULT, folder / "log.txt"
    command = [sys.executable, "-m", "w4a8jax.reporting.worker", str(folder / "job.json")]
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        try:
            for line in child.stdout or ():
                try:
                    step, done, total = json.loads(line)
                except (ValueError, TypeError):
                    continue  # a library's
                update(step, done, total)
            child.wait()
        except BaseException:
            child.terminate()
            raise
    if child.returncode == 0 and result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return {"failed": f"its process was ended by {name}{', for lack of memory?' if name == 'SIGKILL' else ''}"}
    last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return {"failed": f"its process ended with {child.returncode}: {' '.join(last)[:300]}"}

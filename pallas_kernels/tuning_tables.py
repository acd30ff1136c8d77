"""Tables of measured configurations, JSON files:

    {"device": "NVIDIA H200", "entries": [
      {"form": "sign_magnitude", "N": 14336, "K": 12288, "M": 16, "config": {"tile_tokens": 16, "stages": 8}}]}

An entry's `config` holds fields of `TuningConfig`; those left out have their defaults. Entries may hold more, such as
the time that was measured. `M` is a bucket: see `Table.lookup`. An entry with a number of experts as `E` is of the
grouped kernel, for weights [E, N, K] and M rows in all: see `Table.lookup_grouped`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self, get_type_hints

from . import grouped_gemm
from .dense_gemm import TuningConfig
from .errors import W4A8Error

FIELDS: dict[str, Any] = get_type_hints(TuningConfig)  # name -> type

# A bucket of M tokens serves down to a fraction of M, below which its tiles would be too empty, or too few.
_REACH = {64: 2.0, 2**31: 4 / 3}  # up to so many tokens: M over the least
# Above so many tokens, the best tile no longer depends on M.
_MANY = 4096
# Above so many rows an expert, those of the grouped kernel neither.
_MANY_EACH = 256
_FOLDER = Path(__file__).with_name("tuned")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured configuration: form, N, K, M, the configuration, what else the table says of it, and E, 0 if dense."""

    form: str
    n: int
    k: int
    m: int
    config: TuningConfig
    more: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    experts: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Form, N, K, M, and E if grouped. Of two entries with the same key, the later one replaces the other."""
        return (self.form, self.n, self.k, self.m, *([self.experts] if self.experts else []))


class Table:
    """Entries of one device, at most one for each form, N, K and M, and E."""

    def __init__(self, device: str, entries: Iterable[Entry] = ()) -> None:
        self.device = device
        self.entries = {entry.key: entry for entry in entries}

    def lookup(self, m: int, n: int, k: int, form: str) -> TuningConfig | None:
        """The configuration of the smallest M in the table that is at least m, of the same form, N and K.

        None if that M is twice m or more (m counted as 8 at least), or 4/3 of m or more above 64 tokens; or if m is
        above all in the table and the largest of them is below 4096.
        """
        tuned = sorted(key[3] for key in self.entries if key[:3] == (form, n, k) and len(key) == 4)
        bucket = next((t for t in tuned if t >= m), None)
        if bucket is None:
            bucket = tuned[-1] if tuned and tuned[-1] >= _MANY else None
        elif bucket >= next(reach for most, reach in _REACH.items() if bucket <= most) * max(m, 8):
            bucket = None
        return None if bucket is None else self.entries[form, n, k, bucket].config

    def lookup_grouped(self, m: int, experts: int, n: int, k: int, form: str) -> TuningConfig | None:
        """The configuration of the M in the table that is nearest to m rows, of the same form, E, N and K.

        What matters is how many rows an expert gets. None if that M is more than twice m or less than half of it; but
        the largest in the table serves all above it where experts get 256 rows or more.
        """
        tuned = sorted(key[3] for key in self.entries if key[:3] == (form, n, k) and key[4:] == (experts,))
        if not tuned:
            return None
        bucket = min(tuned, key=lambda t: max(t / m, m / t))
        near = m <= 2 * bucket and bucket <= 2 * m
        if not near and not (bucket < m and bucket >= _MANY_EACH * experts):
            return None
        return self.entries[form, n, k, bucket, experts].config

    def merged(self, entries: Iterable[Entry]) -> Self:
        """With further entries, which replace those of the same key."""
        return type(self)(self.device, [*self.entries.values(), *entries])

    def part(self, k: int, n: int, tokens: Collection[int]) -> Self:
        """A table of the entries of a shape with some of the values of M."""
        some = [e for e in self.entries.values() if (e.k, e.n) == (k, n) and e.m in tokens and not e.experts]
        return type(self)(self.device, some)

    def part_grouped(self, experts: int, n: int, k: int, rows: Collection[int]) -> Self:
        """A table of the grouped entries of [E, N, K] with some of the numbers of rows."""
        some = [e for e in self.entries.values() if (e.experts, e.n, e.k) == (experts, n, k) and e.m in rows]
        return type(self)(self.device, some)

    def update(self, path: str | Path) -> None:
        """Adds the entries of a file that `write` wrote, which replace those of the same key.

        Raises:
            W4A8Error: see `read`.
        """
        self.entries |= read(path).entries

    def write(self, path: str | Path) -> None:
        """Writes a JSON file, one line for each entry.

        Raises:
            W4A8Error: it cannot be written.
        """
        lines = []
        for _, e in sorted(self.entries.items()):
            shape = ({"E": e.experts} if e.experts else {}) | {"N": e.n, "K": e.k, "M": e.m}
            record = {"form": e.form} | shape | {"config": dataclasses.asdict(e.config)} | e.more
            lines.append(f"  {json.dumps(record)}")
        text = f'{{"device": {json.dumps(self.device)}, "entries": [\n' + ",\n".join(lines) + "\n]}\n"
        path = Path(path).expanduser()
        temporary = path.with_name(path.name + ".partial")
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as e:
            raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e


def read(path: str | Path) -> Table:
    """Reads a table; one that was read before and has not changed is not read again.

    Raises:
        W4A8Error: it cannot be read, is no table, or an entry is wrong; names the file and the entry.
    """
    path = Path(path).expanduser()
    try:
        modified = path.stat().st_mtime_ns
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
    return _read(path, modified)


def shipped(device_kind: str) -> Table | None:
    """The package's table for a device, or None."""
    path = _FOLDER / f"{slug(device_kind)}.json"
    return read(path) if path.is_file() else None


def slug(device_kind: str) -> str:
    """A device's name as files have it: "NVIDIA H200" is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def misfit(config: TuningConfig, n: int, k: int, form: str, experts: int = 0) -> str | None:
    """Why a configuration cannot run on a weight [N, K], or [E, N, K], in a form; None if it can."""
    try:
        if experts:
            grouped_gemm.check(config, experts, n, k, form)
        else:
            config.check(n, k, form)
    except W4A8Error as e:
        return str(e)
    return None


@functools.lru_cache(maxsize=8)
def _read(path: Path, modified: int) -> Table:
    try:
        record = json.loads(path.read_text())
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise W4A8Error(f"{path}: is not JSON: {e}") from e
    if not isinstance(record, dict) or not isinstance(record.get("entries"), list):
        raise W4A8Error(f'{path}: expected {{"device": NAME, "entries": [...]}}')
    entries = []
    for i, item in enumerate(record["entries"]):
        try:
            entries.append(_entry(item))
        except W4A8Error as e:
            raise W4A8Error(f"{path}: entry {i} ({json.dumps(item)[:200]}): {e}") from None
    return Table(str(record.get("device", "")), entries)


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict):
        raise W4A8Error("expected an object")
    form = item.get("form")
    if not isinstance(form, str):
        raise W4A8Error("expected a string as form")
    n, k, m = (_positive(item, name) for name in "NKM")
    experts = _positive(item, "E") if "E" in item else 0
    fields = item.get("config")
    if not isinstance(fields, dict):
        raise W4A8Error("expected an object as config")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise W4A8Error(f"unknown fields {', '.join(unknown)}; known are {', '.join(FIELDS)}")
    for name, value in fields.items():
        if type(value) is not FIELDS[name]:
            raise W4A8Error(f"{name}: expected {FIELDS[name].__name__}, found {value!r}")
    try:
        config = TuningConfig(**fields)
    except TypeError as e:
        raise W4A8Error(str(e)) from None
    if problem := misfit(config, n, k, form, experts):
        raise W4A8Error(problem)
    more = {name: value for name, value in item.items() if name not in ("form", "E", "N", "K", "M", "config")}
    return Entry(form, n, k, m, config, more, experts)


def _positive(item: dict[str, Any], name: str) -> int:
    value = item.get(name)
    if type(value) is not int or value < 1:
        raise W4A8Error(f"{name}: expected a positive integer, found {value!r}")
    return value

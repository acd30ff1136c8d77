"""Which kernel runs, and how it divides the work.

A configuration is chosen for a product of M tokens with a weight [N, K] whose words have a form ("sign_magnitude",
"two_tables", ...). The first of these that has one decides:

1. `force_config`, a context manager;
2. the user's table, a JSON file that the environment variable W4A8JAX_TUNED names;
3. the table that comes with the package for the device, `tuned/<device kind>.json`;
4. `heuristic`.

`tuning_tables` says what a table holds and how one is read.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from . import tuning_tables
from .dense_gemm import SHARED_MEMORY, TuningConfig
from .errors import W4A8Error
from .group_schedule import ALIGNMENT
from .main_loop import SUMS_BY_GROUP

ENVIRONMENT = "W4A8JAX_TUNED"

# Part of the key of jit's caches: what was compiled under one configuration does not run under another.
_forced: Any = jax.make_user_context(None)


def hopper() -> bool:
    """Whether JAX's default device is a Hopper GPU, which the kernels are for."""
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def takes(n: int, k: int) -> bool:
    """Whether the dense kernel can take a weight [N, K]."""
    return n % 128 == 0 and k % 128 == 0


def choose(m: int, n: int, k: int, form: str) -> TuningConfig:
    """The configuration for M tokens and a weight [N, K] in a form.

    Args:
        m: tokens.
        n: outputs.
        k: inputs.
        form: how the weight's words hold codes, `FragmentWeight.form`.

    Raises:
        W4A8Error: the forced configuration does not fit; a table cannot be read, or an entry of it is not right.
    """
    if (forced := _forced.value) is not None:
        if problem := tuning_tables.misfit(forced, n, k, form):
            raise W4A8Error(f"force_config: {problem}")
        return forced
    path = os.environ.get(ENVIRONMENT)
    if path and (found := tuning_tables.read(path).lookup(m, n, k, form)):
        return found
    shipped = tuning_tables.shipped(jax.devices()[0].device_kind)
    if shipped is not None and (found := shipped.lookup(m, n, k, form)):
        return found
    return heuristic(m, n, k, form)


def choose_grouped(m: int, experts: int, n: int, k: int, form: str) -> TuningConfig:
    """The configuration for M rows in groups, one for each expert, and weights [N, K] in a form.

    It is the forced one, which the kernel checks, or as `choose` has it, that of a table or `heuristic_grouped`.

    Raises:
        W4A8Error: a table cannot be read, or an entry of it is not right.
    """
    if (forced := _forced.value) is not None:
        return forced  # type: ignore[no-any-return]
    path = os.environ.get(ENVIRONMENT)
    if path and (found := tuning_tables.read(path).lookup_grouped(m, experts, n, k, form)):
        return found
    shipped = tuning_tables.shipped(jax.devices()[0].device_kind)
    if shipped is not None and (found := shipped.lookup_grouped(m, experts, n, k, form)):
        return found
    return heuristic_grouped(m, experts, n, k, form)


@contextmanager
def force_config(config: TuningConfig | None) -> Iterator[None]:
    """Within it, kernels traced by this thread use this configuration; None gives the choice back.

    It may be nested, and works under `jax.jit`: a function that was compiled under one configuration is compiled
    again for another.
    """
    with _forced(config):
        yield


def heuristic(m: int, n: int, k: int, form: str) -> TuningConfig:
    """A configuration for M tokens and a weight [N, K], N a multiple of 128, that no table knows.

    From measurements of "lut" numerics on H200s and H100s: with few tokens, small tiles in a deep pipeline, of 128 rows
    where those are fewer than blocks, which share them then, of 256 rows where the weight is large; with many, large
    tiles, those that a rough model finds quickest. Blocks share tiles where the estimated gain exceeds the cost.
    The tiles of "exact" numerics and of W4A16 were not tuned.
    """
    if form == "bf16":
        return _heuristic_bf16(m, n, k)
    # "exact" numerics have two accumulators for each row block: larger tiles do not fit registers or the budget.
    most = {"subnormal": 64, "subnormal_8": 32}.get(form, 128)
    if m > most == 128:
        return _heuristic_many(m, n, k)
    tokens = next(t for t in sorted({8, 16, 32, 64, most}) if m <= t or t == most)
    if (small := _heuristic_small(tokens, m, n, k, form)) is not None and most == 128:
        return small
    large = n * k > 4e7 if m <= 16 else n >= 12288 or m > 128
    if n % 256 == 0 and large:
        config = _wide(tokens, k, form)
    else:
        config = TuningConfig(tokens, 2, 1, 16 if tokens <= 16 else 12 if tokens <= 32 else 8 if tokens <= 64 else 6)
    return _share(config, m, n, k, 1.4e9)[1]


def _heuristic_small(tokens: int, m: int, n: int, k: int, form: str) -> TuningConfig | None:
    """Tiles of 128 rows on two warpgroups, for up to 128 tokens and weights of few tiles; None elsewhere."""
    tiles, ctas = n // 128, TuningConfig.ctas
    if k % 256 or tiles >= ctas or (tokens == 64 and tiles < 0.3 * ctas):
        return None
    # Tables of codes -8..7 leave room for fewer stages.
    depths = {64: range(6, 3, -1), 128: range(7, 3, -1)}.get(tokens, (4,))
    slot_steps = 2 if tokens <= 64 else 1
    fitting = (TuningConfig(tokens, 1, 2, stages, slot_steps=slot_steps) for stages in depths)
    config = _share(next(c for c in fitting if c.shared_memory(form) <= SHARED_MEMORY), m, n, k, 1.4e9)[1]
    return dataclasses.replace(config, lead=_lead(tiles, ctas)) if config.stream_k and tokens <= 32 else config


def _wide(tokens: int, k: int, form: str) -> TuningConfig:
    """Tiles of 256 rows of W4A8 for up to 128 tokens, of "lut" numerics in slots of two K steps."""
    if tokens > 64 or k % 256 or form in SUMS_BY_GROUP:
        return TuningConfig(tokens, 2, 2, 8 if tokens <= 32 else 6 if tokens <= 64 else 4)
    return TuningConfig(tokens, 2, 2, 4 if tokens <= 32 else 3, slot_steps=2)


def _lead(tiles: int, ctas: int) -> int:
    """Of owners of tiles of 128 rows: the more tiles each of the other blocks touches, the later its last sums are."""
    return min(24, 2 * round(3 + 2 * tiles / (ctas - tiles)))


def _heuristic_many(m: int, n: int, k: int) -> TuningConfig:
    """For W4A8, "lut", more than 128 tokens. The rates are fractions of the largest tile's."""
    options = [(TuningConfig(128, 2, 1, 6), 0.73)]
    if n % 256 == 0:
        options += [(TuningConfig(128, 2, 2, 4), 0.88)]
    if k % 256 == 0:
        options += [(TuningConfig(192, 1, 2, 4), 0.93), (TuningConfig(256, 1, 2, 4), 1.0)]
    _, config = min((_share(config, m, n, k, 1.5e9 * rate) for config, rate in options), key=lambda x: x[0])
    # Where tokens are read again and again from the cache, two blocks share them.
    often = m >= 4096 or (config.stream_k and min(n, k) >= 12288)
    together = config.tile_tokens == 256 and often and n % 256 == 0
    return dataclasses.replace(config, cluster=2) if together else config


def _heuristic_bf16(m: int, n: int, k: int) -> TuningConfig:
    """For W4A16, whose tokens take twice the shared memory: the same tiles in shallower pipelines."""
    tokens = next(t for t in (8, 16, 32, 64, 128) if m <= t or t == 128)
    if n % 256 == 0 and (n >= (8192 if m <= 16 else 12288) or m > 128):
        config = TuningConfig(tokens, 2, 2, {8: 8, 16: 8, 32: 8, 64: 4, 128: 3}[tokens])
    else:
        config = TuningConfig(tokens, 2, 1, {8: 16, 16: 16, 32: 8, 64: 8, 128: 4}[tokens])
    return _share(config, m, n, k, 0.7e9)[1]


def heuristic_grouped(m: int, experts: int, n: int, k: int, form: str) -> TuningConfig:
    """A configuration for M rows in groups, by the rows that an expert gets if they are spread evenly.

    Tiles begin at multiples of 8, groups anywhere: tiles have room for 7 rows more, so that a small group has one tile,
    and its weights are read once. From measurements of "lut" numerics on H100s, the largest tiles, which waste most at
    the ends of groups, are for a thousand rows an expert and more. Blocks share tiles where there are few, as measured
    on an H200. Those of "exact" numerics and of W4A16 were not tuned; for W4A16 the largest do not fit.
    """
    most = {"subnormal": 64, "subnormal_8": 32}.get(form, 128)
    rows, wide, bf16 = m / experts, n % 256 == 0, form == "bf16"
    if rows >= 1024 and most == 128 and wide and k % 256 == 0 and k >= 4096 and not bf16:
        return TuningConfig(256, 1, 2, 4, cluster=2)
    tokens = min(most, next(t for most_rows, t in _GROUPED_TOKENS if rows < most_rows))
    # Where so few experts are met that their tiles, of 256 rows, are fewer than blocks, tiles of 128.
    few = _met(m, experts) * (n // 256) < TuningConfig.ctas
    if rows <= 1 and wide and k % 256 == 0 and most == 128 and not bf16:
        if _pays_to_share(m, experts, n, k):
            return dataclasses.replace(_wide(8, k, form), stream_k=True)
        if few:
            return TuningConfig(8, 1, 2, 4, slot_steps=2)
    if wide and not bf16:
        return _wide(tokens, k, form)
    # Tokens in bf16 take twice the shared memory.
    stages = {8: 8, 16: 8, 32: 7, 64: 4, 128: 3} if wide else {8: 16, 16: 16, 32: 8, 64: 8, 128: 4}
    return TuningConfig(tokens, 2, 2 if wide else 1, stages[tokens])


def _pays_to_share(m: int, experts: int, n: int, k: int) -> bool:
    """Whether blocks should share tiles where each expert that is met has one: whether, with tiles of 128 rows and of
    256, more than a quarter of the grid would be idle, for more than the 2.5 us that sharing costs.

    On an H200 little was gained, or nothing, where the grid is fuller.
    """
    met, ctas = _met(m, experts), TuningConfig.ctas
    waves = [met * (n // rows) / ctas for rows in (128, 256)]
    filled = max(w / math.ceil(w) for w in waves)
    busy = met * n * k / 2 / 4e6  # microseconds, by an H200's memory
    return filled < 0.75 and busy / filled - busy > 2.5


def candidates_grouped(m: int, experts: int, n: int, k: int, form: str) -> list[TuningConfig]:
    """Configurations of the grouped kernel worth measuring for M rows: all that fit, none twice, at most 18.

    Three sizes of tiles of tokens about what an expert gets of evenly spread rows; each with 128 and with 256 rows of
    weights, with the deepest pipeline that fits, a power of two where it has few tokens, whose slots hold two K steps
    then if K allows. Blocks share small tiles, or not, where there are few waves of them.
    """
    most = {"subnormal": 64, "subnormal_8": 32}.get(form, 256)
    sizes = [t for t in (8, 16, 32, 64, 128, 192, 256) if t <= most]
    fitting = next((i for i, t in enumerate(sizes) if t >= max(1, m / experts) + ALIGNMENT - 1), len(sizes) - 1)
    found: dict[TuningConfig, None] = {}
    first = max(0, min(fitting - 1, len(sizes) - 3))
    for tokens in sizes[first : first + 3]:
        two = 2 if tokens <= 64 and k % 256 == 0 and form not in SUMS_BY_GROUP else 1
        for row_blocks, warpgroups, slot_steps in ((2, 1, 1), (2, 2, two), (1, 2, two)):
            base = TuningConfig(tokens, row_blocks, warpgroups, slot_steps=slot_steps)
            depths = [
                config
                for stages in range(3, 17)
                if not tuning_tables.misfit(
                    config := dataclasses.replace(base, stages=stages), n, k, form, experts=experts
                )
            ]
            # Tiles of more tokens with two row blocks do not fit the registers.
            if depths and (row_blocks == 1 or tokens <= 128):
                power = min(16 // slot_steps, 1 << depths[-1].stages.bit_length() - 1)
                stages = power if tokens <= 64 and power > 3 else depths[-1].stages
                config = dataclasses.replace(base, stages=stages)
                found[config] = None
                waves = _met(m, experts) * (n // config.tile_rows) / config.ctas
                shared = dataclasses.replace(config, stream_k=True)
                if waves < _FEW_WAVES and warpgroups > 1 and not tuning_tables.misfit(shared, n, k, form, experts):
                    found[shared] = None
                # Where tokens are read again and again from the cache, two blocks may share them.
                pair = dataclasses.replace(config, cluster=2)
                if tokens >= 128 and not tuning_tables.misfit(pair, n, k, form, experts=experts):
                    found[pair] = None
    return list(found)


def _met(m: int, experts: int) -> float:
    """Experts that M evenly spread rows meet, on average."""
    return float(experts * (1 - (1 - 1 / experts) ** m))


# Of the grouped kernel's small tiles, where blocks may share them: with more waves, those that do not fill the last one
# take little of the time.
_FEW_WAVES = 6
# Tokens of a tile, for fewer rows an expert than this.
_GROUPED_TOKENS = ((0.5, 8), (8, 16), (24, 32), (48, 64), (float("inf"), 128))


def _share(config: TuningConfig, m: int, n: int, k: int, products: float) -> tuple[float, TuningConfig]:
    """Estimated microseconds, and the configuration with `stream_k` if dividing the last tiles pays.

    By rough rates of an H200: `products` are floating point operations in a microsecond; sums of tiles go to memory
    and back; blocks that are at different K steps find less of the operands in the cache.
    """
    m_tiles, filled = -(-m // config.tile_tokens), _filled(config, m, n)
    tiles = n // config.tile_rows * m_tiles
    busy = max(n * k / 2 / 4e6, 2 * m_tiles * config.tile_tokens * n * k / products)
    partials = 2 * 4 * config.ctas * config.tile_rows * config.tile_tokens
    tail = min(1, (config.ctas + tiles % config.ctas) / tiles)
    cost = 2 + partials / 3.3e6 + 0.05 * tail * busy
    shared = busy / filled - busy > cost
    return busy + cost if shared else busy / filled, dataclasses.replace(config, stream_k=shared)


# (tokens, row blocks, warpgroups) of tiles worth trying; all compile without spills.
_DECODE_TOKENS = (8, 16, 32, 64)
_PREFILL_TILES = ((96, 2, 3), (128, 2, 1), (128, 2, 2), (160, 2, 2), (192, 1, 2), (256, 1, 2))
_PREFILL_TILES_BF16 = ((96, 2, 2), (128, 2, 1), (128, 2, 2), (160, 2, 1), (192, 1, 2), (64, 4, 2))


def candidates(m: int, n: int, k: int, form: str) -> list[TuningConfig]:
    """Configurations worth measuring for M tokens and a weight [N, K] in a form: all that fit, none twice.

    With few tokens, tiles that hold up to 64 of them, 1 to 3 compute warpgroups, two depths of the
    pipeline, slots of one and two K steps, and leads of owners; with many, the largest tiles. Blocks share tiles, or
    not, where that may pay.
    """
    tiles: list[tuple[int, int, int]] = []
    if m <= 128:
        tokens = next((t for t in _DECODE_TOKENS if m <= t), _DECODE_TOKENS[-1])
        tiles += [(tokens, 1, 2), (tokens, 2, 1), (tokens, 2, 2)]
        tiles += [(tokens, 2, 3)] if m > 32 else []
        tiles += [(128, 1, 2)] if m > 64 else []
    if m > 64:
        # Of the tokens of the tiles, a fifth may be beyond M; (128, 2, 1) takes every N.
        large = _PREFILL_TILES_BF16 if form == "bf16" else _PREFILL_TILES
        tiles += [t for t in large if t == (128, 2, 1) or -(-m // t[0]) * t[0] <= 1.25 * m]
    found: dict[TuningConfig, None] = {}
    bases = [TuningConfig(*tile) for tile in tiles]
    bases += [dataclasses.replace(base, slot_steps=2) for base in bases if base.tile_tokens <= _DECODE_TOKENS[-1]]
    for base in bases:
        for stages in _stages(base, n, k, form):
            filled = _filled(base, m, n)
            for stream_k in (*([False] if filled > 0.55 else []), *([True] if filled < 0.97 else [])):
                for cluster in _clusters(base):
                    config = dataclasses.replace(base, stages=stages, stream_k=stream_k, cluster=cluster)
                    for lead in _leads(config, m, n) if stream_k else (0,):
                        config = dataclasses.replace(config, lead=lead)
                        if not tuning_tables.misfit(config, n, k, form):
                            found[config] = None
    return list(found)


def _clusters(config: TuningConfig) -> tuple[int, ...]:
    """What blocks of a cluster share is the tokens, which small tiles read as often as they read weights."""
    return (1, 2) if config.tile_tokens == 256 or (config.tile_rows == 128 and config.tile_tokens >= 64) else (1,)


def _leads(config: TuningConfig, m: int, n: int) -> tuple[int, ...]:
    """Of owners, where small tiles are fewer than blocks: those of fewer rows take less time for a K step."""
    if config.tile_tokens > 64 or n // config.tile_rows * -(-m // config.tile_tokens) >= config.ctas:
        return (0,)
    if config.tile_rows >= 256:
        return (0, 5, 8)
    return (0, 6, 16) if config.tile_tokens == 64 else (6, 10, 16, 24)


def _filled(config: TuningConfig, m: int, n: int) -> float:
    """Of the blocks that whole waves have, the fraction that has a tile."""
    tiles = n // config.tile_rows * -(-m // config.tile_tokens)
    return tiles / (-(-tiles // config.ctas) * config.ctas)


def _stages(config: TuningConfig, n: int, k: int, form: str) -> list[int]:
    """The deepest pipeline that fits, for few tokens the deepest powers of two, which cost fewer instructions."""
    depths = range(3, max(3, min(16, k // 128) // config.slot_steps) + 1)
    fitting = [s for s in depths if not tuning_tables.misfit(dataclasses.replace(config, stages=s), n, k, form)]
    if not fitting:
        return []
    deepest = fitting[-1]
    if config.tile_tokens > 64 or deepest <= 4:
        return [deepest]
    power = 1 << deepest.bit_length() - 1
    return [deepest] if config.tile_tokens == 64 else sorted({power, min(power, 8 // config.slot_steps)})

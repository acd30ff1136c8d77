"""The ways to quantize that a report can have, by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pallas_kernels.errors import W4A8Error


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    Attributes:
        name: to ask for it; title: in tables.
        options: of `w4a8jax.quantize`; None leaves the model as it is.
        numerics: that the result runs in; None: as its scheme has it, "lut" for W4A8 and "exact" for W4A16.
        distilled: trained by `w4a8jax.distill`, from the result of another recipe.
    """

    name: str
    title: str
    options: Mapping[str, Any] | None = None
    numerics: Literal["lut", "exact"] | None = None
    distilled: bool = False

    @property
    def calibrated(self) -> bool:
        """Needs calibration data."""
        return self.options is not None and self.options.get("method") == "gptq"

    @property
    def equalized(self) -> bool:
        """Its weights are not those of the original times a grid, but rescaled ones."""
        return self.options is not None and bool(self.options.get("equalize"))


# "Plain" is what tools do that do not know the kernel: RTN with the largest weight / 7 for a scale, and GPTQ that
# brings code * scale near the original. Both then run in the kernel's arithmetic all the same.
_ALL = (
    Recipe("bf16", "bf16"),
    Recipe("w4a16-rtn-plain", "W4A16, RTN, largest weight / 7", {"scheme": "w4a16", "search": "none"}),
    Recipe("w4a16-rtn", "W4A16, RTN", {"scheme": "w4a16"}),
    Recipe("w4a8-rtn-plain", "W4A8, RTN, largest weight / 7", {"search": "none"}),
    Recipe("w4a8-rtn", "W4A8, RTN", {}),
    Recipe("w4a8-rtn-code8", "W4A8, RTN, codes -8..7", {"code_min": -8}),
    Recipe("w4a8-exact", 'W4A8, RTN, "exact" numerics', {"numerics": "exact"}, "exact"),
    Recipe("w4a8-gptq-plain", "W4A8, GPTQ, plain INT4 objective", {"method": "gptq", "numerics": "exact"}, "lut"),
    Recipe("w4a8-gptq", "W4A8, GPTQ, kernel-exact", {"method": "gptq"}),
    Recipe("w4a8-gptq-equalized", "W4A8, GPTQ, kernel-exact, equalized", {"method": "gptq", "equalize": True}),
    Recipe("w4a8-qad", "W4A8, distilled", distilled=True),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
# Left out unless they are asked for.
_EXTRA = ("w4a16-rtn-plain", "w4a8-rtn-code8")


def default_recipes(calibration: bool, distillation: bool) -> list[str]:
    """All that can be run with the data there is."""
    return [
        name
        for name, recipe in RECIPES.items()
        if name not in _EXTRA and (calibration or not recipe.calibrated) and (distillation or not recipe.distilled)
    ]


def select(names: Sequence[str], start: str, *, calibration: bool, distillation: bool) -> list[Recipe]:
    """The recipes of these names, in the order of tables.

    Args:
        names: what was asked for.
        start: the recipe that a distillation begins with.
        calibration, distillation: whether there is data for it.

    Raises:
        W4A8Error: a name is unknown or given twice, or its data is missing.
    """
    for name in [*names, start]:
        if name not in RECIPES:
            raise W4A8Error(f"recipe {name!r}: is unknown; there are {', '.join(RECIPES)}")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise W4A8Error(f"recipe {twice[0]}: is given twice")
    chosen = [recipe for name, recipe in RECIPES.items() if name in names]
    for recipe in chosen:
        begin = RECIPES[start] if recipe.distilled else recipe
        if begin.options is None or begin.options.get("scheme") == "w4a16":
            if recipe.distilled:
                raise W4A8Error(f"{recipe.name}: expected a W4A8 recipe to begin with, found {start}")
            continue
        if begin.calibrated and not calibration:
            which = f"{recipe.name}, which begins with {start}" if recipe.distilled else recipe.name
            raise W4A8Error(f"{which}: needs calibration data; give --calibration")
        if recipe.distilled and not distillation:
            raise W4A8Error(f"{recipe.name}: needs data to train on; give --distill-data")
    return chosen


def check_known(options: Mapping[str, Any]) -> None:
    """Raises:
    W4A8Error: `quantize` has no such option.
    """
    from ..quantization.pipeline import quantize

    missing = sorted(set(options) - set(inspect.signature(quantize).parameters))
    if missing:
        raise W4A8Error(f"quantize has no option {missing[0]!r} in this version, so that this recipe cannot be run")

"""What a model's layers see, and when: windows given for a base grid, schedules over steps and layers, and
the recipes that were published. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gnaflex import paper
from gnaflex.spec import GNA, GNAError


@dataclass(frozen=True)
class Neighborhood:
    """A window, stride and dilation for any grid; one entry per axis, or one for all.

    ``base`` is the grid the numbers are meant for: on another grid window, stride and dilation are scaled
    axis by axis, ``-1`` in ``base`` (or None for all) leaving an axis as it is. The rule of scaling is that
    of Cosmos-Predict2: ``round``, the window at least 2, all within the axis.

    Example:
        >>> Neighborhood((18, 24, 24), (16, 8, 8), base=(30, 48, 80)).on((15, 24, 80))
        GNA(shape=(15, 24, 80), window=(9, 12, 24), stride=(8, 4, 8))
    """

    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | str | Sequence[int | str] = 1
    is_causal: bool | Sequence[bool] = False
    base: Sequence[int] | None = None

    def on(self, grid: tuple[int, ...]) -> GNA:
        """The problem on a grid; raises GNAError where it breaks a rule there."""
        fields = [_entries(name, getattr(self, name), len(grid)) for name in ("window", "stride", "dilation")]
        bases = _entries("base", -1 if self.base is None else self.base, len(grid))
        scaled = [_scaled(*column) for column in zip(grid, bases, *fields, strict=True)]
        window, stride, dilation = zip(*scaled, strict=True)
        return GNA(grid, window, stride, dilation, self.is_causal)

    def check(self, axes: int) -> None:
        """Refuse what is valid on no grid of so many axes."""
        windows, dilations, bases = (
            _entries(name, value, axes)
            for name, value in (
                ("window", self.window),
                ("dilation", self.dilation),
                ("base", -1 if self.base is None else self.base),
            )
        )
        self.on(tuple(map(_least_length, windows, dilations, bases)))

    def too_large(self, grid: tuple[int, ...]) -> str:
        """Why a grid is too small for it, in words; "" if it is not."""
        windows = _entries("window", self.window, len(grid))
        dilations = _entries("dilation", self.dilation, len(grid))
        bases = _entries("base", -1 if self.base is None else self.base, len(grid))
        for axis, (length, base, window, dilation) in enumerate(
            zip(grid, bases, windows, dilations, strict=True)
        ):
            reach = max(window, 1) * (1 if dilation == "max" else dilation)
            if base == -1 and reach > length:
                return f"its window reaches over {reach} tokens of axis {axis}, which has {length}"
        return ""


def _entries(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    entries = (value,) * rank if isinstance(value, str) or not hasattr(value, "__len__") else tuple(value)
    if len(entries) != rank:
        raise GNAError(
            f"{name} must have one entry per axis, or be a scalar: got {name}={entries} for a grid of {rank} "
            f"axes.\n  Write {name}={(entries * rank)[:rank]!r}, say."
        )
    return entries


def _least_length(window: Any, dilation: Any, base: Any) -> Any:
    """A length on which an axis breaks no rule of lengths."""
    if base != -1:
        return base
    steps = dilation if isinstance(dilation, int) else 1
    return max(window, 1) * max(steps, 1)


def _scaled(length: int, base: int, window: int, stride: int, dilation: Any) -> tuple[int, int, Any]:
    """One axis for its actual length (get_adaptive_parameters in NVIDIA's cosmos-predict2)."""
    if base == -1 or base == length:
        return window, stride, dilation
    scale = length / base
    window = length if window == -1 else min(max(2, round(window * scale)), length)
    stride = min(max(1, round(stride * scale)), window)
    if dilation != "max":
        dilation = min(max(1, round(dilation * scale)), length // window)
    return window, stride, dilation


@dataclass(frozen=True)
class Schedule:
    """Which steps and layers are sparse; all others stay as they are, dense.

    Args:
        dense_first, dense_last: steps at either end of a run: an int counts them, a float is a share of all
            (rounded up).
        layers: other neighborhoods for single layers, by number in the order they run (negative from the
            end); None keeps a layer dense.
        steps: of a run. A pipeline's scheduler knows them; a bare transformer needs them for shares and for
            ``dense_last``.

    Example:
        >>> Schedule(dense_first=0.3).is_dense(step=14, steps=50), Schedule(dense_first=0.3).is_dense(15, 50)
        (True, False)
    """

    dense_first: int | float = 0
    dense_last: int | float = 0
    layers: Mapping[int, Neighborhood | None] = field(default_factory=dict, hash=False)
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_last"):
            _check_share(name, getattr(self, name))

    @property
    def watches_steps(self) -> bool:
        """Whether anything depends on the step."""
        return bool(self.dense_first or self.dense_last)

    @property
    def needs_steps(self) -> bool:
        """Whether the number of steps must be known."""
        return bool(self.dense_last) or (isinstance(self.dense_first, float) and self.dense_first > 0)

    def is_dense(self, step: int, steps: int | None) -> bool:
        """Whether a step (from 0) is dense; ``steps`` may be None unless :attr:`needs_steps`."""
        if steps is None and self.needs_steps:
            raise GNAError(
                "dense_last, and dense_first as a share, need the number of steps, which a bare transformer "
                "does not know.\n  Give the pipeline, or write Schedule(..., steps=50)."
            )
        first, last = (_count(share, steps or 0) for share in (self.dense_first, self.dense_last))
        return step < first or (last > 0 and steps is not None and step >= steps - last)

    def of_layer(self, number: int, count: int, default: Neighborhood | None) -> Neighborhood | None:
        """What layer ``number`` of ``count`` sees: None is everything."""
        for key in (number, number - count):
            if key in self.layers:
                return self.layers[key]
        return default

    def check_layers(self, count: int) -> None:
        """Refuse numbers that no layer of a model with ``count`` layers has, and what is no neighborhood."""
        for number, one in self.layers.items():
            if one is not None and not isinstance(one, Neighborhood):
                raise GNAError(
                    f"layers must hold a Neighborhood, or None for dense: layer {number} has {one!r}.\n"
                    f"  Write Schedule(layers={{{number}: Neighborhood(window=(18, 24, 24))}})."
                )
            if not -count <= number < count:
                raise GNAError(
                    f"layers must name layers of the model: got {number}, it has {count}.\n"
                    f"  Numbers go from 0 to {count - 1}, or from -{count} to -1."
                )


def problem_on(neighborhood: Neighborhood | None, grid: tuple[int, ...]) -> GNA | str:
    """What a layer computes on a grid, or why it stays dense there."""
    if neighborhood is None:
        return "its schedule has it dense"
    if len(grid) == 3 and grid[0] == 1:
        return "an image, one frame"
    if why := neighborhood.too_large(grid):
        return why
    spec = neighborhood.on(grid)
    return "its window is the whole grid" if covers_all(spec) else spec


def covers_all(spec: GNA) -> bool:
    """Whether every token sees every token."""
    return spec.window == spec.shape and not any(spec.is_causal)


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise GNAError(
            f"{name} must be a number of steps, or a share: got {value!r}. Write {name}=3, or 0.3."
        )
    if isinstance(value, float) and value > 1:
        raise GNAError(
            f"{name} as a float is a share of the steps, 0 to 1: got {value}. Write {name}={round(value)} "
            "for a number of steps."
        )


def _count(share: int | float, steps: int) -> int:
    """Steps; a share is rounded up, but not by what floating point adds."""
    return share if isinstance(share, int) else math.ceil(share * steps - 1e-9)


@dataclass(frozen=True)
class Recipe:
    """A neighborhood with its schedule, and where both come from."""

    neighborhood: Neighborhood | None
    schedule: Schedule = Schedule()
    name: str = ""
    source: str = ""

    def check(self, count: int, axes: int) -> None:
        """Refuse what no model with ``count`` layers on grids of ``axes`` axes can do."""
        self.schedule.check_layers(count)
        for one in (self.neighborhood, *self.schedule.layers.values()):
            if one is not None:
                one.check(axes)


def recipe(name: str) -> Recipe:
    """A published recipe by name: :data:`RECIPES` lists them.

    Args:
        name: "flux-4k-90", "cosmos-56", "cosmos-89", "hunyuanvideo-58", "hunyuanvideo-91" (the paper's; the
            number is the sparsity in percent) or "cosmos-predict2-2b" (a window per layer).

    Raises:
        GNAError: there is no such recipe.

    Example:
        >>> import gnaflex
        >>> one = gnaflex.models.recipe("hunyuanvideo-91")
        >>> one.neighborhood.window, one.schedule.dense_first
        ((18, 24, 24), 0.3)
    """
    if name not in RECIPES:
        raise GNAError(f"no recipe is called {name!r}. Write one of {', '.join(map(repr, RECIPES))}.")
    return RECIPES[name]


def _of_paper(name: str, model: paper.Model, window: tuple[int, ...], stride: tuple[int, ...]) -> Recipe:
    """A perfectly block-sparse row of arXiv 2504.16922, with the share of dense steps it prints."""
    return Recipe(
        Neighborhood(window, stride, base=model.shape),
        Schedule(dense_first=model.dense_steps / model.steps),
        name,
        f"arXiv 2504.16922: {model.name}, the first {model.dense_steps} of {model.steps} steps dense",
    )


def _predict2_2b() -> Recipe:
    """Layer by layer, no dense steps: what NVIDIA's cosmos-predict2 calls its final choice for the 2B model
    (NATTEN_PARAMETERS_2B_COMB02), trained with it. The letters are ours."""
    base = (-1, 44, 80)
    kinds = {
        "A": Neighborhood((-1, 4, 16), 1, (1, 11, 5), base=base),
        "B": Neighborhood((-1, 12, 16), (1, 4, 1), (1, 1, 5), base=base),
        "C": Neighborhood((-1, 12, 24), (1, 4, 8), base=base),
        "D": Neighborhood((-1, 20, 40), (1, 4, 8), base=base),
        "E": Neighborhood((-1, 28, 56), (1, 4, 8), base=base),
    }
    layers = "AABCCBCCCCBDDDDDDDDDDDDEDDDC"
    schedule = Schedule(layers={number: kinds[kind] for number, kind in enumerate(layers)})
    return Recipe(kinds["D"], schedule, "cosmos-predict2-2b", "cosmos-predict2, 2B, windows per layer")


RECIPES = {
    one.name: one
    for one in (
        _of_paper("flux-4k-90", paper.FLUX, (80, 80), (16, 16)),
        _of_paper("cosmos-56", paper.COSMOS, (16, 32, 48), (1, 8, 16)),
        _of_paper("cosmos-89", paper.COSMOS, (16, 24, 16), (1, 8, 16)),
        _of_paper("hunyuanvideo-58", paper.HUNYUAN, (30, 40, 40), (1, 32, 8)),
        _of_paper("hunyuanvideo-91", paper.HUNYUAN, (18, 24, 24), (16, 8, 8)),
        _predict2_2b(),
    )
}


def as_recipe(window: Any, stride: Any, dilation: Any, base: Any, schedule: Schedule | None) -> Recipe:
    """The recipe from any way to give it."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise GNAError(
            f"schedule must be a Schedule: got {schedule!r}.\n"
            "  Write schedule=gnaflex.models.Schedule(dense_first=0.3)."
        )
    if isinstance(window, (Recipe, Neighborhood)) and (stride, dilation, base) != (1, 1, None):
        raise GNAError(
            f"a {type(window).__name__} is the whole problem: got stride, dilation or base too.\n"
            "  Write Neighborhood(window, stride, dilation, base=...)."
        )
    if isinstance(window, Recipe):
        return window if schedule is None else replace(window, schedule=schedule)
    if window is not None and not isinstance(window, Neighborhood):
        window = Neighborhood(window, stride, dilation, base=base)
    return Recipe(window, schedule or Schedule())

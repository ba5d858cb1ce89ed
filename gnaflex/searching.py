"""The best of all windows, strides and tiles; no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from gnaflex.axis_tables import MOST_ENTRIES, Side, work_of
from gnaflex.fewest import Bar, Classes, Fewest, check_combinations, progress_bar
from gnaflex.planner import ROWS, KVTiling, Plan, check_choice, check_spec
from gnaflex.spec import GNA, Axis, GNAError, whole
from gnaflex.tiles import Tile, groups, relation
from gnaflex.window import IntArray

if TYPE_CHECKING:
    from rich.table import Table

Choices: TypeAlias = "int | range | Sequence[int | Sequence[int]] | None"
Objective = Literal["work_speedup", "efficiency", "reach"]
MOST_SEARCH_WORK = 5e9  # numbers computed for an axis: about two minutes


@dataclass(frozen=True)
class Row:
    """A problem found: its ``plan``, and how far a query sees.

    ``reach`` is the share of an axis's length that the keys of a query span, on average over the queries
    (window * dilation / length unless the axis is causal), as the geometric mean of the axes; ``margin`` is,
    per axis, how many tokens each query is sure to see to both sides (dilation's gaps and the grid's border
    aside; to one side on a causal axis).
    """

    plan: Plan
    reach: float

    @property
    def spec(self) -> GNA:
        """The problem."""
        return self.plan.spec

    @property
    def work_speedup(self) -> float:
        """That of the plan; dense tiles fill their rows."""
        return self.plan.work_speedup

    @property
    def efficiency(self) -> float:
        """The share of the FLOP bound that ``work_speedup`` reaches."""
        return self.plan.work_speedup / self.plan.flop_speedup

    @property
    def margin(self) -> tuple[int, ...]:
        """Per axis the tokens that every query is sure to see to both sides."""
        return tuple(map(_margin, self.spec.axes))


def _margin(axis: Axis) -> int:
    least = axis.length - 1
    for n, _ in groups(axis):
        lo, hi = relation(n, axis)
        query = np.arange(n)
        behind, ahead = (query - lo)[lo > 0], (hi - 1 - query)[hi < n]
        for side in (behind,) if axis.is_causal else (behind, ahead):
            least = min(least, *(side * axis.dilation).tolist()) if side.size else least
    return least


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the best ``rows`` by the objective, and the Pareto ``front``, fastest first.

    The front is that of all problems that qualify: no other is at least as fast and reaches at least as far.
    ``problems`` counts the windows and strides tried, each with all tiles.
    """

    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    problems: int

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, front: bool = False) -> Table:
        """The rows, or the front, as a table of rich."""
        try:
            from rich.table import Table
        except ImportError as error:
            raise GNAError("a table needs rich. Write pip install rich, or read the rows.") from error
        shown = Table(title="Pareto front" if front else None)
        for name in ("window", "stride", "query tile", "key tile"):
            shown.add_column(name)
        for name in ("speed-up", "of bound", "sparsity", "reach", "margin"):
            shown.add_column(name, justify="right")
        for row in self.front if front else self.rows:
            boxes = (row.spec.window, row.spec.stride, row.plan.q_tile, row.plan.kv_tile)
            figures = (
                f"{row.work_speedup:.2f}",
                f"{row.efficiency:.0%}",
                f"{row.plan.sparsity:.2%}",
                f"{row.reach:.0%}",
            )
            shown.add_row(*map(_by, boxes), *figures, _by(row.margin))
        return shown


def _by(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))


def search(
    shape: int | Sequence[int],
    *,
    windows: Choices = None,
    strides: Choices = None,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
    block_sparse: bool = True,
    kv_tiling: KVTiling = "dynamic",
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    q_rows: int = ROWS,
    kv_rows: int = ROWS,
    objective: Objective = "work_speedup",
    each_stride: bool = False,
    progress: bool = False,
    limit: int = 20,
) -> SearchResult:
    """The best of all windows, strides and tiles, by exact counts.

    One row per window, with the strides and tiles that visit the fewest tiles, and of equal ones the smallest
    strides (on a causal axis, where a stride changes what is seen: per window and number of keys seen).
    Speed and what a query sees pull against each other, hence the front of ``work_speedup`` and ``reach``,
    see :class:`Row`. ``efficiency`` follows from the two, so no row off the front beats one on it in all.

    Args:
        shape: tokens per axis.
        windows, strides: what to try: None for all, a range (or one number) for every axis, or per axis a
            number or several; -1 is the whole axis (as a stride: the window). Windows that do not fit an axis
            and strides longer than the window are left out.
        dilation, is_causal: as in :class:`gnaflex.GNA`.
        min_sparsity, max_sparsity: bounds of the share of pairs that are masked.
        block_sparse: whether only perfectly block-sparse problems count.
        kv_tiling: "static" or "dynamic", see :class:`gnaflex.Plan`.
        q_tile, kv_tile: tokens per axis of a tile; None tries all boxes that fill more than half of the rows.
        q_rows, kv_rows: tokens that a tile may hold when it is not given. One of fewer costs a whole one.
        objective: "work_speedup", "efficiency" or "reach": what the rows are sorted by, highest first.
        each_stride: one row per window and stride instead; for few windows.
        progress: show a progress bar. Ctrl-C removes it.
        limit: how many rows are wanted; the front is always whole.

    Raises:
        GNAError: an argument is none of those listed, nothing is left to try on an axis, or there are more
            combinations than fit in memory.

    Example:
        >>> from gnaflex.searching import search
        >>> found = search((30, 48, 80), windows=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))
        >>> found.rows[0].spec.stride, round(found.rows[0].work_speedup, 2)
        ((4, 8, 8), 10.42)
    """
    check_choice("kv_tiling", kv_tiling, get_args(KVTiling))
    check_choice("objective", objective, get_args(Objective))
    if not all(isinstance(one, (int, float)) for one in (min_sparsity, max_sparsity)) or not (
        0 <= min_sparsity <= max_sparsity <= 1
    ):
        raise GNAError(
            "sparsity must be a share of 0 to 1, the least at most the greatest: "
            f"min_sparsity={min_sparsity!r}, max_sparsity={max_sparsity!r}. Write min_sparsity=0.8."
        )
    limit = whole("limit", limit)
    if any(isinstance(one, str) for one in (dilation if _is_sequence(dilation) else (dilation,))):  # type: ignore[union-attr]
        raise GNAError('a search needs a dilation in numbers: "max" depends on the window. Write dilation=2.')
    base = GNA(shape, 1, 1, dilation, is_causal)
    check_spec(base)
    options = _choices(base, windows, strides)
    q, kv = Side.of("q_tile", q_tile, base, q_rows), Side.of("kv_tile", kv_tile, base, kv_rows)
    _check_sizes(base, options, q, kv, each_stride)
    with progress_bar(progress) as bar:
        classes = _classes(base, options, (q, kv), kv_tiling, block_sparse, each_stride, bar)
        fewest = Fewest(classes, q, kv)
        touched = fewest.all(bar)
    found, touched, allowed = _qualifying(base, classes, touched, (min_sparsity, max_sparsity))
    keys = {"work_speedup": (touched, -allowed), "efficiency": (touched / allowed, touched)}
    order = np.lexsort(keys.get(objective, (-allowed, touched))[::-1])[:limit]
    row = functools.partial(_row, base, fewest, kv_tiling)
    rows, front = ([row(int(found[at])) for at in which] for which in (order, _front(touched, allowed)))
    return SearchResult(tuple(rows), tuple(front), math.prod(map(len, options)))


def _classes(
    base: GNA,
    options: list[IntArray],
    sides: tuple[Side, Side],
    tiling: KVTiling,
    block_sparse: bool,
    each_stride: bool,
    bar: Bar,
) -> list[Classes]:
    """Those of every axis; equal axes share one."""
    known: dict[Any, Classes] = {}
    for a, axis in enumerate(base.axes):
        extents = sides[0].extents[a], sides[1].extents[a]
        key = _key(axis, options[a], *extents)
        if key not in known:
            known[key] = Classes.of(axis, options[a], extents, tiling, block_sparse, each_stride, bar)
    return [
        known[_key(axis, some, sides[0].extents[a], sides[1].extents[a])]
        for a, (axis, some) in enumerate(zip(base.axes, options, strict=True))
    ]


def _key(axis: Axis, *arrays: IntArray) -> tuple[Any, ...]:
    return (axis, *((one.shape, one.tobytes()) for one in arrays))


def _qualifying(
    base: GNA, classes: list[Classes], touched: Any, bounds: tuple[float, float]
) -> tuple[IntArray, Any, Any]:
    """The combinations of classes within the bounds: which, their visited tiles, the pairs they allow."""
    allowed = functools.reduce(np.multiply.outer, [one.allowed for one in classes]).ravel()
    sparsity = 1 - allowed / base.num_tokens**2
    found = np.flatnonzero((touched < np.inf) & (bounds[0] <= sparsity) & (sparsity <= bounds[1]))
    return found, touched[found], allowed[found]


def _choices(base: GNA, windows: Choices, strides: Choices) -> list[IntArray]:
    """Per axis the windows and strides to try, [options, 2]."""
    out = []
    each = zip(base.axes, _spread("windows", windows, base), _spread("strides", strides, base), strict=True)
    for a, (axis, some, steps) in enumerate(each):
        most = axis.length // axis.dilation
        sizes = range(1, most + 1) if some is None else {most if w == -1 else w for w in some}
        kept = [
            (w, s)
            for w in sorted(w for w in sizes if 1 <= w <= most)
            for s in (range(1, w + 1) if steps is None else sorted({w if s == -1 else s for s in steps}))
            if 1 <= s <= w
        ]
        if not kept:
            raise GNAError(
                f"nothing to try on axis {a}: windows must lie in 1..{most} (window*dilation <= length) and "
                f"strides in 1..window.\n  length={axis.length}, dilation={axis.dilation}, windows={some}, "
                f"strides={steps}. Write windows=range(1, {most + 1})."
            )
        out.append(np.array(kept))
    return out


def _check_sizes(base: GNA, options: list[IntArray], q: Side, kv: Side, each_stride: bool) -> None:
    """Refuse what does not fit in memory, or takes many minutes."""
    axes = list(zip(base.axes, options, strict=True))
    kept = [some if each_stride or axis.is_causal else some[:, :1] for axis, some in axes]
    counts = [len(np.unique(one, axis=0)) for one in kept]
    check_combinations(counts, int(options[-1].max()))
    for a, (axis, some) in enumerate(axes):
        entries = counts[a] * q.size(a) * kv.size(a) / MOST_ENTRIES
        excess = max(entries, work_of(len(some), axis, q.extents[a], kv.extents[a]) / MOST_SEARCH_WORK)
        if excess > 1:
            most, windows = int(some.max()), len(np.unique(some[:, 0]))
            step = min(math.ceil(excess * most / windows), most)
            raise GNAError(
                f"too much to search on axis {a}, {excess:.1f} times over: {len(some):,} windows and strides "
                f"of {axis.length:,} tokens, {q.size(a)} x {kv.size(a)} tile extents.\n"
                f"  Give tiles, or fewer windows. Write windows=range({step}, {most + 1}, {step})."
            )


def _spread(name: str, given: Choices, base: GNA) -> list[Sequence[int] | None]:
    """The windows or strides of every axis."""
    if given is None or isinstance(given, range) or not _is_sequence(given):
        return [_numbers(name, given)] * base.rank
    entries = list(given)  # type: ignore[arg-type]
    if len(entries) != base.rank:
        raise GNAError(
            f"{name} must have one entry per axis, or be one range: got {given!r} for rank {base.rank}.\n"
            f"  shape={base.shape}. Write {name}=range(2, {max(base.shape) + 1}, 2), or one range per axis."
        )
    return [_numbers(name, one) for one in entries]


def _is_sequence(given: Any) -> bool:
    return hasattr(given, "__len__") and not isinstance(given, str) and getattr(given, "ndim", 1) > 0


def _numbers(name: str, given: Any) -> Sequence[int] | None:
    """What to try on an axis: None for all, else integers, -1 among them."""
    if given is None or isinstance(given, range):
        return given
    entries = given if _is_sequence(given) else [given]
    return [whole(f"every entry of {name}", one, -1) for one in entries]


def _front(touched: Any, allowed: Any) -> IntArray:
    """Those that no other beats or equals in one figure without losing in the other, fastest first."""
    order = np.lexsort((touched, -allowed))
    ahead = np.minimum.accumulate(np.concatenate([[np.inf], touched[order]]))[:-1]
    return np.asarray(order[touched[order] < ahead][::-1])


def _row(base: GNA, fewest: Fewest, tiling: KVTiling, number: int) -> Row:
    which = [int(one) for one in np.unravel_index(number, fewest.sizes)]
    at, q, kv = fewest.tiles(which), fewest.q, fewest.kv
    chosen = [
        one.options[one.best[i, j, w]].tolist()
        for one, w, (i, j) in zip(fewest.classes, which, at, strict=True)
    ]
    window, stride = zip(*chosen, strict=True)
    spec = GNA(base.shape, window, stride, base.dilation, base.is_causal)
    how = Plan(*(spec, q.box([i for i, _ in at]), kv.box([j for _, j in at]), tiling), q.charged, kv.charged)
    span = math.prod(base.dilation) * how.allowed_pairs / base.num_tokens**2
    return Row(how, span ** (1 / base.rank))

"""Problems that tile well: the nearest to one, the best of a whole space, why one does not; no torch.

A problem is perfectly block-sparse exactly if on every axis each key tile that a query tile visits is
unmasked. So axes are tabulated one by one, for every window, stride and tile extent; what is reported of a
problem is a product over these tables, and equals what :func:`gnaflex.plan` counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from gnaflex.planner import ROWS, AxisTiles, KVTiling, Plan, _checked, _Ranges, plan
from gnaflex.spec import GNA, Axis, GNAError
from gnaflex.tiles import Relation, Tile, groups, relation
from gnaflex.window import IntArray

if TYPE_CHECKING:
    from rich.table import Table

Choices: TypeAlias = "int | range | Sequence[int | Sequence[int]] | None"
Objective = Literal["speedup", "efficiency", "reach"]
WINDOW_WEIGHT = 12  # of a window's change, by that of a stride: a window says what a model sees
MOST_OPTIONS = 20_000  # windows and strides of an axis that `nearest` looks at
MOST_ENTRIES = 60_000_000  # of the table of an axis: options by tile extents
MOST_WORK = 1e9  # that `nearest` puts into an axis: some seconds
MOST_ROWS = 20_000_000  # combinations that a search holds at once


# ---- one axis, all its windows and strides -----------------------------------------------------------


class _Table(NamedTuple):
    """Windows and strides of an axis, [options, 2]; the pairs each allows; key tiles visited by all query
    tiles, and whether none of them needs a mask, [options, query extents, key extents]."""

    options: IntArray
    allowed: IntArray
    visited: IntArray
    perfect: Any


def _table(axis: Axis, options: IntArray, q_extents: IntArray, kv_extents: IntArray, tiling: str) -> _Table:
    at_once = max(min(512, 2**22 // axis.length), 1)
    parts = [
        _part(axis, some, q_extents, kv_extents, tiling)
        for some in np.array_split(options, -(-len(options) // at_once))
    ]
    allowed, visited, perfect = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Table(options, allowed, visited, perfect)


def _part(axis: Axis, options: IntArray, q_extents: IntArray, kv_extents: IntArray, tiling: str) -> Any:
    visited = np.zeros((len(q_extents), len(kv_extents), len(options)), np.int64)
    unmasked = np.zeros_like(visited)
    allowed = np.zeros(len(options), np.int64)
    for n, members in groups(axis):
        each = [relation(n, axis._replace(window=w, stride=s)) for w, s in options.tolist()]
        pairs = Relation(np.array([one.lo for one in each]).T, np.array([one.hi for one in each]).T)
        allowed += len(members) * (pairs.hi - pairs.lo).sum(0)
        for at, q in enumerate(q_extents.tolist()):
            start = np.arange(0, n, q)
            stop = np.minimum(start + q, n)
            ranges = _Ranges(start, pairs.any_of(start, stop), pairs.all_of(start, stop))
            for kv_at, kv in enumerate(kv_extents.tolist()):
                seen, clear, _ = ranges.tiles(kv, n, tiling)  # type: ignore[arg-type]
                visited[at, kv_at] += len(members) * seen.sum(0)
                unmasked[at, kv_at] += len(members) * clear.sum(0)
    return allowed, visited.transpose(2, 0, 1), (visited == unmasked).transpose(2, 0, 1)


class _Side(NamedTuple):
    """The boxes to try as query or key tiles: extents per axis, of ``least`` to ``rows`` tokens together."""

    extents: tuple[IntArray, ...]
    least: int
    rows: int
    known: dict[tuple[int, int], list[int]]

    @staticmethod
    def of(name: str, tile: Tile | None, spec: GNA, rows: int) -> _Side:
        """The tile given, or all boxes that :func:`plan` tries: those that fill more than half."""
        if given := _checked(name, tile, spec):
            tokens = math.prod(given)
            return _Side(tuple(np.array([extent]) for extent in given), tokens, tokens, {})
        lengths = [axis.group_length(0) for axis in spec.axes]
        extents = tuple(np.arange(1, min(rows, length) + 1) for length in lengths)
        return _Side(extents, min(rows, math.prod(lengths)) // 2 + 1, rows, {})

    def fits(self, axis: int, before: int) -> list[int]:
        """Which extents of ``axis`` can follow axes whose extents have the product ``before``."""
        if (axis, before) not in self.known:
            most = math.prod(int(later[-1]) for later in self.extents[axis + 1 :])
            tokens = before * self.extents[axis]
            fits = np.flatnonzero((tokens <= self.rows) & (tokens * most >= self.least))
            self.known[axis, before] = fits.tolist()
        return self.known[axis, before]

    def size(self, axis: int) -> int:
        """How many extents there are on an axis."""
        return len(self.extents[axis])

    def after(self, axis: int, before: int, which: int) -> int:
        """The product with extent ``which`` of ``axis``."""
        return before * int(self.extents[axis][which])

    def box(self, which: Sequence[int]) -> Tile:
        """The extents themselves."""
        return tuple(int(extent[at]) for extent, at in zip(self.extents, which, strict=True))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(f'"{one}"' for one in allowed)
        raise GNAError(f'{name} must be one of {listed}: got {value!r}. Write {name}="{allowed[0]}".')


# ---- the nearest problems ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearby:
    """A perfectly block-sparse problem near another: how it tiles, how far it is, and what differs."""

    plan: Plan
    distance: float
    changes: tuple[str, ...]

    @property
    def spec(self) -> GNA:
        """The problem."""
        return self.plan.spec

    @property
    def work_speedup(self) -> float:
        """That of the plan."""
        return self.plan.work_speedup


def nearest(
    spec: GNA,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    kv_tiling: KVTiling = "dynamic",
    *,
    limit: int = 10,
    keep: Collection[str] = (),
    q_rows: int = ROWS,
    kv_rows: int = ROWS,
) -> list[Nearby]:
    """The perfectly block-sparse problems closest to one that is not, smallest change first.

    Strides and windows change, on every axis by itself; shape, dilation and causality do not. The distance
    is the sum over the axes of ``|log2(stride' / stride)| + 12 |log2(window' / window)|``: a stride twice as
    long is as far as a window 6% longer, as the window says what a model sees. Of equally distant problems
    the one with the fewest visited tiles comes first. A problem that is block-sparse itself comes first of
    all, at distance 0.

    Args:
        spec: the problem.
        q_tile, kv_tile: tokens per axis of a tile. One that is not given is free, at no distance: of
            all boxes that fill more than half of ``q_rows`` or ``kv_rows`` those with the fewest visited
            tiles, as a tile of fewer tokens costs a whole one.
        kv_tiling: "static" or "dynamic", see :class:`gnaflex.Plan`.
        limit: how many problems are wanted.
        keep: "window", "stride" or both: what must stay.
        q_rows, kv_rows: tokens that a tile may hold when it is not given.

    Returns:
        At most ``limit`` problems; none when no change mends it, as on a causal axis with a query tile
        longer than 1 there. On long axes (thousands of windows and strides, or tens of millions with the
        extents of free tiles) only changes near the problem are looked at, and there may be fewer.

    Raises:
        GNAError: a tile does not fit the problem, or an argument is none of those listed.

    Example:
        >>> import gnaflex
        >>> from gnaflex.searching import nearest
        >>> video = gnaflex.GNA((33, 45, 80), window=(18, 24, 24), stride=(16, 8, 6))
        >>> best = nearest(video, (2, 8, 8), (2, 8, 8))[0]
        >>> best.changes, round(best.work_speedup, 2)
        (('axis 2: stride 6 -> 8',), 10.45)
    """
    _check_choice("kv_tiling", kv_tiling, get_args(KVTiling))
    for name in keep:
        _check_choice("keep", name, ("window", "stride"))
    if limit < 1:
        raise GNAError(f"limit must be at least 1: got limit={limit}. Write limit=10.")
    q, kv = _Side.of("q_tile", q_tile, spec, q_rows), _Side.of("kv_tile", kv_tile, spec, kv_rows)
    ladders, found = _certain(spec, q, kv, kv_tiling, limit, keep)
    return [_nearby(spec, ladders, found, at, q, kv, kv_tiling) for at in range(len(found.distance))]


def _certain(
    spec: GNA, q: _Side, kv: _Side, tiling: KVTiling, limit: int, keep: Collection[str]
) -> tuple[list[_Ladder], _Found]:
    """The first problems, in a radius that grows until no unseen one could be among them."""
    sides = list(zip(spec.axes, q.extents, kv.extents, strict=True))
    sizes: list[int] = []
    for exponent in itertools.count(-8, 2):
        around = [_around(axis, 2.0**exponent, keep) for axis in spec.axes]
        missing = min(beyond for _, beyond in around)
        before, sizes = sizes, [len(options) for options, _ in around]
        if missing < math.inf and before == sizes:
            continue
        if before and any(_is_too_much(size, *side) for size, side in zip(sizes, sides, strict=True)):
            break
        ladders = [
            _Ladder(axis, options, _table(axis, options, q_extents, kv_extents, tiling), limit)
            for (options, _), (axis, q_extents, kv_extents) in zip(around, sides, strict=True)
        ]
        found = _Closest(ladders, q, kv, limit).from_axis(0, 1, 1)
        if missing == math.inf or (len(found.distance) == limit and found.distance[-1] < missing):
            break
    return ladders, found


def _is_too_much(options: int, axis: Axis, q: IntArray, kv: IntArray) -> bool:
    work = options * axis.length * max(50.0, len(kv) * float((1 / q).sum()))
    return options > MOST_OPTIONS or options * len(q) * len(kv) > MOST_ENTRIES or work > MOST_WORK


def _around(axis: Axis, radius: float, keep: Collection[str]) -> tuple[IntArray, float]:
    """The windows and strides of an axis up to a distance, [options, 2], and a bound of the others'."""
    most = axis.length // axis.dilation
    narrow, wide = axis.window * 2 ** (-radius / WINDOW_WEIGHT), axis.window * 2 ** (radius / WINDOW_WEIGHT)
    windows = np.arange(math.ceil(narrow), min(math.floor(wide), most) + 1)
    strides = np.arange(
        math.ceil(axis.stride * 2**-radius), min(math.floor(axis.stride * 2**radius), most) + 1
    )
    pairs = np.stack(np.meshgrid(windows, strides, indexing="ij"), -1).reshape(-1, 2)
    fixed = ("window" in keep) * (pairs[:, 0] != axis.window) | ("stride" in keep) * (
        pairs[:, 1] != axis.stride
    )
    near = (_distance(axis, pairs) <= radius * 1e6) & (pairs[:, 1] <= pairs[:, 0])
    whole = _distance(axis, np.array([[1, axis.stride], [most, axis.stride]])).max()
    whole += _distance(axis, np.array([[axis.window, 1], [axis.window, most]])).max()
    return pairs[near & ~fixed.astype(bool)], math.inf if whole <= radius * 1e6 or len(
        {*keep}
    ) == 2 else radius * 1e6


def _distance(axis: Axis, options: IntArray) -> Any:
    """In millionths, so that equal changes of different axes tie exactly."""
    ratio = np.abs(np.log2(options / (axis.window, axis.stride)))
    return np.rint(ratio * 1e6) @ (WINDOW_WEIGHT, 1.0)


class _Found(NamedTuple):
    """The first problems on some axes by (distance, visited tiles): per axis the option, and the extents of
    the tiles that visit the fewest, [problems, axes]."""

    distance: Any
    visited: Any
    options: IntArray
    q: IntArray
    kv: IntArray

    def first(self, limit: int) -> _Found:
        """The first ``limit`` different problems."""
        order = np.lexsort((*self.options.T[::-1], self.visited, self.distance))
        _, at = np.unique(self.options[order], axis=0, return_index=True)
        return _Found(*(column[order[np.sort(at)[:limit]]] for column in self))


class _Ladder:
    """The perfect options of an axis by distance, for each pair of extents."""

    def __init__(self, axis: Axis, options: IntArray, table: _Table, limit: int) -> None:
        self.table, self.limit, self.cache = table, limit, dict[tuple[int, int], Any]()
        self.distance = _distance(axis, options)

    def rungs(self, q: int, kv: int) -> tuple[IntArray, Any, Any]:
        """The first perfect options: which, their distances, and the tiles they visit."""
        if (q, kv) not in self.cache:
            perfect = np.flatnonzero(self.table.perfect[:, q, kv])
            visited = self.table.visited[perfect, q, kv].astype(float)
            first = np.lexsort((visited, self.distance[perfect]))[: self.limit]
            self.cache[q, kv] = perfect[first], self.distance[perfect[first]], visited[first]
        return self.cache[q, kv]  # type: ignore[no-any-return]


class _Closest:
    """The first problems over all tiles, axis by axis from the last one on.

    Distances add up, visited tiles multiply and tiles share nothing between the axes but their tokens. So
    for every product of the extents before an axis, the first ``limit`` from that axis on are all it takes.
    """

    def __init__(self, ladders: list[_Ladder], q: _Side, kv: _Side, limit: int) -> None:
        self.ladders, self.q, self.kv, self.limit = ladders, q, kv, limit
        self.cache: dict[Any, _Found] = {}

    def from_axis(self, a: int, q_before: int, kv_before: int) -> _Found:
        if a == len(self.ladders):
            return _Found(np.zeros(1), np.ones(1), *np.zeros((3, 1, 0), np.int64))
        q_fits, kv_fits = self.q.fits(a, q_before), self.kv.fits(a, kv_before)
        last = a == len(self.ladders) - 1
        key = (a, tuple(q_fits), tuple(kv_fits)) if last else (a, q_before, kv_before)
        if key not in self.cache:
            self.cache[key] = self._from_axis(a, q_before, kv_before, q_fits, kv_fits)
        return self.cache[key]

    def _from_axis(
        self, a: int, q_before: int, kv_before: int, q_fits: list[int], kv_fits: list[int]
    ) -> _Found:
        parts, bound = [], math.inf
        for q, kv in itertools.product(q_fits, kv_fits):
            which, distance, visited = self.ladders[a].rungs(q, kv)
            if not len(which) or distance[0] > bound:
                continue
            rest = self.from_axis(a + 1, self.q.after(a, q_before, q), self.kv.after(a, kv_before, kv))
            total = np.add.outer(distance, rest.distance)
            if total.size >= self.limit:
                bound = min(bound, float(np.partition(total, self.limit - 1, None)[self.limit - 1]))
            here, there = np.nonzero(total <= bound)
            columns = (
                (which[here], rest.options),
                (np.full(len(here), q), rest.q),
                (np.full(len(here), kv), rest.kv),
            )
            stacked = (np.column_stack([mine, theirs[there]]) for mine, theirs in columns)
            parts.append(_Found(total[here, there], visited[here] * rest.visited[there], *stacked))
        if not parts:
            return _Found(np.zeros(0), np.zeros(0), *np.zeros((3, 0, len(self.ladders) - a), np.int64))
        return _Found(*map(np.concatenate, zip(*parts, strict=True))).first(self.limit)


def _nearby(
    spec: GNA, ladders: list[_Ladder], found: _Found, at: int, q: _Side, kv: _Side, tiling: KVTiling
) -> Nearby:
    options = zip(ladders, found.options[at].tolist(), strict=True)
    window, stride = zip(*(ladder.table.options[option].tolist() for ladder, option in options), strict=True)
    other = GNA(spec.shape, window, stride, spec.dilation, spec.is_causal)
    changes = tuple(
        f"axis {a}: {change}" for a in range(spec.rank) for change in _changes(spec.axes[a], other.axes[a])
    )
    plan = Plan(other, q.box(found.q[at]), kv.box(found.kv[at]), tiling)
    return Nearby(plan, float(found.distance[at]) / 1e6, changes)


def _changes(before: Axis, after: Axis) -> list[str]:
    names = ("window", "stride")
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


# ---- the search --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A problem found, its tiles, and figures that equal those of its plan.

    ``speedup`` counts dense tiles that fill their rows, and ``efficiency`` is the share of the FLOP bound
    that it reaches. ``reach`` is the share of an axis's length that the keys of a query span, on average
    over the queries (window * dilation / length unless the axis is causal), as the geometric mean of the
    axes; ``margin`` is, per axis, how many tokens each query is sure to see to both sides (dilation's gaps
    and the grid's border aside; to one side on a causal axis).
    """

    spec: GNA
    q_tile: Tile
    kv_tile: Tile
    kv_tiling: KVTiling
    touched_tiles: int
    work_speedup: float
    speedup: float
    flop_speedup: float
    sparsity: float
    is_block_sparse: bool
    reach: float

    @property
    def efficiency(self) -> float:
        """The share of the FLOP bound that ``speedup`` reaches."""
        return self.speedup / self.flop_speedup

    @property
    def margin(self) -> tuple[int, ...]:
        """Per axis the tokens that every query is sure to see to both sides."""
        return tuple(map(_margin, self.spec.axes))

    def plan(self) -> Plan:
        """The plan of this problem with these tiles."""
        return plan(self.spec, self.q_tile, self.kv_tile, self.kv_tiling)


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
            boxes = (row.spec.window, row.spec.stride, row.q_tile, row.kv_tile)
            figures = (
                f"{row.speedup:.2f}",
                f"{row.efficiency:.0%}",
                f"{row.sparsity:.2%}",
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
    objective: Objective = "speedup",
    each_stride: bool = False,
    progress: bool = False,
    limit: int = 20,
) -> SearchResult:
    """The best of all windows, strides and tiles, by exact counts.

    One row per window, with the strides and tiles that visit the fewest tiles, and of equal ones the smallest
    strides (on a causal axis, where a stride changes what is seen: per window and number of keys seen).
    Speed and what a query sees pull against each other, hence the front of ``speedup`` and ``reach``, see
    :class:`Row`. ``efficiency`` follows from the two, so no row off the front beats one on it in all three.

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
        objective: "speedup", "efficiency" or "reach": what the rows are sorted by, highest first.
        each_stride: one row per window and stride instead; for few windows.
        progress: show a progress bar. Ctrl-C removes it.
        limit: how many rows are wanted; the front is always whole.

    Raises:
        GNAError: an argument is none of those listed, nothing is left to try on an axis, or there are more
            combinations than fit in memory.

    Example:
        >>> from gnaflex.searching import search
        >>> found = search((30, 48, 80), windows=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))
        >>> found.rows[0].spec.stride, round(found.rows[0].speedup, 2)
        ((4, 8, 8), 10.42)
    """
    _check_choice("kv_tiling", kv_tiling, get_args(KVTiling))
    _check_choice("objective", objective, get_args(Objective))
    base = GNA(shape, 1, 1, dilation, is_causal)
    options = _choices(base, windows, strides)
    q, kv = _Side.of("q_tile", q_tile, base, q_rows), _Side.of("kv_tile", kv_tile, base, kv_rows)
    _check_sizes(options, q, kv)
    counts = [len(some) if each_stride else len(np.unique(some[:, 0])) for some in options]
    _check_combinations(counts, int(options[-1].max()))
    with _bar(progress) as bar:
        tables = [
            _table(axis, options[a], q.extents[a], kv.extents[a], kv_tiling)
            for a, axis in enumerate(bar(base.axes, "axes"))
        ]
        classes = [_Classes.of(table, block_sparse, each_stride) for table in tables]
        fewest = _Fewest(classes, q, kv)
        touched = fewest.all(bar)
    allowed = np.ones(1)
    for one in classes:
        allowed = np.multiply.outer(allowed, one.allowed).ravel()
    sparsity = 1 - allowed / base.num_tokens**2
    found = np.flatnonzero((touched < np.inf) & (min_sparsity <= sparsity) & (sparsity <= max_sparsity))
    touched, allowed = touched[found], allowed[found]
    keys = {"speedup": (touched, -allowed), "efficiency": (touched / allowed, touched)}
    order = np.lexsort(keys.get(objective, (-allowed, touched))[::-1])[:limit]
    row = partial(_row, base, tables, fewest, kv_tiling)
    rows, front = ([row(int(found[at])) for at in which] for which in (order, _front(touched, allowed)))
    return SearchResult(tuple(rows), tuple(front), math.prod(map(len, options)))


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


def _check_sizes(options: list[IntArray], q: _Side, kv: _Side) -> None:
    for a, some in enumerate(options):
        if (entries := len(some) * q.size(a) * kv.size(a)) > MOST_ENTRIES:
            raise GNAError(
                f"too much to tabulate on axis {a}: {len(some):,} windows and strides by "
                f"{q.size(a)} x {kv.size(a)} tile extents = {entries:,} > {MOST_ENTRIES:,}.\n"
                f"  Give tiles, or fewer windows. Write windows=range(4, {int(some.max()) + 1}, 4)."
            )


def _check_combinations(counts: list[int], most: int) -> None:
    if (size := math.prod(counts)) > MOST_ROWS:
        raise GNAError(
            f"too many combinations to hold: {size:,} > {MOST_ROWS:,}.\n"
            f"  Give fewer windows or strides. Write windows=range(4, {most + 1}, 4)."
        )


def _spread(name: str, given: Choices, base: GNA) -> list[Sequence[int] | None]:
    if given is None or isinstance(given, (int, range)):
        return [[given] if isinstance(given, int) else given] * base.rank
    if len(given) != base.rank:
        raise GNAError(
            f"{name} must have one entry per axis, or be one range: got {len(given)} for rank {base.rank}.\n"
            f"  {name}={given}. Write {name}=range(2, {max(base.shape) + 1}, 2), or one range per axis."
        )
    return [[one] if isinstance(one, int) else one for one in given]


class _Classes(NamedTuple):
    """The options of an axis that see as many keys through the same window: what is left of them is the least
    number of visited tiles, [query extents, key extents, classes]; inf where none qualifies."""

    windows: IntArray
    allowed: Any
    visited: Any
    members: tuple[IntArray, ...]
    perfect_only: bool

    @staticmethod
    def of(table: _Table, perfect_only: bool, each: bool) -> _Classes:
        what = table.options if each else np.stack([table.options[:, 0], table.allowed], 1)
        label = np.unique(what, axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(label, kind="stable")
        first = np.flatnonzero(np.diff(label[order], prepend=-1))
        visited = table.visited.astype(float)
        if perfect_only:
            visited[~table.perfect] = np.inf
        least = np.minimum.reduceat(visited[order], first).transpose(1, 2, 0).copy()
        members = tuple(np.split(order, first[1:]))
        kept = order[first]
        return _Classes(
            table.options[kept, 0], table.allowed[kept].astype(float), least, members, perfect_only
        )

    def option(self, table: _Table, which: int, q: int, kv: int) -> int:
        """The option that a class stands for: the first, that of the smallest stride, of the best."""
        members = self.members[which]
        visited = table.visited[members, q, kv].astype(float)
        if self.perfect_only:
            visited[~table.perfect[members, q, kv]] = np.inf
        return int(members[np.argmin(visited)])


_Bar: TypeAlias = "Callable[[Sequence[Any], str], Iterable[Any]]"


@contextmanager
def _bar(shown: bool) -> Iterator[_Bar]:
    if not shown:
        yield lambda items, _: items
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise GNAError("a progress bar needs rich. Write pip install rich, or progress=False.") from error
    with Progress(transient=True) as bar:
        yield lambda items, what: bar.track(items, description=what)


class _Fewest:
    """Per combination of classes the fewest visited tiles over all tiles, axis by axis from the last one on:
    tiles share nothing between the axes but their tokens."""

    def __init__(self, classes: list[_Classes], q: _Side, kv: _Side) -> None:
        self.classes, self.q, self.kv = classes, q, kv
        self.sizes = [len(one.allowed) for one in classes]
        self.cache: dict[Any, Any] = {}
        _check_combinations(self.sizes, int(classes[-1].windows.max()))

    def all(self, bar: _Bar) -> Any:
        """Those of whole problems."""
        least = np.full(math.prod(self.sizes), np.inf)
        for q in bar(self.q.fits(0, 1), "tiles"):
            np.minimum(least, self._with(0, 1, 1, q), out=least)
        return least

    def from_axis(self, a: int, q_before: int, kv_before: int) -> Any:
        if a == len(self.classes):
            return np.ones(1)
        fits = self.q.fits(a, q_before)
        last = a == len(self.classes) - 1
        key = (a, *fits, -1, *self.kv.fits(a, kv_before)) if last else (a, q_before, kv_before)
        if key not in self.cache:
            least = np.full(math.prod(self.sizes[a:]), np.inf)
            for q in fits:
                np.minimum(least, self._with(a, q_before, kv_before, q), out=least)
            self.cache[key] = least
        return self.cache[key]

    def _with(self, a: int, q_before: int, kv_before: int, q: int) -> Any:
        """The fewest with one query extent on an axis."""
        least = np.full(math.prod(self.sizes[a:]), np.inf)
        q_before = self.q.after(a, q_before, q)
        for kv in self.kv.fits(a, kv_before):
            rest = self.from_axis(a + 1, q_before, self.kv.after(a, kv_before, kv))
            here = np.multiply.outer(self.classes[a].visited[q, kv], rest).ravel()
            np.minimum(least, here, out=least)
        return least

    def tiles(self, which: Sequence[int]) -> list[tuple[int, int]]:
        """Per axis the extents that visit the fewest tiles, for one combination of classes."""
        out, q_before, kv_before = [], 1, 1
        for a in range(len(self.classes)):
            rest_at = (
                int(np.ravel_multi_index(tuple(which[a + 1 :]), self.sizes[a + 1 :])) if which[a + 1 :] else 0
            )
            best = (math.inf, 0, 0)
            for q, kv in itertools.product(self.q.fits(a, q_before), self.kv.fits(a, kv_before)):
                after = self.q.after(a, q_before, q), self.kv.after(a, kv_before, kv)
                rest = self.from_axis(a + 1, *after)[rest_at]
                best = min(best, (self.classes[a].visited[q, kv, which[a]] * rest, q, kv))
            out.append(best[1:])
            q_before, kv_before = self.q.after(a, q_before, best[1]), self.kv.after(a, kv_before, best[2])
        return out


def _front(touched: Any, allowed: Any) -> IntArray:
    """Those that no other beats or equals in one figure without losing in the other, fastest first."""
    order = np.lexsort((touched, -allowed))
    ahead = np.minimum.accumulate(np.concatenate([[np.inf], touched[order]]))[:-1]
    return np.asarray(order[touched[order] < ahead][::-1])


def _row(base: GNA, tables: list[_Table], fewest: _Fewest, tiling: KVTiling, number: int) -> Row:
    which = [int(one) for one in np.unravel_index(number, fewest.sizes)]
    at, q, kv = fewest.tiles(which), fewest.q, fewest.kv
    options = [
        one.option(table, w, *extents)
        for one, table, w, extents in zip(fewest.classes, tables, which, at, strict=True)
    ]
    each = list(zip(tables, options, at, strict=True))
    window, stride = zip(*(table.options[option].tolist() for table, option, _ in each), strict=True)
    touched = math.prod(int(table.visited[option, i, j]) for table, option, (i, j) in each)
    allowed = math.prod(int(table.allowed[option]) for table, option, _ in each)
    tokens, boxes = base.num_tokens, (q.box([i for i, _ in at]), kv.box([j for _, j in at]))
    dense = math.prod(-(-tokens // math.prod(box)) for box in boxes)
    span = math.prod(base.dilation) * allowed / tokens**2
    return Row(
        spec=GNA(base.shape, window, stride, base.dilation, base.is_causal),
        q_tile=boxes[0],
        kv_tile=boxes[1],
        kv_tiling=tiling,
        touched_tiles=touched,
        work_speedup=dense / touched,
        speedup=-(-tokens // q.rows) * -(-tokens // kv.rows) / touched,
        flop_speedup=tokens**2 / allowed,
        sparsity=1 - allowed / tokens**2,
        is_block_sparse=all(bool(table.perfect[option, i, j]) for table, option, (i, j) in each),
        reach=span ** (1 / base.rank),
    )


# ---- why not -----------------------------------------------------------------------------------------


def explain(plan: Plan) -> str:
    """In words, axis by axis, why visited tiles need a mask, and the cheapest changes that mend it.

    Example:
        >>> import gnaflex
        >>> from gnaflex.searching import explain
        >>> print(explain(gnaflex.plan(gnaflex.GNA(64, window=16, stride=6), (8,), (8,), "dynamic")))
        Not block-sparse: 14 of 23 visited tiles (61%) need a mask; work speed-up 2.78 of at most 4.00.
        axis 0 (length 64, window 16, stride 6; query tile 8, key tile 8): partial for 7 of 8 query tiles.
          7 straddle stride groups whose windows differ: queries [0, 8) need keys [0, 17), share [1, 16).
          Mend: stride 6 -> 8; or a query tile of 1.
        Smallest change with these tiles: GNA(shape=(64,), window=(16,), stride=(8,)), work speed-up 4.00.
        Block-sparse as it is with query tile (6,) and key tile (8,): work speed-up 4.00.
    """
    spec, whole = plan.spec, f"work speed-up {plan.work_speedup:.2f} of at most {plan.flop_speedup:.2f}"
    notes = [note for a in range(spec.rank) for note in _note(plan, a)]
    if plan.is_block_sparse:
        clipped = f" ({plan.clipped_tiles:,} cut off at a border)" if plan.clipped_tiles else ""
        head = f"Block-sparse: none of {plan.touched_tiles:,} visited tiles{clipped} needs a mask; {whole}."
        return "\n".join([head, *notes])
    share = f"{plan.partial_tiles:,} of {plan.touched_tiles:,} visited tiles"
    share += f" ({plan.partial_tiles / plan.touched_tiles:.0%})"
    lines = [f"Not block-sparse: {share} need a mask; {whole}."]
    axes, mended = [], True
    for a, axis in enumerate(spec.axes):
        near = _mend(axis, plan.q_tile[a], plan.kv_tile[a], plan.kv_tiling)
        lines += _why(plan, a, near)
        mended = mended and near is not None
        axes.append(near.spec.axes[0] if near else axis)
    return "\n".join([*lines, *notes, *(_whole_mend(plan, axes) if mended else []), *_other_tiles(plan)])


def _mend(axis: Axis, q: int, kv: int, tiling: KVTiling) -> Nearby | None:
    """The nearest perfect window and stride of an axis, as a problem of its own."""
    alone = GNA((axis.length,), axis.window, axis.stride, axis.dilation, axis.is_causal)
    return next(iter(nearest(alone, (q,), (kv,), tiling, limit=1)), None)


def _why(plan: Plan, a: int, near: Nearby | None) -> list[str]:
    axis, q, kv = plan.spec.axes[a], plan.q_tile[a], plan.kv_tile[a]
    bad = [(one, at) for one in plan.axes[a] for at in range(len(one.start)) if _is_partial(one, at)]
    dilation = f", dilation {axis.dilation}" if axis.dilation > 1 else ""
    causal = ", causal" if axis.is_causal else ""
    numbers = f"length {axis.length}, window {axis.window}, stride {axis.stride}{dilation}{causal}"
    head = f"axis {a} ({numbers}; query tile {q}, key tile {kv}): "
    if not bad:
        return [head + "no query tile is partial."]
    total = sum(one.groups * len(one.start) for one in plan.axes[a])
    lines = [head + f"partial for {sum(one.groups for one, _ in bad)} of {total} query tiles."]
    straddling = [(one, at) for one, at in bad if one.needed[at] != one.shared[at]]
    off = [(one, at) for one, at in bad if one.needed[at] == one.shared[at]]
    rule = "straddle stride groups whose windows differ"
    if axis.is_causal:
        rule = "hold several queries, whose windows end at themselves on a causal axis"
    for some, words in ((straddling, rule), (off, f"see a window off the fixed grid of key tiles of {kv}")):
        if some:
            count = sum(one.groups for one, _ in some)
            lines.append(f"  {count} {words}: {_instance(*some[0], q)}.")
    mends = [" and ".join(_changes(axis, near.spec.axes[0]))] if near else []
    mends += ["a query tile of 1"] if q > 1 and _is_perfect(axis, 1, kv, plan.kv_tiling) else []
    if plan.kv_tiling == "static" and _is_perfect(axis, q, kv, "dynamic"):
        mends.append('kv_tiling="dynamic"')
    return [*lines, *([f"  Mend: {'; or '.join(mends)}."] if mends else [])]


def _is_partial(one: AxisTiles, at: int) -> bool:
    return one.visited[at] != one.unmasked[at]


def _instance(one: AxisTiles, at: int, q: int) -> str:
    (lo, hi), (all_lo, all_hi) = one.needed[at], one.shared[at]
    start, stop = one.start[at], min(one.start[at] + q, one.length)
    tail = (
        f", share {f'[{all_lo}, {all_hi})' if all_lo < all_hi else 'none'}"
        if (all_lo, all_hi) != (lo, hi)
        else ""
    )
    return f"queries [{start}, {stop}) need keys [{lo}, {hi}){tail}"


def _is_perfect(axis: Axis, q: int, kv: int, tiling: KVTiling) -> bool:
    one = _table(axis, np.array([[axis.window, axis.stride]]), np.array([q]), np.array([kv]), tiling)
    return bool(one.perfect.all())


def _note(plan: Plan, a: int) -> Iterator[str]:
    """Tiles that dilation groups cannot fill."""
    axis = plan.spec.axes[a]
    least = min(axis.group_lengths)
    sides = (("query", plan.q_tile[a]), ("key", plan.kv_tile[a]))
    names = " and ".join(f"{name} tile of {extent}" for name, extent in sides if extent > least)
    if axis.dilation > 1 and names:
        yield f"axis {a}: dilation {axis.dilation} leaves groups of {least} tokens, which fill no {names}."


def _whole_mend(plan: Plan, axes: list[Axis]) -> list[str]:
    window, stride = [axis.window for axis in axes], [axis.stride for axis in axes]
    spec = GNA(plan.spec.shape, window, stride, plan.spec.dilation, plan.spec.is_causal)
    speedup = Plan(spec, plan.q_tile, plan.kv_tile, plan.kv_tiling).work_speedup
    return [f"Smallest change with these tiles: {spec}, work speed-up {speedup:.2f}."]


def _other_tiles(plan: Plan) -> list[str]:
    """Tiles of as many tokens that suit the problem as it is."""
    q_rows, kv_rows = (math.prod(tile) for tile in (plan.q_tile, plan.kv_tile))
    same = nearest(
        plan.spec,
        None,
        None,
        plan.kv_tiling,
        limit=1,
        keep=("window", "stride"),
        q_rows=q_rows,
        kv_rows=kv_rows,
    )
    return [
        f"Block-sparse as it is with query tile {one.plan.q_tile} and key tile {one.plan.kv_tile}: "
        f"work speed-up {one.work_speedup:.2f}."
        for one in same
    ]

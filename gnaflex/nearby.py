"""The perfectly block-sparse problems nearest to one that is not; no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from gnaflex.axis_tables import MOST_ENTRIES, AxisTable, Side, table_of, work_of
from gnaflex.planner import ROWS, KVTiling, Plan, check_choice, check_spec
from gnaflex.spec import GNA, Axis, whole
from gnaflex.tiles import Tile
from gnaflex.window import IntArray

WINDOW_WEIGHT = 12  # of a window's change, by that of a stride: a window says what a model sees
MOST_OPTIONS = 20_000  # windows and strides of an axis that `nearest` looks at
MOST_WORK = 1e9  # that `nearest` puts into an axis: some seconds
MOST_MULTIPLES = 1000  # of a tile that are looked at as strides where not all can be
MOST_LIMIT = 100  # problems; more take long
ROUND = (8, 16, 32, 64, 128)  # extents of free tiles that likely strides are multiples of
NOISE = 1e-7  # of distances


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
    keep: str | Collection[str] = (),
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
        limit: how many problems are wanted, up to 100.
        keep: "window", "stride" or both: what must stay.
        q_rows, kv_rows: tokens that a tile may hold when it is not given.

    Returns:
        At most ``limit`` problems; none when no change mends it, as on a causal axis with a query tile
        longer than 1 there. On long axes (thousands of windows and strides, or tens of millions with the
        extents of free tiles) only changes near the problem and multiples of the tiles are looked at: there
        may be nearer ones.

    Raises:
        GNAError: a tile does not fit the problem, or an argument is none of those listed.

    Example:
        >>> import gnaflex
        >>> from gnaflex.nearby import nearest
        >>> video = gnaflex.GNA((33, 45, 80), window=(18, 24, 24), stride=(16, 8, 6))
        >>> best = nearest(video, (2, 8, 8), (2, 8, 8))[0]
        >>> best.changes, round(best.work_speedup, 2)
        (('axis 2: stride 6 -> 8',), 10.45)
    """
    check_choice("kv_tiling", kv_tiling, get_args(KVTiling))
    check_spec(spec)
    keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
    for name in keep:
        check_choice("keep", name, ("window", "stride"))
    limit = whole("limit", limit, 1, MOST_LIMIT)
    q, kv = Side.of("q_tile", q_tile, spec, q_rows), Side.of("kv_tile", kv_tile, spec, kv_rows)
    ladders, found = _certain(spec, q, kv, kv_tiling, limit, keep)
    return [_nearby(spec, ladders, found, at, q, kv, kv_tiling) for at in range(len(found.distance))]


def _certain(
    spec: GNA, q: Side, kv: Side, tiling: KVTiling, limit: int, keep: Collection[str]
) -> tuple[list[_Ladder], _Found]:
    """The first problems, in a radius that grows until no unseen one could be among them; where it cannot
    grow that far, likely ones beyond it too."""
    sides = list(zip(spec.axes, q.extents, kv.extents, strict=True))
    options: list[IntArray] = []
    for exponent in itertools.count(-8, 2):
        around = [_around(axis, 2.0**exponent, keep) for axis in spec.axes]
        missing = min(beyond for _, beyond in around)
        before, options = options, [some for some, _ in around]
        if missing < math.inf and [len(one) for one in before] == [len(one) for one in options]:
            continue
        if before and any(_is_too_much(len(one), *side) for one, side in zip(options, sides, strict=True)):
            likely = [_likely(*side, keep) for side in sides]
            options = [np.unique(np.concatenate(both), axis=0) for both in zip(before, likely, strict=True)]
            missing = math.inf
        ladders = [
            _Ladder(axis, some, table_of(axis, some, q_extents, kv_extents, tiling), limit)
            for some, (axis, q_extents, kv_extents) in zip(options, sides, strict=True)
        ]
        found = _Closest(ladders, q, kv, limit).from_axis(0, 1, 1)
        if missing == math.inf or (len(found.distance) == limit and found.distance[-1] < missing - NOISE):
            break
    return ladders, found


def _is_too_much(options: int, axis: Axis, q: IntArray, kv: IntArray) -> bool:
    entries = options * len(q) * len(kv)
    return options > MOST_OPTIONS or entries > MOST_ENTRIES or work_of(options, axis, q, kv) > MOST_WORK


def _around(axis: Axis, radius: float, keep: Collection[str]) -> tuple[IntArray, float]:
    """The windows and strides of an axis up to a distance, [options, 2], and a bound of the others'."""
    most = axis.length // axis.dilation
    narrow, wide = axis.window * 2 ** (-radius / WINDOW_WEIGHT), axis.window * 2 ** (radius / WINDOW_WEIGHT)
    windows = np.arange(math.ceil(narrow), min(math.floor(wide), most) + 1)
    strides = np.arange(
        math.ceil(axis.stride * 2**-radius), min(math.floor(axis.stride * 2**radius), most) + 1
    )
    pairs = _pairs(axis, windows, strides, keep)
    farthest = _distance(axis, np.array([[1, axis.stride], [most, axis.stride]])).max()
    farthest += _distance(axis, np.array([[axis.window, 1], [axis.window, most]])).max()
    is_all = farthest <= radius or {*keep} == {"window", "stride"}
    return pairs[_distance(axis, pairs) <= radius], math.inf if is_all else radius


def _likely(axis: Axis, q: IntArray, kv: IntArray, keep: Collection[str]) -> IntArray:
    """Windows and strides that are multiples of a tile's extent, or all of the axis; the nearest of them, as
    many as can be tabulated."""
    most = axis.length // axis.dilation
    windows = {axis.window, most}
    for extent in _round(kv):
        windows |= {axis.window // extent * extent, -(-axis.window // extent) * extent}
    strides = {axis.stride, axis.window, most} | {1 << n for n in range(most.bit_length())}
    for extent in _round(q):
        strides.update(range(extent, most + 1, max(extent, most // MOST_MULTIPLES // extent * extent)))
    pairs = _pairs(axis, np.array(sorted(windows)), np.array(sorted(strides)), keep)
    room = min(MOST_WORK / work_of(1, axis, q, kv), MOST_ENTRIES / (len(q) * len(kv)), MOST_OPTIONS)
    return pairs[np.argsort(_distance(axis, pairs), kind="stable")[: max(int(room), 16)]]


def _round(extents: IntArray) -> list[int]:
    """An extent that is given, or of free ones the powers of two that most tiles are made of."""
    return extents.tolist() if len(extents) == 1 else [n for n in extents.tolist() if n in ROUND]


def _pairs(axis: Axis, windows: IntArray, strides: IntArray, keep: Collection[str]) -> IntArray:
    """Those that fit the axis and keep what must stay."""
    pairs = np.stack(np.meshgrid(windows, strides, indexing="ij"), -1).reshape(-1, 2)
    window, stride = pairs.T
    fit = (stride >= 1) & (stride <= window) & (window <= axis.length // axis.dilation)
    for name, column in (("window", window), ("stride", stride)):
        if name in keep:
            fit &= column == getattr(axis, name)
    return np.asarray(pairs[fit])


def _distance(axis: Axis, options: IntArray) -> Any:
    ratio = np.abs(np.log2(options / (axis.window, axis.stride)))
    return ratio @ (float(WINDOW_WEIGHT), 1.0)


def _tied(distance: Any) -> Any:
    """Distances rounded, so that equal changes of different axes tie."""
    return np.round(distance, 6)


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
        order = np.lexsort((*self.options.T[::-1], self.visited, _tied(self.distance)))
        _, at = np.unique(self.options[order], axis=0, return_index=True)
        return _Found(*(column[order[np.sort(at)[:limit]]] for column in self))


class _Ladder:
    """The perfect options of an axis by distance, for each pair of extents."""

    def __init__(self, axis: Axis, options: IntArray, table: AxisTable, limit: int) -> None:
        self.table, self.limit, self.cache = table, limit, dict[tuple[int, int], Any]()
        self.distance = _distance(axis, options)

    def rungs(self, q: int, kv: int) -> tuple[IntArray, Any, Any]:
        """The first perfect options: which, their distances, and the tiles they visit."""
        if (q, kv) not in self.cache:
            perfect = np.flatnonzero(self.table.perfect[:, q, kv])
            visited = self.table.visited[perfect, q, kv].astype(float)
            first = np.lexsort((visited, _tied(self.distance[perfect])))[: self.limit]
            self.cache[q, kv] = perfect[first], self.distance[perfect[first]], visited[first]
        return self.cache[q, kv]  # type: ignore[no-any-return]


class _Closest:
    """The first problems over all tiles, axis by axis from the last one on.

    Distances add up, visited tiles multiply and tiles share nothing between the axes but their tokens. So
    for every product of the extents before an axis, the first ``limit`` from that axis on are all it takes.
    """

    def __init__(self, ladders: list[_Ladder], q: Side, kv: Side, limit: int) -> None:
        self.ladders, self.q, self.kv, self.limit = ladders, q, kv, limit
        self.cache: dict[Any, _Found] = {}

    def from_axis(self, a: int, q_before: int, kv_before: int) -> _Found:
        """The first problems of the axes from ``a`` on, after extents of the given products."""
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
            if not len(which) or distance.min() > bound + NOISE:
                continue
            rest = self.from_axis(a + 1, self.q.after(a, q_before, q), self.kv.after(a, kv_before, kv))
            total = np.add.outer(distance, rest.distance)
            if total.size >= self.limit:
                bound = min(bound, float(np.partition(total, self.limit - 1, None)[self.limit - 1]))
            here, there = np.nonzero(total <= bound + NOISE)
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
    spec: GNA, ladders: list[_Ladder], found: _Found, at: int, q: Side, kv: Side, tiling: KVTiling
) -> Nearby:
    options = zip(ladders, found.options[at].tolist(), strict=True)
    window, stride = zip(*(ladder.table.options[option].tolist() for ladder, option in options), strict=True)
    other = GNA(spec.shape, window, stride, spec.dilation, spec.is_causal)
    changes = tuple(
        f"axis {a}: {change}"
        for a in range(spec.rank)
        for change in changes_between(spec.axes[a], other.axes[a])
    )
    tiles = q.box(found.q[at]), kv.box(found.kv[at])
    plan = Plan(other, *tiles, tiling, q.charged, kv.charged)
    return Nearby(plan, round(float(found.distance[at]), 6), changes)


def changes_between(before: Axis, after: Axis) -> list[str]:
    """What differs between two forms of an axis: ``["stride 6 -> 8"]``."""
    names = ("window", "stride")
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]

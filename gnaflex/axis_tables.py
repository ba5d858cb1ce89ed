"""One axis for all windows, strides and tile extents: what searches are made of; no torch.

A problem is perfectly block-sparse exactly if on every axis each key tile that a query tile visits is
unmasked. So axes are tabulated one by one, and what is reported of a problem is a product over these tables,
equal to what :func:`gnaflex.plan` counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gnaflex.planner import MOST_ROWS, Ranges, checked_tile
from gnaflex.spec import GNA, Axis, whole
from gnaflex.tiles import Relation, Tile, groups, relation
from gnaflex.window import IntArray

MOST_ENTRIES = 60_000_000  # of what is kept of an axis: options by tile extents


class AxisTable(NamedTuple):
    """Windows and strides of an axis, [options, 2]; the pairs each allows; key tiles visited by all query
    tiles, and whether none of them needs a mask, [options, query extents, key extents]."""

    options: IntArray
    allowed: IntArray
    visited: IntArray
    perfect: Any


def table_of(
    axis: Axis, options: IntArray, q_extents: IntArray, kv_extents: IntArray, tiling: str
) -> AxisTable:
    """Tabulate an axis for ``options``: windows and strides, [options, 2]."""
    parts = [
        part_of(axis, some, q_extents, kv_extents, tiling)
        for some in split(axis, options, q_extents, kv_extents)
    ]
    return AxisTable(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def split(axis: Axis, options: IntArray, q_extents: IntArray, kv_extents: IntArray) -> list[IntArray]:
    """Options in parts that are tabulated at a time, so that temporary memory is bounded."""
    at_once = max(min(512, 2**22 // axis.length, 2**23 // (len(q_extents) * len(kv_extents))), 1)
    return np.array_split(options, -(-len(options) // at_once))


def work_of(options: int, axis: Axis, q_extents: IntArray, kv_extents: IntArray) -> float:
    """What a table takes, in numbers computed: the tables of options, and tiles by extents of either side."""
    return options * axis.length * max(50.0, len(kv_extents) * float((1 / q_extents).sum()))


def part_of(
    axis: Axis, options: IntArray, q_extents: IntArray, kv_extents: IntArray, tiling: str
) -> AxisTable:
    """The table of a part of the options."""
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
            ranges = Ranges(start, pairs.any_of(start, stop), pairs.all_of(start, stop))
            for kv_at, kv in enumerate(kv_extents.tolist()):
                seen, clear, _ = ranges.tiles(kv, n, tiling)  # type: ignore[arg-type]
                visited[at, kv_at] += len(members) * seen.sum(0)
                unmasked[at, kv_at] += len(members) * clear.sum(0)
    perfect = (visited == unmasked).transpose(2, 0, 1)
    return AxisTable(options, allowed, visited.transpose(2, 0, 1), perfect)


class Side(NamedTuple):
    """The boxes to try as query or key tiles: extents per axis, of ``least`` to ``rows`` tokens together;
    ``charged``: the rows that one costs, if they are not its own."""

    extents: tuple[IntArray, ...]
    least: int
    rows: int
    charged: int | None
    known: dict[tuple[int, int], list[int]]

    @staticmethod
    def of(name: str, tile: Tile | None, spec: GNA, rows: int) -> Side:
        """The tile given, or all boxes that :func:`plan` tries: those that fill more than half."""
        if given := checked_tile(name, tile, spec):
            tokens = math.prod(given)
            return Side(tuple(np.array([extent]) for extent in given), tokens, tokens, None, {})
        rows = whole(name.replace("tile", "rows"), rows, 1, MOST_ROWS)
        lengths = [min(axis.group_length(0), rows) for axis in spec.axes]
        least = min(rows, math.prod(axis.group_length(0) for axis in spec.axes)) // 2 + 1
        others = [math.prod(lengths[:a] + lengths[a + 1 :]) for a in range(spec.rank)]
        extents = tuple(np.arange(-(-least // o), n + 1) for n, o in zip(lengths, others, strict=True))
        return Side(extents, least, rows, rows, {})

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

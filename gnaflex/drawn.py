"""What drawings show, as numbers and captions from the ranges per axis; no torch.

A kind of block, a window and a count of tiles are each a minimum or a product over the axes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gnaflex.planner import Plan
from gnaflex.searching import Row, SearchResult
from gnaflex.spec import GNA, Axis, GNAError
from gnaflex.tiles import relation
from gnaflex.window import IntArray

BLOCK_KINDS = {"empty": "·", "partial": "░", "clipped": "▒", "full": "█"}
MAX_PAIRS = 2**29  # of tiles in a block map: seconds
ALL_STRIDES = 24  # windows up to here are drawn with every stride


class BlockMap:
    """Kinds of the blocks of a plan, in the order of BLOCK_KINDS: the least over the axes."""

    def __init__(self, p: Plan) -> None:
        kv_tiles = math.prod(
            sum(one.groups * -(-one.length // kv) for one in axis)
            for axis, kv in zip(p.axes, p.kv_tile, strict=True)
        )
        if p.query_tiles * kv_tiles > MAX_PAIRS:
            rule = f"a block map has at most {MAX_PAIRS:,} tile pairs: got {p.query_tiles:,} x {kv_tiles:,}"
            raise GNAError(f'{rule}.\n  Give larger tiles, or write kind="tiles".')
        parts = [_axis_kinds(p, at) for at in range(p.spec.rank)]
        self.kinds = [kinds for kinds, _, _ in parts]
        self.rows = _tile_major([group for _, group, _ in parts])
        self.columns = _tile_major([group for _, _, group in parts])
        self.shape = len(self.rows[0]), len(self.columns[0])

    def pooled(self, n: int) -> IntArray:
        """How many blocks of each kind lie in every n x n blocks: [rows, columns, kinds]."""
        edges = np.arange(0, self.shape[1], n)
        return np.stack([self._pooled_row(row, n, edges) for row in range(0, self.shape[0], n)])

    def _pooled_row(self, row: int, n: int, edges: IntArray) -> IntArray:
        least = np.full((1, 1), len(BLOCK_KINDS) - 1, np.uint8)
        for kinds, rows, columns in zip(self.kinds, self.rows, self.columns, strict=True):
            least = np.minimum(least, kinds[rows[row : row + n]][:, columns])
        sums = [(least == kind).sum(0, dtype=np.int64) for kind in range(len(BLOCK_KINDS))]
        return np.stack([np.add.reduceat(one, edges) for one in sums], 1)


def _axis_kinds(p: Plan, at: int) -> tuple[NDArray[np.uint8], IntArray, IntArray]:
    """The kinds on one axis [query tiles, key tiles], and the dilation group of either; group by group."""
    kv = p.kv_tile[at]
    by_length = [(one, _kinds_of_group(one, kv)) for one in p.axes[at]]
    blocks = [kinds for one, kinds in by_length for _ in range(one.groups)]
    q_group, kv_group = (
        np.repeat(np.arange(len(blocks)), [b.shape[side] for b in blocks]) for side in (0, 1)
    )
    kinds = np.zeros((len(q_group), len(kv_group)), np.uint8)
    corner = [0, 0]
    for block in blocks:
        stop = [first + extent for first, extent in zip(corner, block.shape, strict=True)]
        kinds[corner[0] : stop[0], corner[1] : stop[1]] = block
        corner = stop
    return kinds, q_group, kv_group


def _kinds_of_group(one: Any, kv: int) -> NDArray[np.uint8]:
    tile = np.arange(-(-one.length // kv))
    start, stop = tile * kv, np.minimum(tile * kv + kv, one.length)
    (lo, hi), (all_lo, all_hi) = (np.array(ends).T[..., None] for ends in (one.needed, one.shared))
    visited = (start < hi) & (lo < stop)
    unmasked = (all_lo <= start) & (stop <= all_hi)
    full = unmasked & (stop - start == kv)
    kinds: NDArray[np.uint8] = visited.astype(np.uint8) + unmasked + full
    return kinds


def _tile_major(group: list[IntArray]) -> list[IntArray]:
    """The tile on every axis, of all tiles: dilation groups one after another, row-major in each."""
    tiles = [grid.ravel() for grid in np.meshgrid(*(np.arange(len(g)) for g in group), indexing="ij")]
    order = np.lexsort([g[tile] for g, tile in zip(group, tiles, strict=True)][::-1])
    return [tile[order] for tile in tiles]


class Planes(NamedTuple):
    """A product over the axes: planes of the last two, times one factor for each place on those before."""

    before: IntArray
    rows: IntArray
    columns: IntArray

    @classmethod
    def of(cls, factors: Sequence[IntArray]) -> Planes:
        """From one factor per axis; a single axis is a plane of one row."""
        *before, rows, columns = (np.ones(1, np.int64), *factors) if len(factors) < 2 else factors
        return cls(_outer(before), rows, columns)

    def runs(self, at: int | None = None) -> Iterator[tuple[int, int]]:
        """Planes first to last that are equal and not empty; plane ``at`` stands alone."""
        alone = [] if at is None else [at, at + 1]
        starts = sorted({0, *alone, *(np.flatnonzero(np.diff(self.before)) + 1).tolist()})
        for start, stop in zip(starts, [*starts[1:], len(self.before)], strict=True):
            if start < stop and self.before[start]:
                yield start, stop - 1

    @property
    def most(self) -> int:
        """The largest entry."""
        return math.prod(int(part.max()) for part in self)

    def scale(self, width: int, planes: int) -> int:
        """The least n for which so many planes of n x n places a character fit, three beside each other."""
        beside = min(planes, 3)
        room = (width - 2 * (beside - 1)) // beside
        return -(-max(len(self.rows), len(self.columns)) // room)

    def pooled(self, n: int) -> NDArray[np.float64]:
        """The means of n x n places of a plane whose factor is one."""
        return np.outer(_means(self.rows, n), _means(self.columns, n))


def _outer(factors: Sequence[IntArray]) -> IntArray:
    product = np.ones(1, np.int64)
    for factor in factors:
        product = np.outer(product, factor).ravel()
    return product


def _means(values: IntArray, n: int) -> NDArray[np.float64]:
    edges = np.arange(0, len(values), n)
    means: NDArray[np.float64] = np.add.reduceat(values, edges) / np.diff(edges, append=len(values))
    return means


def coordinates(spec: GNA, query: int | Sequence[int] | None) -> tuple[int, ...]:
    """The coordinates of a query given as such or as a row-major token; the middle if not given."""
    if query is None:
        return tuple(length // 2 for length in spec.shape)
    try:
        is_token = not hasattr(query, "__len__")
        at: Any = operator.index(query) if is_token else tuple(map(operator.index, query))  # type: ignore[arg-type]
        if isinstance(at, int):
            return tuple(int(x) for x in np.unravel_index(at, spec.shape))
        if len(at) == spec.rank and all(0 <= x < n for x, n in zip(at, spec.shape, strict=True)):
            return tuple(at)
    except (TypeError, ValueError):
        pass
    middle = tuple(length // 2 for length in spec.shape)
    raise GNAError(f"query must be a token of the grid {spec.shape}: got {query!r}. Write query={middle}.")


def _seen(axis: Axis, x: int) -> IntArray:
    """1 where the query at ``x`` sees the key, 0 elsewhere."""
    group, place = x % axis.dilation, x // axis.dilation
    pairs = relation(axis.group_length(group), axis)
    keys = np.zeros(axis.length, np.int64)
    keys[group + np.arange(pairs.lo[place], pairs.hi[place]) * axis.dilation] = 1
    return keys


def window_of(spec: GNA, query: tuple[int, ...]) -> tuple[Planes, tuple[int, int, int]]:
    """1 at the keys that a query sees; and its plane, row and column."""
    *before, row, column = (0, *query) if spec.rank == 1 else query
    at = int(np.ravel_multi_index(before, spec.shape[:-2])) if before else 0
    return Planes.of(list(map(_seen, spec.axes, query))), (at, row, column)


def visited(p: Plan) -> Planes:
    """Key tiles that every query tile visits."""
    return Planes.of([np.concatenate([np.tile(one.visited, one.groups) for one in axis]) for axis in p.axes])


class _Stride(NamedTuple):
    stride: int
    speedup: float
    is_block_sparse: bool
    is_given: bool


def strides_of(p: Plan) -> list[list[_Stride]]:
    """Axis by axis what other strides would give."""
    return [[_with_stride(p, at, s) for s in _choices(axis)] for at, axis in enumerate(p.spec.axes)]


def _choices(axis: Axis) -> list[int]:
    if axis.window <= ALL_STRIDES:
        return list(range(1, axis.window + 1))
    rounds = {a << b for a in (1, 3) for b in range(axis.window.bit_length())}
    return sorted({s for s in rounds if s < axis.window} | {axis.stride, axis.window})


def _with_stride(p: Plan, at: int, stride: int) -> _Stride:
    spec = p.spec
    strides = (*spec.stride[:at], stride, *spec.stride[at + 1 :])
    other = replace(p, spec=GNA(spec.shape, spec.window, strides, spec.dilation, spec.is_causal))
    return _Stride(stride, other.work_speedup, other.is_block_sparse, stride == spec.stride[at])


# ---- captions ----------------------------------------------------------------------------------------


def counts_line(p: Plan, blocks: BlockMap) -> str:
    """How many tile pairs are visited, and of which kinds."""
    kinds = f"{p.full_tiles:,} full, {p.clipped_tiles:,} clipped, {p.partial_tiles:,} partial"
    return f"{p.touched_tiles:,} of {math.prod(blocks.shape):,} tile pairs visited: {kinds}"


def seen_line(spec: GNA, at: tuple[int, ...], planes: Planes) -> str:
    """How many tokens a query sees."""
    return f"query {at} sees {math.prod(int(part.sum()) for part in planes):,} of {spec.num_tokens:,} tokens"


def visits_line(p: Plan, planes: Planes) -> str:
    """How many key tiles the query tiles visit."""
    least = math.prod(int(part.min()) for part in planes)
    mean = p.touched_tiles / p.query_tiles
    return f"key tiles that a query tile visits: {least:,} to {planes.most:,}, mean {mean:,.1f}"


def tile_grid(p: Plan) -> tuple[int, ...]:
    """Query tiles per axis."""
    return tuple(sum(one.groups * len(one.start) for one in axis) for axis in p.axes)


def plane_title(shape: tuple[int, ...], run: tuple[int, int]) -> str:
    """Which planes a drawing stands for."""
    if len(shape) < 3:
        return ""
    places = [np.unravel_index(at, shape[:-2]) for at in run]
    first, last = (str(tuple(map(int, at)) if len(at) > 1 else int(at[0])) for at in places)
    return f"plane {first}" if first == last else f"planes {first}-{last}"


def tiles_line(p: Plan) -> str:
    """The tiles of a plan."""
    return f"query tiles {p.q_tile}, key tiles {p.kv_tile}, {p.kv_tiling}"


def front_line(found: SearchResult) -> str:
    """What a search tried, and how much of it is on the front."""
    of = f"{len(found.front):,} of {found.problems:,} windows and strides"
    return f"{found.front[0].spec.shape}: speed-up over reach, the front of {of}"


def front_ends(found: SearchResult) -> list[str]:
    """The fastest problem on the front and the one that reaches farthest."""
    ends = {"fastest": found.front[0], "farthest": found.front[-1]}
    return [f"{name}: {row_line(row)}" for name, row in ends.items()]


def row_line(row: Row) -> str:
    """A problem found, shortly."""
    sizes = ("x".join(map(str, extents)) for extents in (row.spec.window, row.spec.stride))
    window, stride = sizes
    return f"window {window} stride {stride}, {row.work_speedup:.2f} at reach {row.reach:.0%}"

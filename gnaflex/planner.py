"""How a problem tiles, and what that allows: exact counts of visited, full and partial tiles; no torch.

Per axis a query tile needs one range of keys, and all its queries share a range within. Counts over the whole
grid are products over the axes of sums over the tiles of an axis, dilation group by dilation group. The
speed-ups are those of the simulator of Hassani et al. (arXiv 2504.16922, section 4), with ``work_speedup``
beside them, which knows how the query grid rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from gnaflex.spec import GNA, Axis, GNAError, whole
from gnaflex.tiles import Tile, allowed_pairs, groups, relation
from gnaflex.window import IntArray

KVTiling = Literal["static", "dynamic"]
ROWS = 128  # tokens of a tile unless given: FlexAttention's block, and what one Hopper warp group pair takes


MOST_ROWS = 4096  # of a tile whose extents are to be found: more boxes than anyone needs
MOST_LENGTH = 2**26  # tokens of an axis: its tables are a few numbers per token
MOST_BOXES = 20_000  # that are weighed as tiles


class AxisTiles(NamedTuple):
    """The query tiles of one axis in the dilation groups of one length.

    Keys count inside a group. ``needed`` are those that some query of a tile sees, ``shared`` those that all
    see, both half-open; ``visited``, ``unmasked`` and ``whole`` are numbers of key tiles: those that a query
    tile visits, those of them in which it masks nothing, and those of these that hold ``kv_tile`` keys.
    """

    length: int
    groups: int
    start: tuple[int, ...]
    needed: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]
    visited: tuple[int, ...]
    unmasked: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a problem tiles. Every figure is an exact count, or a ratio of two.

    Key tiles are those of a fixed grid (``kv_tiling="static"``: FlexAttention's blocks), or those that cut
    the key range of each query tile from its start on (``"dynamic"``: a kernel that loads boxes anywhere).
    A tile costs ``q_rows`` or ``kv_rows`` rows, so that a dense kernel has tiles of as many tokens; None
    stands for the tokens of the tile itself.
    """

    spec: GNA
    q_tile: Tile
    kv_tile: Tile
    kv_tiling: KVTiling
    q_rows: int | None = None
    kv_rows: int | None = None

    @cached_property
    def axes(self) -> tuple[tuple[AxisTiles, ...], ...]:
        """The tiles of every axis, by length of its dilation groups (two at most)."""
        return tuple(
            tuple(
                _axis_tiles(group.n, len(group.members), axis, q, kv, self.kv_tiling)
                for group in groups(axis)
            )
            for axis, q, kv in zip(self.spec.axes, self.q_tile, self.kv_tile, strict=True)
        )

    def _total(self, name: str) -> int:
        return math.prod(sum(one.groups * sum(getattr(one, name)) for one in axis) for axis in self.axes)

    @property
    def query_tiles(self) -> int:
        """How many query tiles the grid has, those at its edges included."""
        return math.prod(sum(one.groups * len(one.start) for one in axis) for axis in self.axes)

    @cached_property
    def touched_tiles(self) -> int:
        """(query tile, key tile) pairs that are visited."""
        return self._total("visited")

    @cached_property
    def full_tiles(self) -> int:
        """Those in which nothing is masked and every key is a token of the range."""
        return self._total("whole")

    @cached_property
    def clipped_tiles(self) -> int:
        """Those in which nothing is masked but what lies past the grid, or past the query tile's key range
        (dynamic tiling): a comparison of coordinates does it."""
        return self._total("unmasked") - self.full_tiles

    @property
    def partial_tiles(self) -> int:
        """Those that need a mask."""
        return self.touched_tiles - self.full_tiles - self.clipped_tiles

    @property
    def is_block_sparse(self) -> bool:
        """Perfectly block-sparse: no visited tile holds a masked pair inside the grid."""
        return self.partial_tiles == 0

    @cached_property
    def allowed_pairs(self) -> int:
        """(query, key) pairs that the mask allows."""
        return allowed_pairs(self.spec)

    @property
    def sparsity(self) -> float:
        """The share of all pairs that the mask forbids."""
        return 1 - self.allowed_pairs / self.spec.num_tokens**2

    @property
    def flop_speedup(self) -> float:
        """All pairs over allowed pairs; a tiling exceeds it only where dense tiles waste more on rounding."""
        return self.spec.num_tokens**2 / self.allowed_pairs

    @property
    def tile_speedup_worst(self) -> float:
        """Dense key tiles over those of the busiest query tile: what the paper prints."""
        busiest = math.prod(max(max(one.visited) for one in axis) for axis in self.axes)
        return self._dense_kv_tiles / busiest

    @property
    def tile_speedup_mean(self) -> float:
        """Dense key tiles over the mean of all query tiles."""
        return self._dense_kv_tiles * self.query_tiles / self.touched_tiles

    @property
    def work_speedup(self) -> float:
        """Tiles of a dense kernel over tiles visited, the rounding of both grids included: dense time over
        this is the least time to expect."""
        dense_q_tiles = -(-self.spec.num_tokens // (self.q_rows or math.prod(self.q_tile)))
        return dense_q_tiles * self._dense_kv_tiles / self.touched_tiles

    def explain(self) -> str:
        """In words, per axis, why tiles are partial, rule and numbers, and the cheapest change that mends it.

        Example:
            >>> import gnaflex
            >>> print(gnaflex.plan(gnaflex.GNA(64, window=16, stride=16), (16,), (16,)).explain())
            Block-sparse: none of 4 visited tiles needs a mask; work speed-up 4.00, FLOPs allow 4.00.
        """
        from gnaflex.reasons import explain  # which builds on plans

        return explain(self)

    @property
    def _dense_kv_tiles(self) -> int:
        return -(-self.spec.num_tokens // (self.kv_rows or math.prod(self.kv_tile)))


def plan(
    spec: GNA,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    kv_tiling: KVTiling = "static",
    *,
    q_rows: int = ROWS,
    kv_rows: int = ROWS,
) -> Plan:
    """How a problem tiles, and the speed-ups that allows; exact for every window, stride, dilation and shape.

    Args:
        spec: the problem.
        q_tile, kv_tile: tokens per axis of a query and a key tile, in steps of the dilation. One that is not
            given is the best of all boxes that fill more than half of ``q_rows`` or ``kv_rows`` tokens,
            extents of 1 and odd ones included: the fewest visited tiles, then the fewest to mask.
        kv_tiling: "static" or "dynamic", see :class:`Plan`.
        q_rows, kv_rows: tokens that a tile may hold when it is not given; one of fewer costs as much.

    Raises:
        GNAError: a tile does not fit the problem, or an axis is too long; the message says what to write.

    Example:
        >>> import gnaflex
        >>> video = gnaflex.GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
        >>> p = gnaflex.plan(video, (4, 8, 8), (2, 8, 8), "dynamic")
        >>> p.is_block_sparse, round(p.flop_speedup, 2), round(p.work_speedup, 2)
        (True, 11.11, 10.42)
    """
    check_choice("kv_tiling", kv_tiling, get_args(KVTiling))
    check_spec(spec)
    q, kv = checked_tile("q_tile", q_tile, spec), checked_tile("kv_tile", kv_tile, spec)
    rows = whole("q_rows", q_rows, 1, MOST_ROWS), whole("kv_rows", kv_rows, 1, MOST_ROWS)
    free = rows[0] if q is None else None, rows[1] if kv is None else None
    if q is None or kv is None:
        q, kv = _best_tiles(spec, q, kv, kv_tiling, *rows)
    return Plan(spec, q, kv, kv_tiling, *free)


def check_spec(spec: GNA) -> None:
    """Refuse what is no problem, and axes of which no table can be made."""
    if not isinstance(spec, GNA):
        raise GNAError(
            f"a problem is needed: got {type(spec).__name__}. Write gnaflex.GNA((30, 48, 80), window=24)."
        )
    if (longest := max(spec.shape)) > MOST_LENGTH:
        raise GNAError(
            f"an axis must not exceed {MOST_LENGTH:,} tokens: axis {spec.shape.index(longest)} has "
            f"length={longest:,}.\n  shape={spec.shape}. Split the axis."
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an argument that is none of those allowed."""
    if value not in allowed:
        listed = ", ".join(f'"{one}"' for one in allowed)
        raise GNAError(f'{name} must be one of {listed}: got {value!r}. Write {name}="{allowed[0]}".')


def checked_tile(name: str, tile: Tile | None, spec: GNA) -> Tile | None:
    """A tile as integers, refused if it does not fit; None stays."""
    if tile is None:
        return None
    try:
        return _extents(tile, spec.rank)
    except (TypeError, GNAError):
        example = (1,) * (spec.rank - 1) + (ROWS,)
        raise GNAError(
            f"{name} must have one positive integer extent per axis, up to {MOST_LENGTH:,}: got "
            f"{name}={tile!r} for {spec.rank} axes.\n"
            f"  shape={spec.shape}. Write {name}={example}, or leave it out."
        ) from None


def _extents(tile: Any, rank: int) -> Tile:
    extents = tuple(whole("tile", extent, 1, MOST_LENGTH) for extent in tile)
    if len(extents) != rank:
        raise GNAError("a tile has as many extents as the grid has axes.")
    return extents


class Ranges(NamedTuple):
    """Per query tile of an axis its first query, the keys that some query sees, and those that all see."""

    start: IntArray
    needed: tuple[IntArray, IntArray]
    shared: tuple[IntArray, IntArray]

    def tiles(self, kv: Any, n: int, kv_tiling: KVTiling) -> tuple[IntArray, IntArray, IntArray]:
        """Key tiles of extent ``kv`` (which broadcasts): visited, unmasked, and whole ones among these."""
        (lo, hi), (all_lo, all_hi) = self.needed, self.shared
        # key tiles begin at the multiples of kv from ``origin`` on, and are cut off at ``end``
        origin, end = (0, n) if kv_tiling == "static" else (lo, hi)
        visited = -(-(hi - origin) // kv) - (lo - origin) // kv
        first = -(-(all_lo - origin) // kv)
        whole = np.maximum((all_hi - origin) // kv - first, 0)
        last = np.where(all_hi == end, -(-(all_hi - origin) // kv), (all_hi - origin) // kv)
        return visited, np.where(all_lo < all_hi, np.maximum(last - first, 0), 0), whole


def _ranges(n: int, axis: Axis, q: int) -> Ranges:
    pairs = relation(n, axis)
    start = np.arange(0, n, q)
    stop = np.minimum(start + q, n)
    return Ranges(start, pairs.any_of(start, stop), pairs.all_of(start, stop))


@lru_cache(maxsize=4096)
def _axis_tiles(n: int, count: int, axis: Axis, q: int, kv: int, kv_tiling: KVTiling) -> AxisTiles:
    ranges = _ranges(n, axis, q)
    columns = (ranges.start, *ranges.tiles(kv, n, kv_tiling))
    start, visited, unmasked, whole = (tuple(column.tolist()) for column in columns)
    needed, shared = (tuple(zip(*(end.tolist() for end in ends), strict=True)) for ends in ranges[1:])
    return AxisTiles(n, count, start, needed, shared, visited, unmasked, whole)


# ---- the best tiles ----------------------------------------------------------------------------------

CHUNK = 32  # query boxes that are weighed against all key boxes at a time


def _best_tiles(
    spec: GNA, q_tile: Tile | None, kv_tile: Tile | None, kv_tiling: KVTiling, q_rows: int, kv_rows: int
) -> tuple[Tile, Tile]:
    """Of all pairs of boxes those with the fewest visited tiles, then the fewest that need a mask.

    A query box needs so many keys, all tiles together; a key tile holds ``kv_rows`` of them at most. Query
    boxes come in the order of that bound, until it exceeds the best pair found.
    """
    lengths = tuple(axis.group_length(0) for axis in spec.axes)
    q_boxes = np.array([q_tile]) if q_tile else _boxes(q_rows, lengths)
    kv_boxes = np.array([kv_tile]) if kv_tile else _boxes(kv_rows, lengths)
    bound = np.ones(len(q_boxes))
    for a, axis in enumerate(spec.axes):
        extents, at = np.unique(q_boxes[:, a], return_inverse=True)
        bound *= _needed_keys(axis, tuple(extents.tolist()))[at]
    bound /= kv_boxes.prod(axis=1).max()
    order = np.argsort(bound, kind="stable")
    best, found = (math.inf, math.inf), (0, 0)
    for first in range(0, len(order), CHUNK):
        some = order[first : first + CHUNK]
        if bound[some[0]] > best[0]:
            break
        here, at = _fewest(spec, q_boxes, some, kv_boxes, kv_tiling)
        if here < best:
            best, found = here, at
    return tuple(q_boxes[found[0]].tolist()), tuple(kv_boxes[found[1]].tolist())


@lru_cache(maxsize=64)
def _boxes(rows: int, lengths: tuple[int, ...]) -> IntArray:
    """Every box that fills more than half of ``rows`` tokens, or of a smaller grid; [boxes, axes]."""
    boxes, tokens = np.zeros((1, 0), np.int64), np.ones(1, np.int64)
    for length in lengths:
        extents = np.arange(1, min(rows, length) + 1)
        product = np.multiply.outer(tokens, extents)
        box, extent = np.nonzero(product <= rows)
        if len(box) > MOST_BOXES:
            raise GNAError(
                f"too many boxes of {rows} tokens at most for {len(lengths)} axes: over {MOST_BOXES:,}.\n"
                f"  Give the tiles. Write q_tile={(1,) * (len(lengths) - 1) + (lengths[-1],)}."
            )
        boxes = np.column_stack([boxes[box], extents[extent]])
        tokens = product[box, extent]
    return boxes[2 * tokens > min(rows, math.prod(lengths))]


@lru_cache(maxsize=4096)
def _needed_keys(axis: Axis, q_extents: Tile) -> IntArray:
    """Keys that the query tiles of an axis need, summed over the tiles, for each of their extents."""
    totals = np.zeros(len(q_extents), np.int64)
    for n, members in groups(axis):
        starts = [np.arange(0, n, q) for q in q_extents]
        counts = np.array([len(start) for start in starts])
        start = np.concatenate(starts)
        lo, hi = relation(n, axis).any_of(start, np.minimum(start + np.repeat(q_extents, counts), n))
        totals += len(members) * np.add.reduceat(hi - lo, np.cumsum(counts) - counts)
    return totals


def _fewest(
    spec: GNA, q_boxes: IntArray, some: IntArray, kv_boxes: IntArray, kv_tiling: KVTiling
) -> tuple[tuple[float, float], tuple[int, int]]:
    """Of ``some`` query boxes with all key boxes the pair with the fewest (visited, masked) tiles."""
    visited = np.ones((len(some), len(kv_boxes)))
    axes = []
    for a, axis in enumerate(spec.axes):
        q_extents, q_at = np.unique(q_boxes[some, a], return_inverse=True)
        kv_extents, kv_at = np.unique(kv_boxes[:, a], return_inverse=True)
        rows = [axis_totals(axis, q, tuple(kv_extents.tolist()), kv_tiling) for q in q_extents.tolist()]
        seen, unmasked = (np.stack([row[at] for row in rows]) for at in range(2))
        visited *= seen[:, kv_at][q_at]
        axes.append((unmasked, q_at, kv_at))
    q, kv = np.nonzero(visited == visited.min())
    masked = visited[q, kv] - math.prod(unmasked[q_at[q], kv_at[kv]] for unmasked, q_at, kv_at in axes)
    at = int(masked.argmin())
    return (float(visited.min()), float(masked[at])), (int(some[q[at]]), int(kv[at]))


@lru_cache(maxsize=4096)
def axis_totals(axis: Axis, q: int, kv_extents: Tile, kv_tiling: KVTiling) -> IntArray:
    """Visited and unmasked key tiles of an axis, [2, key extents], all dilation groups together."""
    totals = np.zeros((2, len(kv_extents)), np.int64)
    kv = np.array(kv_extents)[:, None]
    for group in groups(axis):
        visited, unmasked, _ = _ranges(group.n, axis, q).tiles(kv, group.n, kv_tiling)
        totals += len(group.members) * np.stack([visited.sum(1), unmasked.sum(1)])
    return totals

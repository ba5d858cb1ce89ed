"""Ranges of tiles to the block lists of FlexAttention, in closed form; no torch.

A mask over blocks is held as sorted disjoint ranges of flat block ids ``row * columns + column``. Tile-major
boxes and row-major runs both come down to such ranges, so union, difference and the expansion into lists
are written once, for the forward lists and for the transposed ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gnaflex.spec import GNA, Axis
from gnaflex.tiles import Group, Tile, TileRanges, classes, groups, relation, tile_ranges
from gnaflex.window import IntArray

Int32Array = npt.NDArray[np.int32]


class Ranges(NamedTuple):
    """Sorted disjoint half-open ranges of flat block ids; ranges may touch, and may be empty."""

    start: IntArray
    stop: IntArray

    def minus(self, inner: Ranges) -> Ranges:
        """These ranges without ``inner``, which must lie inside them."""
        start = np.concatenate([self.start, inner.stop])
        stop = np.concatenate([self.stop, inner.start])
        start.sort()
        stop.sort()
        return Ranges(start, stop)

    @property
    def size(self) -> int:
        """How many blocks the ranges hold."""
        return int((self.stop - self.start).sum())


class Lists(NamedTuple):
    """``counts`` int32 [rows] and ascending column ``indices`` int32 [rows, width], zero past the count."""

    counts: Int32Array
    indices: Int32Array


class Pending(NamedTuple):
    """Block lists that are counted but not yet written."""

    columns: int
    counts: IntArray
    write: Callable[[Int32Array], None]

    @property
    def width(self) -> int:
        """The narrowest width that holds every row; at least 1."""
        return max(1, int(self.counts.max()))


def written(pending: Sequence[Pending], full_width: bool) -> list[Lists]:
    """The lists, each as wide as it has columns, or as narrow as its longest row allows.

    All of them share one allocation: above 4 MB numpy asks for huge pages, which makes the page faults of
    four separate full-width lists (4.8 ms at 900 x 900 blocks) negligible (0.15 ms).
    """
    shapes = [(len(one.counts), one.columns if full_width else one.width) for one in pending]
    sizes = [-(-rows * width // 16) * 16 for rows, width in shapes]  # 64-byte aligned parts
    whole = np.zeros(sum(sizes), np.int32)
    out = []
    for one, shape, end in zip(pending, shapes, np.cumsum(sizes), strict=True):
        indices = whole[end - math.prod(shape) :][: math.prod(shape)].reshape(shape)
        one.write(indices)
        out.append(Lists(one.counts.astype(np.int32), indices))
    return out


class Grid(NamedTuple):
    """The blocks of a mask in one direction: touched and full ranges over ``rows`` x ``columns`` blocks."""

    rows: int
    columns: int
    touched: Ranges
    full: Ranges

    def pending(self) -> tuple[Pending, Pending]:
        """The lists of the partial and of the full blocks."""
        return self._pending(self.touched.minus(self.full)), self._pending(self.full)

    def _pending(self, ranges: Ranges) -> Pending:
        total = _offsets(ranges.stop - ranges.start)
        first = np.searchsorted(ranges.start, np.arange(self.rows + 1) * self.columns)
        counts = np.diff(total[first])
        return Pending(self.columns, counts, functools.partial(self._fill, ranges, counts))

    def _fill(self, ranges: Ranges, counts: IntArray, indices: Int32Array) -> None:
        width = indices.shape[1]
        length = ranges.stop - ranges.start
        keep = length > 0
        start, length = ranges.start[keep], length[keep]
        row = start // self.columns
        dtype = np.int32 if indices.size < 2**31 else np.int64
        entry = np.arange(int(length.sum()), dtype=dtype)
        column = entry + np.repeat((start - row * self.columns - _offsets(length)[:-1]).astype(dtype), length)
        place = entry + np.repeat((row * width - _offsets(counts)[row]).astype(dtype), length)
        indices.reshape(-1)[place] = column


def _offsets(length: IntArray) -> IntArray:
    """Running totals with a leading zero."""
    out = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length, out=out[1:])
    return out


def _expand(start: IntArray, length: IntArray, counts: list[IntArray], pitches: list[int]) -> Ranges:
    """Every range repeated ``counts[a]`` times at steps of ``pitches[a]``, axis after axis."""
    for a, pitch in enumerate(pitches):
        count = counts[a]
        step = np.arange(int(count.sum())) - np.repeat(_offsets(count)[:-1], count)
        start = np.repeat(start, count) + step * pitch
        length = np.repeat(length, count)
        counts = [np.repeat(other, count) for other in counts]
    return Ranges(start, start + length)


# ---- tile-major --------------------------------------------------------------------------------------


def tile_major(spec: GNA, q_tile: Tile, kv_tile: Tile, inverse: bool = False) -> tuple[Pending, Pending]:
    """The partial and full lists of a mask whose tokens lie dilation group by group, tile by tile.

    Rows that look alike but for a shift (the interior of a grid, the groups of one length) are worked out
    once and copied with their shift.
    """
    per_block = math.prod(q // kv for q, kv in zip(q_tile, kv_tile, strict=True))
    q_blocks = sum(len(_group_offsets(spec, each, q_tile)) * _tiles(each, q_tile) for each in classes(spec))
    rows, columns = (q_blocks * per_block, q_blocks) if inverse else (q_blocks, q_blocks * per_block)
    parts = zip(*(_class_lists(spec, each, q_tile, kv_tile, inverse) for each in classes(spec)), strict=True)
    partial, full = (_assembled(rows, columns, part) for part in parts)
    return partial, full


class _Copies(NamedTuple):
    """Row ``like[r]`` of ``distinct``, moved by ``shift[r]``, is row ``row[r]``, for every r."""

    distinct: Lists
    row: IntArray
    like: IntArray
    shift: Int32Array


def _assembled(rows: int, columns: int, parts: Sequence[_Copies]) -> Pending:
    counts = np.zeros(rows, np.int64)
    for part in parts:
        counts[part.row] = part.distinct.counts[part.like]
    return Pending(columns, counts, functools.partial(_copy, parts))


def _copy(parts: Sequence[_Copies], indices: Int32Array) -> None:
    for distinct, row, like, shift in parts:
        width = distinct.indices.shape[1]
        moved = distinct.indices[like]
        if len(row) == len(indices) and bool((np.diff(row) == 1).all()):
            np.add(moved, shift[:, None], out=indices[:, :width])
        else:
            moved += shift[:, None]
            indices[row, :width] = moved


def _tiles(combination: tuple[Group, ...], tile: Tile) -> int:
    return math.prod(-(-group.n // t) for group, t in zip(combination, tile, strict=True))


def _class_lists(
    spec: GNA, combination: tuple[Group, ...], q_tile: Tile, kv_tile: Tile, inverse: bool
) -> list[_Copies]:
    """Partial and full lists of the dilation groups of one combination of lengths."""
    ratio = tuple(q // kv for q, kv in zip(q_tile, kv_tile, strict=True))
    flat = (1,) * spec.rank
    q_tiles = tuple(-(-group.n // t) for group, t in zip(combination, q_tile, strict=True))
    q_place, kv_place = _placement(q_tiles, flat), _placement(q_tiles, ratio)
    row_place, column_place = (kv_place, q_place) if inverse else (q_place, kv_place)
    tiled = [
        tile_ranges(group.n, axis, q, kv, inverse)
        for group, axis, q, kv in zip(combination, spec.axes, q_tile, kv_tile, strict=True)
    ]
    steps = flat if inverse else ratio
    alike = [_alike(ranges, step) for ranges, step in zip(tiled, steps, strict=True)]
    distinct = [
        TileRanges(*(side[first] for side in ranges)) for ranges, (first, _) in zip(tiled, alike, strict=True)
    ]
    columns = math.prod(len(place) for place in column_place)
    touched, full = (
        _boxes(
            [r[at] for r in distinct], [r[at + 1] for r in distinct], column_place, columns, max(steps) > 1
        )
        for at in (0, 2)
    )
    grid = Grid(math.prod(len(first) for first, _ in alike), columns, touched, full)
    pitches = [math.prod(len(first) for first, _ in alike[a + 1 :]) for a in range(spec.rank)]
    like = _outer_sum([group * pitch for (_, group), pitch in zip(alike, pitches, strict=True)])
    moves = []
    for place, ranges, (first, group) in zip(column_place, tiled, alike, strict=True):
        lo = place[ranges.touched_lo]
        moves.append(lo - lo[first][group])
    row = _outer_sum([place[: len(ranges[0])] for place, ranges in zip(row_place, tiled, strict=True)])
    first_block = _group_offsets(spec, combination, q_tile)
    per_block = math.prod(ratio)
    row_origin, column_origin = (first_block * n for n in ((per_block, 1) if inverse else (1, per_block)))
    every_row = np.add.outer(row_origin, row).ravel()
    shift = np.add.outer(column_origin, _outer_sum(moves)).ravel().astype(np.int32)
    every_like = np.tile(like, len(first_block))
    return [
        _Copies(lists, every_row, every_like, shift) for lists in written(grid.pending(), full_width=False)
    ]


def _alike(ranges: TileRanges, step: int) -> tuple[IntArray, IntArray]:
    """The first of every kind of row tile that differ by a shift alone (of whole ``step``s), and each
    tile's kind."""
    touched = ranges.touched_hi - ranges.touched_lo
    full = ranges.full_hi - ranges.full_lo
    offset = np.where(full > 0, ranges.full_lo - ranges.touched_lo, 0)
    size = int(touched.max()) + 1
    key = ((touched * size + full) * size + offset) * step + ranges.touched_lo % step
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    return first, group


def _placement(q_tiles: Tile, ratio: Tile) -> list[IntArray]:
    """Per axis, what a tile adds to the id of its block inside a dilation group.

    ``ratio`` is 1 for query tiles. Key tiles lie query tile by query tile, so their ids are sums as well:
    the place of the query tile, and the place inside it.
    """
    per_block = math.prod(ratio)
    out = []
    for a, (tiles, r) in enumerate(zip(q_tiles, ratio, strict=True)):
        tile = np.arange(tiles * r)
        outer, inner = math.prod(q_tiles[a + 1 :]) * per_block, math.prod(ratio[a + 1 :])
        out.append(tile // r * outer + tile % r * inner)
    return out


def _group_offsets(spec: GNA, combination: tuple[Group, ...], q_tile: Tile) -> IntArray:
    """The first query block of every dilation group of a combination, groups in row-major order."""
    tiles_of = [
        np.concatenate([np.full(len(group.members), -(-group.n // t)) for group in groups(axis)])
        for axis, t in zip(spec.axes, q_tile, strict=True)
    ]
    first = np.zeros(1, np.int64)
    for a, group in enumerate(combination):
        inner = math.prod(int(tiles.sum()) for tiles in tiles_of[a + 1 :])
        outer = _tiles(combination[:a], q_tile[:a])
        first = np.add.outer(first, _offsets(tiles_of[a])[group.members] * outer * inner).ravel()
    return first


def _boxes(
    lo: list[IntArray], hi: list[IntArray], place: list[IntArray], columns: int, nested: bool
) -> Ranges:
    """The flat ids of the boxes ``[lo, hi)`` of column tiles, one box per combination of row tiles.

    A box is a product of runs, unless the column tiles are nested: then every tile is listed and sorted.
    """
    rows = math.prod(len(axis) for axis in lo)
    length = [_spread(stop - start, a, lo) for a, (start, stop) in enumerate(zip(lo, hi, strict=True))]
    if not nested:
        pitches = [int(axis[1]) if len(axis) > 1 else 0 for axis in place]
        first = _outer_sum([start * pitch for start, pitch in zip(lo, pitches, strict=True)])
        return _expand(np.arange(rows) * columns + first, length[-1], length[:-1], pitches[:-1])
    ids = np.arange(rows) * columns
    first_tile = [_spread(start, a, lo) for a, start in enumerate(lo)]
    for a, axis in enumerate(place):
        count = length[a]
        step = np.arange(int(count.sum())) - np.repeat(_offsets(count)[:-1], count)
        ids = np.repeat(ids, count) + axis[np.repeat(first_tile[a], count) + step]
        first_tile = [np.repeat(other, count) for other in first_tile]
        length = [np.repeat(other, count) for other in length]
    ids.sort()
    return Ranges(ids, ids + 1)


def _outer_sum(parts: list[IntArray]) -> IntArray:
    total = parts[0]
    for part in parts[1:]:
        total = np.add.outer(total, part).ravel()
    return total


def _spread(values: IntArray, a: int, per_axis: list[IntArray]) -> IntArray:
    """Values of axis ``a`` repeated over the product of all axes."""
    return _outer_sum(
        [values if at == a else np.zeros(len(axis), np.int64) for at, axis in enumerate(per_axis)]
    )


def _joined(parts: list[Ranges]) -> Ranges:
    start = np.concatenate([np.zeros(0, np.int64), *(part.start for part in parts)])
    stop = np.concatenate([np.zeros(0, np.int64), *(part.stop for part in parts)])
    start.sort()
    stop.sort()
    return Ranges(start, stop)


# ---- row-major ---------------------------------------------------------------------------------------


class _Dim(NamedTuple):
    """One mixed-radix digit of a token index: what a box of row tokens touches and fully sees on it.

    An axis with dilation has two digits, the place inside the group and the group.
    """

    pitch: int
    size: int
    touched_lo: IntArray
    touched_hi: IntArray
    full_lo: IntArray
    full_hi: IntArray


def row_major(spec: GNA, q_block: int, kv_block: int, inverse: bool = False) -> tuple[Pending, Pending]:
    """The blocks of a mask over row-major tokens, cut into runs of ``q_block`` and ``kv_block`` tokens.

    A run of consecutive tokens is a few boxes. What a box touches is a box again, hence a set of token runs;
    what all boxes of a run see in full is one box.
    """
    row_block, column_block = (kv_block, q_block) if inverse else (q_block, kv_block)
    tokens = spec.num_tokens
    rows, columns = -(-tokens // row_block), -(-tokens // column_block)
    block, start, last = _token_boxes(spec.shape, row_block)
    block, dims = _digits(spec, block, start, last, inverse)
    touched = _touched(block, dims, columns, column_block)
    # A group of a dilated axis can hold its last token and its first, which follow each other row-major.
    wraps = any(axis.dilation > 1 and axis.length % axis.dilation == 1 for axis in spec.axes)
    full = _full(block, dims, columns, column_block, tokens // row_block, wraps)
    return Grid(rows, columns, touched, full).pending()


def _token_boxes(shape: Tile, size: int) -> tuple[IntArray, IntArray, IntArray]:
    """Every run of ``size`` row-major tokens as at most ``2 * rank - 1`` boxes of coordinates.

    Returns the run of each box (ascending), and its first and last coordinates, both [boxes, rank].
    """
    rank, tokens = len(shape), math.prod(shape)
    begin = np.arange(0, tokens, size)
    end = np.minimum(begin + size, tokens) - 1
    p, e = (np.stack(np.unravel_index(at, shape), axis=1) for at in (begin, end))
    differs = np.minimum(np.argmax(np.concatenate([p != e, np.ones((len(p), 1), bool)], 1), axis=1), rank - 1)
    parts = []
    whole = np.array(shape) - 1
    for k in range(rank):
        inner = int(k < rank - 1)
        for kind in ("head", "middle", "tail"):
            rows = np.flatnonzero(differs == k if kind == "middle" else differs < k)
            first, last = np.zeros((len(rows), rank), np.int64), np.tile(whole, (len(rows), 1))
            outer = (e if kind == "tail" else p)[rows, :k]
            first[:, :k] = last[:, :k] = outer
            if kind != "tail":
                first[:, k] = p[rows, k] + inner
            if kind != "head":
                last[:, k] = e[rows, k] - inner
            keep = first[:, k] <= last[:, k]
            parts.append((rows[keep], first[keep], last[keep]))
    block, first, last = (np.concatenate([part[at] for part in parts]) for at in range(3))
    order = np.argsort(block, kind="stable")
    return block[order], first[order], last[order]


def _digits(
    spec: GNA, block: IntArray, first: IntArray, last: IntArray, inverse: bool
) -> tuple[IntArray, list[_Dim]]:
    """The boxes digit by digit, those on dilated axes split so that each is a product of digit ranges."""
    pieces: dict[int, list[IntArray]] = {}
    for a, axis in enumerate(spec.axes):
        if axis.dilation == 1:
            continue
        source, *digits = _split(axis, first[:, a], last[:, a])
        block, first, last = block[source], first[source], last[source]
        pieces = {at: [digit[source] for digit in other] for at, other in pieces.items()}
        pieces[a] = digits
    dims = []
    for a, axis in enumerate(spec.axes):
        pitch = math.prod(spec.shape[a + 1 :])
        if a not in pieces:
            pairs = relation(axis.length, axis, inverse)
            start, stop = first[:, a], last[:, a] + 1
            dims.append(_Dim(pitch, axis.length, *pairs.any_of(start, stop), *pairs.all_of(start, stop)))
            continue
        inside_first, inside_last, group_first, group_last, is_short = pieces[a]
        dims.append(
            _group_digit(axis, pitch * axis.dilation, inside_first, inside_last + 1, is_short, inverse)
        )
        full = group_last, np.maximum(group_first + 1, group_last)
        dims.append(_Dim(pitch, axis.dilation, group_first, group_last + 1, *full))
    return block, dims


def _split(axis: Axis, first: IntArray, last: IntArray) -> tuple[IntArray, ...]:
    """Coordinates ``[first, last]`` of a dilated axis as products of (inside, group) digit ranges.

    Returns source box, first and last inside digit, first and last group, and whether the groups are of
    the shorter of the two lengths.
    """
    d, longer = axis.dilation, axis.length % axis.dilation
    (i, g), (j, h) = np.divmod(first, d), np.divmod(last, d)
    same = i == j
    zero, top = np.zeros_like(g), np.full_like(g, d - 1)
    pieces = [
        (i, i, g, np.where(same, h, top), np.ones_like(same)),
        (i + 1, j - 1, zero, top, j - i > 1),
        (j, j, zero, h, ~same),
    ]
    out = []
    for inside_first, inside_last, group_first, group_last, exists in pieces:
        for is_short in (False, True) if longer else (False,):
            lo = np.maximum(group_first, longer) if is_short else group_first
            hi = np.minimum(group_last, longer - 1) if longer and not is_short else group_last
            keep = np.flatnonzero(exists & (lo <= hi))
            out.append(
                (
                    keep,
                    inside_first[keep],
                    inside_last[keep],
                    lo[keep],
                    hi[keep],
                    np.full(len(keep), is_short),
                )
            )
    columns = [np.concatenate(column) for column in zip(*out, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return tuple(column[order] for column in columns)


def _group_digit(
    axis: Axis, pitch: int, start: IntArray, stop: IntArray, is_short: IntArray, inverse: bool
) -> _Dim:
    out = np.zeros((4, len(start)), np.int64)
    for group, rows in zip(groups(axis), (~is_short, is_short), strict=False):
        pairs = relation(group.n, axis, inverse)
        each = (*pairs.any_of(start[rows], stop[rows]), *pairs.all_of(start[rows], stop[rows]))
        out[:, rows] = each
    return _Dim(pitch, axis.group_length(0), *out)


def _touched(block: IntArray, dims: list[_Dim], columns: int, size: int) -> Ranges:
    """The column blocks that some token of a row block is paired with."""
    span = dims[-1].touched_hi - dims[-1].touched_lo
    depth = np.zeros(len(block), np.int64)
    merging = np.ones(len(block), bool)
    for at in range(len(dims) - 2, -1, -1):
        steps = dims[at].touched_hi - dims[at].touched_lo - 1
        merging &= (dims[at].pitch - span < size) | (steps == 0)
        span = np.where(merging, steps * dims[at].pitch + span, span)
        depth += merging
    base = sum((dim.touched_lo * dim.pitch for dim in dims), start=np.zeros(len(block), np.int64))
    parts = []
    for merged in np.unique(depth):
        rows = np.flatnonzero(depth == merged)
        outer = dims[: len(dims) - 1 - int(merged)]
        counts = [(dim.touched_hi - dim.touched_lo)[rows] for dim in outer]
        tokens = columns * size  # a row of tokens, wide enough that no run leaves it
        runs = _expand(block[rows] * tokens + base[rows], span[rows], counts, [dim.pitch for dim in outer])
        parts.append(Ranges(runs.start // size, (runs.stop - 1) // size + 1))
    return _union(parts, columns)


def _union(parts: list[Ranges], columns: int) -> Ranges:
    """The union of ranges, each within one row of ``columns`` blocks."""
    start, stop = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
    packed = start * (columns + 1) + (stop - start)
    packed.sort()
    start, length = np.divmod(packed, columns + 1)
    reach = np.maximum.accumulate(start + length)
    start[1:] = np.maximum(start[1:], reach[:-1])
    keep = start < reach
    return Ranges(start[keep], reach[keep])


def _full(block: IntArray, dims: list[_Dim], columns: int, size: int, whole_rows: int, wraps: bool) -> Ranges:
    """The column blocks of which every token is paired with every token of a row block.

    Row blocks and column blocks that reach past the last token are never full, as in create_block_mask.
    """
    at_block = np.flatnonzero(np.diff(block, prepend=-1))
    lo = [np.maximum.reduceat(dim.full_lo, at_block) for dim in dims]
    hi = [np.minimum.reduceat(dim.full_hi, at_block) for dim in dims]
    row = block[at_block]
    keep = row < whole_rows
    for low, high in zip(lo, hi, strict=True):
        keep &= low < high
    row, lo, hi = row[keep], [low[keep] for low in lo], [high[keep] for high in hi]
    depth = np.zeros(len(row), np.int64)  # trailing digits that are covered wholly join into longer runs
    covered = np.ones(len(row), bool)
    for at in range(len(dims) - 1, 0, -1):
        covered &= (hi[at] - lo[at]) == dims[at].size
        depth += covered
    parts = []
    for joined in np.unique(depth):
        run = len(dims) - 1 - int(joined)
        length = (hi[run] - lo[run]) * dims[run].pitch
        # Shorter runs hold no whole block, not even two of them that meet.
        rows = np.flatnonzero((depth == joined) & (length * (2 if wraps else 1) >= size))
        base = row[rows] * (columns * size + 1)  # a token more, so that no run meets one of the next row
        for low, dim in zip(lo, dims, strict=True):
            base = base + low[rows] * dim.pitch
        counts = [(hi[at] - lo[at])[rows] for at in range(run)]
        runs = _expand(base, length[rows], counts, [dim.pitch for dim in dims[:run]])
        runs = _met(runs) if wraps else runs
        at_row = runs.start // (columns * size + 1)
        start = at_row * columns + -(-(runs.start - at_row * (columns * size + 1)) // size)
        stop = at_row * columns + (runs.stop - at_row * (columns * size + 1)) // size
        inside = start < stop
        parts.append(Ranges(start[inside], stop[inside]))
    return _joined(parts)


def _met(runs: Ranges) -> Ranges:
    """Runs that meet joined into one."""
    apart = runs.start[1:] != runs.stop[:-1]
    return Ranges(
        runs.start[np.r_[True, apart][: len(runs.start)]], runs.stop[np.r_[apart, True][: len(runs.stop)]]
    )

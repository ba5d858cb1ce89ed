"""Block lists of tile-major masks, in closed form; no torch.

Per axis a query tile touches one range of key tiles, so it touches a box of them, and covers a box within.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gnaflex.blocks import Cut, Grid, Int32Array, Lists, Pending, Ranges, expand, offsets, written
from gnaflex.order import Document, Order
from gnaflex.spec import GNA
from gnaflex.tiles import Group, Tile, TileRanges, classes, groups, tile_ranges
from gnaflex.window import IntArray


def tile_major(order: Order, inverse: bool = False, cut: Cut = Cut.NOTHING) -> tuple[Pending, Pending]:
    """The partial and full lists of a mask whose tokens lie dilation group by group, tile by tile, the extra
    tokens behind. ``inverse`` gives the transposed lists. Blocks that ``cut`` may cut into are partial."""
    each = [_document_lists(document, inverse, cut) for document in order.documents]
    if len(each) == 1:
        return each[0]
    return _stacked([partial for partial, _ in each]), _stacked([full for _, full in each])


def _stacked(parts: Sequence[Pending]) -> Pending:
    """Lists of documents that share neither rows nor columns."""

    def write(indices: Int32Array) -> None:
        row = column = 0
        for part in parts:
            mine = indices[row : row + len(part.counts)]
            part.write(mine)
            mine += column
            row, column = row + len(part.counts), column + part.columns

    return Pending(sum(part.columns for part in parts), np.concatenate([p.counts for p in parts]), write)


# ---- extra tokens ------------------------------------------------------------------------------------

# How much of a key block can be seen: none of it is a token, some is (or may be cut), all is.
NONE, SOME, ALL = range(3)


def _document_lists(document: Document, inverse: bool, cut: Cut) -> tuple[Pending, Pending]:
    grid = _grid_lists(document.spec, *document.layout.tiles, inverse, cut is Cut.ALL)
    if not document.texts:
        return grid
    keys = np.minimum(_key_states(document), SOME if cut is Cut.ALL else ALL)
    kv_blocks = len(grid[0].counts) if inverse else grid[0].columns
    if cut is Cut.TEXT:
        keys[kv_blocks:] = np.minimum(keys[kv_blocks:], SOME)
    queries = np.full(document.num_queries // math.prod(document.layout.tiles[0]), ALL)
    rows, columns = (keys, queries) if inverse else (queries, keys)
    return _with_text(grid[0], rows, columns, SOME), _with_text(grid[1], rows, columns, ALL)


def _with_text(grid: Pending, rows: IntArray, columns: IntArray, state: int) -> Pending:
    """The lists of a grid continued: blocks that pair with extra tokens are listed here if the lesser of the
    states of row and column is ``state``. Extra tokens lie behind, so their columns follow the grid's."""
    tail = np.minimum.outer(rows[: len(grid.counts)], columns[grid.columns :]) == state
    below = np.minimum.outer(rows[len(grid.counts) :], columns) == state
    counts = np.concatenate([grid.counts + tail.sum(1), below.sum(1)])

    def write(indices: Int32Array) -> None:
        grid.write(indices[: len(grid.counts)])
        for listed, before, row, column in (
            (tail, grid.counts, 0, grid.columns),
            (below, np.zeros(len(below), np.int64), len(grid.counts), 0),
        ):
            at, entry = np.nonzero(listed)
            place = before[at] + listed.cumsum(1)[at, entry] - 1
            indices[row + at, place] = column + entry

    return Pending(len(columns), counts, write)


def _key_states(document: Document) -> IntArray:
    """The state of every key block: those of the grid, then those of the extra tokens."""
    spec, (q_tile, kv_tile) = document.spec, document.layout.tiles
    ratio = tuple(q // kv for q, kv in zip(q_tile, kv_tile, strict=True))
    kv_block = math.prod(kv_tile)
    states = np.full(document.num_keys // kv_block, ALL)
    for combination in classes(spec):
        q_tiles = tuple(-(-group.n // t) for group, t in zip(combination, q_tile, strict=True))
        each = [
            _filled(group.n, tiles * q, kv)
            for group, tiles, q, kv in zip(combination, q_tiles, q_tile, kv_tile, strict=True)
        ]
        block = _outer_sum(_placement(q_tiles, ratio))
        origin = _group_offsets(spec, combination, q_tile) * math.prod(ratio)
        states[np.add.outer(origin, block)] = functools.reduce(np.minimum.outer, each).ravel()
    for text in document.texts:
        here = slice(text.start // kv_block, (text.start + text.places) // kv_block)
        states[here] = _filled(text.tokens, text.places, kv_block)
    return states


def _filled(tokens: int, places: int, block: int) -> IntArray:
    """The states of the blocks of ``places`` of which the first ``tokens`` are tokens."""
    left = tokens - np.arange(0, places, block)
    return np.where(left >= block, ALL, np.where(left > 0, SOME, NONE))


# ---- grids -------------------------------------------------------------------------------------------


def _grid_lists(
    spec: GNA, q_tile: Tile, kv_tile: Tile, inverse: bool, never_full: bool
) -> tuple[Pending, Pending]:
    """The lists of a grid alone.

    Rows that look alike but for a shift (the interior of a grid, the groups of one length) are worked out
    once and copied with their shift.
    """
    per_block = math.prod(q // kv for q, kv in zip(q_tile, kv_tile, strict=True))
    q_blocks = sum(len(_group_offsets(spec, each, q_tile)) * _tiles(each, q_tile) for each in classes(spec))
    rows, columns = (q_blocks * per_block, q_blocks) if inverse else (q_blocks, q_blocks * per_block)
    each = (_class_lists(spec, one, q_tile, kv_tile, inverse, never_full) for one in classes(spec))
    partial, full = (_assembled(rows, columns, part) for part in zip(*each, strict=True))
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
    spec: GNA,
    combination: tuple[Group, ...],
    q_tile: Tile,
    kv_tile: Tile,
    inverse: bool,
    never_full: bool,
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
    if never_full:
        full = Ranges(full.start[:0], full.stop[:0])
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
    return [_Copies(lists, every_row, every_like, shift) for lists in written(grid.pending())]


def _alike(ranges: TileRanges, step: int) -> tuple[IntArray, IntArray]:
    """The first of every kind of row tile that differ by a shift alone (of whole ``step``s), and each
    tile's kind."""
    touched = ranges.touched_hi - ranges.touched_lo
    full = ranges.full_hi - ranges.full_lo
    offset = np.where(full > 0, ranges.full_lo - ranges.touched_lo, 0)
    size = int(touched.max()) + 1
    key = ((touched * size + full) * size + offset) * step + ranges.touched_lo % step
    order = np.argsort(key, kind="stable")  # np.unique would import numpy.ma, 5 ms in a fresh process
    is_first = np.diff(key[order], prepend=-1) > 0
    group = np.empty(len(key), np.int64)
    group[order] = np.cumsum(is_first) - 1
    return order[is_first], group


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
        first = np.add.outer(first, offsets(tiles_of[a])[group.members] * outer * inner).ravel()
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
        return expand(np.arange(rows) * columns + first, length[-1], length[:-1], pitches[:-1])
    ids = np.arange(rows) * columns
    first_tile = [_spread(start, a, lo) for a, start in enumerate(lo)]
    for a, axis in enumerate(place):
        count = length[a]
        step = np.arange(int(count.sum())) - np.repeat(offsets(count)[:-1], count)
        ids = np.repeat(ids, count) + axis[np.repeat(first_tile[a], count) + step]
        first_tile = [np.repeat(other, count) for other in first_tile]
        length = [np.repeat(other, count) for other in length]
    ids.sort()
    return Ranges(ids, ids + 1)


def _spread(values: IntArray, a: int, per_axis: list[IntArray]) -> IntArray:
    """Values of axis ``a`` repeated over the product of all axes."""
    return _outer_sum(
        [values if at == a else np.zeros(len(axis), np.int64) for at, axis in enumerate(per_axis)]
    )


def _outer_sum(parts: list[IntArray]) -> IntArray:
    total = parts[0]
    for part in parts[1:]:
        total = np.add.outer(total, part).ravel()
    return total

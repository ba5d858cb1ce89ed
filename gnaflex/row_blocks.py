"""Block lists of row-major masks, in closed form; no torch.

A run of consecutive tokens is a few boxes. What a box touches is a box again, hence a set of token runs; what
all boxes of a run see in full is one box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gnaflex.blocks import CHUNK, Cut, Grid, Pending, Ranges, expand, joined, offsets
from gnaflex.layout import Layout
from gnaflex.order import Document, Order
from gnaflex.spec import Axis
from gnaflex.tiles import Tile, relation
from gnaflex.window import IntArray


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

    def rows(self, some: IntArray) -> _Dim:
        """The same for some boxes only."""
        return _Dim(self.pitch, self.size, *(values[some] for values in self[2:]))


def row_major(
    order: Order, q_block: int, kv_block: int, inverse: bool = False, cut: Cut = Cut.NOTHING
) -> tuple[Pending, Pending]:
    """The partial and full lists of a mask over row-major tokens, in blocks of ``q_block`` and ``kv_block``.

    ``inverse`` gives the transposed lists: which query blocks a key block is seen by. Blocks that ``cut`` may
    cut into are partial.
    """
    row_block, column_block = (kv_block, q_block) if inverse else (q_block, kv_block)
    row_tokens, column_tokens = order.num_queries, order.num_keys
    if inverse:
        row_tokens, column_tokens = column_tokens, row_tokens
    blocks = _Blocks(-(-row_tokens // row_block), row_block, -(-column_tokens // column_block), column_block)
    touched, full = [], []
    firsts = zip(order.starts(inverse), order.starts(not inverse), strict=True)
    for document, (row, column) in zip(order.documents, firsts, strict=False):
        rows, columns = _side(document, row, inverse, cut), _side(document, column, not inverse, cut)
        block, start, last = _token_boxes(rows.shape, *blocks.runs_of(rows))
        boxes, dims = _digits(document.layout, block, start, last, inverse)
        touched.append(_touched(boxes, dims, columns.origin, blocks))
        if rows.texts or columns.texts:
            touched.append(_touched_by_text(rows, columns, blocks))
        if cut is not Cut.ALL:
            full.append(_full(boxes, dims, rows, columns, blocks))
    if len(touched) > 1:
        start, stop = (np.concatenate(ends) for ends in zip(*touched, strict=True))
        touched = [_union(start, stop, blocks.columns)]
    return Grid(blocks.rows, blocks.columns, touched[0], joined(full)).pending()


class _Blocks(NamedTuple):
    """The grid of blocks: how many rows and columns, and the tokens of each."""

    rows: int
    row_size: int
    columns: int
    column_size: int

    @property
    def pitch(self) -> int:
        """Tokens from one row of blocks to the next; one more than a row has, so that no two runs meet."""
        return self.columns * self.column_size + 1

    def runs_of(self, side: _Side) -> tuple[IntArray, IntArray, IntArray]:
        """The row blocks that hold grid tokens, and the first and the last grid token of each."""
        end = side.origin + side.tokens
        block = np.arange(side.origin // self.row_size, -(-end // self.row_size))
        first = np.maximum(block * self.row_size, side.origin) - side.origin
        return block, first, np.minimum((block + 1) * self.row_size, end) - 1 - side.origin


class _Side(NamedTuple):
    """A document on the row or the column side: its tokens, its grid's first token and shape, its extra
    tokens and whether they may be cut, and whether tokens of one dilation group can follow each other."""

    first: int
    stop: int
    origin: int
    shape: Tile
    texts: list[tuple[int, int]]
    is_cut: bool
    wraps: bool

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.shape)


def _side(document: Document, first: int, keys: bool, cut: Cut) -> _Side:
    count = document.num_keys if keys else document.num_queries
    texts = [(first + run.start, first + run.stop) for run in document.texts if keys or run.is_query]
    shape = document.layout.kv_shape if keys else document.layout.q_shape
    # The last token of a group and its first follow each other, row-major, if this remainder is 1.
    wraps = any(d > 1 and n % d == 1 for n, d in zip(shape, document.spec.dilation, strict=True))
    is_cut = keys and cut is Cut.TEXT
    return _Side(first, first + count, first + document.grid_start, shape, texts, is_cut, wraps)


def _token_boxes(
    shape: Tile, block: IntArray, begin: IntArray, end: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Every run ``[begin, end]`` of row-major tokens as at most ``2 * rank - 1`` boxes of coordinates.

    Returns the block of each box (ascending), and its first and last coordinates, both [boxes, rank].
    """
    rank = len(shape)
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
    which, first, last = (np.concatenate([part[at] for part in parts]) for at in range(3))
    order = np.argsort(which, kind="stable")
    return block[which[order]], first[order], last[order]


class _Ends(NamedTuple):
    """Where the rows and the columns of an axis lie on it (all of it, unless the layout is a slab)."""

    row_start: int
    column_start: int
    column_stop: int


def _ends(layout: Layout, a: int, inverse: bool) -> _Ends:
    length, slab = layout.spec.shape[a], layout.slab
    if slab is None or slab.axis != a:
        return _Ends(0, 0, length)
    if inverse:
        return _Ends(slab.kv_start, slab.q_start, slab.q_stop)
    return _Ends(slab.q_start, slab.kv_start, slab.kv_stop)


def _digits(
    layout: Layout, block: IntArray, first: IntArray, last: IntArray, inverse: bool
) -> tuple[IntArray, list[_Dim]]:
    """The boxes digit by digit, those on dilated axes split so that each is a product of digit ranges."""
    spec, shape = layout.spec, layout.q_shape if inverse else layout.kv_shape
    ends = [_ends(layout, a, inverse) for a in range(spec.rank)]
    row_start = np.array([end.row_start for end in ends])
    first, last = first + row_start, last + row_start
    pieces: dict[int, list[IntArray]] = {}
    for a, axis in enumerate(spec.axes):
        if axis.dilation == 1:
            continue
        source, *digits = _split(axis, ends[a], first[:, a], last[:, a])
        block, first, last = block[source], first[source], last[source]
        pieces = {at: [digit[source] for digit in other] for at, other in pieces.items()}
        pieces[a] = digits
    dims = []
    for a, axis in enumerate(spec.axes):
        pitch = math.prod(shape[a + 1 :])
        if a not in pieces:
            pairs = relation(axis.length, axis, inverse)
            start, stop = first[:, a], last[:, a] + 1
            ranges = np.stack([*pairs.any_of(start, stop), *pairs.all_of(start, stop)])
            if layout.slab is not None:
                ranges = np.clip(ranges, *ends[a][1:]) - ends[a].column_start
            dims.append(_Dim(pitch, shape[a], *ranges))
            continue
        inside_first, inside_last, group_first, group_last = pieces[a]
        dims.append(_group_digit(axis, ends[a], pitch, inside_first, inside_last + 1, group_first, inverse))
        full = group_last, np.maximum(group_first + 1, group_last)
        dims.append(_Dim(pitch, axis.dilation, group_first, group_last + 1, *full))
    return block, dims


def _alike(axis: Axis, ends: _Ends) -> list[tuple[int, int]]:
    """Ranges of dilation groups that have one length on the whole axis, and one among the columns."""
    d = axis.dilation
    bounds = sorted({0, axis.length % d, ends.column_stop % d, d})
    return list(itertools.pairwise(bounds))


def _split(axis: Axis, ends: _Ends, first: IntArray, last: IntArray) -> tuple[IntArray, ...]:
    """Coordinates ``[first, last]`` of a dilated axis as products of (inside, group) digit ranges, the groups
    of each piece all alike.

    Returns source box, first and last inside digit, first and last group.
    """
    d = axis.dilation
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
        for start, stop in _alike(axis, ends):
            lo, hi = np.maximum(group_first, start), np.minimum(group_last, stop - 1)
            keep = np.flatnonzero(exists & (lo <= hi))
            out.append((keep, inside_first[keep], inside_last[keep], lo[keep], hi[keep]))
    columns = [np.concatenate(column) for column in zip(*out, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return tuple(column[order] for column in columns)


def _group_digit(
    axis: Axis, ends: _Ends, pitch: int, start: IntArray, stop: IntArray, group: IntArray, inverse: bool
) -> _Dim:
    """The digit inside a dilation group, for boxes whose groups are alike and begin with ``group``."""
    d = axis.dilation
    out = np.zeros((4, len(start)), np.int64)
    begin = ends.column_start // d
    for first, end in _alike(axis, ends):
        rows = (group >= first) & (group < end)
        pairs = relation(axis.group_length(first), axis, inverse)
        each = (*pairs.any_of(start[rows], stop[rows]), *pairs.all_of(start[rows], stop[rows]))
        out[:, rows] = np.clip(each, begin, -((first - ends.column_stop) // d)) - begin
    return _Dim(pitch * d, -(-(ends.column_stop - ends.column_start) // d), *out)


def _touched(block: IntArray, dims: list[_Dim], origin: int, blocks: _Blocks) -> Ranges:
    """The column blocks that some token of a row block is paired with, grid to grid.

    What a box touches is a token run per step of its outer digits. Inner digits whose steps lie less than a
    block apart touch every block between: their runs are taken as one.
    """
    columns, size = blocks.columns, blocks.column_size
    count = np.stack([dim.touched_hi - dim.touched_lo for dim in dims])
    if not count.all():  # keys of a slab that none of its queries sees
        some = np.flatnonzero(count.all(axis=0))
        block, count, dims = block[some], count[:, some], [dim.rows(some) for dim in dims]
    span = count[-1]
    merged = np.ones(len(block), np.int64)  # trailing digits taken as one run
    for at in range(len(dims) - 2, -1, -1):
        steps, pitch = count[at] - 1, dims[at].pitch
        joins = (merged == len(dims) - 1 - at) & ((pitch - span < size) | (steps == 0))
        span = np.where(joins, steps * pitch + span, span)
        merged += joins
    start = block * (columns * size) + origin  # a row of tokens, wide enough that no run leaves it
    for dim in dims:
        start = start + dim.touched_lo * dim.pitch
    outer = np.where(np.arange(len(dims))[:, None] < len(dims) - merged, count, 1)
    parts = []
    for part in _parts(block, outer.prod(axis=0)):
        runs = expand(start[part], span[part], [*outer[:-1, part]], [dim.pitch for dim in dims[:-1]])
        parts.append(_union(runs.start // size, (runs.stop - 1) // size + 1, columns))
    return joined(parts)


def _touched_by_text(rows: _Side, columns: _Side, blocks: _Blocks) -> Ranges:
    """The column blocks touched because a row or a column of the document is an extra token."""
    everywhere = (rows.first, rows.stop), (columns.first, columns.stop)
    pairs = [(text, everywhere[1]) for text in rows.texts] + [(everywhere[0], text) for text in columns.texts]
    start, stop = [], []
    for (row, row_stop), (column, column_stop) in pairs:
        at = np.arange(row // blocks.row_size, -(-row_stop // blocks.row_size)) * blocks.columns
        start.append(at + column // blocks.column_size)
        stop.append(at - (-column_stop // blocks.column_size))
    return Ranges(np.concatenate(start), np.concatenate(stop))


def _parts(block: IntArray, runs: IntArray) -> Iterator[slice]:
    """Boxes in parts of about ``CHUNK`` runs; a row block stays in one part."""
    first = np.flatnonzero(np.diff(block, prepend=-1))
    before = offsets(runs)[first]
    cuts = np.searchsorted(before, np.arange(0, int(runs.sum()), CHUNK))
    edges = sorted({*first[cuts[cuts < len(first)]].tolist(), len(block)})
    yield from map(slice, edges, edges[1:])


def _union(start: IntArray, stop: IntArray, columns: int) -> Ranges:
    """The union of ranges, each within one row of ``columns`` blocks."""
    packed = start * (columns + 1) + (stop - start)
    packed.sort()
    start, length = np.divmod(packed, columns + 1)
    reach = np.maximum.accumulate(start + length)
    start[1:] = np.maximum(start[1:], reach[:-1])
    keep = start < reach
    return Ranges(start[keep], reach[keep])


def _full(block: IntArray, dims: list[_Dim], rows: _Side, columns: _Side, blocks: _Blocks) -> Ranges:
    """The column blocks of which every token is paired with every token of a row block.

    Row blocks and column blocks that reach past the last token are never full, as in create_block_mask; nor
    are row blocks that hold tokens of two documents, nor blocks with extra tokens that may be cut.
    """
    whole = np.arange(-(-rows.first // blocks.row_size), rows.stop // blocks.row_size)
    begin, end = whole * blocks.row_size, (whole + 1) * blocks.row_size
    if rows.is_cut:
        holds = [(begin < stop) & (end > start) for start, stop in rows.texts]
        keep = ~np.any(holds, axis=0) if holds else slice(None)
        whole, begin, end = whole[keep], begin[keep], end[keep]
    texts = [] if columns.is_cut else columns.texts
    runs = [_full_runs(block, dims, whole, columns, blocks, bool(texts))]
    if rows.texts or texts:
        is_text = (end <= rows.origin) | (begin >= rows.origin + rows.tokens)
        grid = columns.origin, columns.origin + columns.tokens
        for at, (start, stop) in [(whole[is_text], grid), *((whole, text) for text in texts)]:
            runs.append(Ranges(at * blocks.pitch + start, at * blocks.pitch + stop))
    every = joined(runs) if len(runs) > 1 else runs[0]
    every = _met(every) if len(runs) > 1 or columns.wraps else every
    row = every.start // blocks.pitch
    token, block_0, size = row * blocks.pitch, row * blocks.columns, blocks.column_size
    lo, hi = block_0 + -(-(every.start - token) // size), block_0 + (every.stop - token) // size
    return Ranges(lo[lo < hi], hi[lo < hi])


def _full_runs(
    block: IntArray, dims: list[_Dim], whole: IntArray, columns: _Side, blocks: _Blocks, has_text: bool
) -> Ranges:
    """The runs of column tokens of the grid that every grid token of a row block is paired with, but for
    those too short to hold a block."""
    at_block = np.flatnonzero(np.diff(block, prepend=-1))
    lo = [np.maximum.reduceat(dim.full_lo, at_block) for dim in dims]
    hi = [np.minimum.reduceat(dim.full_hi, at_block) for dim in dims]
    row = block[at_block]
    may_be_full = np.zeros(blocks.rows, bool)
    may_be_full[whole] = True
    keep = may_be_full[row]
    for low, high in zip(lo, hi, strict=True):
        keep &= low < high
    row, lo, hi = row[keep], [low[keep] for low in lo], [high[keep] for high in hi]
    depth = np.zeros(len(row), np.int64)  # trailing digits that are covered wholly join into longer runs
    covered = np.ones(len(row), bool)
    for at in range(len(dims) - 1, 0, -1):
        covered &= (hi[at] - lo[at]) == dims[at].size
        depth += covered
    base, end = np.zeros((2, len(row)), np.int64)
    for low, high, dim in zip(lo, hi, dims, strict=True):
        base += low * dim.pitch
        end += (high - 1) * dim.pitch
    meets_text = (base == 0) | (end == columns.tokens - 1) if has_text else np.zeros(len(row), bool)
    parts = []
    for covering in sorted(set(depth.tolist())):
        run = len(dims) - 1 - int(covering)
        length = (hi[run] - lo[run]) * dims[run].pitch
        # Shorter runs hold no whole block, not even two of them that meet, unless they meet extra tokens.
        long = length * (2 if columns.wraps else 1) >= blocks.column_size
        rows = np.flatnonzero((depth == covering) & (long | meets_text))
        first = row[rows] * blocks.pitch + columns.origin + base[rows]
        counts = [(hi[at] - lo[at])[rows] for at in range(run)]
        parts.append(expand(first, length[rows], counts, [dim.pitch for dim in dims[:run]]))
    return joined(parts)


def _met(runs: Ranges) -> Ranges:
    """Runs that meet joined into one."""
    apart = runs.start[1:] != runs.stop[:-1]
    return Ranges(
        runs.start[np.r_[True, apart][: len(runs.start)]], runs.stop[np.r_[apart, True][: len(runs.stop)]]
    )

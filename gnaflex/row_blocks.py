"""Block lists of row-major masks, in closed form; no torch.

A run of consecutive tokens is a few boxes. What a box touches is a box again, hence a set of token runs; what
all boxes of a run see in full is one box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gnaflex.blocks import CHUNK, Grid, Pending, Ranges, expand, joined, offsets
from gnaflex.spec import GNA, Axis
from gnaflex.tiles import Tile, groups, relation
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


def row_major(spec: GNA, q_block: int, kv_block: int, inverse: bool = False) -> tuple[Pending, Pending]:
    """The partial and full lists of a mask over row-major tokens, in blocks of ``q_block`` and ``kv_block``.

    ``inverse`` gives the transposed lists: which query blocks a key block is seen by.
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
    """The column blocks that some token of a row block is paired with.

    What a box touches is a token run per step of its outer digits. Inner digits whose steps lie less than a
    block apart touch every block between: their runs are taken as one.
    """
    count = np.stack([dim.touched_hi - dim.touched_lo for dim in dims])
    span = count[-1]
    merged = np.ones(len(block), np.int64)  # trailing digits taken as one run
    for at in range(len(dims) - 2, -1, -1):
        steps, pitch = count[at] - 1, dims[at].pitch
        joins = (merged == len(dims) - 1 - at) & ((pitch - span < size) | (steps == 0))
        span = np.where(joins, steps * pitch + span, span)
        merged += joins
    start = block * (columns * size)  # a row of tokens, wide enough that no run leaves it
    for dim in dims:
        start = start + dim.touched_lo * dim.pitch
    outer = np.where(np.arange(len(dims))[:, None] < len(dims) - merged, count, 1)
    parts = []
    for part in _parts(block, outer.prod(axis=0)):
        runs = expand(start[part], span[part], [*outer[:-1, part]], [dim.pitch for dim in dims[:-1]])
        parts.append(_union(runs.start // size, (runs.stop - 1) // size + 1, columns))
    return joined(parts)


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
    for covering in sorted(set(depth.tolist())):
        run = len(dims) - 1 - int(covering)
        length = (hi[run] - lo[run]) * dims[run].pitch
        # Shorter runs hold no whole block, not even two of them that meet.
        rows = np.flatnonzero((depth == covering) & (length * (2 if wraps else 1) >= size))
        base = row[rows] * (columns * size + 1)  # a token more, so that no run meets one of the next row
        for low, dim in zip(lo, dims, strict=True):
            base = base + low[rows] * dim.pitch
        counts = [(hi[at] - lo[at])[rows] for at in range(run)]
        runs = expand(base, length[rows], counts, [dim.pitch for dim in dims[:run]])
        runs = _met(runs) if wraps else runs
        at_row = runs.start // (columns * size + 1)
        start = at_row * columns + -(-(runs.start - at_row * (columns * size + 1)) // size)
        stop = at_row * columns + (runs.stop - at_row * (columns * size + 1)) // size
        inside = start < stop
        parts.append(Ranges(start[inside], stop[inside]))
    return joined(parts)


def _met(runs: Ranges) -> Ranges:
    """Runs that meet joined into one."""
    apart = runs.start[1:] != runs.stop[:-1]
    return Ranges(
        runs.start[np.r_[True, apart][: len(runs.start)]], runs.stop[np.r_[apart, True][: len(runs.stop)]]
    )

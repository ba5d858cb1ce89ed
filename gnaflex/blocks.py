"""Block lists as FlexAttention wants them, from ranges of blocks; no torch.

A mask over blocks is held as sorted disjoint ranges of flat block ids ``row * columns + column``. Tile-major
boxes and row-major runs both come down to such ranges, so difference and the expansion into lists are
written once, for the forward lists and for the transposed ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gnaflex.window import IntArray

Int32Array = npt.NDArray[np.int32]

# Fresh memory costs a page fault (4 us each on a virtual machine, 1 ms per MB), and glibc maps whatever is
# larger than 128 KiB afresh: entries are written in parts whose temporaries stay below that.
CHUNK = 2**13


class Cut(Enum):
    """What a condition beside the windows may take away: blocks that hold some of it are partial."""

    NOTHING = "nothing"
    TEXT = "keys that are extra tokens"
    ALL = "any pair"


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


def written(pending: Sequence[Pending], widths: Sequence[int] | None = None) -> list[Lists]:
    """The lists, each of its given width, or as narrow as its longest row allows.

    All of them share one allocation: above 4 MB numpy asks for huge pages, which makes the page faults of
    four separate full-width lists (4.8 ms at 900 x 900 blocks) negligible (0.15 ms).
    """
    shapes = [
        (len(one.counts), width)
        for one, width in zip(pending, widths or (one.width for one in pending), strict=True)
    ]
    sizes = [-(-rows * width // 16) * 16 for rows, width in shapes]  # 64-byte aligned parts
    whole = np.zeros(sum(sizes), np.int32)
    out = []
    for one, shape, end in zip(pending, shapes, np.cumsum(sizes), strict=True):
        indices = whole[end - math.prod(shape) :][: math.prod(shape)].reshape(shape)
        if one.counts.any():  # else not even the first page of a row is touched
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
        total = offsets(ranges.stop - ranges.start)
        first = np.searchsorted(ranges.start, np.arange(self.rows + 1) * self.columns)
        counts = np.diff(total[first])
        return Pending(self.columns, counts, functools.partial(self._fill, ranges, counts))

    def _fill(self, ranges: Ranges, counts: IntArray, indices: Int32Array) -> None:
        keep = ranges.stop > ranges.start
        start, length = ranges.start[keep], (ranges.stop - ranges.start)[keep]
        row = start // self.columns
        before = offsets(length)
        column = start - row * self.columns - before[:-1]  # of the first entry, less its number
        place = row * indices.shape[1] - offsets(counts)[row]
        flat = indices.reshape(-1)
        parts = np.arange(0, int(before[-1]) + CHUNK, CHUNK)
        cuts = np.minimum(np.searchsorted(before, parts), len(length))
        for first, last in itertools.pairwise(cuts):
            part = length[first:last]
            entry = np.arange(before[first], before[last])
            flat[entry + np.repeat(place[first:last], part)] = entry + np.repeat(column[first:last], part)


def offsets(length: IntArray) -> IntArray:
    """Running totals with a leading zero."""
    out = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length, out=out[1:])
    return out


def expand(start: IntArray, length: IntArray, counts: list[IntArray], pitches: list[int]) -> Ranges:
    """Every range repeated ``counts[a]`` times at steps of ``pitches[a]``, axis after axis."""
    for a, pitch in enumerate(pitches):
        count = counts[a]
        step = np.arange(int(count.sum())) - np.repeat(offsets(count)[:-1], count)
        start = np.repeat(start, count) + step * pitch
        length = np.repeat(length, count)
        counts = [np.repeat(other, count) for other in counts]
    return Ranges(start, start + length)


def joined(parts: list[Ranges]) -> Ranges:
    """Ranges that share no block, in order."""
    start = np.concatenate([np.zeros(0, np.int64), *(part.start for part in parts)])
    stop = np.concatenate([np.zeros(0, np.int64), *(part.stop for part in parts)])
    start.sort()
    stop.sort()
    return Ranges(start, stop)

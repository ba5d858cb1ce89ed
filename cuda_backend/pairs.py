"""Query boxes that a kernel takes two at a time, over one sequence of key tiles; no torch, no cutlass.

Two boxes go together if their key boxes are equal on all axes but the first, and start whole tiles apart
there. Boxes with equal keys are paired first. Of a key box that an odd number of query boxes sees, one is
left over; these are paired along the first axis so that most tiles are seen twice. No other pairs see more:
key ranges ascend in both ends, so of four boxes two and two neighbours share no fewer layers of tiles than
any others.

A key box has one left over if an odd number of boxes sees its range on every axis. So what is left over is a
product over the axes, and its pairs along the first are the same wherever they lie on the others.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from gnaflex.spec import Axis
from gnaflex.tiles import groups, relation
from gnaflex.window import IntArray

_AnyArray = npt.NDArray[Any]


def paired(work: _AnyArray, ranges: list[tuple[IntArray, IntArray]], layer: int) -> _AnyArray:
    """A work list [boxes, 3, axes] as [pairs, 2, 3, axes], in the order of first halves.

    Args:
        work: all boxes of a grid of them, the last axis fastest.
        ranges: first key and end per axis, ascending.
        layer: the extent of a key tile along the first axis.
    """
    numbers = [_numbers(*one) for one in ranges]
    key_box = functools.reduce(lambda box, n: np.add.outer(box * (n[-1] + 1), n).ravel(), numbers)
    first, second, over = _with_equal_keys(key_box)
    over = over.reshape(numbers[0][-1] + 1, -1)
    odd, lo, hi = _left_over(*ranges[0])
    one, other, _ = _mates(lo, hi, layer)
    together = np.stack([over[odd[one]].ravel(), over[odd[other]].ravel()])
    rest = np.delete(over, odd[np.concatenate([one, other])], axis=0)
    rest = rest[rest >= 0]
    both = np.concatenate([[first, second], together[:, together[0] >= 0], [rest, rest]], axis=1)
    pairs = work[both.T]
    pairs[len(both.T) - len(rest) :, 1, 2] = 0
    return np.asarray(pairs[np.argsort(both[0])])


@functools.lru_cache(maxsize=4096)
def alone(axis: Axis, q: int, kv: int, is_first: bool) -> int:
    """Key tiles of extent ``kv`` in the ranges of an axis that are left over, all dilation groups together;
    along the first axis without those that two of them share. The product over the axes is how many tiles
    one half of a pair sees alone."""
    total = 0
    for n, members in groups(axis):
        start = np.arange(0, n, q)
        _, lo, hi = _left_over(*relation(n, axis).any_of(start, np.minimum(start + q, n)))
        tiles = int((-(-(hi - lo) // kv)).sum())
        if is_first:
            tiles -= 2 * int(_mates(lo, hi, kv)[2].sum())
        total += len(members) * tiles
    return total


def _with_equal_keys(key_box: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """By the number of every box's key box: first and second boxes of pairs, and the box that each key box
    has left over, -1 for none."""
    order = np.argsort(key_box, kind="stable")
    known = key_box[order]
    place = np.arange(len(known)) - np.searchsorted(known, known)
    second = np.flatnonzero(place % 2)
    last = np.append(known[1:] != known[:-1], True) & (place % 2 == 0)
    over = np.full(known[-1] + 1, -1)
    over[known[last]] = order[last]
    return order[second - 1], order[second], over


def _numbers(lo: IntArray, hi: IntArray) -> IntArray:
    """The number of every box's range among the different ones of an axis."""
    return np.append(0, np.cumsum((lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])))


def _left_over(lo: IntArray, hi: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The different ranges that an odd number of boxes sees: their numbers, first keys and ends."""
    numbers = _numbers(lo, hi)
    odd = np.flatnonzero(np.bincount(numbers) % 2)
    at = np.searchsorted(numbers, odd)
    return odd, lo[at], hi[at]


def _mates(lo: IntArray, hi: IntArray, kv: int) -> tuple[IntArray, IntArray, IntArray]:
    """Of ascending ranges those that go together, the first ones and the second ones, so that they share the
    most layers of tiles, and how many each two share."""
    order = np.argsort(lo % kv, kind="stable")  # of what lies whole tiles apart, neighbours
    a, b = order[:-1], order[1:]
    later = lo[b] - lo[a]
    layers = np.where(later % kv == 0, np.maximum(-(-(hi[a] - lo[a]) // kv) - later // kv, 0), 0)
    most = [0, 0]  # of the ranges so far: along one axis only
    for shared in layers.tolist():
        most.append(max(most[-1], most[-2] + shared))
    # walked back from the end, every second one of a run that are better taken is taken
    taken = np.diff(most[1:]) > 0
    stops = np.append(np.flatnonzero(~taken), len(taken))
    at = np.arange(len(taken))
    taken &= (stops[np.searchsorted(stops, at)] - at) % 2 == 1
    return a[taken], b[taken], layers[taken]

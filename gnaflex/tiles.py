"""Windows to ranges of tiles, per axis; exact counts; no torch.

On every axis ``lo`` and ``hi`` are monotone and neighbouring windows leave no gap. So the keys that any
query of ``[a, b)`` sees are ``[lo(a), hi(b - 1))`` and those that all of them see are
``[lo(b - 1), hi(a))``: no predicate is ever evaluated on pairs. The same two lines hold for the inverse
relation, which keys are seen by which queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gnaflex.spec import GNA, Axis
from gnaflex.window import IntArray, tables

Tile = tuple[int, ...]


class Relation(NamedTuple):
    """For every token of one side, the half-open range of tokens of the other side it is paired with."""

    lo: IntArray
    hi: IntArray

    def any_of(self, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
        """What some token of ``[start, stop)`` is paired with."""
        return self.lo[start], self.hi[stop - 1]

    def all_of(self, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
        """What every token of ``[start, stop)`` is paired with; ``lo == hi`` when there is nothing."""
        lo = self.lo[stop - 1]
        return lo, np.maximum(self.hi[start], lo)


@lru_cache(maxsize=1024)
def relation(n: int, axis: Axis, inverse: bool = False) -> Relation:
    """Queries to keys (or keys to queries) in a dilation group of ``n`` tokens of ``axis``."""
    lo, hi = tables(n, axis.window, axis.stride, axis.is_causal)
    if inverse:
        keys = np.arange(n)
        lo, hi = np.searchsorted(hi, keys, "right"), np.searchsorted(lo, keys, "right")
    return Relation(lo, hi)


class TileRanges(NamedTuple):
    """Per row tile of an axis: the column tiles it touches, and those it covers fully (half-open)."""

    touched_lo: IntArray
    touched_hi: IntArray
    full_lo: IntArray
    full_hi: IntArray


@lru_cache(maxsize=1024)
def tile_ranges(n: int, axis: Axis, q_tile: int, kv_tile: int, inverse: bool = False) -> TileRanges:
    """The tile ranges of a dilation group of ``n`` tokens: query tiles to key tiles, or the inverse.

    A key tile that reaches past the group holds padded keys, which are masked: it is never full. A query
    tile that does is filled up with copies of its last query, which change nothing.
    """
    row_tile, column_tile = (kv_tile, q_tile) if inverse else (q_tile, kv_tile)
    pairs = relation(n, axis, inverse)
    start = np.arange(0, n, row_tile)
    stop = np.minimum(start + row_tile, n)
    lo, hi = pairs.any_of(start, stop)
    all_lo, all_hi = pairs.all_of(start, stop)
    full_lo, full_hi = -(-all_lo // column_tile), all_hi // column_tile
    if inverse:
        full_hi = np.where(all_hi == n, -(-n // column_tile), full_hi)
        if n % row_tile:
            full_hi[-1] = 0
    return TileRanges(lo // column_tile, -(-hi // column_tile), full_lo, np.maximum(full_lo, full_hi))


class Group(NamedTuple):
    """The dilation groups of one length on an axis: which they are, and how the axis is laid out there."""

    n: int
    members: IntArray


@lru_cache(maxsize=256)
def groups(axis: Axis) -> tuple[Group, ...]:
    """The dilation groups of an axis by length: one class, or two when the dilation does not divide it."""
    longer = axis.length % axis.dilation
    bounds = [(0, longer), (longer, axis.dilation)] if longer else [(0, axis.dilation)]
    return tuple(Group(axis.group_length(first), np.arange(first, last)) for first, last in bounds)


def classes(spec: GNA) -> Iterator[tuple[Group, ...]]:
    """Every combination of group lengths over the axes: at most ``2 ** rank``."""
    return itertools.product(*(groups(axis) for axis in spec.axes))


def touched_blocks(spec: GNA, q_tile: Tile, kv_tile: Tile) -> int:
    """Exactly how many (query tile, key tile) pairs hold an allowed pair, in tile-major order."""
    return math.prod(
        sum(
            len(group.members) * int(np.subtract(*tile_ranges(group.n, axis, q, kv)[1::-1]).sum())
            for group in groups(axis)
        )
        for axis, q, kv in zip(spec.axes, q_tile, kv_tile, strict=True)
    )


def allowed_pairs(spec: GNA) -> int:
    """Exactly how many (query, key) pairs the mask allows."""
    ones = (1,) * spec.rank
    return touched_blocks(spec, ones, ones)


def padded_tokens(spec: GNA, tile: Tile) -> int:
    """Tokens of the tile-major order: every dilation group padded to whole tiles."""
    return math.prod(
        sum(len(group.members) * -(-group.n // t) * t for group in groups(axis))
        for axis, t in zip(spec.axes, tile, strict=True)
    )

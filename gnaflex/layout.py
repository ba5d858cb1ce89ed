"""Token orders of one grid: row-major, or tile-major with dilation groups gathered; no torch.

Tile-major order puts the dilation groups one after another, cuts each into query tiles (padded to whole
tiles), each query tile into key tiles, and lists the tokens of a key tile row-major.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gnaflex.spec import GNA, Axis
from gnaflex.tiles import Tile, classes, groups, padded_tokens, relation
from gnaflex.window import IntArray


class AxisPlaces(NamedTuple):
    """The places of one axis in a token order, int64 [places] each.

    ``coordinate`` counts dilation group by group, so that a window is one interval ``[lo, hi)`` of it
    whatever the dilation. A pad has a coordinate that no window holds, and the token and the window of the
    last real place of its group.
    """

    coordinate: IntArray
    lo: IntArray
    hi: IntArray
    token: IntArray
    is_pad: IntArray


class Slab(NamedTuple):
    """The part of one axis that a rank holds: its queries, and keys that hold all they see (half-open; the
    starts are multiples of the dilation)."""

    axis: int
    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True)
class Layout:
    """The token order of a grid: tile-major with these tiles, or row-major when they are None. With a slab
    (row-major only) the queries and the keys are two parts of the grid."""

    spec: GNA
    q_tile: Tile | None = None
    kv_tile: Tile | None = None
    slab: Slab | None = None

    @cached_property
    def q_shape(self) -> tuple[int, ...]:
        """The grid of the queries."""
        return self._cut(lambda slab: slab.q_stop - slab.q_start)

    @cached_property
    def kv_shape(self) -> tuple[int, ...]:
        """The grid of the keys."""
        return self._cut(lambda slab: slab.kv_stop - slab.kv_start)

    def _cut(self, extent: Callable[[Slab], int]) -> tuple[int, ...]:
        if self.slab is None:
            return self.spec.shape
        at = self.slab.axis
        return (*self.spec.shape[:at], extent(self.slab), *self.spec.shape[at + 1 :])

    @cached_property
    def num_queries(self) -> int:
        """Queries in this order, padding included."""
        return math.prod(self.q_shape) if self.q_tile is None else padded_tokens(self.spec, self.q_tile)

    @cached_property
    def num_keys(self) -> int:
        """Keys in this order, padding included."""
        return self.num_queries if self.slab is None else math.prod(self.kv_shape)

    @cached_property
    def tiles(self) -> tuple[Tile, Tile]:
        """Query and key tile; row-major order counts as tiles of one token."""
        ones = (1,) * self.spec.rank
        return self.q_tile or ones, self.kv_tile or ones

    @property
    def tiles_given(self) -> tuple[Tile | None, Tile | None]:
        """Query and key tile as they were given."""
        return self.q_tile, self.kv_tile

    @cached_property
    def places(self) -> tuple[AxisPlaces, ...]:
        """The places of every axis, query side; their windows count in coordinates of the key side."""
        return tuple(
            _slab_places(axis, self.slab)[0]
            if self.slab is not None and self.slab.axis == at
            else _axis_places(axis, None if self.q_tile is None else t)
            for at, (axis, t) in enumerate(zip(self.spec.axes, self.tiles[0], strict=True))
        )

    @cached_property
    def key_places(self) -> tuple[AxisPlaces, ...]:
        """The places of every axis, key side: the same but on the axis of a slab (there without windows)."""
        if self.slab is None:
            return self.places
        at = self.slab.axis
        return (*self.places[:at], _slab_places(self.spec.axes[at], self.slab)[1], *self.places[at + 1 :])

    def sum_over_axes(self, values: Sequence[IntArray]) -> IntArray:
        """Add up one value per place of every axis, for every token in this order."""
        if self.q_tile is None:
            return _grid_sum([value.reshape(1, 1, 1, -1) for value in values]).reshape(-1)
        q_tile, kv_tile = self.tiles
        parts = []
        for combination in classes(self.spec):
            cut = []
            for value, axis, group, q, kv in zip(
                values, self.spec.axes, combination, q_tile, kv_tile, strict=True
            ):
                size = -(-group.n // q) * q
                first = _axis_starts(axis, q)[group.members]
                segments = value[first[:, None] + np.arange(size)] if axis.dilation > 1 else value
                cut.append(segments.reshape(len(first), size // q, q // kv, kv))
            parts.append(_grid_sum(cut).reshape(math.prod(len(part) for part in cut), -1))
        if len(parts) == 1:
            return parts[0].reshape(-1)
        out = np.empty(self.num_queries, values[0].dtype)
        for combination, part in zip(classes(self.spec), parts, strict=True):
            first = self._group_starts([group.members for group in combination])
            out[first[:, None] + np.arange(part.shape[1])] = part
        return out

    def _group_starts(self, members: Sequence[IntArray]) -> IntArray:
        """The first token of every dilation group of a combination of equal lengths."""
        lengths = [
            np.diff(_axis_starts(axis, q)) for axis, q in zip(self.spec.axes, self.tiles[0], strict=True)
        ]
        first = np.zeros(1, np.int64)
        outer = 1
        for a, chosen in enumerate(members):
            inner = math.prod(int(length.sum()) for length in lengths[a + 1 :])
            starts = _axis_starts(self.spec.axes[a], self.tiles[0][a])[chosen]
            first = np.add.outer(first, starts * outer * inner).ravel()
            outer *= int(lengths[a][chosen[0]])
        return first

    def row_major_tokens(self) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """For every token of this order its row-major index (a pad: that of the query it copies), and
        whether it is a pad; int64 and bool [num_tokens]."""
        shape = self.spec.shape
        if self.q_tile is None:
            return np.arange(self.num_queries), np.zeros(self.num_queries, bool)
        tokens = self.sum_over_axes(
            [one.token * math.prod(shape[a + 1 :]) for a, one in enumerate(self.places)]
        )
        return tokens, self.sum_over_axes([one.is_pad for one in self.places]) > 0


def _grid_sum(cut: Sequence[IntArray]) -> IntArray:
    """Outer sum of [groups, q tiles, kv tiles, tokens] of every axis, axes innermost."""
    rank = len(cut)
    total: IntArray | None = None
    for a in range(rank - 1, -1, -1):  # the last axes first: the long final addition then has long rows
        shape = [1] * (4 * rank)
        shape[a::rank] = cut[a].shape
        spread = cut[a].reshape(shape)
        total = spread if total is None else spread + total
    assert total is not None
    return total


@lru_cache(maxsize=256)
def _axis_starts(axis: Axis, q_tile: int) -> IntArray:
    """The first place of every dilation group of an axis padded to whole tiles, and the end."""
    lengths = np.concatenate(
        [np.full(len(group.members), -(-group.n // q_tile) * q_tile) for group in groups(axis)]
    )
    return np.concatenate([[0], np.cumsum(lengths)])


@lru_cache(maxsize=256)
def _axis_places(axis: Axis, q_tile: int | None) -> AxisPlaces:
    parts = []
    starts = _axis_starts(axis, q_tile or 1)
    for group in groups(axis):
        pairs = relation(group.n, axis)
        size = group.n if q_tile is None else -(-group.n // q_tile) * q_tile
        place = np.arange(size)
        real = np.minimum(place, group.n - 1)
        start = starts[group.members][:, None]
        parts.append(
            np.stack(
                [
                    start + place,
                    start + pairs.lo[real],
                    start + pairs.hi[real],
                    group.members[:, None] + axis.dilation * real,
                    np.broadcast_to(place >= group.n, (len(group.members), size)),
                ]
            ).reshape(5, -1)
        )
    table = np.concatenate(parts, axis=1)
    if q_tile is None and axis.dilation > 1:
        table = table[:, np.argsort(table[3])]
    return AxisPlaces(*table)


@lru_cache(maxsize=64)
def _slab_places(axis: Axis, slab: Slab) -> tuple[AxisPlaces, AxisPlaces]:
    """The places of the queries and of the keys of a slab, coordinates counted group by group in the slab."""
    queries, keys = np.arange(slab.q_start, slab.q_stop), np.arange(slab.kv_start, slab.kv_stop)
    d = axis.dilation
    q_coordinate, kv_coordinate = (
        np.argsort(np.argsort(side % d, kind="stable")) for side in (queries, keys)
    )
    lo, hi = np.zeros((2, len(queries)), np.int64)
    first_key = np.concatenate([[0], np.cumsum(np.bincount(keys % d, minlength=d))])
    for group in groups(axis):
        pairs = relation(group.n, axis)
        mine = np.isin(queries % d, group.members)
        # of inside coordinates to those of the slab: its first key of every group is number kv_start / d
        shift = first_key[queries[mine] % d] - slab.kv_start // d
        lo[mine], hi[mine] = (side[queries[mine] // d] + shift for side in pairs)
    none_q, none_kv = (np.zeros_like(side) for side in (queries, keys))
    return (
        AxisPlaces(q_coordinate, lo, hi, queries - slab.q_start, none_q),
        AxisPlaces(kv_coordinate, none_kv, none_kv, keys - slab.kv_start, none_kv),
    )

"""The "packed" form: all axes compared at once in the bit fields of one integer per token.

The key side is computed in float32 digit arithmetic where that is exact, else gathered from a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnaflex.layout import AxisPlaces, Layout
from gnaflex.order import Document, Order
from gnaflex.tables import MaskMod, Tables, with_text
from gnaflex.window import IntArray

# floor(k * r) with r = 1/d rounded up to float32 is k // d for every k below 2**22: the relative error is at
# most 1.5 * 2**-23, so the absolute one stays below 1/d. Above, the key side is gathered from a table.
EXACT_QUOTIENTS = 2**22


@dataclass(frozen=True)
class Fields:
    """The bit field of every axis in a packed coordinate: ``shift`` and ``width``, a guard bit above each.

    Documents follow one another on the first axis, ``first[d]`` places before document ``d``; grids of fewer
    axes have leading axes of one place. ``end`` is a coordinate there that no window holds.
    """

    shift: tuple[int, ...]
    width: tuple[int, ...]
    first: tuple[int, ...]

    @staticmethod
    def of(orders: Sequence[Order]) -> Fields:
        """The fields that serve all classes of heads."""
        documents = orders[0].documents
        rank = max(document.spec.rank for document in documents)
        sizes = [_right_aligned([len(one.token) for one in d.layout.key_places], rank) for d in documents]
        first = tuple(itertools.accumulate((size[0] for size in sizes), initial=0))
        most = [max(column) - 1 for column in zip(*sizes, strict=True)]
        most[0] = first[-1] if needs_end(orders) else first[-1] - 1
        width = tuple(n.bit_length() for n in most)
        shift = tuple(sum(width[a + 1 :]) + rank - 1 - a for a in range(rank))
        return Fields(shift, width, first)

    @property
    def bits(self) -> int:
        """Bits of all fields and guards."""
        return sum(self.width) + len(self.width)

    @property
    def guard(self) -> int:
        """All guard bits."""
        return sum(1 << (shift + width) for shift, width in zip(self.shift, self.width, strict=True))

    @property
    def end(self) -> int:
        """A packed key that no window holds."""
        return self.first[-1] << self.shift[0]

    @property
    def dtype(self) -> Any:
        """The narrowest integer that holds it."""
        return np.int32 if self.bits <= 31 else np.int64

    def pack(self, number: int, layout: Layout, values: Sequence[IntArray], plus: int = 0) -> IntArray:
        """One integer per place of a document's grid from one value per place of every axis, and ``plus``."""
        shifts = self.shift[len(self.shift) - len(values) :]
        parts: list[Any] = [
            (value << shift).astype(self.dtype) for value, shift in zip(values, shifts, strict=True)
        ]
        return layout.sum_over_axes([parts[0] + ((self.first[number] << self.shift[0]) + plus), *parts[1:]])

    def pack_one(self, number: int, values: Sequence[int], plus: int = 0) -> int:
        """The same for one place."""
        shifts = self.shift[len(self.shift) - len(values) :]
        packed = sum(value << shift for value, shift in zip(values, shifts, strict=True))
        return packed + (self.first[number] << self.shift[0]) + plus


def _right_aligned(values: list[int], rank: int) -> list[int]:
    return [1] * (rank - len(values)) + values


def needs_end(orders: Sequence[Order]) -> bool:
    """Whether key coordinates are gathered and some must lie outside every window: queries that are extra
    tokens have the widest window there is, which holds the padding between dilation groups."""
    return orders[0].has_text and any(
        max(document.spec.dilation) > 1 or len(order.documents) > 1
        for order in orders
        for document in order.documents
    )


def widest(layout: Layout) -> list[int]:
    """The last coordinate that a query among the extra tokens sees on every axis: padding lies behind it, or
    has no coordinate of its own (:func:`needs_end`)."""
    return [
        (axis.length if axis.dilation == 1 else len(one.token)) - 1
        for axis, one in zip(layout.spec.axes, layout.places, strict=True)
    ]


def packed(tables: Tables) -> MaskMod:
    """Every axis at once: with a guard bit over each field, ``key - lo`` and ``hi - 1 - key`` keep all guards
    exactly when the key lies in the window on every axis."""
    fields = Fields.of(tables.orders)
    guard = fields.guard

    def of_queries(
        values: Callable[[AxisPlaces], IntArray], text: Callable[[Layout], list[int]], plus: int
    ) -> Tensor:
        return tables(
            lambda order: order.spread(
                False,
                lambda number, d: fields.pack(
                    number, d.layout, [values(one) for one in d.layout.places], plus
                ),
                lambda number, d: fields.pack_one(number, text(d.layout), plus),
            )
        )

    first = of_queries(lambda one: one.lo, lambda layout: [0] * layout.spec.rank, -guard)
    last = of_queries(lambda one: one.hi - 1, widest, guard)
    pick, key_of, also = tables.pick(), _packed_keys(tables, fields), with_text(tables)

    def packed_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key = key_of(h, kv_idx)
        grid = ((key - pick(first, h, q_idx)) & (pick(last, h, q_idx) - key) & guard) == guard
        return grid if also is None else also(grid, q_idx, kv_idx)

    return packed_mask_mod


def _packed_keys(tables: Tables, fields: Fields) -> Callable[[Tensor, Tensor], Tensor]:
    """``key_of(h, kv_idx)``: packed coordinates of keys, computed where float32 is exact, else gathered."""
    segments = key_segments(tables.orders, fields)
    if segments is None:
        keys = tables(lambda order: _key_table(order, fields))
        pick = tables.pick()
        return lambda h, kv_idx: pick(keys, h, kv_idx)
    origin = tables.order.documents[0].grid_start

    def computed(h: Tensor, kv_idx: Tensor) -> Tensor:
        # No gather on the key: inductor's CPU code would repeat it for every row (1.15x against 1.05x).
        token = kv_idx.to(torch.float32)
        return packed_key(token - origin if origin else token, segments).to(torch.int32)

    return computed


def _key_table(order: Order, fields: Fields) -> IntArray:
    def grid(number: int, document: Document) -> IntArray:
        places = document.layout.key_places
        keys = fields.pack(number, document.layout, [one.coordinate for one in places])
        if order.has_text and document.is_tiled:
            keys[document.layout.sum_over_axes([one.is_pad for one in places]) > 0] = fields.end
        return keys

    return order.spread(True, grid, lambda number, document: fields.end)


Terms = tuple[tuple[float, float], ...]  # (reciprocal, weight), the last reciprocal being 1


def packed_key(token: Tensor, segments: Sequence[tuple[int, Terms]]) -> Tensor:
    """The packed coordinate of float32 token indices, exact below 2**22 tokens and 24 bits.

    A segment of mixed-radix digits spans ``unit`` tokens per step. Inside it the packed value is the sum of
    ``floor(index * reciprocal) * weight``: no weight is negative, so that no partial sum exceeds the result.
    """
    key, rest = torch.zeros_like(token), token
    for unit, terms in segments:
        index = torch.floor(rest * _rounded_up(unit)) if unit > 1 else rest
        for reciprocal, weight in terms:
            key = key + (torch.floor(index * reciprocal) if reciprocal < 1 else index) * weight
        rest = rest - index * unit
    return key


def key_segments(orders: Sequence[Order], fields: Fields) -> tuple[tuple[int, Terms], ...] | None:
    """How token indices turn into packed coordinates: row-major one segment of digits, tile-major one for the
    query tile, the key tile in it and the token in that. None where float32 would not be exact, or where
    dilation or packing shuffles the coordinates."""
    layout = orders[0].documents[0].layout
    dilated = any(max(order.documents[0].spec.dilation) > 1 for order in orders)
    too_large = fields.bits > 24 or orders[0].num_keys >= EXACT_QUOTIENTS
    if dilated or too_large or len(orders[0].documents) > 1:
        return None
    ones = (1,) * layout.spec.rank
    steps = [tuple(len(one.token) for one in layout.places), *layout.tiles, ones]
    if layout.q_tile is None:
        steps = [layout.kv_shape, ones]
    segments = []
    unit = math.prod(steps[0])
    for outer, inner in itertools.pairwise(steps):
        radices = [size // step for size, step in zip(outer, inner, strict=True)]
        weights = [step << shift for step, shift in zip(inner, fields.shift, strict=True)]
        unit //= math.prod(radices)
        if terms := _terms(radices, weights):
            segments.append((unit, terms))
    return tuple(segments)


def _terms(radices: Sequence[int], weights: Sequence[int]) -> Terms:
    """One term per digit that is not constant; digits that are contiguous in the packed value join."""
    terms: list[tuple[float, float]] = []
    below, carry = 1, 0
    for radix, weight in zip(reversed(radices), reversed(weights), strict=True):
        if radix > 1 and weight != carry:
            terms.append((_rounded_up(below), float(weight - carry)))
        if radix > 1:
            below, carry = below * radix, weight * radix
    return tuple(reversed(terms))


def _rounded_up(divisor: int) -> float:
    """The least float32 that is not below ``1 / divisor``."""
    nearest = np.float32(1.0 / divisor)
    return float(nearest if float(nearest) * divisor >= 1.0 else np.nextafter(nearest, np.float32(2)))

"""The other ways to write a mask, "table", "interval" and "arith", and which of the four a problem allows.

All work from the places of an order: each query place has a window per axis, each key place a coordinate.
Extra tokens are not in the windows: queries among them get the widest window, keys an OR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnaflex.layout import AxisPlaces, Layout
from gnaflex.order import Document, Order
from gnaflex.packed import Fields, packed, widest
from gnaflex.spec import GNA
from gnaflex.tables import AnyArray, MaskMod, Tables, with_text
from gnaflex.window import IntArray, torch_source

MOST_INTERVALS = 8  # what FlexAttention's FLASH backend packs (torch 2.13, inductor interval_mask_packing)


def reason_against(form: str, orders: Sequence[Order]) -> str | None:
    """Why a form cannot express a mask, or None."""
    if form == "packed" and (bits := Fields.of(orders).bits) > 63:
        return f"its fields need {bits} bits > 63."
    if form == "arith" and orders[0].is_tiled:
        return "it is written for row-major order, not for tile-major."
    if form == "arith" and (len(orders) > 1 or len(orders[0].documents) > 1):
        return "it is written for one grid and one window."
    if form == "arith" and orders[0].documents[0].layout.slab is not None:
        return "it is written for whole grids."
    if form == "interval":
        return next(filter(None, map(_reason_against_intervals, orders)), None)
    return None


def table(tables: Tables) -> MaskMod:
    """Axis by axis from tables of coordinates and windows; expresses every problem."""
    first = Fields.of(tables.orders).first
    rank = max(document.spec.rank for document in tables.order.documents)

    def per_axis(keys: bool, column: Callable[[Order, int], IntArray]) -> list[Tensor]:
        return [tables(lambda order, a=a: column(order, a).astype(np.int32)) for a in range(-rank, 0)]  # type: ignore[misc]

    def shift(number: int, a: int) -> int:
        return first[number] if a == -rank else 0

    def queries(
        values: Callable[[AxisPlaces], IntArray], widest: Callable[[Layout, int], int]
    ) -> list[Tensor]:
        return per_axis(
            False,
            lambda order, a: order.spread(
                False,
                lambda number, d: _column(d.layout, a, values(_axis_of(d.layout, a))) + shift(number, a),
                lambda number, d: widest(d.layout, a) + shift(number, a),
            ),
        )

    def keys(order: Order, a: int) -> IntArray:
        def grid(number: int, d: Document) -> IntArray:
            places = _axis_of(d.layout, a, keys=True)
            out = _column(d.layout, a, places.coordinate, keys=True) + shift(number, a)
            if order.has_text and d.is_tiled and a == -rank:
                out[d.layout.sum_over_axes([one.is_pad for one in d.layout.places]) > 0] = first[-1]
            return out

        return order.spread(True, grid, lambda number, d: first[-1] if a == -rank else 0)

    coordinate = per_axis(True, keys)
    lo = queries(lambda one: one.lo, lambda layout, a: 0)
    hi = queries(lambda one: one.hi, lambda layout, a: widest(layout)[a] + 1 if -a <= layout.spec.rank else 1)
    pick, also = tables.pick(), with_text(tables)

    def table_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key = pick(coordinate[0], h, kv_idx)
        ok = (key >= pick(lo[0], h, q_idx)) & (key < pick(hi[0], h, q_idx))
        for a in range(1, rank):
            key = pick(coordinate[a], h, kv_idx)
            ok = ok & (key >= pick(lo[a], h, q_idx)) & (key < pick(hi[a], h, q_idx))
        return ok if also is None else also(ok, q_idx, kv_idx)

    return table_mask_mod


_POINT = AxisPlaces(*np.array([[0], [0], [1], [0], [0]]))


def _axis_of(layout: Layout, a: int, keys: bool = False) -> AxisPlaces:
    """The places of axis ``a``, counted from the last; a single one where the grid has fewer axes."""
    places = layout.key_places if keys else layout.places
    return places[a] if -a <= len(places) else _POINT


def _column(layout: Layout, a: int, values: IntArray, keys: bool = False) -> IntArray:
    """Values of one axis for every place of a grid."""
    places = layout.key_places if keys else layout.places
    each = [np.zeros(len(one.token), np.int64) for one in places]
    if -a > len(places):
        each[-1] = each[-1] + values[0]
    else:
        each[a] = values
    return layout.sum_over_axes(each)


def _reason_against_intervals(order: Order) -> str | None:
    for document in order.documents:
        layout, spec = document.layout, document.spec
        dilated = max(spec.dilation) > 1
        if layout.q_tile is not None and (spec.rank > 1 or (dilated and document.texts)):
            return "in tile-major order the keys of a query are too many runs of tokens."
        runs = math.prod(spec.window[: _run_axes(spec)[0]]) if layout.q_tile is None else 1
        runs += len(document.texts)
        if runs > MOST_INTERVALS:
            return f"the keys of a query are up to {runs} runs of tokens > {MOST_INTERVALS}."
    return None


def _run_axes(spec: GNA) -> tuple[int, int]:
    """Of the axes of a row-major grid, how many leading ones have a run per key of their window, and how many
    come before the trailing dense ones. The one between, if any, has its whole window in one run."""
    moving = spec.rank
    while moving > 1 and spec.window[moving - 1] == spec.shape[moving - 1] and not spec.is_causal[moving - 1]:
        moving -= 1
    return moving - (spec.dilation[moving - 1] == 1), moving


def interval(tables: Tables) -> MaskMod:
    """An OR of ``lo[q] <= k < hi[q]``, always over as many runs as the rank calls for (1, or 8)."""
    order = tables.order
    single = order.is_plain and order.spec.rank == 1 and all(o.spec.dilation == (1,) for o in tables.orders)
    count = 1 if single else MOST_INTERVALS

    def ends(at: int) -> list[Tensor]:
        return [tables(lambda order, run=run: _intervals(order, count)[at][run]) for run in range(count)]  # type: ignore[misc]

    first, stop, pick = ends(0), ends(1), tables.pick()

    def interval_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ok = (kv_idx >= pick(first[0], h, q_idx)) & (kv_idx < pick(stop[0], h, q_idx))
        for run in range(1, count):
            ok = ok | ((kv_idx >= pick(first[run], h, q_idx)) & (kv_idx < pick(stop[run], h, q_idx)))
        return ok

    return interval_mask_mod


@lru_cache(maxsize=4)
def _intervals(order: Order, count: int) -> tuple[AnyArray, AnyArray]:
    """The runs of keys of every query place, int32 [count, places]; those that do not exist are empty."""
    lo, hi = np.zeros((2, count, order.num_queries), np.int32)
    starts = zip(order.starts(False), order.starts(True), strict=True)
    for document, (query, key) in zip(order.documents, starts, strict=False):
        origin, layout = key + document.grid_start, document.layout
        grid = slice(query + document.grid_start, query + document.grid_start + layout.num_queries)
        runs_lo, runs_hi = _runs(layout)
        lo[: len(runs_lo), grid] = np.where(runs_lo < runs_hi, runs_lo + origin, 0)
        hi[: len(runs_lo), grid] = np.where(runs_lo < runs_hi, runs_hi + origin, 0)
        everybody = slice(query, query + document.num_queries)
        for run, text in enumerate(document.texts, start=len(runs_lo)):
            lo[run, everybody], hi[run, everybody] = key + text.start, key + text.stop
            if text.is_query:  # the text queries see the whole grid
                mine = slice(query + text.start, query + text.start + text.places)
                real = layout.num_keys if layout.q_tile is None else layout.spec.num_tokens
                lo[0, mine], hi[0, mine] = origin, origin + real
    return lo, hi


def _runs(layout: Layout) -> tuple[IntArray, IntArray]:
    """The runs of keys of every query of a grid, int32 [runs, queries]; where there are fewer, empty ones."""
    spec, places, shape = layout.spec, layout.places, layout.kv_shape
    if layout.q_tile is not None:
        return places[0].lo[None].astype(np.int32), places[0].hi[None].astype(np.int32)
    queries = math.prod(layout.q_shape)
    tokens = np.stack(np.unravel_index(np.arange(queries), layout.q_shape))
    single, moving = _run_axes(spec)
    lo = [np.zeros(queries, np.int64)]
    exists = [np.ones(queries, bool)]
    for a in range(single):
        pitch = math.prod(shape[a + 1 :])
        key, valid = (of_axis[:, tokens[a]] for of_axis in _window_tokens(layout, a))
        lo = [base + step * pitch for base in lo for step in key]
        exists = [there & here for there in exists for here in valid]
    pitch = math.prod(shape[moving:])
    start, stop = np.zeros(1, np.int64), np.full(1, pitch)
    if single < moving:
        at = tokens[moving - 1]
        start, stop = places[moving - 1].lo[at] * pitch, places[moving - 1].hi[at] * pitch
    first, there = np.stack(lo), np.stack(exists)
    return tuple(np.where(there, first + edge, 0).astype(np.int32) for edge in (start, stop))  # type: ignore[return-value]


def _window_tokens(layout: Layout, a: int) -> tuple[IntArray, Any]:
    """The keys of every query of an axis as tokens, [window, length], and which of them exist."""
    one, keys = layout.places[a], layout.key_places[a]
    token = keys.token[np.argsort(keys.coordinate)]
    seen = one.lo + np.arange(layout.spec.window[a])[:, None]
    return token[np.minimum(seen, one.hi - 1)], seen < one.hi


def arith(tables: Tables) -> MaskMod:
    """The window printed as torch code."""
    (document,) = tables.order.documents
    names: dict[str, Any] = {"torch": torch}
    exec(compile(torch_source(document.spec), f"<{document.spec!r}>", "exec"), names)
    mod: MaskMod = names["mask_mod"]
    also = with_text(tables)
    if also is None:
        return mod
    first, end = document.grid_start, document.grid_start + document.layout.num_keys

    def arith_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        grid = mod(b, h, q_idx - first, kv_idx - first) | (q_idx < first) | (q_idx >= end)
        return also(grid, q_idx, kv_idx)

    return arith_mask_mod


FORMS: dict[str, Callable[[Tables], MaskMod]] = {
    "packed": packed,
    "table": table,
    "interval": interval,
    "arith": arith,
}

"""How the "sdpa" backend cuts an order into tiles: query tiles with their key boxes, by kind, and how large
tiles should be.

Tiles of equal rows, box and mask are one kind and share calls. Extra tokens join the keys of every tile of
their document; as queries they are tiles of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gnaflex.layout import AxisPlaces, Layout
from gnaflex.order import Document, Order
from gnaflex.reorder import real_tensors
from gnaflex.tiles import Tile
from gnaflex.window import IntArray

Tensors = tuple[Tensor, ...]
# Measured on an AMD EPYC, 1 thread, fp32, torch 2.13: 80 GFLOP/s, a call 60 us; gathering a key and its
# value, with what a call loses on few rows, takes as long as 24 pairs.
KEY_PAIRS = 24
CPU_CALL_BYTES = 32 * 2**20  # 8 to 128 MiB are as fast; score temporaries beyond are 1.4 times as slow
TILES_PER_CALL = 2**15  # tiles go where heads go, a CUDA grid axis of at most 65535


class _AxisKind(NamedTuple):
    """Tiles of one axis with equal rows, keys and windows [2, rows], which count from the first key."""

    rows: int
    keys: int
    first_query: IntArray
    first_key: IntArray
    windows: IntArray


@lru_cache(maxsize=1024)
def _axis_kinds(layout: Layout, a: int, tile: int) -> tuple[_AxisKind, ...]:
    """The query tiles of extent ``tile`` of an axis, by kind; the last tile of a group may be shorter."""
    places = layout.places[a]
    by_coordinate = np.argsort(places.coordinate)
    lo, hi, stop = places.lo[by_coordinate], places.hi[by_coordinate], np.cumsum(_group_sizes(layout, a))
    begin = np.concatenate([np.arange(*ends, tile) for ends in itertools.pairwise([0, *stop])])
    rows = np.minimum(begin + tile, stop[np.searchsorted(stop, begin, "right")]) - begin
    query = begin[:, None] + np.minimum(np.arange(tile), rows[:, None] - 1)
    windows = np.stack([lo[query], hi[query]], 1) - lo[begin][:, None, None]
    signature = np.column_stack([rows, windows.reshape(len(rows), -1)])
    _, which, counts = np.unique(signature, axis=0, return_inverse=True, return_counts=True)
    kinds = []
    for at in np.split(np.argsort(which.reshape(-1), kind="stable"), np.cumsum(counts)[:-1]):
        n, seen = int(rows[at[0]]), windows[at[0]]
        kinds.append(_AxisKind(n, int(seen[1, -1]), begin[at], lo[begin[at]], seen[:, :n]))
    return tuple(kinds)


def _group_sizes(layout: Layout, a: int) -> list[int]:
    """Query places of every dilation group of an axis, pads included, longest first."""
    dilation = layout.spec.dilation[a]
    return cast(list[int], np.bincount(layout.places[a].token % dilation, minlength=dilation).tolist())


class Load(NamedTuple):
    """All that the choice of tiles depends on besides the layout; bytes are those of one key head."""

    pair_flops: int
    key_flops: int
    call_flops: float
    pair_bytes: int
    key_bytes: int
    fast_bytes: int
    memory_bytes: int

    def tile_bytes(self, rows: Any, keys: Any) -> Any:
        """What one tile and key head take."""
        return keys * (self.key_bytes + rows * self.pair_bytes)


def load_of(k: Tensor, v: Tensor, group: int, explicit: bool, memory_bytes: int) -> Load:
    """The load of a call with key [heads of all batches, T, D] and ``group`` query heads to each; explicit if
    every score is spelled out."""
    heads, channels, size, device = k.shape[0], k.shape[-1] + v.shape[-1], k.element_size(), k.device.type
    wide = max(size, 4)
    # Copies of the scores in memory: torch's CPU kernel keeps none, but takes one head dim only.
    scores = 5 if explicit else 0 if device == "cpu" and v.shape[-1] == k.shape[-1] else 3
    flops = 2 * channels * heads
    costs = flops * group, flops * KEY_PAIRS, 5e6 if device == "cpu" else 1e9  # a GPU's flops are faster
    pair_bytes = wide * group * (scores + 2)  # 2: the mask, and a part of it
    key_bytes = channels * (size + wide * (explicit and size < wide)) + 16
    fast_bytes = CPU_CALL_BYTES if device == "cpu" and explicit else memory_bytes
    return Load(*costs, pair_bytes, key_bytes, fast_bytes, memory_bytes)


@lru_cache(maxsize=256)
def _choose(layout: Layout, extra: int, load: Load) -> Tile:
    """The cheapest of 30,000 query tiles when every tile has ``extra`` more keys. Their pairs and keys are
    exact, both products over the axes."""
    most = max(int(30_000 ** (1 / max(sum(length > 1 for length in layout.spec.shape), 1))), 2)
    options = [_extents(layout, a)[:most] for a in range(layout.spec.rank)]
    kinds = [[_axis_kinds(layout, a, extent) for extent in axis] for a, axis in enumerate(options)]

    def product(count: Callable[[_AxisKind], int], total: Callable[[Iterable[int]], int] = sum) -> Any:
        axes = [np.array([total(map(count, each)) for each in axis], float) for axis in kinds]
        return reduce(np.multiply.outer, axes)

    flops = load.pair_flops * product(lambda kind: kind.rows * kind.keys * len(kind.first_key))
    flops += load.key_flops * product(lambda kind: kind.keys * len(kind.first_key))
    if extra:  # which makes as many pairs whatever the tile
        flops += load.key_flops * extra * product(lambda kind: len(kind.first_key))
    flops += load.call_flops * product(lambda kind: 1)
    keys = product(lambda kind: kind.keys, max) + extra
    needed = load.tile_bytes(product(lambda kind: kind.rows, max), keys)
    room = max(load.memory_bytes, 2 * needed.min())  # the very least may be a row at a time, which takes ages
    best = np.argmin(np.where(needed <= room, flops * (1 + 0.4 * (needed > load.fast_bytes)), np.inf))
    return tuple(axis[i] for axis, i in zip(options, np.unravel_index(best, needed.shape), strict=True))


def _extents(layout: Layout, a: int) -> list[int]:
    """Tile extents of an axis, the likeliest first: whole stride groups need no mask."""
    stride, longest = layout.spec.stride[a], _group_sizes(layout, a)[0]
    extents = [stride, 8, 1, 4, longest, 2 * stride, 16, 2, 32, 4 * stride, 64, 128, 256, 512, 1024]
    return list(dict.fromkeys(min(extent, longest) for extent in extents))


class _Cut(NamedTuple):
    """How a document is cut: the query tile of its grid, and how many extra queries go together."""

    tile: Tile
    rows: int


def cut_of(document: Document, load: Load) -> _Cut:
    """Extra queries see the whole document, and every tile of them gathers it anew: many rows share that."""
    tile = _choose(document.layout, sum(text.tokens for text in document.texts), load)
    rows = sum(text.places for text in document.texts if text.is_query)
    keys = document.row_major_count(keys=True)
    fast = max(load.fast_bytes, load.tile_bytes(4 * KEY_PAIRS, keys))
    room = max(min(fast, load.memory_bytes), 2 * load.tile_bytes(1, keys))
    most = max((room // keys - load.key_bytes) // load.pair_bytes, 1)
    return _Cut(tile, -(-rows // max(-(-rows // most), 1)))  # all of about the same size


def work_of(order: Order, load: Load) -> int:
    """What a call on an order costs, in pairs: those of all tiles, and ``KEY_PAIRS`` for every key that is
    gathered."""
    total = 0
    for document in order.documents:
        (tile, rows), texts = cut_of(document, load), sum(text.tokens for text in document.texts)
        axes = [_axis_kinds(document.layout, a, extent) for a, extent in enumerate(tile)]
        tiles, keys, pairs = (
            math.prod(sum(len(kind.first_key) * count(kind) for kind in axis) for axis in axes)
            for count in (lambda kind: 1, lambda kind: kind.keys, lambda kind: kind.rows * kind.keys)
        )
        total += pairs + KEY_PAIRS * keys + texts * (document.layout.num_queries + KEY_PAIRS * tiles)
        asking = sum(text.places for text in document.texts if text.is_query)
        if asking:  # a tile of them gathers the whole document
            total += document.row_major_count(keys=True) * (asking + KEY_PAIRS * -(-asking // rows))
    return total


@dataclass(frozen=True, eq=False)
class Kind:
    """Tiles with equal rows, box and windows. ``queries`` are their places in the order [tiles, rows]; that
    of key ``j`` of the box of tile ``i`` is ``place[first[i] + step[j]]``. All rows also see the keys
    ``shared``, which count from the first key ``start[i]`` of the tile's document."""

    rows: tuple[int, ...]
    box: tuple[int, ...]
    windows: Tensors
    queries: Tensor
    place: Tensor
    first: Tensor
    step: Tensor
    start: Tensor
    shared: Tensor

    def tile_bytes(self, load: Load) -> int:
        """What one tile and key head take."""
        return int(load.tile_bytes(self.queries.shape[1], len(self.step) + len(self.shared)))

    def keys(self, tiles: slice) -> Tensor:
        """The places [tiles, keys] of the keys of some tiles, those of the box first."""
        keys = self.place[self.first[tiles, None] + self.step]
        return torch.cat([keys, self.start[tiles, None] + self.shared], 1) if len(self.shared) else keys

    def mask(self, dtype: torch.dtype, copies: int) -> Tensor | None:
        """0 where a row sees a key, else -inf: [copies * rows, keys]; None if every row sees every key."""
        total, rank, shape = None, len(self.rows), (copies, *self.rows, *self.box)
        for a, windows in enumerate(self.windows):
            if windows.numel():
                key = torch.arange(self.box[a], device=windows.device)
                hidden = (key < windows[0, :, None]) | (key >= windows[1, :, None])
                part = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
                part = part.view([n if i % rank == a else 1 for i, n in enumerate(self.rows + self.box)])
                total = part if total is None else total + part
        if total is not None:
            total = total.expand(shape).reshape(-1, len(self.step))
        return total if total is None or not len(self.shared) else pad(total, (0, len(self.shared)))


class Kinds(NamedTuple):
    """The tiles of an order on a device: those of grids, those of extra queries. ``back`` maps the places of
    the order to the queries of all kinds in a row."""

    kinds: tuple[tuple[Kind, ...], ...]
    back: Tensor


@lru_cache(maxsize=32)
def kinds_of(order: Order, cuts: tuple[_Cut, ...], device: torch.device) -> Kinds:
    """The tiles of an order; ``cuts`` says how each distinct document is cut."""

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    copies: dict[Document, list[tuple[int, int]]] = {}
    starts = zip(order.starts(keys=False), order.starts(keys=True), strict=True)
    for document, start in zip(order.documents, starts, strict=False):
        copies.setdefault(document, []).append(start)
    kinds: tuple[list[Kind], list[Kind]] = [], []
    with real_tensors():
        for (document, at), cut in zip(copies.items(), cuts, strict=True):
            for some, make in zip(kinds, (_grid_kinds, _extra_kinds), strict=True):
                some += make(document, cut, np.array(at).T, tensor)
        back = torch.cat([kind.queries.reshape(-1) for some in kinds for kind in some]).argsort()
    return Kinds(tuple(tuple(some) for some in kinds if some), back)


def _grid_kinds(
    document: Document, cut: _Cut, starts: IntArray, tensor: Callable[[IntArray], Tensor]
) -> Iterator[Kind]:
    """The tiles of the grid of a document, copies of which start at the query and key places ``starts``."""
    layout = document.layout
    query_place, query_pitch = key_place, key_pitch = _by_coordinate(layout, layout.places)
    if layout.slab is not None:
        key_place, key_pitch = _by_coordinate(layout, layout.key_places)
    query_start, key_start = document.grid_start + starts
    copy = np.arange(len(key_start)) * len(key_place)  # their coordinates follow one another
    place = tensor(np.add.outer(key_start, key_place).reshape(-1))
    runs = [np.arange(text.start, text.stop) for text in document.texts]
    shared = tensor(np.concatenate([*runs, np.arange(0)]))
    for kinds in itertools.product(*(_axis_kinds(layout, a, extent) for a, extent in enumerate(cut.tile))):
        rows, box, *firsts, windows = zip(*kinds, strict=True)
        query, row = (_flat(parts, query_pitch) for parts in (firsts[0], map(np.arange, rows)))
        key, step = (_flat(parts, key_pitch) for parts in (firsts[1], map(np.arange, box)))
        queries = np.add.outer(query_start, query_place[np.add.outer(query, row)]).reshape(-1, len(row))
        limits = tuple(tensor(one if np.ptp(one, axis=1).any() else one[:0]) for one in windows)
        first, start = np.add.outer(copy, key).reshape(-1), np.repeat(starts[1], len(key))
        keys = place, tensor(first), tensor(step), tensor(start), shared
        yield Kind(rows, box, limits, tensor(queries), *keys)


def _extra_kinds(
    document: Document, cut: _Cut, starts: IntArray, tensor: Callable[[IntArray], Tensor]
) -> Iterator[Kind]:
    """The extra queries of a document: tiles without a box, whose rows all see every real key of it."""
    runs = [np.arange(text.start, text.start + text.places) for text in document.texts if text.is_query]
    if runs:
        queries, none = np.concatenate(runs), tensor(np.arange(0))
        shared = tensor(np.flatnonzero(~document.tokens(keys=True)[1]))
        for some in filter(len, np.split(queries, [len(queries) // cut.rows * cut.rows])):
            rows = min(cut.rows, len(some))
            tiles = tensor(np.add.outer(starts[0], some).reshape(-1, rows))
            start = tensor(np.repeat(starts[1], len(some) // rows))
            yield Kind((rows,), (0,), (), tiles, none, torch.zeros_like(start), none, start, shared)


def _by_coordinate(layout: Layout, places: Sequence[AxisPlaces]) -> tuple[IntArray, list[int]]:
    """The places of one side of a grid by coordinate, row-major, and the step of every axis in there."""
    sizes = [len(one.coordinate) for one in places]
    pitch = [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]
    columns = [one.coordinate * p for one, p in zip(places, pitch, strict=True)]
    return np.argsort(layout.sum_over_axes(columns)), pitch


def _flat(parts: Iterable[IntArray], pitch: Sequence[int]) -> IntArray:
    """The coordinates of a box, row-major, from those of every axis."""
    scaled = [part * p for part, p in zip(parts, pitch, strict=True)]
    return cast(IntArray, reduce(np.add.outer, scaled).reshape(-1))

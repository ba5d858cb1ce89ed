"""The "sdpa" backend: gather the key box of each query tile and run plain attention on it.

The keys that a query tile sees lie in one box of coordinates, so attention under the mask is a batch of
small dense problems. Tiles of equal rows, box and mask are one *kind* and share calls. Extra tokens join
the keys of every tile of their document; as queries they are tiles of their own. Nothing is compiled and
every step is an ordinary autograd operation, so it runs, and trains, wherever torch does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from gnaflex.layout import AxisPlaces, Layout
from gnaflex.mask import ScoreMod
from gnaflex.order import Document, Order
from gnaflex.reorder import real_tensors
from gnaflex.spec import GNAError
from gnaflex.tables import MaskMod
from gnaflex.tiles import Tile
from gnaflex.window import IntArray

Tensors = tuple[Tensor, ...]
# Measured on an AMD EPYC, 1 thread, fp32, torch 2.13: 80 GFLOP/s, a call 60 us; gathering a key and its
# value, with what a call loses on few rows, takes as long as 24 pairs.
_KEY_PAIRS = 24
_CPU_CALL_BYTES = 32 * 2**20  # 8 to 128 MiB are as fast; score temporaries beyond are 1.4 times as slow
_TILES_PER_CALL = 2**15  # tiles go where heads go, a CUDA grid axis of at most 65535


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


class _Load(NamedTuple):
    """All that the choice of tiles depends on besides the layout; bytes are those of one key head."""

    pair_flops: int
    key_flops: int
    call_flops: float
    pair_bytes: int
    key_bytes: int
    fast_bytes: int
    memory_bytes: int

    def tile_bytes(self, rows: Any, keys: Any) -> Any:
        return keys * (self.key_bytes + rows * self.pair_bytes)


def _load(k: Tensor, v: Tensor, group: int, explicit: bool, memory_bytes: int) -> _Load:
    heads, channels, size, device = k.shape[0], k.shape[-1] + v.shape[-1], k.element_size(), k.device.type
    wide = max(size, 4)
    # Copies of the scores in memory: torch's CPU kernel keeps none, but takes one head dim only.
    scores = 5 if explicit else 0 if device == "cpu" and v.shape[-1] == k.shape[-1] else 3
    flops = 2 * channels * heads
    costs = flops * group, flops * _KEY_PAIRS, 5e6 if device == "cpu" else 1e9  # a GPU's flops are faster
    pair_bytes = wide * group * (scores + 2)  # 2: the mask, and a part of it
    key_bytes = channels * (size + wide * (explicit and size < wide)) + 16
    fast_bytes = _CPU_CALL_BYTES if device == "cpu" and explicit else memory_bytes
    return _Load(*costs, pair_bytes, key_bytes, fast_bytes, memory_bytes)


@lru_cache(maxsize=256)
def _choose(layout: Layout, extra: int, load: _Load) -> Tile:
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


def _cut(document: Document, load: _Load) -> _Cut:
    """Extra queries see the whole document, and every tile of them gathers it anew: many rows share that."""
    tile = _choose(document.layout, sum(text.tokens for text in document.texts), load)
    rows = sum(text.places for text in document.texts if text.is_query)
    keys = document.row_major_count(keys=True)
    fast = max(load.fast_bytes, load.tile_bytes(4 * _KEY_PAIRS, keys))
    room = max(min(fast, load.memory_bytes), 2 * load.tile_bytes(1, keys))
    most = max((room // keys - load.key_bytes) // load.pair_bytes, 1)
    return _Cut(tile, -(-rows // max(-(-rows // most), 1)))  # all of about the same size


@dataclass(frozen=True, eq=False)
class _Kind:
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

    def tile_bytes(self, load: _Load) -> int:
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


class _Tables(NamedTuple):
    """The tiles of an order on a device: those of grids, those of extra queries. ``back`` maps the places of
    the order to the queries of all kinds in a row."""

    kinds: tuple[tuple[_Kind, ...], ...]
    back: Tensor


@lru_cache(maxsize=32)
def _tables(order: Order, cuts: tuple[_Cut, ...], device: torch.device) -> _Tables:
    """The tiles of an order; ``cuts`` says how each distinct document is cut."""

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    copies: dict[Document, list[tuple[int, int]]] = {}
    starts = zip(order.starts(keys=False), order.starts(keys=True), strict=True)
    for document, start in zip(order.documents, starts, strict=False):
        copies.setdefault(document, []).append(start)
    kinds: tuple[list[_Kind], list[_Kind]] = [], []
    with real_tensors():
        for (document, at), cut in zip(copies.items(), cuts, strict=True):
            for some, make in zip(kinds, (_grid_kinds, _extra_kinds), strict=True):
                some += make(document, cut, np.array(at).T, tensor)
        back = torch.cat([kind.queries.reshape(-1) for some in kinds for kind in some]).argsort()
    return _Tables(tuple(tuple(some) for some in kinds if some), back)


def _grid_kinds(
    document: Document, cut: _Cut, starts: IntArray, tensor: Callable[[IntArray], Tensor]
) -> Iterator[_Kind]:
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
        yield _Kind(rows, box, limits, tensor(queries), *keys)


def _extra_kinds(
    document: Document, cut: _Cut, starts: IntArray, tensor: Callable[[IntArray], Tensor]
) -> Iterator[_Kind]:
    """The extra queries of a document: tiles without a box, whose rows all see every real key of it."""
    runs = [np.arange(text.start, text.start + text.places) for text in document.texts if text.is_query]
    if runs:
        queries, none = np.concatenate(runs), tensor(np.arange(0))
        shared = tensor(np.flatnonzero(~document.tokens(keys=True)[1]))
        for some in filter(len, np.split(queries, [len(queries) // cut.rows * cut.rows])):
            rows = min(cut.rows, len(some))
            tiles = tensor(np.add.outer(starts[0], some).reshape(-1, rows))
            start = tensor(np.repeat(starts[1], len(some) // rows))
            yield _Kind((rows,), (0,), (), tiles, none, torch.zeros_like(start), none, start, shared)


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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Order,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    score_mod: ScoreMod | None = None,
    visible: MaskMod | None = None,
    return_lse: bool = False,
    memory_bytes: int = 256 * 2**20,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query [B, Hq, Tq, D] to key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv], the tokens being
    the query and key places of ``order``, which are also what ``score_mod`` gets, and ``visible``, a mask_mod
    that broadcasts and hides further pairs. A padded query sees what the last real one of its group or text
    sees; padded keys are never seen. Gathered boxes, masks and scores take about ``memory_bytes`` at a time,
    but at least what one tile and key head need; training recomputes them in the backward pass if all
    together exceed half of it.

    Returns:
        [B, Hq, Tq, Dv] in the dtype of ``query``; with ``return_lse`` also the natural log-sum-exp
        [B, Hq, Tq], float64 if the inputs are, else float32. A row that ``score_mod`` sends to -inf gives
        zeros and -inf.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    explicit = return_lse or score_mod is not None or visible is not None
    if heads != kv_heads and not (enable_gqa and heads % kv_heads == 0):
        rule = f"query heads must be those of the key, or a multiple: got {heads}, {kv_heads}, {enable_gqa=}"
        raise GNAError(f"{rule}.\n  query is {tuple(query.shape)}, key {tuple(key.shape)}.")
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    trains = torch.is_grad_enabled() and (score_mod is not None or any(x.requires_grad for x in (q, k, v)))
    group, room = heads // kv_heads, memory_bytes // 2 if trains else memory_bytes  # half for gradients
    load = _load(k, v, group, explicit, room)
    tables = _tables(order, tuple(_cut(one, load) for one in dict.fromkeys(order.documents)), q.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = _Call(tables, load, trains, scale, score_mod, visible, explicit, (kv_heads, group), {})
    out, *lse = (x.reshape(*query.shape[:3], *x.shape[2:]) for x in call(q, k, v))
    return (out, lse[0]) if return_lse else out


class _Call(NamedTuple):
    tables: _Tables
    load: _Load
    trains: bool
    scale: float
    score_mod: ScoreMod | None
    visible: MaskMod | None
    explicit: bool
    heads: tuple[int, int]  # of the key, and of the query per head of the key
    mask: dict[_Kind, Tensor | None]  # the latest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """The output [B * Hq, T, Dv] of all tiles and, if every score is spelled out, the log-sum-exp."""
        load, room, kinds = self.load, self.load.memory_bytes, itertools.chain(*self.tables.kinds)
        needed = max(len(k), 1) * sum(kind.tile_bytes(load) * len(kind.first) for kind in kinds)
        attend: Callable[..., Tensors] = self._attend
        if self.trains and needed > room:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        if q.is_cpu and not self.trains:
            room = min(room, _CPU_CALL_BYTES)
        done = [part for some in self.tables.kinds for part in self._run(some, attend, (q, k, v), room)]
        return tuple(torch.cat(part, 1).index_select(1, self.tables.back) for part in zip(*done, strict=True))

    def _run(
        self, kinds: tuple[_Kind, ...], attend: Callable[..., Tensors], qkv: Tensors, room: int
    ) -> Iterator[list[Tensor]]:
        """The tiles of some kinds, as many heads at a time for all kinds as the largest tile allows: then the
        tensors are split, and their gradients joined, only once."""
        (q, k, v), group, each = qkv, self.heads[1], [kind.tile_bytes(self.load) for kind in kinds]
        heads = min(max(room // max(each), 1), max(len(k), 1))
        whole = (q, group), (k, 1), (v, 1), (torch.arange(len(k), device=k.device), 1)
        slices = [torch.split(x, heads * n) for x, n in whole]
        for kind, size in zip(kinds, each, strict=True):
            fit = min(max(room // (heads * size), 1), _TILES_PER_CALL)
            for tiles in (slice(i, i + fit) for i in range(0, len(kind.first), fit)):
                parts = [attend(*part, kind, tiles) for part in zip(*slices, strict=True)]
                yield [torch.cat(part) for part in zip(*parts, strict=True)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, kind: _Kind, tiles: slice) -> Tensors:
        """Some tiles of one kind, for the key heads ``heads`` of all batches. Tiles go where heads go, these
        where the batch goes, so that one mask serves all; the query heads of a key head become rows."""
        queries, keys = kind.queries[tiles], kind.keys(tiles)
        k, v = (x.index_select(1, keys.reshape(-1)).reshape(len(x), *keys.shape, x.shape[-1]) for x in (k, v))
        (n, rows), batch, group = queries.shape, len(k), self.heads[1]
        q = q.index_select(1, queries.reshape(-1)).reshape(batch, group, n, rows, q.shape[-1])
        q = q.transpose(1, 2).flatten(2, 3)
        if kind not in self.mask:
            self.mask.clear()
            self.mask[kind] = kind.mask(q.dtype, group)
        mask, at = self.mask[kind], (heads, queries, keys)
        parts = self._scored(q, k, v, mask, at) if self.explicit else (sdpa(q, k, v, mask, scale=self.scale),)
        split = (x.reshape(batch, n, group, rows, *x.shape[3:]).transpose(1, 2) for x in parts)
        return tuple(x.reshape(batch * group, n * rows, *x.shape[4:]) for x in split)

    def _scored(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Tensors) -> Tensors:
        """Output and log-sum-exp with every score in float32 or wider, under autocast too."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(wide) * self.scale) @ k.to(wide).mT
            if self.score_mod is not None and scores.numel():
                scores = self._modified(scores, self.score_mod, at)
            if self.visible is not None:
                self._grid(scores).masked_fill_(~self._seen(self.visible, at), -torch.inf)
            if mask is not None:
                scores.masked_fill_(mask < 0, -torch.inf)  # in place wherever autograd keeps nothing
            top = scores.detach().amax(-1, keepdim=True)
            weights = scores.sub_(top.clamp(min=torch.finfo(wide).min)).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=0.5)  # at least 1, or 0 if no key is left
            return (weights @ v.to(wide) / total).to(q.dtype), (top + total.log()).squeeze(-1)

    def _modified(self, scores: Tensor, mod: Callable[..., Tensor], at: Tensors) -> Tensor:
        """``mod`` of scores [key heads, tiles, group * rows, keys], with the places of both."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # loads sympy

        (heads, h), (_, queries, keys) = self._heads(at), at
        # What varies along keys, rows, group, tiles, key heads of all batches: the innermost map comes first.
        for varies in ("k", "q", "h", "qk", "bh"):
            mod = torch.vmap(mod, in_dims=(0, *(0 if index in varies else None for index in "bhqk")))
        with TransformGetItemToIndex():  # as FlexAttention: bias[h] under vmap, in torch 2.9 too
            out = mod(self._grid(scores), heads, h, queries, keys)
        return out.to(scores.dtype).reshape(scores.shape).clone()  # not what mod keeps for its gradient

    def _seen(self, visible: MaskMod, at: Tensors) -> Tensor:
        """``visible`` of the same pairs, as it broadcasts."""
        (batch, h), (_, queries, keys) = self._heads(at), at
        b, q_idx = batch[:, None, None, None, None], queries[:, None, :, None]
        return visible(b, h[:, None, :, None, None], q_idx, keys[:, None, None, :])

    def _grid(self, scores: Tensor) -> Tensor:
        """[key heads, tiles, group * rows, keys] with the rows apart from the group, a view."""
        return scores.view(*scores.shape[:2], self.heads[1], -1, scores.shape[-1])

    def _heads(self, at: Tensors) -> Tensors:
        """The batch entry of every key head, and the query heads of its group."""
        (kv_heads, group), heads = self.heads, at[0]
        return heads // kv_heads, heads[:, None] % kv_heads * group + torch.arange(group, device=heads.device)

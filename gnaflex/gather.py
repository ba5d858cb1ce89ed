"""The "sdpa" backend: gather the key box of each query tile and run plain attention on it.

The keys that a query tile sees lie in one box of coordinates, so attention under any mask is a batch of small
dense ones. Tiles of equal rows, box and mask pattern are one *kind* and share calls. Nothing is compiled and
every step is an ordinary autograd operation, so it runs, and trains, wherever torch does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gnaflex.layout import Layout
from gnaflex.spec import GNAError
from gnaflex.tiles import groups
from gnaflex.window import IntArray

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Cut = tuple[int, bool]

# Costs in pairs or flops. AMD EPYC, 1 thread, fp32, torch 2.13, 2025-11: 80 GFLOP/s, gathering one key and value
# takes as long as 60 pairs, a mask per tile 2.7 ns per pair, a call 60 us. A GPU computes 1000 times faster.
_KEY_PAIRS = 64
_MASK_FLOPS = 200
_CALL_FLOPS = {"cpu": 5e6}
_CALL_FLOPS_DEVICE = 1e9
_CPU_PASS_BYTES = 32 * 2**20  # larger gathers leave the cache and pay page faults
_CANDIDATES = 30_000  # combinations of tile extents that are weighed
_TILES_PER_CALL = 2**15  # CUDA kernels put heads on a grid axis of at most 65535


# ---- one axis: its windows, cut into query tiles -------------------------------------------------------


class _AxisWindows(NamedTuple):
    """The windows of an axis by coordinate, int64 [places], and where its dilation groups begin and end."""

    lo: IntArray
    hi: IntArray
    starts: IntArray


@lru_cache(maxsize=256)
def _axis_windows(layout: Layout, a: int) -> _AxisWindows:
    places, q_tile = layout.places[a], layout.tiles[0][a]
    sizes = [np.full(len(group.members), -(-group.n // q_tile) * q_tile) for group in groups(layout.spec.axes[a])]
    by_coordinate = np.argsort(places.coordinate)
    starts = np.cumsum(np.concatenate([[0], *sizes]))
    return _AxisWindows(places.lo[by_coordinate], places.hi[by_coordinate], starts)


class _AxisKind(NamedTuple):
    """Tiles of one axis with equal rows, key extent and pattern; ``lo`` and ``hi`` are the windows relative to
    the box, int64 [tiles or 1, rows], None if every row sees the whole box."""

    rows: int
    keys: int
    first_query: IntArray
    first_key: IntArray
    windows: tuple[IntArray, IntArray] | None


@lru_cache(maxsize=1024)
def _axis_kinds(layout: Layout, a: int, cut: Cut) -> tuple[_AxisKind, ...]:
    """The tiles of extent ``cut[0]`` of an axis. With ``cut[1]`` all boxes grow to one extent and patterns may
    differ inside a kind: fewer calls, more masking."""
    (tile, grow), (lo, hi, starts) = cut, _axis_windows(layout, a)
    begin = np.concatenate([np.arange(*ends, tile) for ends in itertools.pairwise(starts)])
    rows = np.minimum(begin + tile, starts[np.searchsorted(starts, begin, "right")]) - begin
    first, keys = lo[begin], hi[begin + rows - 1] - lo[begin]
    if grow:
        keys = np.full_like(keys, keys.max())
        first = np.minimum(first, len(lo) - keys)
    query = begin[:, None] + np.minimum(np.arange(tile), rows[:, None] - 1)
    seen_lo, seen_hi = lo[query] - first[:, None], hi[query] - first[:, None]
    signature = np.stack([rows, keys], 1) if grow else np.column_stack([rows, keys, seen_lo, seen_hi])
    _, which = np.unique(signature, axis=0, return_inverse=True)
    kinds = []
    for one in range(which.max() + 1):
        at = np.flatnonzero(which.reshape(-1) == one)
        r, k = int(rows[at[0]]), int(keys[at[0]])
        windows = tuple(x[at, :r] if np.ptp(x[at, :r], axis=0).any() else x[at[:1], :r] for x in (seen_lo, seen_hi))
        masked = bool((windows[0] > 0).any() or (windows[1] < k).any())
        kinds.append(_AxisKind(r, k, begin[at], first[at], (windows[0], windows[1]) if masked else None))
    return tuple(kinds)

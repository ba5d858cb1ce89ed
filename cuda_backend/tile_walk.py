"""A perfectly block-sparse problem as boxes of tokens: what a kernel walks over; no torch, no cutlass.

A query box sees one box of keys, cut into key tiles from its first key on (dynamic tiling); only the last
tile of an axis can reach past the key box. So an entry of the work list is one query box: where it starts,
where its keys start, how many there are per axis. Windows, strides and masks end here.

A kernel that takes two boxes at once ("halves") walks over one sequence of key tiles, those of the first; the
second's start some layers of tiles later along the first axis, the slowest.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gnaflex.cuda_backend import pairs

from gnaflex.planner import AxisTiles, Plan, axis_totals
from gnaflex.spec import GNA
from gnaflex.tiles import Tile, groups

Q_ROWS = KV_ROWS = 128  # rows of the largest box: two consumer warp groups of 64 query rows; 128 columns of S
Q_STEP = 8  # rows of a box: shared memory is swizzled 8 rows at a time
SPANS = 3  # rows of an entry of the work list: the first query, the first key, the number of keys
TEXTS = 3  # runs of extra tokens: before the grid, behind it, and keys alone
KV_STEP = 16  # keys that one matrix instruction of P V takes
KV_OVERHEAD = (
    12  # keys that would take as long as what a key tile costs besides its keys; assumed, no GPU yet
)
ALONE = 1.6  # time of a tile that one half of two sees, by half that of one that both do; assumed, no GPU yet
_Ints = npt.NDArray[np.int32]
_AnyArray = npt.NDArray[Any]


class Launch(NamedTuple):
    """The query boxes of all dilation groups with the same lengths, dearest first.

    ``lengths``: tokens of such a group per axis. Per axis these are the dilation groups ``first`` to
    ``first + groups - 1``. ``work`` [boxes, 3, axes]: the first query, the first key, the number
    of keys, in tokens of the group.

    With two halves, entries ``2 * p`` and ``2 * p + 1`` are pair ``p``. Their key boxes are equal, but that
    along the first axis the second one may start whole tiles later and end later; one without keys is none.
    """

    lengths: tuple[int, ...]
    first: tuple[int, ...]
    groups: tuple[int, ...]
    work: _Ints


@lru_cache(maxsize=256)
def chosen(spec: GNA, halves: int = 1) -> Plan | None:
    """The boxes with the least work that need no mask, or None where there are none.

    The cost of a key tile is its rows and an overhead; query boxes cost the same whatever rows they fill, as
    the matrix units take all of them. Two halves (Blackwell) take turns: one's products run while the other's
    softmax does. So a tile of a pair costs 2 when both see it, ``ALONE`` when one does and nothing runs
    beside its softmax; keys and values come once for both.
    """
    assert halves in (1, 2)
    q_boxes, kv_boxes = _boxes(spec, Q_ROWS, Q_STEP), _boxes(spec, KV_ROWS, KV_STEP)
    cost = np.ones((len(q_boxes), len(kv_boxes))) * (kv_boxes.prod(axis=1) + KV_OVERHEAD)
    perfect = np.ones(cost.shape, bool)
    for a, axis in enumerate(spec.axes):
        q_extents, q_at = np.unique(q_boxes[:, a], return_inverse=True)
        kv_extents, kv_at = np.unique(kv_boxes[:, a], return_inverse=True)
        kv = tuple(kv_extents.tolist())
        visited, unmasked = np.stack([axis_totals(axis, q, kv, "dynamic") for q in q_extents.tolist()], 1)
        cost *= visited[:, kv_at][q_at]
        perfect &= (visited == unmasked)[:, kv_at][q_at]
    cost[~perfect] = math.inf
    if not perfect.any():
        return None
    best = int(cost.argmin()) if halves == 1 else _best_in_pairs(spec, q_boxes, kv_boxes, cost)
    q_at_best, kv_at_best = divmod(best, len(kv_boxes))
    q, kv = (tuple(box.tolist()) for box in (q_boxes[q_at_best], kv_boxes[kv_at_best]))
    return Plan(spec, q, kv, "dynamic", Q_ROWS)


def _best_in_pairs(spec: GNA, q_boxes: _AnyArray, kv_boxes: _AnyArray, cost: _AnyArray) -> int:
    """The place of the least cost of pairs in ``cost`` [query boxes, key boxes], which has that of boxes all
    of which share every tile."""
    some = np.flatnonzero(cost <= ALONE * cost.min())  # none costs more than if nothing were shared
    q, kv = q_boxes[some // len(kv_boxes)], kv_boxes[some % len(kv_boxes)]
    alone = np.ones(len(some))
    for a, axis in enumerate(spec.axes):
        extents = q[:, a], kv[:, a]
        tiles = np.zeros((Q_ROWS + 1, KV_ROWS + 1))
        tiles[extents] = 1
        for one in np.argwhere(tiles).tolist():
            tiles[tuple(one)] = pairs.alone(axis, *one, a == 0)
        alone *= tiles[extents]
    extra = (ALONE - 1) * alone * (kv.prod(axis=1) + KV_OVERHEAD)
    return int(some[(cost.ravel()[some] + extra).argmin()])


def _boxes(spec: GNA, rows: int, step: int) -> _AnyArray:
    """Every box of a multiple of ``step`` tokens, ``rows`` at most, [boxes, axes]; an extent exceeds its axis
    only to fill up to such a multiple."""
    boxes, tokens = np.zeros((1, 0), np.int64), np.ones(1, np.int64)
    for axis in spec.axes:
        length = axis.group_length(0)
        extents = np.unique([*range(1, min(length, rows) + 1), min(-(-length // step) * step, rows)])
        product = np.multiply.outer(tokens, extents)
        box, extent = np.nonzero(product <= rows)
        boxes = np.column_stack([boxes[box], extents[extent]])
        tokens = product[box, extent]
    return np.asarray(boxes[tokens % step == 0])


def launches(plan: Plan, halves: int = 1) -> tuple[Launch, ...]:
    """The work of a plan without partial tiles, one launch per combination of group lengths; in pairs for two
    halves."""
    assert plan.is_block_sparse
    assert plan.kv_tiling == "dynamic"
    assert halves in (1, 2)
    each = [
        zip(groups(axis), tiles, strict=True) for axis, tiles in zip(plan.spec.axes, plan.axes, strict=True)
    ]
    out = []
    for combination in itertools.product(*map(list, each)):
        members = [group.members for group, _ in combination]
        work = _work([tiles for _, tiles in combination], plan.kv_tile, halves)
        lengths = tuple(group.n for group, _ in combination)
        out.append(Launch(lengths, tuple(int(m[0]) for m in members), tuple(len(m) for m in members), work))
    return tuple(out)


def _work(axes: list[AxisTiles], kv_tile: Tile, halves: int) -> _Ints:
    """[boxes, 3, axes], by descending number of key tiles of what is taken at once, else in their order."""
    per_axis = [
        np.array([(start, lo, hi - lo) for start, (lo, hi) in zip(one.start, one.needed, strict=True)])
        for one in axes
    ]
    at = np.meshgrid(*(np.arange(len(one)) for one in per_axis), indexing="ij")
    work = np.stack([one[which.ravel()] for one, which in zip(per_axis, at, strict=True)], axis=2)
    if halves == 1:
        items = work[:, None]
    else:
        items = pairs.paired(work, [(lo, lo + n) for _, lo, n in (one.T for one in per_axis)], kv_tile[0])
    tiles = item_tiles(items, kv_tile)
    dearest = items[np.argsort(-tiles, kind="stable")]
    return np.ascontiguousarray(dearest.reshape(-1, *work.shape[1:]), dtype=np.int32)


def item_tiles(work: _AnyArray, kv_tile: Tile) -> _AnyArray:
    """How many key tiles are walked for the boxes [items, halves, 3, axes] that are taken at once."""
    tiles = tile_counts(work[:, :, 2], kv_tile)
    later = (work[:, :, 1, 0] - work[:, :1, 1, 0]) // kv_tile[0]
    return np.asarray((later + tiles[:, :, 0]).max(axis=1) * tiles[:, 0, 1:].prod(axis=1))


def pair_counts(plan: Plan) -> tuple[int, int]:
    """Of a plan without partial tiles: the tiles of all pairs that both halves see, then those that one
    sees."""
    extents = zip(plan.spec.axes, plan.q_tile, plan.kv_tile, strict=True)
    alone = math.prod(pairs.alone(*one, a == 0) for a, one in enumerate(extents))
    return (plan.touched_tiles - alone) // 2, alone


# ---- integer arithmetic that tests and kernels share, on ints and on cutlass.Int32 -------------------------


def tile_counts(keys: Any, kv_tile: Any) -> Any:
    """How many tiles cover so many keys."""
    return (keys + np.array(kv_tile) - 1) // np.array(kv_tile)


def unravel(i: Any, counts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place of number ``i`` in a box of ``counts``, the last axis fastest."""
    places = []
    for count in counts[:0:-1]:
        places.append(i % count)
        i = i // count
    return (i, *places[::-1])

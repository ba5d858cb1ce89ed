"""A perfectly block-sparse problem as boxes of tokens: what a kernel walks over; no torch, no cutlass.

A query box sees one box of keys, cut into key tiles from its first key on (dynamic tiling); only the last
tile of an axis can reach past the key box. So an entry of the work list is one query box: where it starts,
where its keys start, how many there are per axis. Windows, strides and masks end here.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
_Ints = npt.NDArray[np.int32]
_AnyArray = npt.NDArray[Any]


class Launch(NamedTuple):
    """The query boxes of all dilation groups with the same lengths, dearest first.

    ``lengths``: tokens of such a group per axis. Per axis these are the dilation groups ``first`` to
    ``first + groups - 1``. ``work`` [boxes, 3, axes]: the first query, the first key, the number
    of keys, in tokens of the group.
    """

    lengths: tuple[int, ...]
    first: tuple[int, ...]
    groups: tuple[int, ...]
    work: _Ints


@lru_cache(maxsize=256)
def chosen(spec: GNA) -> Plan | None:
    """The boxes with the least work that need no mask, or None where there are none.

    The cost of a key tile is its rows and an overhead; query boxes cost the same whatever rows they fill, as
    the matrix units take all of them.
    """
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
    q_at_best, kv_at_best = divmod(int(cost.argmin()), len(kv_boxes))
    if cost[q_at_best, kv_at_best] == math.inf:
        return None
    q, kv = (tuple(box.tolist()) for box in (q_boxes[q_at_best], kv_boxes[kv_at_best]))
    return Plan(spec, q, kv, "dynamic", Q_ROWS)


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


def launches(plan: Plan) -> tuple[Launch, ...]:
    """The work of a plan without partial tiles, one launch per combination of group lengths."""
    assert plan.is_block_sparse
    assert plan.kv_tiling == "dynamic"
    each = [
        zip(groups(axis), tiles, strict=True) for axis, tiles in zip(plan.spec.axes, plan.axes, strict=True)
    ]
    out = []
    for combination in itertools.product(*map(list, each)):
        members = [group.members for group, _ in combination]
        work = _work([tiles for _, tiles in combination], plan.kv_tile)
        lengths = tuple(group.n for group, _ in combination)
        out.append(Launch(lengths, tuple(int(m[0]) for m in members), tuple(len(m) for m in members), work))
    return tuple(out)


def _work(axes: list[AxisTiles], kv_tile: Tile) -> _Ints:
    """[boxes, 3, axes], by descending number of key tiles, else in their order."""
    per_axis = [
        np.array([(start, lo, hi - lo) for start, (lo, hi) in zip(one.start, one.needed, strict=True)])
        for one in axes
    ]
    at = np.meshgrid(*(np.arange(len(one)) for one in per_axis), indexing="ij")
    work = np.stack([one[which.ravel()] for one, which in zip(per_axis, at, strict=True)], axis=2)
    tiles = tile_counts(work[:, 2], kv_tile).prod(axis=1)
    return np.ascontiguousarray(work[np.argsort(-tiles, kind="stable")], dtype=np.int32)


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

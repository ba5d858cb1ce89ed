"""Why a problem does not tile, in words, and what mends it; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gnaflex.axis_tables import table_of
from gnaflex.nearby import Nearby, changes_between, nearest
from gnaflex.planner import AxisTiles, KVTiling, Plan
from gnaflex.spec import GNA, Axis

MOST_EXTENTS = 128  # smaller ones that are tried in the place of a tile's


def explain(plan: Plan) -> str:
    """In words, axis by axis, why visited tiles need a mask, and the cheapest changes that mend it.

    Example:
        >>> import gnaflex
        >>> from gnaflex.reasons import explain
        >>> print(explain(gnaflex.plan(gnaflex.GNA(64, window=16, stride=6), (8,), (8,), "dynamic")))
        Not block-sparse: 14 of 23 visited tiles (61%) need a mask; work speed-up 2.78, FLOPs allow 4.00.
        axis 0 (length 64, window 16, stride 6; query tile 8, key tile 8): partial for 7 of 8 query tiles.
          7 straddle stride groups whose windows differ: queries [0, 8) need keys [0, 17), share [1, 16).
          Mend: stride 6 -> 8; or a query tile of 6.
        Smallest change with these tiles: GNA(shape=(64,), window=(16,), stride=(8,)), work speed-up 4.00.
        Block-sparse as it is with query tile (6,) and key tile (8,): work speed-up 2.91.
    """
    spec, whole = plan.spec, f"work speed-up {plan.work_speedup:.2f}, FLOPs allow {plan.flop_speedup:.2f}"
    notes = [note for a in range(spec.rank) for note in _note(plan, a)]
    if plan.is_block_sparse:
        end = "of the grid" if plan.kv_tiling == "static" else "of the keys of a query tile"
        clipped = f" ({plan.clipped_tiles:,} cut off at the end {end})" if plan.clipped_tiles else ""
        head = f"Block-sparse: none of {plan.touched_tiles:,} visited tiles{clipped} needs a mask; {whole}."
        return "\n".join([head, *notes])
    share = f"{plan.partial_tiles:,} of {plan.touched_tiles:,} visited tiles"
    share += f" ({plan.partial_tiles / plan.touched_tiles:.0%})"
    lines = [f"Not block-sparse: {share} need a mask; {whole}."]
    axes, mended = [], True
    for a, axis in enumerate(spec.axes):
        near = _mend(axis, plan.q_tile[a], plan.kv_tile[a], plan.kv_tiling)
        lines += _why(plan, a, near)
        mended = mended and near is not None
        axes.append(near.spec.axes[0] if near else axis)
    whole_mends = _whole_mend(plan, axes) if mended else []
    return "\n".join([*lines, *notes, *whole_mends, *_dynamic_mend(plan), *_other_tiles(plan)])


def _mend(axis: Axis, q: int, kv: int, tiling: KVTiling) -> Nearby | None:
    """The nearest perfect window and stride of an axis, as a problem of its own."""
    alone = GNA((axis.length,), axis.window, axis.stride, axis.dilation, axis.is_causal)
    return next(iter(nearest(alone, (q,), (kv,), tiling, limit=1)), None)


def _why(plan: Plan, a: int, near: Nearby | None) -> list[str]:
    axis, q, kv = plan.spec.axes[a], plan.q_tile[a], plan.kv_tile[a]
    bad = [(one, at) for one in plan.axes[a] for at in range(len(one.start)) if _is_partial(one, at)]
    dilation = f", dilation {axis.dilation}" if axis.dilation > 1 else ""
    causal = ", causal" if axis.is_causal else ""
    numbers = f"length {axis.length}, window {axis.window}, stride {axis.stride}{dilation}{causal}"
    head = f"axis {a} ({numbers}; query tile {q}, key tile {kv}): "
    if not bad:
        return [head + "no query tile is partial."]
    total = sum(one.groups * len(one.start) for one in plan.axes[a])
    lines = [head + f"partial for {sum(one.groups for one, _ in bad)} of {total} query tiles."]
    straddling = [(one, at) for one, at in bad if one.needed[at] != one.shared[at]]
    off = [(one, at) for one, at in bad if one.needed[at] == one.shared[at]]
    rule = "straddle stride groups whose windows differ"
    if axis.is_causal:
        rule = "hold several queries, whose windows end at themselves on a causal axis"
    for some, words in ((straddling, rule), (off, f"see a window off the fixed grid of key tiles of {kv}")):
        if some:
            count = sum(one.groups for one, _ in some)
            lines.append(f"  {count} {words}: {_instance(*some[0], q)}.")
    mends = [" and ".join(changes_between(axis, near.spec.axes[0]))] if near else []
    for name, extent in (
        ("query", _smaller(axis, q, kv, plan.kv_tiling, 0)),
        ("key", _smaller(axis, q, kv, plan.kv_tiling, 1)),
    ):
        mends += [f"a {name} tile of {extent}"] if extent else []
    if plan.kv_tiling == "static" and _is_perfect(axis, q, kv, "dynamic"):
        mends.append('kv_tiling="dynamic"')
    return [*lines, *([f"  Mend: {'; or '.join(mends)}."] if mends else [])]


def _is_partial(one: AxisTiles, at: int) -> bool:
    return one.visited[at] != one.unmasked[at]


def _instance(one: AxisTiles, at: int, q: int) -> str:
    (lo, hi), (all_lo, all_hi) = one.needed[at], one.shared[at]
    start, stop = one.start[at], min(one.start[at] + q, one.length)
    tail = (
        f", share {f'[{all_lo}, {all_hi})' if all_lo < all_hi else 'none'}"
        if (all_lo, all_hi) != (lo, hi)
        else ""
    )
    return f"queries [{start}, {stop}) need keys [{lo}, {hi}){tail}"


def _is_perfect(axis: Axis, q: int, kv: int, tiling: KVTiling) -> bool:
    return bool(_perfect(axis, range(q, q + 1), range(kv, kv + 1), tiling).all())


def _perfect(axis: Axis, q: range, kv: range, tiling: KVTiling) -> Any:
    """Which extents of tiles need no mask, [query extents, key extents]."""
    option = np.array([[axis.window, axis.stride]])
    return table_of(axis, option, np.array(q), np.array(kv), tiling).perfect[0]


def _smaller(axis: Axis, q: int, kv: int, tiling: KVTiling, side: int) -> int | None:
    """The largest smaller extent of the query tile (``side`` 0) or the key tile that needs no mask."""
    given = (q, kv)
    extents = [range(n, n + 1) for n in given]
    extents[side] = range(max(1, given[side] - MOST_EXTENTS), given[side])
    if given[side] == 1:
        return None
    found = np.flatnonzero(_perfect(axis, extents[0], extents[1], tiling))
    return extents[side][found[-1]] if len(found) else None


def _note(plan: Plan, a: int) -> Iterator[str]:
    """Tiles that dilation groups cannot fill."""
    axis = plan.spec.axes[a]
    least = min(axis.group_lengths)
    sides = (("query", plan.q_tile[a]), ("key", plan.kv_tile[a]))
    names = " and ".join(f"{name} tile of {extent}" for name, extent in sides if extent > least)
    if axis.dilation > 1 and names:
        yield f"axis {a}: dilation {axis.dilation} leaves groups of {least} tokens, which fill no {names}."


def _dynamic_mend(plan: Plan) -> list[str]:
    """What dynamic key tiles would take instead."""
    if plan.kv_tiling == "dynamic":
        return []
    sides = zip(plan.spec.axes, plan.q_tile, plan.kv_tile, strict=True)
    mends = [_mend(axis, q, kv, "dynamic") for axis, q, kv in sides]
    axes = [near.spec.axes[0] for near in mends if near]
    if len(axes) < plan.spec.rank:
        return []
    pairs = enumerate(zip(plan.spec.axes, axes, strict=True))
    changes = [f"axis {a}: {one}" for a, (before, after) in pairs for one in changes_between(before, after)]
    spec = _with(axes, plan.spec)
    speedup = replace(plan, spec=spec, kv_tiling="dynamic").work_speedup
    what = f"with {'; '.join(changes)}" if changes else "as it is"
    return [f'With kv_tiling="dynamic" it is block-sparse {what}: work speed-up {speedup:.2f}.']


def _whole_mend(plan: Plan, axes: list[Axis]) -> list[str]:
    spec = _with(axes, plan.spec)
    speedup = replace(plan, spec=spec).work_speedup
    return [f"Smallest change with these tiles: {spec}, work speed-up {speedup:.2f}."]


def _with(axes: list[Axis], spec: GNA) -> GNA:
    window, stride = [axis.window for axis in axes], [axis.stride for axis in axes]
    return GNA(spec.shape, window, stride, spec.dilation, spec.is_causal)


def _other_tiles(plan: Plan) -> list[str]:
    """Tiles of as many tokens that suit the problem as it is."""
    q_rows, kv_rows = (math.prod(tile) for tile in (plan.q_tile, plan.kv_tile))
    same = nearest(
        plan.spec,
        None,
        None,
        plan.kv_tiling,
        limit=1,
        keep=("window", "stride"),
        q_rows=q_rows,
        kv_rows=kv_rows,
    )
    return [
        f"Block-sparse as it is with query tile {one.plan.q_tile} and key tile {one.plan.kv_tile}: "
        f"work speed-up {one.work_speedup:.2f}."
        for one in same
    ]

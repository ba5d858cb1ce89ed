"""Why a problem does not tile, in words, and what mends it; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gnaflex.axis_tables import table_of
from gnaflex.nearby import Nearby, changes_between, nearest
from gnaflex.planner import AxisTiles, KVTiling, Plan
from gnaflex.spec import GNA, Axis


def explain(plan: Plan) -> str:
    """In words, axis by axis, why visited tiles need a mask, and the cheapest changes that mend it.

    Example:
        >>> import gnaflex
        >>> from gnaflex.reasons import explain
        >>> print(explain(gnaflex.plan(gnaflex.GNA(64, window=16, stride=6), (8,), (8,), "dynamic")))
        Not block-sparse: 14 of 23 visited tiles (61%) need a mask; work speed-up 2.78 of at most 4.00.
        axis 0 (length 64, window 16, stride 6; query tile 8, key tile 8): partial for 7 of 8 query tiles.
          7 straddle stride groups whose windows differ: queries [0, 8) need keys [0, 17), share [1, 16).
          Mend: stride 6 -> 8; or a query tile of 1.
        Smallest change with these tiles: GNA(shape=(64,), window=(16,), stride=(8,)), work speed-up 4.00.
        Block-sparse as it is with query tile (6,) and key tile (8,): work speed-up 4.00.
    """
    spec, whole = plan.spec, f"work speed-up {plan.work_speedup:.2f} of at most {plan.flop_speedup:.2f}"
    notes = [note for a in range(spec.rank) for note in _note(plan, a)]
    if plan.is_block_sparse:
        clipped = f" ({plan.clipped_tiles:,} cut off at a border)" if plan.clipped_tiles else ""
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
    return "\n".join([*lines, *notes, *(_whole_mend(plan, axes) if mended else []), *_other_tiles(plan)])


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
    mends += ["a query tile of 1"] if q > 1 and _is_perfect(axis, 1, kv, plan.kv_tiling) else []
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
    one = table_of(axis, np.array([[axis.window, axis.stride]]), np.array([q]), np.array([kv]), tiling)
    return bool(one.perfect.all())


def _note(plan: Plan, a: int) -> Iterator[str]:
    """Tiles that dilation groups cannot fill."""
    axis = plan.spec.axes[a]
    least = min(axis.group_lengths)
    sides = (("query", plan.q_tile[a]), ("key", plan.kv_tile[a]))
    names = " and ".join(f"{name} tile of {extent}" for name, extent in sides if extent > least)
    if axis.dilation > 1 and names:
        yield f"axis {a}: dilation {axis.dilation} leaves groups of {least} tokens, which fill no {names}."


def _whole_mend(plan: Plan, axes: list[Axis]) -> list[str]:
    window, stride = [axis.window for axis in axes], [axis.stride for axis in axes]
    spec = GNA(plan.spec.shape, window, stride, plan.spec.dilation, plan.spec.is_causal)
    speedup = Plan(spec, plan.q_tile, plan.kv_tile, plan.kv_tiling).work_speedup
    return [f"Smallest change with these tiles: {spec}, work speed-up {speedup:.2f}."]


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

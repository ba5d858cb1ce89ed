"""Masks made from others: several grids in one sequence, another shape, a rank's share, other lengths."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from gnaflex import cuts, flex
from gnaflex.forms import reason_against
from gnaflex.layout import Layout, Slab
from gnaflex.mask import Form, MaskRecord, choose_form, resolve_device
from gnaflex.order import Document, Order
from gnaflex.origin import own_record
from gnaflex.spec import GNA, Axis, GNAError
from gnaflex.tables import MaskMod
from gnaflex.tiles import groups, relation


def packed_block_mask(
    specs: Sequence[GNA],
    *,
    prefix: int | Sequence[int] = 0,
    suffix: int | Sequence[int] = 0,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    block_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    form: Form = "auto",
    full_width: bool | None = None,
    where: MaskMod | None = None,
) -> tuple[BlockMask, tuple[int, ...]]:
    """Several grids in one sequence, one behind the other, none of which sees another: multi-resolution
    training without padding. The lists are made in closed form, grid by grid.

    Args:
        specs: the grids in order; their shapes, windows and ranks may differ (tiles need one rank).
        prefix, suffix: extra tokens before and after every grid, which see and are seen by that grid alone;
            one number for all, or one per grid.
        q_tile, kv_tile, block_size, device, form, full_width, where: as in :func:`block_mask`.

    Returns:
        The mask, and where each grid with its extra tokens begins, row-major, and the end: ``len(specs) + 1``
        numbers, so that ``x[..., offsets[i]:offsets[i + 1], :]`` are the tokens of grid ``i``. With tiles
        :func:`permute` takes the whole sequence into the order of the mask.

    Raises:
        GNAError: no grid, or tiles that do not fit; the message says what to write.

    Example:
        >>> import gnaflex
        >>> grids = [gnaflex.GNA((8, 8), 3), gnaflex.GNA((4, 12), 3), gnaflex.GNA(20, 7)]
        >>> bm, offsets = gnaflex.packed_block_mask(grids, device="cpu")
        >>> bm.seq_lengths, offsets
        ((132, 132), (0, 64, 112, 132))
    """
    grids = tuple(specs) if isinstance(specs, Iterable) else ()
    if not grids or not all(isinstance(spec, GNA) for spec in grids):
        raise GNAError(
            f"packed_block_mask takes a sequence of GNA: got {specs!r}.\n"
            "  Write packed_block_mask([GNA((64, 64), 9), GNA((48, 80), 9)])."
        )
    extras = zip(_per_grid("prefix", prefix, grids), _per_grid("suffix", suffix, grids), strict=True)
    documents = (
        Document(flex.make_layout(spec, q_tile, kv_tile), ahead, behind)
        for spec, (ahead, behind) in zip(grids, extras, strict=True)
    )
    order = Order(tuple(documents))
    there = resolve_device(device)
    record = MaskRecord(
        (order,),
        choose_form((order,), form),
        flex.block_size_of(order.documents[0].layout, block_size),
        full_width,
        cuts=cuts.checked(order, None, None, where, there),
    )
    return flex.compile_mask(record, there), order.row_major_starts(keys=False)


def _per_grid(name: str, given: Any, grids: Sequence[GNA]) -> list[int]:
    values = list(given) if getattr(given, "ndim", 0) == 1 or isinstance(given, (list, tuple)) else None
    if values is None:
        values = [given] * len(grids)
    if len(values) != len(grids):
        raise GNAError(
            f"{name} must be one number, or one per grid: got {len(values)} for {len(grids)} grids.\n"
            f"  Write {name}={[0] * len(grids)}, say."
        )
    return [flex.count_of(name, value) for value in values]


# ---- another shape, other lengths --------------------------------------------------------------------


def resize(bm: BlockMask, shape: int | Sequence[int]) -> BlockMask:
    """The same problem on a grid of another shape: tiles, extra tokens, heads and conditions stay.

    An axis that the window covered whole stays covered; every other window, stride and dilation keeps its
    numbers.

    Args:
        bm: a mask of :func:`block_mask`.
        shape: tokens per axis, as many axes as before.

    Raises:
        GNAError: the windows do not fit the shape, or the mask is packed or a shard.

    Example:
        >>> import gnaflex
        >>> bm = gnaflex.block_mask((8, 32, 32), (-1, 9, 9), prefix=16, device="cpu")
        >>> gnaflex.spec_of(gnaflex.resize(bm, (12, 40, 24)))
        GNA(shape=(12, 40, 24), window=(12, 9, 9))
    """
    record = own_record(bm)
    document = record.order.documents[0]
    if len(record.order.documents) > 1 or document.layout.slab is not None:
        raise GNAError(
            "only a mask of one whole grid can be resized: this one is packed, or a shard.\n"
            "  Write packed_block_mask(specs) or shard(spec, axis, rank, world) for the new shapes."
        )
    orders = []
    for order in record.orders:
        layout = Layout(_resized(order.spec, shape), *document.layout.tiles_given)
        orders.append(Order((replace(order.documents[0], layout=layout),)))
    form = "auto" if reason_against(record.form, orders) else record.form
    made = replace(record, orders=tuple(orders), form=choose_form(orders, form))
    return flex.compile_mask(made, bm.kv_num_blocks.device)


def _resized(spec: GNA, shape: Any) -> GNA:
    given = shape if hasattr(shape, "__len__") else (shape,) * spec.rank
    new = GNA(given, 1).shape
    if len(new) != spec.rank:
        raise GNAError(
            f"a resized grid keeps its axes: got {len(new)} for rank {spec.rank}.\n"
            f"  shape={new}, the mask is {spec!r}. Write resize(bm, {spec.shape}), say."
        )
    windows, strides = [], []
    for axis, length in zip(spec.axes, new, strict=True):
        covered = axis.window == axis.length // axis.dilation
        windows.append(max(length // axis.dilation, 1) if covered else axis.window)
        follows = axis.stride == axis.window or axis.stride > windows[-1]
        strides.append(windows[-1] if covered and follows else axis.stride)
    return GNA(new, windows, strides, spec.dilation, spec.is_causal)


def with_lengths(bm: BlockMask, *, text_valid: Any = None, padding: Any = None) -> BlockMask:
    """The same mask for other text lengths or padding: its block lists, and no new graph.

    Args:
        bm: a mask of :func:`block_mask` made with ``text_valid`` or ``padding``.
        text_valid, padding: integers as in :func:`block_mask`; None keeps what the mask has.

    Raises:
        GNAError: the mask was made without the condition, so that its lists do not know what it may cut.

    Example:
        >>> import gnaflex
        >>> bm = gnaflex.block_mask((4, 8), 3, suffix=6, text_valid=[6], device="cpu")
        >>> shorter = gnaflex.with_lengths(bm, text_valid=[2])
        >>> shorter.kv_indices is bm.kv_indices
        True
    """
    record = own_record(bm)
    had = record.cuts or cuts.Cuts()
    for name, new, old in (("text_valid", text_valid, had.text_valid), ("padding", padding, had.padding)):
        if new is not None and old is None:
            raise GNAError(
                f"this mask was made without {name}, so that its full blocks may not be cut.\n"
                f"  Write block_mask(..., {name}=...) once; with_lengths(bm, {name}=...) then takes others."
            )
    device = bm.kv_num_blocks.device
    new = cuts.checked(record.order, text_valid, padding, None, device) or cuts.Cuts()
    kept = cuts.Cuts(
        had.text_valid if new.text_valid is None else new.text_valid,
        had.padding if new.padding is None else new.padding,
        had.where,
    )
    return flex.recompiled(bm, record.with_cuts(cuts.check_batches(kept)))


# ---- context parallelism -----------------------------------------------------------------------------


class Shard(NamedTuple):
    """A rank's share of a problem: on ``axis`` it holds the queries ``query`` and needs the keys ``key`` (its
    own and the halo); ``block_mask`` is the mask between the two, both row-major."""

    axis: int
    query: slice
    key: slice
    block_mask: BlockMask


def shard(
    spec: GNA,
    axis: int,
    rank: int,
    world: int,
    *,
    block_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    form: Form = "auto",
    full_width: bool | None = None,
) -> Shard:
    """The share of one rank when queries are cut into slabs along an axis: context parallelism whose ranks
    exchange the halo of keys that they need, not all keys. Exact for every stride, dilation and causal flag.

    Slabs follow one another and differ by one token at most (with dilation ``d``: by ``d``, as they begin at
    multiples of it).

    Args:
        spec: the whole problem.
        axis: the axis that is cut; negative ones count from the last.
        rank, world: ``0 <= rank < world``.
        block_size, device, form, full_width: as in :func:`block_mask`.

    Returns:
        A :class:`Shard`. With ``q, k, v`` the whole grids ``[batch, *shape, heads, head_dim]`` the share is
        ``q[:, query]`` and ``k[:, key]`` (for axis 0) flattened row-major, under ``block_mask``.

    Raises:
        GNAError: no such axis or rank, or more ranks than slabs.

    Example:
        >>> import gnaflex
        >>> mine = gnaflex.shard(gnaflex.GNA((32, 8), 5), axis=0, rank=1, world=4, device="cpu")
        >>> mine.query, mine.key, mine.block_mask.seq_lengths
        (slice(8, 16, None), slice(6, 18, None), (64, 96))
    """
    if not isinstance(spec, GNA):
        raise GNAError(
            f"shard takes a GNA: got {type(spec).__name__}. Write shard(GNA(shape, window), 0, 0, 2)."
        )
    try:
        at, number, count = (operator.index(given) for given in (axis, rank, world))
    except TypeError:
        raise GNAError(
            f"axis, rank and world must be integers: got {axis!r}, {rank!r}, {world!r}.\n"
            "  Write shard(spec, axis=0, rank=0, world=2)."
        ) from None
    if not -spec.rank <= at < spec.rank:
        raise GNAError(f"axis must be one of the grid's {spec.rank}: got axis={at}. Write axis=0, say.")
    at %= spec.rank
    units = -(-spec.shape[at] // spec.dilation[at])
    if not 0 <= number < count <= units:
        raise GNAError(
            f"shard needs 0 <= rank < world <= {units}: got rank={number}, world={count}.\n"
            f"  Axis {at} has length={spec.shape[at]}, dilation={spec.dilation[at]}. Use at most {units} "
            "ranks, or another axis."
        )
    slab = _slab(spec.axes[at], at, number, count, units)
    order = Order((Document(Layout(spec, slab=slab)),))
    record = MaskRecord(
        (order,),
        choose_form((order,), form),
        flex.block_size_of(order.documents[0].layout, block_size),
        full_width,
    )
    bm = flex.compile_mask(record, resolve_device(device))
    return Shard(at, slice(slab.q_start, slab.q_stop), slice(slab.kv_start, slab.kv_stop), bm)


def _slab(axis: Axis, at: int, rank: int, world: int, units: int) -> Slab:
    """The queries of a rank, and the least run of keys, from a multiple of the dilation on, that they see."""
    d = axis.dilation
    first, last = (units // world * r + min(r, units % world) for r in (rank, rank + 1))
    start, stop = first * d, min(last * d, axis.length)
    kv_start, kv_stop = axis.length, 0
    for group in groups(axis):
        pairs = relation(group.n, axis)
        queries = min(last, group.n) - first  # in a group of this length
        if queries > 0:
            lo, hi = int(pairs.lo[first]), int(pairs.hi[first + queries - 1])
            kv_start = min(kv_start, lo * d)
            kv_stop = max(kv_stop, (hi - 1) * d + int(group.members[-1]) + 1)
    return Slab(at, start, stop, kv_start, kv_stop)

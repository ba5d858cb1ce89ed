"""A problem and a token order to a FlexAttention ``BlockMask``."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from gnaflex import cuts
from gnaflex.blocks import Cut, Lists, Pending, written
from gnaflex.layout import Layout
from gnaflex.mask import PADDED_TO, Form, MaskRecord, build, choose_form, resolve_device
from gnaflex.order import Document, Order
from gnaflex.reorder import real_tensors
from gnaflex.row_blocks import row_major
from gnaflex.spec import GNA, GNAError
from gnaflex.tables import MaskMod
from gnaflex.tile_blocks import tile_major

DEFAULT_BLOCK = 128
# The CPU kernel needs lists as wide as there are blocks. Elsewhere narrow lists do, but wide ones keep one
# shape, hence one compiled graph, for all windows: take them while they are small.
FULL_WIDTH_BYTES = {"cpu": 2**30}
FULL_WIDTH_BYTES_ELSEWHERE = 64 * 2**20


def block_mask(
    shape: int | Sequence[int] | GNA | Sequence[GNA],
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    block_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    form: Form = "auto",
    full_width: bool | None = None,
    prefix: int = 0,
    suffix: int = 0,
    extra_kv: int = 0,
    text_valid: Any = None,
    padding: Any = None,
    where: MaskMod | None = None,
) -> BlockMask:
    """Compile a problem into a FlexAttention ``BlockMask``, exactly, without the N x N mask.

    Without tiles the tokens are row-major (last axis fastest), as users pass them to ``flex_attention``.
    With tiles the order is tile-major: dilation group by group, padded to whole query tiles; bring tensors
    into it with :func:`gnaflex.permute` and back with :func:`gnaflex.unpermute`.

    Args:
        shape: tokens per axis, or a :class:`GNA` (then the problem is complete), or a sequence of them, one
            per query head: grids of one shape, a window for every head. Each head has block lists of its own,
            ``heads`` times the memory, unless all windows are equal; equal ones are worked out once.
        window, stride, dilation, is_causal: the problem, as in :class:`GNA`.
        q_tile, kv_tile: tokens per axis of a query and a key tile; one alone serves for both. ``q_tile`` is
            a whole multiple of ``kv_tile`` on every axis, so that one order serves q, k, v and the output.
        block_size: tokens per block, one number or (query, key); 128 by default. With tiles it follows from
            them, and may be given only if it agrees.
        device: where the mask lives; None is the current accelerator or the CPU, as in ``create_block_mask``.
        form: the form of the mask_mod, see :func:`mask_mod`.
        full_width: block lists as wide as the mask has blocks (True), as narrow as the longest row (False),
            or as the device wants them (None: wide on a CPU, whose kernel needs it, up to 1 GiB in all;
            wide elsewhere while below 64 MiB, which keeps one compiled graph for all windows).
        prefix, suffix: extra (text, register) tokens before and after the grid, which see everything and
            which everything sees. Row-major they keep their places; tile-major they lie behind the padded
            grid, each run padded to whole blocks: :func:`permute` takes ``[prefix | grid | suffix]`` there.
        extra_kv: keys and values without queries, last of all, seen by every query (NATTEN's
            ``additional_keys``).
        text_valid: integers [batch] (or [1]), how many tokens at the start of the prefix, suffix or extra_kv
            are real keys; [batch, runs] if there are several such runs. It is captured: changed in place, or
            given anew, it needs no new graph and no new lists (:func:`with_lengths`).
            Lengths past the end of a run count as its end. A deepcopy of the mask has a copy of it.
        padding: integers [batch, rank] (or [1, rank]), the valid extent of every axis: grid tokens past it
            neither see nor are seen; their rows are zero, with a log-sum-exp of -inf. Windows stay those of
            the whole grid.
        where: a mask_mod of your own, ANDed in; it sees row-major tokens, extra ones included, in every
            order. All full blocks become partial.

    Returns:
        A ``BlockMask`` with forward and transposed lists, full blocks apart from partial ones, its
        ``seq_lengths`` padded when tile-major, and the complete mask as ``mask_mod``; see :func:`spec_of`.

    Raises:
        GNAError: the problem, the tiles or the form is refused; the message says why and what to write.

    Example:
        >>> import gnaflex
        >>> bm = gnaflex.block_mask((8, 16, 16), window=(4, 8, 8), stride=(4, 8, 8), device="cpu")
        >>> bm.shape
        (1, 1, 2048, 2048)
        >>> gnaflex.block_mask((8, 16, 16), (4, 8, 8), (4, 8, 8), q_tile=(2, 8, 8), device="cpu").sparsity()
        87.5
    """
    specs = as_specs(shape, window, stride, dilation, is_causal)
    given = {"prefix": prefix, "suffix": suffix, "extra_kv": extra_kv}
    extras = {name: count_of(name, value) for name, value in given.items()}
    distinct = list(dict.fromkeys(specs))
    if (q_tile or kv_tile) and len({spec.dilation for spec in distinct}) > 1:
        raise GNAError(
            "tile-major order gathers dilation groups, so that all heads must share the dilation: got "
            f"{sorted({spec.dilation for spec in distinct})}.\n"
            "  Leave out q_tile and kv_tile: row-major order takes any."
        )
    orders = tuple(Order((Document(make_layout(spec, q_tile, kv_tile), **extras),)) for spec in distinct)
    heads = tuple(map(distinct.index, specs)) if len(distinct) > 1 else ()
    where_it_lives = resolve_device(device)
    record = MaskRecord(
        orders,
        choose_form(orders, form),
        block_size_of(orders[0].documents[0].layout, block_size),
        full_width,
        heads,
        cuts.checked(orders[0], text_valid, padding, where, where_it_lives),
    )
    return compile_mask(record, where_it_lives)


def as_specs(shape: Any, window: Any, stride: Any, dilation: Any, is_causal: Any) -> tuple[GNA, ...]:
    """The problems of the heads, or the one for all, from any way to give them, checked to share a shape."""
    if not isinstance(shape, (list, tuple)) or not any(isinstance(one, GNA) for one in shape):
        return (as_spec(shape, window, stride, dilation, is_causal),)
    if not all(isinstance(one, GNA) for one in shape):
        raise GNAError(
            f"windows per head are a GNA for every query head: got {shape!r}.\n"
            "  Write block_mask([GNA(shape, 3), GNA(shape, 5)]), one per head."
        )
    specs = tuple(as_spec(one, window, stride, dilation, is_causal) for one in shape)
    for head, spec in enumerate(specs):
        if spec.shape != specs[0].shape:
            raise GNAError(
                f"windows per head must share the shape: head {head} has shape={spec.shape}, head 0 has "
                f"{specs[0].shape}.\n"
                "  For grids of several shapes in one sequence write gnaflex.packed_block_mask(specs)."
            )
    return specs


def count_of(name: str, value: Any) -> int:
    """A number of extra tokens, checked."""
    try:
        count = operator.index(value)
    except TypeError:
        raise GNAError(f"{name} must be an integer: got {value!r}. Write {name}=256, say.") from None
    if isinstance(value, bool) or count < 0:
        raise GNAError(f"{name} must be a number of tokens >= 0: got {value!r}. Write {name}=256, say.")
    return count


def as_spec(
    shape: int | Sequence[int] | GNA, window: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False
) -> GNA:
    """The problem from either way to give it."""
    if not isinstance(shape, GNA):
        if window is None:
            raise GNAError("window is missing. Write block_mask(shape, window), or block_mask(GNA(...)).")
        return GNA(shape, window, stride, dilation, is_causal)
    if (window, stride, dilation, is_causal) != (None, 1, 1, False):
        raise GNAError(
            f"a GNA is the whole problem: got {shape!r} and window, stride, dilation or is_causal too.\n"
            "  Write block_mask(spec), or block_mask(spec.shape, window, ...)."
        )
    return shape


def make_layout(spec: GNA, q_tile: Sequence[int] | None, kv_tile: Sequence[int] | None) -> Layout:
    """The token order that the tiles ask for, checked."""
    q_tile, kv_tile = q_tile or kv_tile, kv_tile or q_tile
    if q_tile is None or kv_tile is None:
        return Layout(spec)
    tiles = []
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        try:
            extents = tuple(operator.index(extent) for extent in tile)
        except TypeError:
            example = (1,) * (spec.rank - 1) + (DEFAULT_BLOCK,)
            raise GNAError(
                f"{name} must hold integers: got {name}={tile!r}. Write {name}={example}."
            ) from None
        if len(extents) != spec.rank or min(extents) < 1:
            raise GNAError(
                f"{name} must have one positive extent per axis: got {name}={extents} for {spec.rank} axes.\n"
                f"  shape={spec.shape}. Write {name}={(1,) * (spec.rank - 1) + (DEFAULT_BLOCK,)}, say."
            )
        tiles.append(extents)
    for axis, (q, kv) in enumerate(zip(*tiles, strict=True)):
        if q % kv:
            fixed = tuple(-(-a // b) * b for a, b in zip(*tiles, strict=True))
            raise GNAError(
                f"q_tile must be a whole multiple of kv_tile: axis {axis} has q_tile={q}, kv_tile={kv}.\n"
                f"  q_tile={tiles[0]}, kv_tile={tiles[1]}. Write q_tile={fixed}, kv_tile={tiles[1]}."
            )
    return Layout(spec, tiles[0], tiles[1])


def block_size_of(layout: Layout, block_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Tokens per query and key block: those of the tiles, or as given, or 128."""
    given = _pair(block_size)
    if layout.q_tile is None:
        return given or (DEFAULT_BLOCK, DEFAULT_BLOCK)
    q, kv = (math.prod(tile) for tile in layout.tiles)
    if given is not None and given != (q, kv):
        raise GNAError(
            f"block_size must agree with the tiles: got {block_size!r}, but q_tile={layout.q_tile} and "
            f"kv_tile={layout.kv_tile} hold {q} and {kv} tokens.\n  Leave block_size out."
        )
    return q, kv


def _pair(block_size: Any) -> tuple[int, int] | None:
    if block_size is None:
        return None
    entries = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    try:
        q, kv = map(operator.index, entries)
        if min(q, kv) > 0:
            return q, kv
    except (TypeError, ValueError):
        pass
    raise GNAError(f"block_size must be a positive int, or two: got {block_size!r}. Write block_size=128.")


def compile_mask(record: MaskRecord, device: torch.device) -> BlockMask:
    """The BlockMask of a record, on a device."""
    size = record.block_size
    assert size is not None
    lists = _block_lists(record, device)
    mod = build(record, device, table_multiple(size))
    names = ("kv", "full_kv", "q", "full_q")
    tensors: dict[str, Any] = {}
    with real_tensors():
        for name, one in zip(names, lists, strict=True):
            tensors[f"{name}_num_blocks"] = torch.from_numpy(one.counts)[None].to(device)
            tensors[f"{name}_indices"] = torch.from_numpy(one.indices)[None].to(device)
    return _assemble(record, tensors, mod)


def table_multiple(size: tuple[int, int]) -> int:
    """Tables reach the end of the last block, of these sizes or of any in common use."""
    return math.lcm(*size, PADDED_TO) if max(size) <= 1024 else math.lcm(*size)


def _block_lists(record: MaskRecord, device: torch.device) -> list[Lists]:
    """Partial and full lists, forward and transposed: counts [heads, rows], indices [heads, rows, width]."""
    pending = [pending_lists(record, order) for order in record.orders]
    heads, full_width = max(len(record.heads), 1), record.full_width
    if full_width is None:
        most = FULL_WIDTH_BYTES.get(device.type, FULL_WIDTH_BYTES_ELSEWHERE)
        full_width = heads * sum(4 * len(one.counts) * one.columns for one in pending[0]) <= most
    kinds = zip(*pending, strict=True)
    widths = [max(one.columns if full_width else one.width for one in kind) for kind in kinds]
    lists = [written(each, widths) for each in pending]
    if not record.heads:
        return [Lists(one.counts[None], one.indices[None]) for one in lists[0]]
    of_heads = [[lists[which][kind] for which in record.heads] for kind in range(len(widths))]
    return [
        Lists(np.stack([one.counts for one in kind]), np.stack([one.indices for one in kind]))
        for kind in of_heads
    ]


def pending_lists(
    record: MaskRecord, order: Order, directions: Sequence[bool] = (False, True)
) -> list[Pending]:
    """Partial and full lists of a class of heads, counted but not written: forward, then transposed."""
    assert record.block_size is not None
    cut = Cut.NOTHING if record.cuts is None else record.cuts.cut
    out: list[Pending] = []
    for inverse in directions:
        if order.is_tiled:
            out += tile_major(order, inverse, cut)
        else:
            out += row_major(order, *record.block_size, inverse, cut)
    return out


def _assemble(record: MaskRecord, tensors: dict[str, Any], mod: MaskMod) -> BlockMask:
    lengths = record.order.num_queries, record.order.num_keys
    assert record.block_size is not None
    bm = BlockMask(seq_lengths=lengths, BLOCK_SIZE=record.block_size, mask_mod=mod, **tensors)
    # torch's own .to() would leave the tables that mask_mod captures behind. A subclass would not survive
    # torch (pytree registration, copies), an attribute of the instance does no harm where it is lost.
    bm.to = functools.partial(_moved, record, tensors, mod)  # type: ignore[method-assign]
    return bm


def recompiled(bm: BlockMask, record: MaskRecord) -> BlockMask:
    """The lists of a mask, and its windows, under the conditions of another record."""
    assert record.block_size is not None
    kinds = ("kv", "full_kv", "q", "full_q")
    names = [f"{kind}_{what}" for kind in kinds for what in ("num_blocks", "indices")]
    mod = build(record, bm.kv_num_blocks.device, table_multiple(record.block_size), bm.mask_mod)
    return _assemble(record, {name: getattr(bm, name) for name in names}, mod)


def _moved(
    record: MaskRecord, tensors: dict[str, Any], mod: MaskMod, device: torch.device | str
) -> BlockMask:
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    if all(moved[name] is tensors[name] for name in tensors):
        return _assemble(record, tensors, mod)
    size, target = record.block_size, moved["kv_indices"].device
    assert size is not None
    there = record.with_cuts(record.cuts and record.cuts.to(target))
    return _assemble(there, moved, build(there, target, table_multiple(size)))


def listed_blocks(record: MaskRecord) -> int:
    """How many blocks the forward lists of a mask hold, all heads together, without writing them."""
    counts = [
        sum(int(one.counts.sum()) for one in pending_lists(record, order, (False,)))
        for order in record.orders
    ]
    return sum(counts[which] for which in record.heads or (0,))

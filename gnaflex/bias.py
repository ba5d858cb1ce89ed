"""score_mods that know the grid: learned relative biases, functions of coordinates, and mods of row-major
tokens brought into the order of a mask. Whatever differs from one window or table to another is a captured
tensor, so that one compiled graph serves them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex.cuts import ANY_NUMBER, parameters
from gnaflex.flex import count_of, table_multiple
from gnaflex.layout import Layout
from gnaflex.mask import PADDED_TO, ScoreMod, resolve_device
from gnaflex.order import Document, Order, order_of
from gnaflex.origin import own_record
from gnaflex.reorder import real_tensors
from gnaflex.spec import GNA, GNAError
from gnaflex.tables import Pick, Tables
from gnaflex.window import IntArray

CoordinateFn = Callable[
    [Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor
]  # (score, b, h, q_coords, kv_coords) -> score
Mod = TypeVar("Mod", bound=Callable[..., Tensor])
_INT32_MAX = 2**31 - 1


def relative_bias(
    spec: GNA | BlockMask,
    table: Tensor,
    *,
    prefix: int = 0,
    suffix: int = 0,
    extra_kv: int = 0,
    device: torch.device | str | None = None,
) -> ScoreMod:
    """A learned bias per head and relative position (T5, Swin, NAT), as a FlexAttention ``score_mod``.

    The score of query i and key j of one grid gains ``table[h, j - i + middle]``, both counted per axis in
    steps of the dilation (``x // dilation``). Pairs with an extra token keep their score. So do nearly all
    pairs that the mask leaves out, but not every one: use the mod with the mask of its problem.

    Args:
        spec: a problem, for tokens in row-major order with the extra tokens that the keywords name; or a mask
            of :func:`block_mask`, for its own order and extra tokens.
        table: floating point [heads, \\*extents], contiguous, offset 0 in the middle. Extents are odd and at
            least ``2 * window - 1``; larger ones let several windows share one compiled graph. One head
            serves all; otherwise heads are those of the queries. The mod reads the tensor itself, so that
            steps of an optimizer are seen, and gradients flow into it.
        prefix, suffix, extra_kv: extra tokens, as in :func:`block_mask`; only with a :class:`GNA`.
        device: where the mod works; it must be the table's, which is the default.

    Returns:
        ``score_mod(score, b, h, q_idx, kv_idx)``, which keeps the dtype of the score. Build it again when
        the table is replaced by another tensor.

    Raises:
        GNAError: the table does not fit the problem, or the mask is not gnaflex's; the message says why.

    Example:
        >>> import torch, gnaflex
        >>> mod = gnaflex.relative_bias(gnaflex.GNA(4, window=2), torch.tensor([[-1.0, 0.0, 1.0]]))
        >>> q, k = torch.arange(4)[:, None], torch.arange(4)
        >>> mod(torch.zeros(4, 4), q * 0, q * 0, q, k)[0].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    _check_values(table)
    if isinstance(spec, GNA) and device is None:
        device = table.device
    return bias_of(_tables_of(spec, device, prefix=prefix, suffix=suffix, extra_kv=extra_kv), table)


def coordinate_score_mod(
    spec: GNA | BlockMask,
    fn: CoordinateFn,
    *,
    prefix: int = 0,
    suffix: int = 0,
    extra_kv: int = 0,
    device: torch.device | str | None = None,
) -> ScoreMod:
    """A function of grid coordinates as a FlexAttention ``score_mod``, in whatever order the tokens are.

    Args:
        spec: a problem, for tokens in row-major order with the extra tokens that the keywords name; or a mask
            of :func:`block_mask`, for its own order and extra tokens.
        fn: ``fn(score, b, h, q_coords, kv_coords) -> score``; the coordinates are tuples of int32 tensors,
            one per axis, counted in tokens of the grid (of the document, if there are several). They always
            lie in the grid; a pad has those of a token that it copies. Pairs with an extra token keep their
            score, whatever ``fn`` says.
        prefix, suffix, extra_kv: extra tokens, as in :func:`block_mask`; only with a :class:`GNA`.
        device: where the captured tables live; None is the mask's device, else the current accelerator or
            the CPU.

    Returns:
        ``score_mod(score, b, h, q_idx, kv_idx)``.

    Raises:
        GNAError: the mask is not gnaflex's, or an argument is refused; the message says why.

    Example:
        >>> import torch, gnaflex
        >>> def nearer_is_better(score, b, h, q, k):
        ...     return score - (q[0] - k[0]).abs() - (q[1] - k[1]).abs()
        >>> mod = gnaflex.coordinate_score_mod(gnaflex.GNA((2, 3), window=2), nearer_is_better, device="cpu")
        >>> q, k = torch.arange(6)[:, None], torch.arange(6)
        >>> mod(torch.zeros(6, 6), q, q, q, k)[0].tolist()
        [0.0, -1.0, -2.0, -1.0, -2.0, -3.0]
    """
    return coordinates_of(_tables_of(spec, device, prefix=prefix, suffix=suffix, extra_kv=extra_kv), fn)


def in_order(bm: BlockMask, mod: Mod) -> Mod:
    """A ``score_mod`` or ``mask_mod`` of row-major tokens, for the token order of a mask.

    Args:
        bm: a mask of :func:`block_mask`.
        mod: a mod whose indices are row-major, extra tokens included: per document ``[prefix | grid | suffix
            | extra_kv]``. Five parameters without a default make it a score_mod, four a mask_mod.

    Returns:
        The mod for the places of the mask; unchanged if the mask is row-major. A pad asks as a token that it
        copies, and a rewritten mask_mod shows no pad to any query.

    Raises:
        GNAError: the mask is not gnaflex's, or the mod has other parameters or is in that order already.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((4, 4), window=2, q_tile=(2, 2), device="cpu")
        >>> mod = gnaflex.in_order(bm, lambda score, b, h, q, k: score + k)
        >>> zero, k = torch.zeros((), dtype=torch.long), torch.arange(8)
        >>> mod(torch.zeros(8), zero, zero, zero, k).tolist()
        [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]
    """
    own_record(bm)
    tables = _tables_of(bm, None)
    return to_places(tables.order, mod, tables.device, tables.multiple)


def to_places(order: Order, mod: Mod, device: torch.device, padded_to: int = PADDED_TO) -> Mod:
    """:func:`in_order` for an order that has no mask yet."""
    is_score_mod = _is_score_mod(mod)
    if not order.is_tiled:
        return mod
    if any(done.is_tiled for done in getattr(mod, "gnaflex_order", ())):
        raise GNAError(f"{_name(mod)} is in the order of a mask already.\n  Write score_mod={_name(mod)}.")
    tables = Tables((order,), (), device, padded_to)
    key_tokens, is_pad = order.tokens(True)
    with real_tensors():
        query = tables.tensor(order.tokens(False)[0].astype(np.int32))
        # the pads of a mask_mod are complemented, to tell them apart
        key = tables.tensor(np.where(is_pad & (not is_score_mod), ~key_tokens, key_tokens).astype(np.int32))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mod(score, b, h, query[q_idx], key[kv_idx])

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        token = key[kv_idx]
        return (token >= 0) & mod(b, h, query[q_idx], torch.maximum(token, ~token))

    placed: Any = score_mod if is_score_mod else mask_mod
    placed.gnaflex_order = (order,)
    return placed  # type: ignore[no-any-return]


def _is_score_mod(mod: Callable[..., Any]) -> bool:
    """Whether it has five parameters, as torch counts them; four make a mask_mod."""
    needed = parameters(mod)
    if needed not in (4, 5):
        raise GNAError(
            f"a mod takes (score, b, h, q_idx, kv_idx) or (b, h, q_idx, kv_idx): {_name(mod)} takes"
            f" {'no call' if needed is None else needed}.\n  Write lambda score, b, h, q_idx, kv_idx: score."
        )
    return needed == 5


def _name(mod: Callable[..., Any]) -> str:
    return getattr(mod, "__name__", repr(mod))


def _tables_of(source: GNA | BlockMask, device: torch.device | str | None, **extras: int) -> Tables:
    """The tokens of a problem in row-major order, or those of a mask, and where their tables go."""
    if isinstance(source, GNA):
        checked = {name: count_of(name, count) for name, count in extras.items()}
        return Tables((order_of(source, **checked),), (), resolve_device(device), PADDED_TO)
    if not isinstance(source, BlockMask):
        raise GNAError(
            f"a problem or a mask is needed: got {type(source).__name__}.\n"
            "  Give gnaflex.GNA(shape, window), or bm = gnaflex.block_mask(shape, window)."
        )
    if given := {name: count for name, count in extras.items() if count}:
        raise GNAError(
            f"a mask knows its extra tokens: got {', '.join(f'{k}={v}' for k, v in given.items())} too.\n"
            f"  Leave out {' and '.join(given)}, or give the GNA in place of the mask."
        )
    record = own_record(source)
    assert record.block_size is not None
    where = resolve_device(source.kv_indices.device if device is None else device)
    return Tables(record.orders, record.heads, where, table_multiple(record.block_size))


def _specs(tables: Tables) -> list[GNA]:
    """The problem of every grid."""
    return [document.spec for order in tables.orders for document in order.documents]


def _coordinates(layout: Layout, keys: bool) -> list[IntArray]:
    """The grid coordinate of every place of every axis; those of a slab count in the whole grid."""
    tokens = [one.token for one in (layout.key_places if keys else layout.places)]
    if (slab := layout.slab) is not None:
        tokens[slab.axis] = tokens[slab.axis] + (slab.kv_start if keys else slab.q_start)
    return tokens


# ---- relative bias -----------------------------------------------------------------------------------
#
# A query lies in its own window, so that |j - i| <= window - 1 for every key j that it sees. On one axis, in
# coordinates of its dilation group: base <= i < base + s and s <= w.
#   non-causal  lo <= i, for unclamped lo <= base + s//2 - w//2 <= base. And i < lo + w: if lo is not clamped
#               to n - w, lo + w >= leader + ceil(w/2), where leader is n - 1 or base + s//2, and
#               base + s//2 + ceil(w/2) >= base + s//2 + ceil(s/2) = base + s.
#   causal      lo = max(leader - w + 1, 0) <= base <= i, for leader <= base + s - 1; and keys end with i.
# So the offsets of a window fit extents of 2 * window - 1, and one index of mixed radix holds all axes: that
# of the key less that of the query, with no carry between axes. Other pairs may alias one another: they are
# masked, and only have to stay inside the table.


def bias_of(tables: Tables, table: Tensor) -> ScoreMod:
    """:func:`relative_bias` for any tokens."""
    _check_table(tables, table)
    query, key, pick = _codes(tables, tuple(table.shape[1:]))
    one_head = table.shape[0] == 1
    last = math.prod(table.shape[1:]) - 1
    # A view, made with gradients on even where the caller has them off: it is read in training as well.
    with torch.inference_mode(False), torch.enable_grad():
        bias = table.view(-1) if one_head else table.view(table.shape[0], -1)

    def relative_bias_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        index = pick(key, h, kv_idx) - pick(query, h, q_idx)
        inside = index.clamp(0, last)
        gain = bias[inside] if one_head else bias[h, inside]
        return torch.where(index == inside, score + gain.to(score.dtype), score)

    relative_bias_mod.gnaflex_order = tables.orders  # type: ignore[attr-defined]
    relative_bias_mod.gnaflex_table = table.shape  # type: ignore[attr-defined]
    return relative_bias_mod


@lru_cache(maxsize=16)
def _codes(tables: Tables, extents: tuple[int, ...]) -> tuple[Tensor, Tensor, Pick]:
    """The codes of queries and keys, whose difference is the index into the table, and how to pick them: grid
    coordinates in mixed radix, those of a query less the middle. An extra token makes the index negative."""
    pitch = [math.prod(extents[a + 1 :]) for a in range(len(extents))]
    middle = math.prod(extents) // 2
    top = max(_top_code(spec, pitch) for spec in _specs(tables))
    if top + middle + 2 > _INT32_MAX:
        least = [2 * max(windows) - 1 for windows in zip(*(s.window for s in _specs(tables)), strict=True)]
        raise GNAError(
            f"indices into the table must fit 32 bits: they reach {top + middle + 2} > {_INT32_MAX}.\n"
            f"  extents={extents}. Write torch.zeros(heads, {_listed(least)}): the windows need no more."
        )
    if len({tuple(document.spec.dilation for document in order.documents) for order in tables.orders}) == 1:
        tables = replace(tables, orders=tables.orders[:1], heads=())  # all else of a window is no matter here

    def codes(order: Order, keys: bool) -> IntArray:
        def grid(_: int, document: Document) -> IntArray:
            axes = zip(_coordinates(document.layout, keys), document.spec.dilation, pitch, strict=True)
            parts: list[Any] = [(x // d * step).astype(np.int32) for x, d, step in axes]
            return document.layout.sum_over_axes([parts[0] - (0 if keys else middle), *parts[1:]])

        return order.spread(keys, grid, lambda *_: -middle - 1 if keys else top + 1)

    with real_tensors():
        return tables(partial(codes, keys=False)), tables(partial(codes, keys=True)), tables.pick()


def _top_code(spec: GNA, pitch: Sequence[int]) -> int:
    return sum((axis.group_length(0) - 1) * step for axis, step in zip(spec.axes, pitch, strict=True))


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _check_values(table: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise GNAError(f"table must be a floating point tensor: got {got}.\n  Write table.float().")
    if not table.is_contiguous():
        raise GNAError(
            f"table must be contiguous: got strides {table.stride()} for shape {tuple(table.shape)}.\n"
            "  A copy would miss later updates of yours: write relative_bias(spec, table.contiguous()) before"
            " every call, or keep the parameter itself contiguous."
        )


def _check_table(tables: Tables, table: Tensor) -> None:
    _check_values(table)
    for spec in _specs(tables):
        _check_extents(spec, tuple(table.shape))
    heads, extents = table.shape[0], tuple(table.shape[1:])
    if heads != 1 and tables.heads and heads != len(tables.heads):
        raise GNAError(
            f"table must have one head, or those of the mask: got {heads} for {len(tables.heads)} heads.\n"
            f"  Write torch.zeros({_listed((len(tables.heads), *extents))})."
        )
    wanted, found = tables.device, table.device
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise GNAError(
            f"table must lie where the mask and the queries do: it is on {found}, they are on {wanted}.\n"
            f'  Write relative_bias(spec, table.to("{wanted}")).'
        )


def _check_extents(spec: GNA, shape: tuple[int, ...]) -> None:
    least = [2 * window - 1 for window in spec.window]
    remedy = f"\n  window={spec.window}. Write torch.zeros(heads, {_listed(least)})."
    if len(shape) != spec.rank + 1 or not shape[0]:
        raise GNAError(
            f"table must be [heads, *extents], an extent per axis: got {shape} for {spec.rank} axes.{remedy}"
        )
    for axis, (extent, needed) in enumerate(zip(shape[1:], least, strict=True)):
        if extent < needed or extent % 2 == 0:
            broken = f"{extent} < {needed}" if extent < needed else f"{extent}, which is even"
            raise GNAError(
                f"table must have odd extents of at least 2 * window - 1: axis {axis} has {broken}.{remedy}"
            )


# ---- functions of coordinates ------------------------------------------------------------------------


def coordinates_of(tables: Tables, fn: CoordinateFn) -> ScoreMod:
    """:func:`coordinate_score_mod` for any tokens; all classes of heads share the geometry."""
    if parameters(fn) not in (5, ANY_NUMBER):
        raise GNAError(
            f"fn takes (score, b, h, q_coords, kv_coords): got {fn!r}.\n"
            "  Write lambda score, b, h, q, k: score - (q[0] - k[0]).abs()."
        )
    ranks = sorted({spec.rank for spec in _specs(tables)})
    if len(ranks) > 1:
        raise GNAError(
            f"coordinates need grids of one rank: got ranks {ranks}.\n"
            "  Give the lower ones axes of length 1: GNA((1, 8, 8), (1, 3, 3))."
        )
    with real_tensors():
        query, key = (
            [
                # extra tokens have -1 on axis 0, to tell them apart
                tables.tensor(tables.order.coordinates(keys, a, 0 if a else -1).astype(np.int32))
                for a in range(ranks[0])
            ]
            for keys in (False, True)
        )
    has_text = tables.order.has_text

    def coordinate_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q, k = [axis[q_idx] for axis in query], [axis[kv_idx] for axis in key]
        if not has_text:
            return fn(score, b, h, tuple(q), tuple(k))
        of_grid = (q[0] >= 0) & (k[0] >= 0)
        q[0], k[0] = q[0].clamp(min=0), k[0].clamp(min=0)
        return torch.where(of_grid, fn(score, b, h, tuple(q), tuple(k)), score)

    coordinate_mod.gnaflex_order = tables.orders  # type: ignore[attr-defined]
    return coordinate_mod

"""What the door checks before a call reaches a backend, and the dtypes it brings tensors to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gnaflex.dispatch import Call
from gnaflex.mask import ScoreMod
from gnaflex.order import Order
from gnaflex.spec import GNAError


def extra_pair(
    key: Tensor, value: Tensor, extra_keys: Tensor | None, extra_values: Tensor | None
) -> tuple[Tensor, ...]:
    """The extra keys and values, checked; nothing if there are none."""
    if extra_keys is None and extra_values is None:
        return ()
    given = [None if x is None else tuple(x.shape) for x in (extra_keys, extra_values)]
    count = next((shape[1] for shape in given if shape and len(shape) == 4), 0)
    fits = [(key.shape[0], count, *x.shape[-2:]) for x in (key, value)]
    dtypes = {x.dtype for x in (key, value, extra_keys, extra_values) if x is not None}
    if extra_keys is not None and extra_values is not None and len(dtypes) > 1:
        raise GNAError(
            "extra_keys and extra_values must have the dtype of key and value: got "
            f"{sorted(map(str, dtypes))}.\n"
            "  Write extra_keys.to(key.dtype), extra_values.to(value.dtype)."
        )
    if extra_keys is None or extra_values is None or given != fits:
        raise GNAError(
            "extra_keys and extra_values come together, [batch, extra, heads of the key, head_dim]: got "
            f"{given[0]} and {given[1]}, key is {tuple(key.shape)}.\n"
            f"  Give tensors of shapes {fits[0]} and {fits[1]}."
        )
    return extra_keys, extra_values


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to SDPA: floating tensors but float64 to the autocast dtype."""
    for x in tensors:
        if not isinstance(x, Tensor):
            raise GNAError(f"attention takes tensors: got {type(x).__name__}. Write torch.as_tensor(x).")
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_heads(query: Tensor, key: Tensor, heads_dim: int) -> None:
    """What torch would report from inside its compiler."""
    heads, kv_heads = query.shape[heads_dim], key.shape[heads_dim]
    if heads % max(kv_heads, 1):
        raise GNAError(
            f"query heads must be a multiple of key heads: got {heads} and {kv_heads}.\n"
            f"  Give the key and the value {heads} heads, or a divisor of it."
        )
    if query.shape[-1] != key.shape[-1]:
        raise GNAError(
            f"query and key must share head_dim: got {query.shape[-1]} and {key.shape[-1]}.\n"
            "  Only the value may have a head_dim of its own."
        )


def check_grids(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Heads-last grids that fit together."""
    shape = query.shape
    if len(shape) < 4 or key.shape[:-2] != shape[:-2] or value.shape[:-1] != key.shape[:-1]:
        raise GNAError(
            "query, key and value must share batch and grid, key and value the heads: got "
            f"{tuple(shape)}, {tuple(key.shape)}, {tuple(value.shape)}.\n"
            "  The layout is [batch, *shape, heads, head_dim]."
        )
    check_heads(query, key, -2)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Batches, dtypes and devices, and key and value, which kernels read side by side."""
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
        raise GNAError(
            "query, key and value must share the batch, key and value the heads and tokens: got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}.\n"
            "  One batch entry of keys for several of queries: key.expand(len(query), -1, -1, -1)."
        )
    for what in ("dtype", "device"):
        found = [getattr(x, what) for x in (query, key, value)]
        if len(set(found)) > 1:
            raise GNAError(
                f"query, key and value must share one {what}: got {found[0]}, {found[1]} and {found[2]}.\n"
                f"  Write key.to(query.{what}), value.to(query.{what})."
            )
    if not query.is_floating_point():
        raise GNAError(f"query must be floating point: got {query.dtype}. Write query.float(), say.")


def _check_record(call: Call) -> None:
    """What only a mask of ours can tell."""
    record = call.record
    assert record is not None
    batch, heads = call.query.shape[:2]
    if record.heads and len(record.heads) != heads:
        raise GNAError(
            f"the mask has windows for {len(record.heads)} query heads, the query has {heads}.\n"
            f"  Give block_mask one spec per query head, {heads} of them."
        )
    if record.cuts is not None and record.cuts.batch not in (1, batch):
        raise GNAError(
            f"text_valid and padding are for a batch of {record.cuts.batch}, the query has {batch}.\n"
            "  Write gnaflex.with_lengths(block_mask, ...) with a row per batch entry."
        )
    check_score_mod(call.score_mod, record.orders, heads)


def check_score_mod(score_mod: ScoreMod | None, orders: Sequence[Order], heads: int) -> None:
    """A score_mod is a function, and one of ours knows the tokens it was made for, and for which windows."""
    if score_mod is None:
        return
    if not callable(score_mod):
        raise GNAError(
            f"score_mod must be a function of (score, b, h, q_idx, kv_idx): got {score_mod!r}.\n"
            "  Write lambda score, b, h, q_idx, kv_idx: score."
        )
    made_for = getattr(score_mod, "gnaflex_order", None)
    if made_for is not None and orders and made_for[0].geometry != orders[0].geometry:
        raise GNAError(
            "score_mod and block_mask count tokens in different orders.\n"
            "  Make the score_mod for the mask: relative_bias(block_mask, table), or "
            "coordinate_score_mod(block_mask, fn)."
        )
    table = getattr(score_mod, "gnaflex_table", None)
    if table is not None:
        _check_table(tuple(table), made_for, orders, heads)


def _check_table(table: tuple[int, ...], made_for: Any, orders: Sequence[Order], heads: int) -> None:
    """The table of a relative bias, [heads, *extents], serves these heads, dilations and windows."""
    if table[0] not in (1, heads):
        raise GNAError(
            "the table of relative_bias must have one head, or those of the query: got "
            f"{table[0]} for {heads}.\n"
            "  Give it the heads of the query, table[:, ...] for a part of them."
        )
    for made, order in zip(made_for * (len(orders) if len(made_for) == 1 else 1), orders, strict=False):
        for ours, theirs in zip(made.documents, order.documents, strict=True):
            fits = all(2 * w - 1 <= n for w, n in zip(theirs.spec.window, table[1:], strict=True))
            if ours.spec.dilation != theirs.spec.dilation or not fits:
                raise GNAError(
                    f"this relative_bias was made for {ours.spec!r} with a table of {table[1:]}, the mask is "
                    f"{theirs.spec!r}.\n  Make it for the mask: relative_bias(block_mask, table), with "
                    "extents of at least 2 * window - 1."
                )


def check_call(call: Call) -> None:
    """Whether tensors, mask and score_mod fit together."""
    query, key, value = call.query, call.key, call.value
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise GNAError(
            "flex_attention takes [batch, heads, tokens, head_dim]: got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}.\n"
            "  For heads-last grids write gnaflex.attention(q, k, v, window)."
        )
    check_heads(query, key, 1)
    if call.record is None:
        check_score_mod(call.score_mod, (), query.shape[1])
    device = query.device if call.block_mask is None else call.block_mask.kv_num_blocks.device
    if device != query.device:
        raise GNAError(
            f"mask and tensors must be on one device: the mask is on {device}, the query on {query.device}.\n"
            f'  Write block_mask.to("{query.device}").'
        )
    _check_tensors(query, key, value)
    if call.block_mask is None:
        return
    rows, columns = call.block_mask.seq_lengths
    if (query.shape[-2], key.shape[-2]) != (rows, columns):
        order = call.record and call.record.order.is_tiled
        hint = (
            "Bring them into the mask's order: gnaflex.permute(x, block_mask)."
            if order
            else "Build one for them."
        )
        raise GNAError(
            f"the mask is for {rows} queries and {columns} keys, the tensors have {query.shape[-2]} and "
            f"{key.shape[-2]}.\n  {hint}"
        )
    if call.record is not None:
        _check_record(call)

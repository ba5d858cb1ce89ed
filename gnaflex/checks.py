"""What the door checks before a call reaches a backend, and the dtypes it brings tensors to."""

from __future__ import annotations

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
    check_score_mod(call.score_mod, record.order)


def check_score_mod(score_mod: ScoreMod | None, order: Order) -> None:
    """A score_mod of ours knows the tokens it was made for."""
    made_for = getattr(score_mod, "gnaflex_order", None)
    if made_for is not None and made_for[0].geometry != order.geometry:
        raise GNAError(
            "score_mod and block_mask count tokens in different orders.\n"
            "  Make the score_mod for the mask: relative_bias(block_mask, table), or "
            "coordinate_score_mod(block_mask, fn)."
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
    if call.block_mask is None:
        return
    device = call.block_mask.kv_num_blocks.device
    if device != query.device:
        raise GNAError(
            f"mask and tensors must be on one device: the mask is on {device}, the query on {query.device}.\n"
            f'  Write block_mask.to("{query.device}").'
        )
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

"""Masks with extra tokens, conditions and packed documents spelled out plainly: orders, masks, attention.

``documents`` is a list of grids, packed one behind the other; ``specs`` holds one such list for all query
heads, or one per head, as in ``masked_attention``."""

from __future__ import annotations

import math

import numpy as np
import torch
from orders import axis_pairs, tile_major_tokens

from gnaflex.spec import GNA


def joint_order(documents, q_tile=None, kv_tile=None, prefix=0, suffix=0, extra_kv=0, keys=False):
    """Row-major token of every place (a pad: of the token it copies), and whether the place is a pad."""
    assert (q_tile is None) == (kv_tile is None)
    tokens, pads, first = [], [], 0
    for spec in documents:
        grid, grid_pads = np.arange(spec.num_tokens), np.zeros(spec.num_tokens, bool)
        behind = prefix + spec.num_tokens
        runs = [(0, prefix, q_tile), (behind, suffix, q_tile)]
        runs += [(behind + suffix, extra_kv, kv_tile)] if keys else []
        texts = [run_order(start, length, tile) for start, length, tile in runs]
        if q_tile is None:
            parts = [texts[0], (prefix + grid, grid_pads), *texts[1:]]
        else:
            grid, grid_pads = tile_major_tokens(spec, q_tile, kv_tile)
            parts = [(prefix + grid, grid_pads), *texts]
        for part_tokens, part_pads in parts:
            tokens.append(first + part_tokens)
            pads.append(part_pads)
        first += sum(length for _, length, _ in runs) + spec.num_tokens
    return np.concatenate(tokens), np.concatenate(pads)


def run_order(start: int, length: int, tile):
    """A run of extra tokens, padded to whole tiles with copies of its last token."""
    places = length if tile is None else -(-length // math.prod(tile)) * math.prod(tile)
    tokens = [start + min(at, length - 1) for at in range(places)]
    return np.array(tokens, np.int64), np.arange(places) >= length


def row_major_mask(documents, prefix=0, suffix=0, extra_kv=0) -> np.ndarray:
    """Who sees whom before any condition, bool [queries, keys]."""
    blocks = []
    for spec in documents:
        grid = np.ones((spec.num_tokens, spec.num_tokens), bool)
        for axis, x in zip(spec.axes, grid_coordinates(spec), strict=True):
            grid &= axis_pairs(axis, x[:, None], x[None, :])
        blocks.append(np.pad(grid, ((prefix, suffix), (prefix, suffix + extra_kv)), constant_values=True))
    return block_diagonal(blocks)


def block_diagonal(masks):
    """Masks that do not see one another, as one."""
    out = np.zeros(np.sum([mask.shape for mask in masks], axis=0), bool)
    row = column = 0
    for mask in masks:
        rows, columns = mask.shape
        out[row : row + rows, column : column + columns] = mask
        row, column = row + rows, column + columns
    return out


def grid_coordinates(spec: GNA):
    return np.unravel_index(np.arange(spec.num_tokens), spec.shape)


def valid_tokens(spec: GNA, prefix, suffix, extra_kv, lengths, extents):
    """Which queries ask and which keys are seen, in one batch entry; None: all of the run or the grid."""
    lengths = iter([run for run in (prefix, suffix, extra_kv) if run] if lengths is None else lengths)
    extents = spec.shape if extents is None else extents
    before, after, extra = (
        np.arange(run) < next(lengths) if run else [] for run in (prefix, suffix, extra_kv)
    )
    assert next(lengths, None) is None
    inside = np.ones(spec.num_tokens, bool)
    for x, extent in zip(grid_coordinates(spec), extents, strict=True):
        inside &= x < extent
    asks = np.concatenate([np.ones(prefix, bool), inside, np.ones(suffix, bool)])
    return asks, np.concatenate([before, inside, after, extra]).astype(bool)


def joint_mask(
    specs, q_tile=None, kv_tile=None, prefix=0, suffix=0, extra_kv=0,
    *, batch=1, heads=1, text_valid=None, padding=None, where=None,
) -> np.ndarray:  # fmt: skip
    """The dense mask over the places of the order, bool [batch, heads, query places, key places]: pads ask
    with the token they copy and are never seen. Conditions as in ``masked_attention``."""
    specs = [list(documents) for documents in specs]
    specs = specs * heads if len(specs) == 1 else specs
    assert len(specs) == heads
    assert q_tile is None or len({tuple(spec.dilation for spec in documents) for documents in specs}) == 1
    text = (prefix, suffix, extra_kv)
    mask = np.stack([row_major_mask(documents, *text) for documents in specs])[None].repeat(batch, 0)
    if text_valid is not None or padding is not None:
        (spec,) = specs[0]
        for b in range(batch):
            lengths = None if text_valid is None else np.atleast_1d(of_batch(text_valid, b))
            extents = None if padding is None else of_batch(padding, b)
            asks, seen = valid_tokens(spec, *text, lengths, extents)
            mask[b] &= asks[:, None] & seen
    if where is not None:
        indices = torch.meshgrid(*map(torch.arange, mask.shape), indexing="ij")
        mask = mask & where(*indices).numpy()
    (tokens, _), (key_tokens, key_pads) = (
        joint_order(specs[0], q_tile, kv_tile, *text, keys=keys) for keys in (False, True)
    )
    return mask[:, :, tokens][..., key_tokens] & ~key_pads


def of_batch(rows, b: int) -> np.ndarray:
    """Entry b of one row per batch entry, or of one row for all."""
    rows = np.asarray(rows)
    return rows[b if len(rows) > 1 else 0]


def attend(q, k, v, mask, scale=None, score_mod=None):
    """Output and log-sum-exp of plain attention in float64, [batch, heads, tokens, channels], under a bool
    mask that broadcasts to [batch, query heads, queries, keys]; differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, *torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij"))
    scores = scores.masked_fill(~torch.as_tensor(mask), -torch.inf)
    blind = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(blind[..., None], 0)
    out = (scores.softmax(-1) @ v).masked_fill(blind[..., None], 0)
    return out, scores.logsumexp(-1).masked_fill(blind, -torch.inf)

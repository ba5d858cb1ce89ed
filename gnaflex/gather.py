"""The "sdpa" backend: gather the key box of each query tile and run plain attention on it.

The keys that a query tile sees lie in one box of coordinates, so attention under the mask is a batch of
small dense problems. Nothing is compiled and every step is an ordinary autograd operation, so it runs, and
trains, wherever torch does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from gnaflex.gather_tiles import (
    CPU_CALL_BYTES,
    TILES_PER_CALL,
    Kind,
    Kinds,
    Load,
    Tensors,
    cut_of,
    kinds_of,
    load_of,
    work_of,
)
from gnaflex.mask import ScoreMod
from gnaflex.order import Order
from gnaflex.spec import GNAError
from gnaflex.tables import MaskMod

MEMORY_BYTES = 256 * 2**20


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Order,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    score_mod: ScoreMod | None = None,
    visible: MaskMod | None = None,
    return_lse: bool = False,
    memory_bytes: int = MEMORY_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query [B, Hq, Tq, D] to key [B, Hkv, Tk, D] and value [B, Hkv, Tk, Dv], the tokens being
    the query and key places of ``order``, which are also what ``score_mod`` gets, and ``visible``, a mask_mod
    that broadcasts and hides further pairs. A padded query sees what the last real one of its group or text
    sees; padded keys are never seen. Gathered boxes, masks and scores take about ``memory_bytes`` at a time,
    but at least what one tile and key head need; training recomputes them in the backward pass if all
    together exceed half of it.

    Returns:
        [B, Hq, Tq, Dv] in the dtype of ``query``; with ``return_lse`` also the natural log-sum-exp
        [B, Hq, Tq], float64 if the inputs are, else float32. A row that ``score_mod`` sends to -inf gives
        zeros and -inf.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    explicit = return_lse or score_mod is not None or visible is not None
    if heads != kv_heads and not (enable_gqa and heads % kv_heads == 0):
        rule = f"query heads must be those of the key, or a multiple: got {heads}, {kv_heads}, {enable_gqa=}"
        raise GNAError(f"{rule}.\n  query is {tuple(query.shape)}, key {tuple(key.shape)}.")
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    trains = torch.is_grad_enabled() and (score_mod is not None or any(x.requires_grad for x in (q, k, v)))
    group, room = heads // kv_heads, memory_bytes // 2 if trains else memory_bytes  # half for gradients
    load = load_of(k, v, group, explicit, room)
    tables = kinds_of(order, tuple(cut_of(one, load) for one in dict.fromkeys(order.documents)), q.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = _Call(tables, load, trains, scale, score_mod, visible, explicit, (kv_heads, group), {})
    out, *lse = (x.reshape(*query.shape[:3], *x.shape[2:]) for x in call(q, k, v))
    return (out, lse[0]) if return_lse else out


def work(query: Tensor, key: Tensor, value: Tensor, order: Order) -> int:
    """What plain attention under ``order`` costs per query head, in pairs (``gather_tiles.work_of``)."""
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    return work_of(order, load_of(k, v, query.shape[1] // key.shape[1], False, MEMORY_BYTES))


class _Call(NamedTuple):
    tables: Kinds
    load: Load
    trains: bool
    scale: float
    score_mod: ScoreMod | None
    visible: MaskMod | None
    explicit: bool
    heads: tuple[int, int]  # of the key, and of the query per head of the key
    mask: dict[Kind, Tensor | None]  # the latest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """The output [B * Hq, T, Dv] of all tiles and, if every score is spelled out, the log-sum-exp."""
        load, room, kinds = self.load, self.load.memory_bytes, itertools.chain(*self.tables.kinds)
        needed = max(len(k), 1) * sum(kind.tile_bytes(load) * len(kind.first) for kind in kinds)
        attend: Callable[..., Tensors] = self._attend
        if self.trains and needed > room:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        if q.is_cpu and not self.trains:
            room = min(room, CPU_CALL_BYTES)
        done = [part for some in self.tables.kinds for part in self._run(some, attend, (q, k, v), room)]
        return tuple(torch.cat(part, 1).index_select(1, self.tables.back) for part in zip(*done, strict=True))

    def _run(
        self, kinds: tuple[Kind, ...], attend: Callable[..., Tensors], qkv: Tensors, room: int
    ) -> Iterator[list[Tensor]]:
        """The tiles of some kinds, as many heads at a time for all kinds as the largest tile allows: then the
        tensors are split, and their gradients joined, only once."""
        (q, k, v), group, each = qkv, self.heads[1], [kind.tile_bytes(self.load) for kind in kinds]
        heads = min(max(room // max(each), 1), max(len(k), 1))
        whole = (q, group), (k, 1), (v, 1), (torch.arange(len(k), device=k.device), 1)
        slices = [torch.split(x, heads * n) for x, n in whole]
        for kind, size in zip(kinds, each, strict=True):
            fit = min(max(room // (heads * size), 1), TILES_PER_CALL)
            for tiles in (slice(i, i + fit) for i in range(0, len(kind.first), fit)):
                parts = [attend(*part, kind, tiles) for part in zip(*slices, strict=True)]
                yield [torch.cat(part) for part in zip(*parts, strict=True)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, kind: Kind, tiles: slice) -> Tensors:
        """Some tiles of one kind, for the key heads ``heads`` of all batches. Tiles go where heads go, these
        where the batch goes, so that one mask serves all; the query heads of a key head become rows."""
        queries, keys = kind.queries[tiles], kind.keys(tiles)
        k, v = (x.index_select(1, keys.reshape(-1)).reshape(len(x), *keys.shape, x.shape[-1]) for x in (k, v))
        (n, rows), batch, group = queries.shape, len(k), self.heads[1]
        q = q.index_select(1, queries.reshape(-1)).reshape(batch, group, n, rows, q.shape[-1])
        q = q.transpose(1, 2).flatten(2, 3)
        if kind not in self.mask:
            self.mask.clear()
            self.mask[kind] = kind.mask(q.dtype, group)
        mask, at = self.mask[kind], (heads, queries, keys)
        parts = self._scored(q, k, v, mask, at) if self.explicit else (sdpa(q, k, v, mask, scale=self.scale),)
        split = (x.reshape(batch, n, group, rows, *x.shape[3:]).transpose(1, 2) for x in parts)
        return tuple(x.reshape(batch * group, n * rows, *x.shape[4:]) for x in split)

    def _scored(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Tensors) -> Tensors:
        """Output and log-sum-exp with every score in float32 or wider, under autocast too."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(wide) * self.scale) @ k.to(wide).mT
            if self.score_mod is not None and scores.numel():
                scores = self._modified(scores, self.score_mod, at)
            if self.visible is not None:
                self._grid(scores).masked_fill_(~self._seen(self.visible, at), -torch.inf)
            if mask is not None:
                scores.masked_fill_(mask < 0, -torch.inf)  # in place wherever autograd keeps nothing
            top = scores.detach().amax(-1, keepdim=True)
            weights = scores.sub_(top.clamp(min=torch.finfo(wide).min)).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=0.5)  # at least 1, or 0 if no key is left
            return (weights @ v.to(wide) / total).to(q.dtype), (top + total.log()).squeeze(-1)

    def _modified(self, scores: Tensor, mod: Callable[..., Tensor], at: Tensors) -> Tensor:
        """``mod`` of scores [key heads, tiles, group * rows, keys], with the places of both."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # loads sympy

        (heads, h), (_, queries, keys) = self._heads(at), at
        # What varies along keys, rows, group, tiles, key heads of all batches: the innermost map comes first.
        for varies in ("k", "q", "h", "qk", "bh"):
            mod = torch.vmap(mod, in_dims=(0, *(0 if index in varies else None for index in "bhqk")))
        with TransformGetItemToIndex():  # as FlexAttention: bias[h] under vmap, in torch 2.9 too
            out = mod(self._grid(scores), heads, h, queries, keys)
        return out.to(scores.dtype).reshape(scores.shape).clone()  # not what mod keeps for its gradient

    def _seen(self, visible: MaskMod, at: Tensors) -> Tensor:
        """``visible`` of the same pairs, as it broadcasts."""
        (batch, h), (_, queries, keys) = self._heads(at), at
        b, q_idx = batch[:, None, None, None, None], queries[:, None, :, None]
        return visible(b, h[:, None, :, None, None], q_idx, keys[:, None, None, :])

    def _grid(self, scores: Tensor) -> Tensor:
        """[key heads, tiles, group * rows, keys] with the rows apart from the group, a view."""
        return scores.view(*scores.shape[:2], self.heads[1], -1, scores.shape[-1])

    def _heads(self, at: Tensors) -> Tensors:
        """The batch entry of every key head, and the query heads of its group."""
        (kv_heads, group), heads = self.heads, at[0]
        return heads // kv_heads, heads[:, None] % kv_heads * group + torch.arange(group, device=heads.device)

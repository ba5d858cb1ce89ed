"""What a call of "sdpa" costs on a CPU, by exact counts, and whether FlexAttention's costs more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gnaflex import gather
from gnaflex.flex import listed_blocks
from gnaflex.mask import MaskRecord

if TYPE_CHECKING:
    from gnaflex.dispatch import Call

# Seconds of a pair of "sdpa", and those by FlexAttention's 2.0e-9: float32, head_dim 64, AMD EPYC, 2 threads,
# torch 2.13, 21 November 2026 (benchmarks/results: 18 problems, 10 sizes).
PAIR_S, BY_FLEX = 2.6e-9, 1.3
LEAST_PAIRS = 2**19  # of FlexAttention, 1 ms: with fewer, what a call costs anyhow decides


def cheaper(call: Call) -> str:
    """Why "sdpa" is likely faster than FlexAttention on a CPU, or "". Of plain calls in float32 under one
    window for all heads: nothing else was measured.

    Example: row-major blocks of 128 tokens cover a small 3-D window badly, its boxes of keys do not.
    """
    record = call.record
    plain = call.score_mod is None and call.query.dtype == torch.float32
    if not plain or record is None or record.block_size is None or record.heads or record.cuts is not None:
        return ""
    size = math.prod(record.block_size)
    blocks = _kept(record, "blocks", lambda: listed_blocks(record))
    if blocks * size < LEAST_PAIRS or blocks * size <= BY_FLEX * (pairs := _pairs(call, record)):
        return ""
    return f'its blocks hold {blocks * size:.2g} pairs per head, the boxes of "sdpa" {pairs:.2g}'


def hours(call: Call) -> float:
    """How long "sdpa" takes on a CPU, about; 0 without a mask of gnaflex."""
    if call.record is None:
        return 0.0
    batch, heads = call.query.shape[:2]
    return PAIR_S * _pairs(call, call.record) * batch * heads / 3600


def _pairs(call: Call, record: MaskRecord) -> int:
    """Of a query head, the greatest where windows differ."""
    q, k, v = call.query, call.key, call.value
    sizes = len(q), q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype
    return _kept(record, sizes, lambda: max(gather.work(q, k, v, order) for order in record.orders))


def _kept(record: MaskRecord, key: Any, make: Callable[[], int]) -> int:
    """A count, made once for a record: where functools.cached_property would keep it."""
    known: dict[Any, int] = record.__dict__.setdefault("counts", {})
    if key not in known:
        known[key] = make()
    return known[key]

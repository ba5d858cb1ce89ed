"""Attention on a CPU: what the mask costs, how close sparsity comes to its ideal, what the door adds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import gnaflex

from .measure import Row, interleaved, ratios, row

compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def measure(quick: bool) -> Iterator[Row]:
    """Rows in order; ``quick`` takes fewer rounds."""
    rounds = 3 if quick else 9
    with torch.no_grad():
        yield from mask_cost(rounds)
        yield from sparsity(rounds)
        yield from door(rounds)
        yield graphs()


def all_full(bm: BlockMask) -> BlockMask:
    """The same lists, every block declared full: the mask costs nothing."""
    out = copy.copy(bm)
    assert bm.full_kv_indices is not None
    assert bm.full_kv_num_blocks is not None
    partial, full = (_rows(bm, kind) for kind in ("kv", "full_kv"))
    indices = torch.zeros_like(bm.full_kv_indices)
    for at, entries in enumerate(zip(partial, full, strict=True)):
        both = torch.cat(entries).sort().values
        indices[0, 0, at, : len(both)] = both
    out.full_kv_indices, out.full_kv_num_blocks = indices, bm.kv_num_blocks + bm.full_kv_num_blocks
    out.kv_num_blocks = torch.zeros_like(bm.kv_num_blocks)
    return out


def _rows(bm: BlockMask, kind: str) -> list[torch.Tensor]:
    counts, indices = getattr(bm, f"{kind}_num_blocks")[0, 0], getattr(bm, f"{kind}_indices")[0, 0]
    return [line[:n] for n, line in zip(counts.tolist(), indices, strict=True)]


def tensors(tokens: int, heads: int = 4, dim: int = 64) -> list[torch.Tensor]:
    """q, k, v [1, heads, tokens, dim], seeded."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3)]


def mask_cost(rounds: int) -> Iterator[Row]:
    """Compiled attention against the same lists all declared full."""
    for order, tile, must, aim in (("row-major", None, 1.15, 1.05), ("tile-major", (2, 8, 8), 1.20, 1.08)):
        bm = gnaflex.block_mask((16, 32, 32), (9, 13, 13), q_tile=tile, device="cpu")
        floor = all_full(bm)
        q, k, v = tensors(bm.seq_lengths[0])
        calls = {name: _call(q, k, v, mask) for name, mask in (("masked", bm), ("floor", floor))}
        times = interleaved(calls, rounds)
        what = f"16x32x32 window 9x13x13 fp32, {order}: over the same lists all full"
        yield row(
            what,
            ratios(times, "masked", "floor"),
            "x",
            must,
            aim,
            f"masked {1e3 * min(times['masked']):.0f} ms",
        )


def sparsity(rounds: int) -> Iterator[Row]:
    """Perfectly block-sparse problems: ideal time (dense x density) over measured time."""
    for percent, shape, window in ((75, (128, 128), (64, 64)), (90, (120, 128), (24, 64))):
        bm = gnaflex.block_mask(shape, window, window, q_tile=(8, 16), device="cpu")
        assert int(bm.kv_num_blocks.sum()) == 0
        density = 1 - bm.sparsity() / 100
        dense = all_full(gnaflex.block_mask(shape, shape, q_tile=(8, 16), device="cpu"))
        q, k, v = tensors(bm.seq_lengths[0])
        calls: dict[str, Any] = {
            "sparse": _call(q, k, v, bm),
            "all full": _call(q, k, v, dense),
            "SDPA": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),
        }
        times = interleaved(calls, max(3, rounds // 2))
        for against, must, aim in (("all full", 0.95, 0.99), ("SDPA", 0.88, 0.94)):
            fraction = [density * ratio for ratio in ratios(times, against, "sparse")]
            what = f"{percent} % sparse, no partial block: fraction of the ideal against {against}"
            yield row(what, fraction, "", must, aim)


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bm: BlockMask) -> Any:
    return lambda: compiled(q, k, v, block_mask=bm)


def door(rounds: int) -> Iterator[Row]:
    """What a cached call of the door adds to the compiled kernel, on a problem small enough to show it."""
    grid = torch.randn(3, 1, 8, 8, 1, 16)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in grid)
    bm = gnaflex.block_mask((8, 8), 3, device="cpu")
    calls = {
        "kernel": lambda: _repeat(lambda: compiled(q, k, v, block_mask=bm)),
        "flex_attention": lambda: _repeat(lambda: gnaflex.flex_attention(q, k, v, block_mask=bm)),
        "attention": lambda: _repeat(lambda: gnaflex.attention(grid[0], grid[1], grid[2], 3)),
    }
    times = interleaved(calls, rounds)
    for name in ("attention", "flex_attention"):
        extra = [1e3 * (a - b) for a, b in zip(times[name], times["kernel"], strict=True)]
        bounds = (50, 20) if name == "attention" else (None, None)
        yield row(f"a cached gnaflex.{name} call beyond the compiled kernel", extra, "us", *bounds)


def _repeat(call: Any) -> None:
    for _ in range(1000):
        call()


def graphs() -> Row:
    """New graphs over nine other problems of one shape."""
    q, k, v = tensors(480, heads=2, dim=16)
    problems: list[dict[str, Any]] = [{"window": w} for w in (3, (6, 8, 10), (2, 5, 7), 1)]
    problems += [{"window": 4, "stride": (2, 3, 4)}, {"window": 4, "is_causal": True}]
    problems += [{"window": 2, "dilation": d} for d in ((1, 2, 3), 3, (2, 4, 5))]
    masks = [gnaflex.block_mask((6, 8, 10), **problem, device="cpu") for problem in problems]
    compiled(q, k, v, block_mask=masks[0])
    before = counters["stats"]["unique_graphs"]
    for bm in masks[1:]:
        compiled(q, k, v, block_mask=bm)
    new = counters["stats"]["unique_graphs"] - before
    return row("new graphs for 8 other windows, strides, dilations, flags", [float(new)], "", 1, 0)

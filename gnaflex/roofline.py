"""What bounds a key tile of the CUTLASS kernel on Blackwell: clocks of one multiprocessor, by unit.

Rates per clock and multiprocessor: 8,192 FLOPs of dense bf16/fp16 products and 16 exponentials
(FlashAttention-4's analysis of B200; 2,250 TFLOP/s are 8,217 on 148 at 1.85 GHz), 128 bytes of shared memory,
four instructions. What a tile takes of them is counted in the kernel: tests/test_compile.py.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = 128  # of the boxes that the matrix units take: each half of a block
EXPONENTIALS = 3 / 4  # of the weights; every fourth pair is a polynomial
PER_KEY, PER_TILE = 5.4, 60  # instructions of a warp of 32 rows: softmax per key, all else of a tile, at most


class Clocks(NamedTuple):
    """How long each unit works on a tile; they overlap, so the slowest bounds it."""

    tensor: float
    exponentials: float
    shared_memory: float
    issue: float


def clocks(halves: int, kv_rows: int, head_dim: int) -> Clocks:
    """Of ``halves`` boxes of 128 queries over one tile of ``kv_rows`` keys.

    Example:
        >>> clocks(2, 128, 128)
        Clocks(tensor=2048.0, exponentials=1552.0, shared_memory=2048.0, issue=1502.4)
    """
    scores, kv_bytes = halves * ROWS * kv_rows, 2 * kv_rows * head_dim
    products = halves * (2 * ROWS * head_dim + 2 * kv_bytes)  # Q and K for Q K^T, V for P V
    return Clocks(
        tensor=4 * scores * head_dim / 8192,
        exponentials=halves * ROWS * (EXPONENTIALS * kv_rows + 1) / 16,
        shared_memory=(products + 2 * kv_bytes) / 128,  # K and V are written, too
        issue=halves * ROWS // 32 * (PER_KEY * kv_rows + PER_TILE) / 4,
    )


def tile_rate(halves: int, kv_rows: int, head_dim: int) -> float:
    """The rate of products by that of the largest tile at head_dim 128, where tensor cores and shared memory
    bound it.

    Example:
        >>> round(tile_rate(2, 128, 64), 2)  # instructions and exponentials bound it
        0.66
    """
    mine, best = (
        4 * n * ROWS * kv * d / max(clocks(n, kv, d))
        for n, kv, d in ((halves, kv_rows, head_dim), (2, 128, 128))
    )
    return mine / best

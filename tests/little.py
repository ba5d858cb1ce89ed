"""Kernels and a problem small enough for the stand-in."""

from __future__ import annotations

from gnaflex.cuda_backend.config import KernelConfig

from gnaflex.spec import GNA

LITTLE = [
    KernelConfig("sm_90a", "bfloat16", 64, (2, 4), (2, 8), True),
    KernelConfig("sm_90a", "float16", 128, (8,), (16,), True),
    KernelConfig("sm_90a", "bfloat16", 64, (2, 2, 2), (2, 2, 4), False),
    KernelConfig("sm_100a", "bfloat16", 64, (2, 4), (2, 8), True),
    KernelConfig("sm_100a", "bfloat16", 64, (2, 2, 2), (2, 2, 4), False),
]
FEW = GNA((8, 16), 8, 8)

"""What both softmaxes are made of."""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from gnaflex.cuda_backend.tile_walk import unravel

LN_2 = math.log(2)


def key_words(left: Any, box: cutlass.Constexpr) -> Any:
    """Which rows of a tile are keys when ``left`` are left on every axis, as bits; the same in all lanes."""
    lane = cute.arch.lane_idx()
    words = []
    for first in range(0, math.prod(box), 32):
        place = unravel(lane + first, box)
        is_key = place[0] < left[0]
        for at, room in zip(place[1:], left[1:], strict=True):
            is_key = cutlass.and_(is_key, at < room)
        words.append(cute.arch.vote_ballot_sync(is_key))
    return words


def exp2(x: Any) -> Any:
    """In PTX, so that it stays where it is written."""
    return cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


def rounded(low: Any, high: Any, dtype: str) -> Int32:
    """Two numbers as one register. In PTX, as the compiler would move the conversion past matrix
    instructions, and ptxas then lets no two of these overlap."""
    name = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r0}}, {{$r1}};", write_only_types=[Int32], read_only_args=[high, low]
    )

"""The Hopper kernel without its arithmetic: how fast boxes of tokens come, for benchmarks.

Consumers free every tile as soon as it is there; nothing is written. Against the same kernel over a line of
tokens, whose boxes are contiguous, it tells what unaligned boxes of row-major tokens cost.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from gnaflex.cuda_backend.sm90_attend import Attend, Item, number_of, turns


class Loads(Attend):  # type: ignore[misc, unused-ignore]
    """The kernel of a configuration, its consumers idle."""

    @cute.jit
    def consume(
        self, schedule: Any, qk: Any, pv: Any, smem: Any, bars: Any, out: Any, tid: Int32, scale_log2: Float32
    ) -> None:
        """Wait for every tile and give it back."""
        tile = Int32(0)
        first, _, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        for turn in cutlass.range(turns(schedule, first, every), unroll=1):
            item = Item(schedule, number_of(schedule, first, every, turn))
            cute.arch.mbarrier_wait(bars.q_full, turn & 1)
            for _i in cutlass.range(item.tiles, unroll=1):
                stage, phase = tile % self.stages, tile // self.stages & 1
                cute.arch.mbarrier_wait(bars.k_full + stage, phase)
                cute.arch.mbarrier_arrive(bars.k_empty + stage)
                cute.arch.mbarrier_wait(bars.v_full + stage, phase)
                cute.arch.mbarrier_arrive(bars.v_empty + stage)
                tile += 1
            cute.arch.mbarrier_arrive(bars.q_empty)

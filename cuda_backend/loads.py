"""The kernels without their arithmetic: how fast boxes of tokens come, for benchmarks.

Tiles are given back as soon as they are there; nothing is written. Against the same kernel over a line of
tokens, whose boxes are contiguous, it tells what unaligned boxes of row-major tokens cost.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from gnaflex.cuda_backend.config import KernelConfig


def loads_only(config: KernelConfig) -> Any:
    """The kernel of a configuration, all roles but one idle."""
    if config.arch == "sm_90a":
        from gnaflex.cuda_backend.sm90_attend import Attend90

        class Loads90(Attend90):  # type: ignore[misc, unused-ignore]
            def attend_setup(self) -> None: ...

            @cute.jit
            def attend(self, h: Any) -> None:
                """Wait for every tile and give it back."""
                n = self.number(0)
                for turn in cutlass.range(self.turns(), unroll=1):
                    self.wait("q_full", turn)
                    for _i in cutlass.range(self.item(turn).tiles, unroll=1):
                        for what in ("k", "v"):
                            self.wait(f"{what}_full", n)
                            self.arrive(f"{what}_empty", n)
                        n += 1
                    self.arrive("q_empty", turn)

        return Loads90(config)
    from gnaflex.cuda_backend.protocol import HALVES
    from gnaflex.cuda_backend.sm100_attend import Attend100

    class Loads100(Attend100):  # type: ignore[misc, unused-ignore]
        def multiply_setup(self) -> None:
            self.begin()

        def weigh_setup(self, h: Any) -> None: ...
        def weigh(self, h: Any) -> None: ...
        def correct(self) -> None: ...
        def store(self) -> None: ...

        @cute.jit
        def multiply(self) -> None:
            """Wait for every tile and give it back."""
            n = self.number(0)
            for turn in cutlass.range(self.turns(), unroll=1):
                for h in HALVES:
                    self.wait("q_full", turn, h)
                for _i in cutlass.range(2 * self.pair(turn).tiles, unroll=1):
                    self.wait("kv_full", n)
                    self.commit("kv_empty", n)
                    n += 1
                self.commit("q_empty", turn)
            self.wait("q_empty", self.turns())  # the block does not end before that

    return Loads100(config)

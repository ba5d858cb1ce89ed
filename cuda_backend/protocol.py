"""Who waits for whom inside a kernel, as data: barriers, buffers, and what is done to them; no cutlass.

An architecture's roles module declares these and writes the program of every warp role over them, in plain
Python. The kernel hands the programs to CuTe DSL as they are; tests run them on plain numbers and search all
interleavings for deadlocks and buffers that are overwritten before they were read.

Uses of a barrier or buffer are counted from 0: use ``n`` lies in place ``n % places``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

HALVES = (0, 1)  # warp groups with rows of their own
Program = TypeVar("Program", bound=Callable[..., Any])


class Barrier(NamedTuple):
    """An mbarrier: who arrives (all threads of a role, one of them, the TMA unit by its bytes, the tensor
    cores when they have finished), how many arrivals complete a phase, and how many places it has."""

    by: str  # "threads", "one", "tma", "mma"; "named": one of the hardware's own, without a place in memory
    arrivals: int = 1
    places: int | str = 1  # or the name of an attribute of the kernel
    is_free: bool = False  # whoever waits first for a place finds it so
    halves: bool = False  # one for each half


class Buffer(NamedTuple):
    """Memory that one role or unit fills and another reads."""

    places: int | str = 1
    halves: bool = False


class Action(NamedTuple):
    """What is done to buffers, in use ``n`` of each: read (after which action, any if not said), written.

    ``unit``: "threads" are done when the program goes on; "tma" and "store" (the TMA unit either way), "mma"
    and "wgmma" do it later, in order among themselves but for "tma", which then signals ``full``.
    """

    unit: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    full: str = ""


def jit(program: Program) -> Program:
    """Mark a program: CuTe DSL translates functions decorated with ``@something.jit``, once told to."""
    return program


def loop(*bounds: int, unroll: int) -> Iterable[int]:
    """``range`` for programs, which import it by that name: CuTe DSL knows loops by it, and what ``unroll``
    is."""
    return range(*bounds)


def offsets(barriers: dict[str, Barrier], places: Callable[[int | str], int]) -> tuple[dict[str, int], int]:
    """Where every barrier's first place lies among all of them, and how many there are."""
    at, out = 0, {}
    for name, barrier in barriers.items():
        if barrier.by == "named":
            continue
        out[name] = at
        at += places(barrier.places) * (len(HALVES) if barrier.halves else 1)
    return out, at

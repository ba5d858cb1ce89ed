"""What a compiled kernel takes, in order: the one statement of it, for the kernel, its host side and tests.

A launch is a C function of a list of addresses, one per number. All numbers of a launch lie in one buffer
whose addresses never change, so that a call writes them in one go.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

AXES = "axes"  # as many numbers as the grid has axes


class Part(NamedTuple):
    """One argument of a launch: its name, the struct code of its numbers, and how many there are."""

    name: str
    code: str
    numbers: int | str = 1


# Rows of all tensors are those of the sequence [prefix | grid | suffix | keys alone]; strides in elements.
PARTS = (
    Part("q", "Q"),  # addresses: [batch, heads, queries, head_dim], channels contiguous
    Part("k", "Q"),  # [batch, key heads, keys, head_dim]
    Part("v", "Q"),
    Part("o", "Q"),  # like q
    Part("lse", "Q"),  # [batch, heads, queries] float32, contiguous, natural logarithm
    Part("work", "Q"),  # [boxes, 3, axes] int32, contiguous: first query, first key, number of keys
    Part("valid", "Q"),  # [batch, columns] int32: how many tokens of a run of extra ones are keys
    Part("stream", "Q"),
    Part("strides", "q", 12),  # of q, k, v, o: batch, heads, tokens
    Part("sizes", "i", 7),  # batch, heads, key heads, queries, keys, boxes, stride of a batch entry of valid
    Part("lengths", "i", AXES),  # tokens of a dilation group
    Part("steps", "i", AXES),  # rows from one of its tokens to the next
    Part("group_steps", "i", AXES),  # rows from a group to the next
    Part("groups", "i", AXES),
    Part(
        "texts", "i", 8
    ),  # tokens before the grid, behind, keys alone; their columns; 1 if queries too; rounds
    Part("start", "i"),  # the row of the first token of the first group
    Part("blocks", "i"),  # of the launch
    Part("scale_log2", "f"),  # the softmax scale times log2(e), positive
)


def counts(rank: int) -> tuple[int, ...]:
    """How many numbers every part has for a grid of ``rank`` axes."""
    return tuple(rank if part.numbers == AXES else int(part.numbers) for part in PARTS)


class Launcher:
    """A compiled kernel's C function, called with the numbers of a launch in the order of ``PARTS``.

    The GPU's error code comes back, 0 for none. Safe among threads.
    """

    def __init__(self, function: Callable[[Any], Any], rank: int, keep: Any = None) -> None:
        self._function, self._keep, self._lock = function, keep, threading.Lock()
        code = "".join(part.code * n for part, n in zip(PARTS, counts(rank), strict=True))
        self._numbers = struct.Struct("=" + code + "i")  # the last one is the result
        self._buffer = ctypes.create_string_buffer(self._numbers.size)
        at, places = ctypes.addressof(self._buffer), []
        for one in code + "i":
            places.append(at)
            at += struct.calcsize("=" + one)
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._result = self._numbers.size - struct.calcsize("=i")

    def __call__(self, *numbers: float) -> int:
        """Launch with one number after another, as many as ``sum(counts(rank))``."""
        with self._lock:
            self._numbers.pack_into(self._buffer, 0, *numbers, 0)
            self._function(self._places)
            return int(struct.unpack_from("=i", self._buffer, self._result)[0])

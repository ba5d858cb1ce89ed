"""What the door adds to a call that a kernel runs: host time, with a launch that does nothing, on the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from gnaflex.cuda_backend import gate, machine
from gnaflex.cuda_backend.abi import Launcher
from gnaflex.cuda_backend.config import KernelConfig

import gnaflex

from .measure import Row, row

CALLS = 2000


def measure(quick: bool) -> Iterator[Row]:
    """Rows in order; ``quick`` takes fewer rounds."""
    rounds = 3 if quick else 15
    with _as_if_on_hopper(), torch.no_grad():
        bm = gnaflex.block_mask((16, 16), 8, 8, device="cpu")
        q, k, v = torch.randn(3, 1, 2, 256, 64, dtype=torch.bfloat16).unbind(0)
        grid = torch.randn(1, 16, 16, 2, 64, dtype=torch.bfloat16)
        text = gnaflex.block_mask((16, 16), 8, 8, suffix=64, text_valid=[[50]], device="cpu")
        x = torch.randn(1, 2, 320, 64, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            "flex_attention": lambda: gnaflex.flex_attention(q, k, v, block_mask=bm),
            "flex_attention, text_valid": lambda: gnaflex.flex_attention(x, x, x, block_mask=text),
            "attention": lambda: gnaflex.attention(grid, grid, grid, 8, 8),
        }
        for name, call in calls.items():
            yield row(
                f"{name} to the launch of a kernel",
                [_microseconds(call) for _ in range(rounds)],
                "us",
                20,
                12,
            )


def _microseconds(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def _always(answer: Any) -> Callable[[torch.device], Any]:
    return lambda device: answer  # a mock would count its calls


@contextlib.contextmanager
def _as_if_on_hopper() -> Iterator[None]:
    """Kernels exist, and launching one writes its numbers and calls a function that does nothing."""
    opened: dict[Any, Launcher] = {}

    def open_one(config: KernelConfig, device: torch.device) -> str:
        opened[config, device] = Launcher(lambda places: None, config.rank)
        return ""

    answers = {"obstacle": "", "architecture": "sm_90a", "multiprocessors": 132, "stream": 0}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(machine, name, _always(answer)))
        here = contextlib.nullcontext()
        stack.enter_context(mock.patch.object(machine, "on", _always(here)))
        stack.enter_context(mock.patch.object(gate, "_launchers", opened))
        stack.enter_context(mock.patch.object(gate, "_opened", open_one))
        yield

"""What a call costs the host: a problem too small for anything else to show, many calls without waiting."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator

import torch

from gnaflex.spec import GNA

from .comparison import inputs
from .measure import Row, finished, row
from .parts import dtype_on
from .problems import Problem
from .providers import PROVIDERS, CannotRun

TINY = Problem("8x32", GNA((8, 32), (8, 16), (8, 16)), 1, 1, head_dim=64)  # block-sparse: kernels take it
BATCH_S, BATCHES = 0.05, 9


def overhead(device: torch.device) -> Iterator[Row]:
    """Microseconds of a call by every provider, in turn; on a CPU the attention of 256 tokens is in them."""
    tensors = inputs(TINY, device, dtype_on(device))
    calls = {}
    for name, make in PROVIDERS.items():
        try:
            calls[name] = _call(make(TINY, device).call, tensors)
        except CannotRun:
            continue
        except Exception:  # the comparison tells why
            traceback.print_exc()
    counts = {name: max(int(BATCH_S / _seconds(call, 3, device)), 1) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BATCHES):
        for name, call in calls.items():
            taken[name].append(1e6 * _seconds(call, counts[name], device))
    for name, values in taken.items():
        yield row(name, values, "us", note=f"{counts[name]} calls in a row")


def _call(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], None]:
    def again() -> None:
        with torch.no_grad():
            call(*tensors)

    again()
    return again


def _seconds(call: Callable[[], None], count: int, device: torch.device) -> float:
    """Of a call until it returns, the mean of some."""
    finished(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count

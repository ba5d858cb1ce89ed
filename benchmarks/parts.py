"""What can be measured: parts of the benchmark, each a set of items and a results file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .engine import Item
from .problems import SETS

ONE_ITEM = (
    "compile_time",
    "cpu_attention",
    "dispatch_cost",
    "joint_masks",
    "planning",
)  # modules of that name
PARTS = ("backends", "growth", "models", *ONE_ITEM)
LIMIT_S = {"full": 300.0, "small": 120.0, "quick": 120.0}  # of a problem
QUICK_S, LONG_S = 120.0, 1800.0  # of a part that is one item
BUDGET_S = {"full": 3600.0, "small": 600.0, "quick": 120.0}  # of all problems, and of growth


def items(part: str, which: str, device: torch.device) -> dict[str, Item]:
    """The items of a part, most telling first; ``which`` is a set of problems (problems.SETS)."""
    if part == "backends":
        from .overhead import overhead

        found = {name: Item(partial(_compared, name, which, device), LIMIT_S[which]) for name in SETS[which]}
        return found | {"dispatch": Item(partial(overhead, device), 60.0)}
    if part == "growth":
        from . import growth

        return growth.items(device)
    if part == "models":
        from .models import MODELS

        return {name: Item(partial(_steps, name, which, device), LIMIT_S["full"]) for name in MODELS}
    quick = which == "quick"
    return {part: Item(partial(_module, part, quick), QUICK_S if quick else LONG_S)}


def budget_s(part: str, which: str) -> float:
    """The seconds that a part may take unless they are given."""
    return LONG_S if part in ONE_ITEM else BUDGET_S[which]


def _compared(name: str, which: str, device: torch.device) -> Iterator[Any]:
    from .comparison import compare

    return compare(name, SETS[which][name], device, dtype_on(device))


def _steps(name: str, which: str, device: torch.device) -> Iterator[Any]:
    from .models import steps

    return steps(name, which, device, dtype_on(device))


def _module(part: str, quick: bool) -> Iterator[Any]:
    measure: Callable[[bool], Iterator[Any]] = importlib.import_module(f".{part}", __package__).measure
    return measure(quick)


def dtype_on(device: torch.device) -> torch.dtype:
    """What models run in there."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16

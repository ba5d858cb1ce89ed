"""Calls that a kernel has run before, so that the next one like it is launched within microseconds.

A lane is found by everything that the checks of the door look at; what it cannot tell, as gradients or
autocast, sends a call the long way. No torch function is traced, so lanes are for eager calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MOST_LANES = 256  # of a mask or problem: shapes that one process serves
NAME = "_gnaflex_lanes"  # of the attribute of an owner
Ready = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def signature(query: Tensor, key: Tensor, value: Tensor, scale: float | None, form: Hashable) -> Hashable:
    """What must be the same for a lane to serve, None where none can; ``form`` is what else a call says."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if not type(query) is type(key) is type(value) is Tensor or torch.is_autocast_enabled(query.device.type):
        return None
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        scale, form,
    )  # fmt: skip


def ready(owner: Any, found: Hashable, *tensors: Tensor) -> Ready | None:
    """The lane of an owner that has some, a mask or a problem, if the tensors are aligned."""
    lanes: dict[Hashable, Ready] = getattr(owner, NAME)
    try:
        lane = lanes.get(found)
    except TypeError:  # windows in lists do not hash
        return None
    if lane is None or any(x.data_ptr() % 16 for x in tensors):
        return None
    return lane


def keep(owner: Any, found: Hashable, lane: Ready) -> None:
    """Remember a lane of an owner."""
    lanes = owner.__dict__.setdefault(NAME, {})
    if found is not None and len(lanes) < MOST_LANES:
        with contextlib.suppress(TypeError):
            lanes[found] = lane

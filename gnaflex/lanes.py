"""Calls that a kernel has run before, so that the next one like it is launched within microseconds.

A lane is found by everything that the checks of the door look at; what it cannot tell, as gradients or
autocast, sends a call the long way. Lanes are for eager calls: nothing here is traced.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST_LANES = 256  # of a mask, or of all grids: shapes that one process serves
Ready = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_of_owner: weakref.WeakKeyDictionary[Any, dict[Hashable, Ready]] = weakref.WeakKeyDictionary()


class Owner:
    """What keeps lanes without being a mask."""


_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def looked_into() -> bool:
    """Whether torch.func, forward-mode derivatives or a tracer follow what operators a call is made of; of
    these, neither requires_grad nor the type of a tensor tells."""
    mode = torch._C._get_dispatch_mode
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or mode(_FAKE) is not None
        or mode(_PROXY) is not None
    )


def is_plain(value: Any) -> bool:
    """Whether an argument can be remembered by value: a tensor hashes by identity, and 8.0 as 8."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return value is None or type(value) in (int, bool, str)


def signature(query: Tensor, key: Tensor, value: Tensor, scale: float | None, form: Hashable) -> Hashable:
    """What must be the same for a lane to serve, None where none can; ``form`` is what else a call says."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if not type(query) is type(key) is type(value) is Tensor or torch.is_autocast_enabled(query.device.type):
        return None
    if looked_into() or not is_plain(form):
        return None
    if scale is not None and not (type(scale) in (float, int) and scale > 0):
        return None  # a query whose sign is turned has strides of its own
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        scale, form,
    )  # fmt: skip


def ready(
    owner: Any, tensors: tuple[Tensor, Tensor, Tensor], scale: float | None, form: Hashable
) -> Ready | None:
    """The lane of an owner, a mask say, for such a call, if the tensors are aligned."""
    if not _of_owner:
        return None
    try:
        lane = _of_owner.get(owner, {}).get(signature(*tensors, scale, form))
    except (TypeError, AttributeError):  # windows in lists do not hash; no tensors, no mask
        return None
    if lane is None or any(x.data_ptr() % 16 for x in tensors):
        return None
    return lane


def keep(
    owner: Any, tensors: tuple[Tensor, Tensor, Tensor], scale: float | None, form: Hashable, lane: Ready
) -> None:
    """Remember a lane of an owner. A copy of the owner has none: it may be another mask."""
    lanes, found = _of_owner.setdefault(owner, {}), signature(*tensors, scale, form)
    if found is None:
        return
    if len(lanes) >= MOST_LANES:
        del lanes[next(iter(lanes))]  # the oldest
    with contextlib.suppress(TypeError):
        lanes[found] = lane

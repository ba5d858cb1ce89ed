"""Forwards whose backward pass is still to come, where blocks are compiled and run again in it.

Eager blocks find on their rotary tables what their own forward told them; compiled ones read the layers as
they are then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gnaflex.models.families import Attention


class _Token:
    """Lives as long as the graph of a forward; ``done`` when its backward pass began."""

    done = False


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.token.done = True
        return grad, None


def watch(x: Tensor) -> tuple[Tensor, Any]:
    """The output of a forward, and what :func:`is_waiting` takes."""
    token = _Token()
    return _Watch.apply(x, token), weakref.ref(token)  # type: ignore[no-untyped-call]


def is_waiting(reference: Any) -> bool:
    """Whether the backward pass of a forward may still come."""
    token = reference and reference()
    return token is not None and not token.done


def runs_compiled_again(model: Any, attentions: Iterable[Attention]) -> bool:
    """Whether a forward's blocks run again in its backward pass, compiled."""
    if not torch.is_grad_enabled() or not getattr(model, "gradient_checkpointing", False):
        return False
    blocks = (model.get_submodule(one.name.rpartition(".")[0]) for one in attentions)
    return any(block._compiled_call_impl is not None for block in blocks)

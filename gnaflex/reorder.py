"""Row-major tokens to the order of a mask, and the exact inverse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gnaflex.order import Order
from gnaflex.spec import GNAError


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors that can be kept: those made under inference_mode could not be used in training later on,
    those made while tracing are not real."""
    with torch.inference_mode(False), contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        yield


@lru_cache(maxsize=32)
def _token_index(order: Order, keys: bool, device: torch.device) -> Tensor:
    """For every row-major token its place in the order, int64 [tokens] on ``device``."""
    tokens, is_pad = order.tokens(keys)
    place = np.empty(order.row_major_starts(keys)[-1], np.int64)
    place[tokens[~is_pad]] = np.flatnonzero(~is_pad)
    with real_tensors():
        return torch.from_numpy(place).to(device)


def to_order(x: Tensor, order: Order, dim: int = -2) -> Tensor:
    """Row-major tokens along ``dim`` (queries, or keys with their extra ones) to ``order``; pads are zero."""
    expected = [order.row_major_starts(keys)[-1] for keys in (False, True)]
    keys = _side("permute", x, dim, expected, order)
    if not order.is_tiled:
        return x
    shape = list(x.shape)
    shape[dim] = order.num_keys if keys else order.num_queries
    return x.new_zeros(shape).index_copy(dim, _token_index(order, keys, x.device), x)


def from_order(x: Tensor, order: Order, dim: int = -2) -> Tensor:
    """Tokens in ``order`` along ``dim`` back to row-major; pads are dropped."""
    keys = _side("unpermute", x, dim, [order.num_queries, order.num_keys], order)
    if not order.is_tiled:
        return x
    return x.index_select(dim, _token_index(order, keys, x.device))


def _side(verb: str, x: Tensor, dim: int, expected: list[int], order: Order) -> bool:
    """Whether the tokens are keys; queries and keys differ in number where they differ at all."""
    if -x.dim() <= dim < x.dim() and x.shape[dim] in expected:
        return x.shape[dim] != expected[0]
    count = " or ".join(str(n) for n in dict.fromkeys(expected))
    grids = ", ".join(repr(document.spec) for document in order.documents[:3])
    raise GNAError(
        f"{verb} takes {count} tokens along dim {dim}: got shape {tuple(x.shape)}.\n"
        f"  The mask is {grids} with q_tile={order.documents[0].layout.q_tile}. Tensors are"
        " [..., tokens, head_dim]; pass dim= when the tokens lie elsewhere."
    )

"""How the numbers of a mask become captured tensors, and the part of every mask that extra tokens have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gnaflex.order import Document, Order
from gnaflex.window import IntArray

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
AnyArray = npt.NDArray[Any]
Pick = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tables:
    """How tables become tensors: one row per class of heads, their places padded to a multiple.

    ``orders`` are the problems of the classes, all of one geometry; ``heads`` the class of every query head,
    empty if there is one class.
    """

    orders: tuple[Order, ...]
    heads: tuple[int, ...]
    device: torch.device
    multiple: int

    @property
    def order(self) -> Order:
        """The geometry that all classes share."""
        return self.orders[0]

    def __call__(self, values: Callable[[Order], AnyArray]) -> Tensor:
        """[..., places], or [classes, ..., places]; ``values`` gives those of a class."""
        if not self.heads:
            return self.tensor(values(self.order))
        return self.tensor(np.stack([values(order) for order in self.orders]))

    def tensor(self, values: AnyArray) -> Tensor:
        """A table as a tensor, its last entry repeated up to a multiple of a block."""
        places = values.shape[-1]
        if places % self.multiple == 0:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        padded = np.empty((*values.shape[:-1], -(-places // self.multiple) * self.multiple), values.dtype)
        padded[..., :places] = values
        padded[..., places:] = values[..., -1:]
        return torch.from_numpy(padded).to(self.device)

    def pick(self) -> Pick:
        """``pick(table, h, place)``: the entry of a table of :meth:`__call__` for a head."""
        if not self.heads:
            return lambda table, h, place: table[place]
        which = torch.tensor(self.heads, dtype=torch.int32, device=self.device)
        return lambda table, h, place: table[which[h], place]


# ---- extra tokens ------------------------------------------------------------------------------------


def with_text(tables: Tables) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """``also(grid, q_idx, kv_idx)``: the mask of the grids, continued to keys that are extra tokens."""
    order = tables.order
    if not order.has_text:
        return None
    if len(order.documents) > 1:
        return _with_text_of_documents(tables)
    (document,) = order.documents
    first, end = document.grid_start, document.grid_start + document.layout.num_keys
    if not document.is_tiled:
        ahead, behind = first > 0, end < document.num_keys

        def beside(grid: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            grid = grid | (kv_idx < first) if ahead else grid
            return grid | (kv_idx >= end) if behind else grid

        return beside
    runs = [(text.start, text.stop) for text in document.texts]

    def behind_the_grid(grid: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        is_text = kv_idx < runs[0][1]
        for start, stop in runs[1:]:
            is_text = is_text | ((kv_idx >= start) & (kv_idx < stop))
        return torch.where(kv_idx < end, grid, is_text)

    return behind_the_grid


def _with_text_of_documents(tables: Tables) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def nobody(number: int, document: Document) -> IntArray:
        return np.full(document.layout.num_keys, -1, np.int32)

    def own(number: int, document: Document) -> IntArray:
        return np.full(document.layout.num_queries, number, np.int32)

    order = tables.order
    seen_by = tables.tensor(order.spread(True, nobody, lambda number, _: number, pad=-1))
    asks = tables.tensor(order.spread(False, own, lambda number, _: number))
    return lambda grid, q_idx, kv_idx: grid | (seen_by[kv_idx] == asks[q_idx])

"""Token orders of a problem whose tensors are heads-last, and which of them a backend gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex import flash, flex
from gnaflex.advice import cheapest_layout
from gnaflex.cuts import Cuts
from gnaflex.dispatch import RUN, Call, cheaper_masked, choose, goes_on, has_kernels, runs
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord, ScoreMod, choose_form
from gnaflex.order import Document, Order
from gnaflex.reorder import from_order, to_order
from gnaflex.spec import GNA


class Route:
    """A token order of a problem on heads-last tensors, with its masks per device. ``has_lengths`` says that
    calls bring the effective lengths of their extra tokens."""

    def __init__(self, document: Document, has_lengths: bool = False, flash_rows: int | None = None) -> None:
        self.order = Order((document,))
        orders, block = (self.order,), (flash_rows or flex.DEFAULT_BLOCK, flex.DEFAULT_BLOCK)
        form = flash.form_of(orders, flash_rows) if flash_rows else choose_form(orders, "auto")
        self.record = MaskRecord(orders, form, block)
        if has_lengths:
            self.record = self.record.with_cuts(Cuts(torch.zeros(1, len(document.texts), dtype=torch.int32)))
        self._masks: dict[torch.device, BlockMask] = {}

    def under(self, lengths: Tensor | None) -> MaskRecord:
        """The record of a call: with its lengths, integers [batch, runs of extra tokens]."""
        return self.record if lengths is None else self.record.with_cuts(Cuts(lengths))

    def mask(self, device: torch.device, lengths: Tensor | None = None) -> BlockMask:
        """The mask, compiled once per device; other lengths neither change its lists nor its graph."""
        bm = self._masks.get(device)
        if bm is None:
            from gnaflex.cuda_backend.machine import aside

            cuts = self.record.cuts and self.record.cuts.to(device)
            bm = aside(device, flex.compile_mask, self.record.with_cuts(cuts), device)
            self._masks[device] = bm
        return bm if lengths is None else flex.recompiled(bm, self.under(lengths))

    def heads_first(self, query: Tensor, key: Tensor, value: Tensor, *extra: Tensor) -> list[Tensor]:
        """[batch, *shape, heads, d] (or all tokens in one axis) to [batch, heads, tokens, d] in this order,
        extra keys and values behind the others; views if row-major without extra ones."""
        flat = [x.flatten(1, -3) for x in (query, key, value)]
        for at, more in enumerate(extra, start=1):
            flat[at] = torch.cat([flat[at], more], 1)
        if self.order.is_tiled:
            flat = [to_order(x, self.order, 1) for x in flat]
        return [x.transpose(1, 2) for x in flat]

    def heads_last(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`heads_first` for an output, to the grid of ``shape``."""
        x = x.transpose(1, 2)
        if self.order.is_tiled:
            x = from_order(x, self.order, 1)
        return x.reshape(shape[:-1] + x.shape[-1:])


class Problem:
    """A problem with the token order that costs least, and the row-major one; the same for FLASH.

    ``prefix``, ``suffix`` and ``extra_kv`` are extra tokens, as in :func:`gnaflex.block_mask`."""

    def __init__(
        self, spec: GNA, prefix: int = 0, suffix: int = 0, extra_kv: int = 0, has_lengths: bool = False
    ) -> None:
        self._flash: dict[tuple[Layout, int], Route] = {}
        self._document, self._has_lengths = Document(Layout(spec), prefix, suffix, extra_kv), has_lengths
        self.row_major = Route(self._document, has_lengths)
        layout = cheapest_layout(spec)
        self.cheapest = self.row_major if layout.q_tile is None else self.in_order(layout)

    def in_order(self, layout: Layout, flash_rows: int | None = None) -> Route:
        """The problem in another token order of its grid."""
        return Route(replace(self._document, layout=layout), self._has_lengths, flash_rows)

    def for_flash(self, rows: int, takes_tiles: bool) -> Route:
        """The token order that costs FLASH least, or row-major order, in blocks of ``rows`` queries."""
        document = self._document
        layout = flash.cheapest_layout(document.spec, rows) if takes_tiles else document.layout
        if (route := self._flash.get((layout, rows))) is None:
            route = self._flash[layout, rows] = self.in_order(layout, rows)
        return route


def attended(
    problem: Problem,
    backend: str,
    score_mod: ScoreMod | None,
    device: torch.device,
    call_in: Callable[[Route], Call],
) -> tuple[Route, str, Call, Any]:
    """The token order of a call on heads-last grids, the backend that ran it there, the call, the output."""
    order, name, call = _order_and_backend(problem, backend, score_mod, device, call_in)
    if name in ("flash", "flex"):
        call = call._replace(block_mask=order.mask(device, _lengths(call)))
    try:
        return order, name, call, RUN[name](call)
    except Exception as error:
        if not goes_on(call, name, backend, error):
            raise
    return attended(problem, backend, score_mod, device, call_in)


def _order_and_backend(
    problem: Problem,
    backend: str,
    score_mod: ScoreMod | None,
    device: torch.device,
    call_in: Callable[[Route], Call],
) -> tuple[Route, str, Call]:
    """The token order of a call on heads-last grids, the backend that runs it there, and the call."""
    row_major, cheapest = problem.row_major, problem.cheapest
    if backend == "auto" and cheapest is not row_major and has_kernels(device):
        call = call_in(row_major)  # a kernel reads tokens as they lie
        if runs(call, "cuda") and not cheaper_masked(row_major.record, cheapest.record, device):
            return row_major, "cuda", call
    if backend == "flash" or (backend == "auto" and flash.leads(device)):
        order, seen = problem.for_flash(flash.q_rows(device), score_mod is None), call_in(row_major)
        # nothing is permuted before it is known to serve
        like = seen._replace(record=order.under(_lengths(seen)))
        if backend == "flash" or (not runs(seen, "cuda") and runs(like, "flash")):
            return order, choose(like, "flash"), call_in(order)
    takes_tiles = score_mod is None and backend in ("auto", "flex")
    order, seen = cheapest if takes_tiles else row_major, call_in(row_major)
    name = choose(seen._replace(record=order.under(_lengths(seen))), backend)  # nothing is permuted before
    if name != "flex" or order is row_major:
        return row_major, name, seen
    return order, name, call_in(order)


def _lengths(call: Call) -> Tensor | None:
    """Those that a call brings for its extra tokens."""
    cuts = call.record and call.record.cuts
    return cuts.text_valid if cuts else None

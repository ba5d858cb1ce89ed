"""mask_mods and score_mods of a problem; always the complete mask.

"packed", "table" and "interval" have a structure that the grid and the token order fix; the numbers are
captured tensors, so that another window does not recompile. "arith" writes the window into the code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from gnaflex.cuts import Cuts, cut, lengths, where
from gnaflex.forms import FORMS, reason_against
from gnaflex.layout import Layout, Slab
from gnaflex.order import Document, Order, order_of
from gnaflex.reorder import real_tensors
from gnaflex.spec import GNA, GNAError
from gnaflex.tables import MaskMod, Tables

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Form = Literal["auto", "packed", "table", "interval", "arith"]

SPEC = ("shape", "window", "stride", "dilation", "is_causal")
PADDED_TO = 256  # tables are read up to the end of the last block; 256 is the largest block in common use


@dataclass(frozen=True)
class MaskRecord:
    """What a mask was compiled from; it travels as attribute ``gnaflex`` of the mask_mod.

    ``orders`` are the token problems of the classes of heads, of one geometry; ``heads`` the class of every
    query head, empty if one problem serves all.
    """

    orders: tuple[Order, ...]
    form: str
    block_size: tuple[int, int] | None = None
    full_width: bool | None = None
    heads: tuple[int, ...] = ()
    cuts: Cuts | None = None

    @property
    def order(self) -> Order:
        """The geometry of all classes."""
        return self.orders[0]

    def with_cuts(self, cuts: Cuts | None) -> MaskRecord:
        """The same problem under other conditions."""
        return replace(self, cuts=cuts)


def mask_mod(spec: GNA, form: Form = "auto", *, device: torch.device | str | None = None) -> MaskMod:
    """The complete mask of a problem over row-major tokens, as a FlexAttention ``mask_mod``.

    Args:
        spec: the problem.
        form: "packed" compares all axes at once in the bit fields of one integer per token; "table" compares
            coordinates looked up per axis; "interval" tests ``lo[q] <= k < hi[q]`` for at most 8 runs of keys
            per query (the form that FlexAttention's FLASH backend packs); "arith" computes with div and mod
            and is recompiled for every problem. "auto" takes packed where its fields fit, else table.
        device: where the captured tables live; None is the current accelerator or the CPU.

    Returns:
        ``mask_mod(b, h, q_idx, kv_idx) -> bool``, broadcasting over its arguments.

    Raises:
        GNAError: the form cannot express this problem; the message says why.

    Example:
        >>> import torch, gnaflex
        >>> mod = gnaflex.mask_mod(gnaflex.GNA(6, window=3), device="cpu")
        >>> q, k = torch.arange(6)[:, None], torch.arange(6)
        >>> mod(q, q, q, k).int().sum(1).tolist()
        [3, 3, 3, 3, 3, 3]
    """
    orders = (order_of(spec),)
    return build(MaskRecord(orders, choose_form(orders, form)), resolve_device(device))


def score_mod(spec: GNA, form: Form = "auto", *, device: torch.device | str | None = None) -> ScoreMod:
    """The same mask as a ``score_mod`` (``-inf`` outside), for kernels that take only that.

    Arguments and errors are those of :func:`mask_mod`.

    Example:
        >>> import torch, gnaflex
        >>> mod = gnaflex.score_mod(gnaflex.GNA(6, window=3), device="cpu")
        >>> q, k = torch.arange(6)[:, None], torch.arange(6)
        >>> mod(torch.zeros(6, 6), q, q, q, k)[0].tolist()
        [0.0, 0.0, 0.0, -inf, -inf, -inf]
    """
    allowed = mask_mod(spec, form, device=device)

    def gna_score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(allowed(b, h, q_idx, kv_idx), score, -float("inf"))

    gna_score_mod.gnaflex = allowed.gnaflex  # type: ignore[attr-defined]
    return gna_score_mod


def resolve_device(device: torch.device | str | None) -> torch.device:
    """None is the current accelerator, or the CPU: also where torch was built for one that is not there."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device(device)


def choose_form(orders: Sequence[Order], form: str) -> str:
    """The form to build; raises when the one asked for cannot express the problem."""
    if form == "auto":
        return "table" if reason_against("packed", orders) else "packed"
    if form not in FORMS:
        raise GNAError(f"form must be one of {('auto', *FORMS)}: got form={form!r}.")
    reason = reason_against(form, orders)
    if reason:
        specs = ", ".join(repr(document.spec) for document in orders[0].documents[:3])
        raise GNAError(f'form="{form}" cannot express {specs}: {reason}\n  Write form="auto".')
    return form


def build(
    record: MaskRecord, device: torch.device, padded_to: int = PADDED_TO, like: MaskMod | None = None
) -> MaskMod:
    """The mask_mod of a record, its tables on ``device`` and padded to a multiple of ``padded_to`` tokens;
    ``like`` is a mask_mod of the same windows, whose tables then serve."""
    tables = Tables(record.orders, record.heads, device, padded_to)
    with real_tensors():
        windows = FORMS[record.form](tables) if like is None else getattr(like, "gnaflex_windows", like)
        mod = cut(windows, record.cuts, tables)
    mod.gnaflex = record  # type: ignore[attr-defined]
    if mod is not windows:  # a mod that held itself would keep its tables until a garbage collection
        mod.gnaflex_windows = windows  # type: ignore[attr-defined]
    mod.gnaflex_code = encoded(record)  # type: ignore[attr-defined]
    return mod


def encoded(record: MaskRecord) -> str:
    """A record as text, its conditions left out: how it travels through a compiled graph."""
    orders = [[_fields(document) for document in order.documents] for order in record.orders]
    return repr((orders, record.form, record.block_size, record.full_width, record.heads))


def _fields(document: Document) -> tuple[Any, ...]:
    layout, slab = document.layout, document.layout.slab
    problem = (getattr(layout.spec, name) for name in SPEC)
    where = layout.q_tile, layout.kv_tile, slab and tuple(slab)
    return *problem, *where, document.prefix, document.suffix, document.extra_kv


def decoded(code: str) -> MaskRecord:
    """The record that :func:`encoded` wrote."""
    orders, *rest = ast.literal_eval(code)
    return MaskRecord(tuple(Order(tuple(map(_document, documents))) for documents in orders), *rest)


def _document(fields: tuple[Any, ...]) -> Document:
    *problem, q_tile, kv_tile, slab, prefix, suffix, extra_kv = fields
    layout = Layout(GNA(*problem), q_tile, kv_tile, slab and Slab(*slab))
    return Document(layout, prefix, suffix, extra_kv)


@lru_cache(maxsize=16)
def conditions_of(record: MaskRecord, device: torch.device) -> tuple[MaskMod | None, MaskMod | None]:
    """What a record cuts away beside its windows and extra tokens, as mask_mods over the places of its order:
    by lengths, which broadcasts, and by the user's ``where``."""
    if record.cuts is None:
        return None, None
    tables = Tables(record.orders, record.heads, device, PADDED_TO)
    with real_tensors():
        return lengths(record.cuts, tables), where(record.cuts, tables)

"""Conditions beside the windows: padding of a batch entry, effective text lengths, a user's own mask_mod.

They are captured, not compiled: their numbers may change without another graph or other block lists. The
lists only know which blocks they may cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnaflex.blocks import Cut
from gnaflex.order import Order
from gnaflex.reorder import real_tensors
from gnaflex.spec import GNAError
from gnaflex.tables import MaskMod, Tables

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class Cuts:
    """``text_valid`` integers [batch, runs of extra tokens], ``padding`` integers [batch, rank], and
    ``where``, a mask_mod over row-major tokens."""

    text_valid: Tensor | None = None
    padding: Tensor | None = None
    where: MaskMod | None = None

    @property
    def cut(self) -> Cut:
        """What the block lists must know."""
        if self.padding is not None or self.where is not None:
            return Cut.ALL
        return Cut.NOTHING if self.text_valid is None else Cut.TEXT

    @property
    def batch(self) -> int:
        """The batch size the tensors ask for; 1 suits every batch."""
        texts = 1 if self.text_valid is None else len(self.text_valid)
        extents = 1 if self.padding is None else len(self.padding)
        return max(texts, extents)

    def to(self, device: torch.device) -> Cuts:
        """The same with its tensors on a device; what ``where`` captures stays where it is."""
        text_valid, padding = (None if x is None else x.to(device) for x in (self.text_valid, self.padding))
        return Cuts(text_valid, padding, self.where)


def checked(
    order: Order, text_valid: Any, padding: Any, where: MaskMod | None, device: torch.device
) -> Cuts | None:
    """The conditions of a mask, checked against its tokens; None if there are none."""
    if text_valid is None and padding is None and where is None:
        return None
    for name, given in (("text_valid", text_valid), ("padding", padding)):
        if given is not None and len(order.documents) > 1:
            raise GNAError(
                f"{name} is for one grid: got {len(order.documents)} packed ones.\n"
                "  Give every grid its own shape and prefix or suffix instead."
            )
    runs = len(order.documents[0].texts)
    if text_valid is not None and not runs:
        raise GNAError(
            "text_valid needs extra tokens: got prefix=0, suffix=0, extra_kv=0.\n"
            "  Write block_mask(..., suffix=256, text_valid=lengths)."
        )
    rank = order.documents[0].spec.rank
    what = "one per run of extra tokens (prefix, suffix, extra_kv, those that are not empty)"
    made = Cuts(
        None if text_valid is None else _integers("text_valid", text_valid, runs, what, device),
        None if padding is None else _integers("padding", padding, rank, "one per axis", device),
        _boolean(where),
    )
    return check_batches(made)


ANY_NUMBER = -1


def parameters(mod: Any) -> int | None:
    """How many positional parameters without a default a mod has, as torch counts them; None if it cannot be
    called, ANY_NUMBER if it takes what comes."""
    try:
        found = inspect.signature(mod).parameters.values()
    except (TypeError, ValueError):
        return ANY_NUMBER if callable(mod) else None
    if any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in found):
        return None
    if any(one.kind is one.VAR_POSITIONAL for one in found):
        return ANY_NUMBER
    return sum(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in found)


def _boolean(where: Any) -> MaskMod | None:
    """The user's mask_mod, checked, and held to booleans."""
    if where is None:
        return None
    if parameters(where) not in (4, ANY_NUMBER):
        raise GNAError(
            f"where must be a mask_mod, a function of (b, h, q_idx, kv_idx): got {where!r}.\n"
            "  Write where=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, say."
        )

    def boolean(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = where(b, h, q_idx, kv_idx)
        if isinstance(found, bool):
            return torch.full_like(kv_idx, found, dtype=torch.bool)
        if found.dtype != torch.bool:
            raise GNAError(f"where must return booleans: got {found.dtype}. Compare: q_idx >= kv_idx, say.")
        return found  # type: ignore[no-any-return]

    return boolean


def check_batches(cuts: Cuts) -> Cuts:
    """Refuse conditions for batches of different sizes."""
    batches = [len(x) for x in (cuts.text_valid, cuts.padding) if x is not None]
    if len(set(batches) - {1}) > 1:
        raise GNAError(
            f"text_valid and padding must be for one batch: got {batches[0]} and {batches[1]} entries.\n"
            "  Give each a row per batch entry, or one row for all."
        )
    return cuts


def _integers(name: str, given: Any, columns: int, what: str, device: torch.device) -> Tensor:
    """[batch, columns]: the tensor that was given, shared wherever its device allows, so that it may be
    changed in place."""
    with real_tensors():
        try:
            values = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            raise GNAError(
                f"{name} must be integers [batch, {columns}]: got {given!r}.\n"
                f"  Write {name}=torch.tensor([[...]] * batch, dtype=torch.int32)."
            ) from None
        counts = values.dtype in INTEGERS
        if counts and not isinstance(given, Tensor):
            values = values.to(torch.int32)  # the mask's own
            if values.numel() and int(values.min()) < 0:
                raise GNAError(f"{name} must not be negative: got {given!r}. Write 0 where there is nothing.")
        if values.dim() == 1 and columns == 1:
            values = values[:, None]
        if counts and values.dim() == 2 and values.shape[1] == columns and len(values):
            return _contiguous(name, values).to(device)
    raise GNAError(
        f"{name} must be integers [batch, {columns}], {what}: got {tuple(values.shape)} {values.dtype}.\n"
        f"  Write {name}=torch.tensor([[...]] * batch, dtype=torch.int32) with {columns} entries each."
    )


def _contiguous(name: str, values: Tensor) -> Tensor:
    if not values.is_contiguous():
        raise GNAError(
            f"{name} must be contiguous, as it is captured itself: got strides {values.stride()} for shape "
            f"{tuple(values.shape)}.\n  Write {name}={name}.contiguous()."
        )
    return values


def cut(mod: MaskMod, cuts: Cuts | None, tables: Tables) -> MaskMod:
    """``mod`` and every condition."""
    if cuts is None:
        return mod
    mods = [mod, *(one for one in (lengths(cuts, tables), where(cuts, tables)) if one is not None)]
    return _every(mods)


def lengths(cuts: Cuts, tables: Tables) -> MaskMod | None:
    """``text_valid`` and ``padding`` as a mask_mod over the places of the order, which broadcasts."""
    mods = []
    if cuts.text_valid is not None:
        mods.append(_valid_text(cuts.text_valid, tables.order))
    if cuts.padding is not None:
        mods.append(_inside(cuts.padding, tables))
    return _every(mods) if mods else None


def where(cuts: Cuts, tables: Tables) -> MaskMod | None:
    """The user's mask_mod over the places of the order."""
    return None if cuts.where is None else at_places(cuts.where, tables)


def _every(mods: list[MaskMod]) -> MaskMod:
    if len(mods) == 1:
        return mods[0]

    def every(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ok = mods[0](b, h, q_idx, kv_idx)
        for mod in mods[1:]:
            ok = ok & mod(b, h, q_idx, kv_idx)
        return ok

    return every


def _entry(values: Tensor) -> Callable[[Tensor, int], Tensor]:
    """``entry(b, column)`` of [batch, columns]; one row serves every batch."""
    # one flat index: torch 2.9 takes values[b, 0] under vmap for a read of b on the host
    flat, columns, one_row = values.view(-1), values.shape[1], len(values) == 1
    return lambda b, column: flat[b * (0 if one_row else columns) + column]


def _valid_text(lengths: Tensor, order: Order) -> MaskMod:
    (document,) = order.documents
    runs = [(text.start, text.start + text.places) for text in document.texts]
    entry = _entry(lengths)

    def valid_text(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ok = None
        for column, (start, stop) in enumerate(runs):
            here = (kv_idx < start) | (kv_idx >= stop) | (kv_idx - start < entry(b, column))
            ok = here if ok is None else ok & here
        assert ok is not None
        return ok

    return valid_text


def _inside(extents: Tensor, tables: Tables) -> MaskMod:
    """Both tokens within the extents; extra tokens are within any."""
    rank = tables.order.spec.rank
    query, key = (_coordinates(tables.order, keys, tables.device, tables.multiple) for keys in (False, True))
    entry = _entry(extents)

    def inside(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ok = (query[0][q_idx] < entry(b, 0)) & (key[0][kv_idx] < entry(b, 0))
        for a in range(1, rank):
            ok = ok & (query[a][q_idx] < entry(b, a)) & (key[a][kv_idx] < entry(b, a))
        return ok

    return inside


@lru_cache(maxsize=16)
def _coordinates(order: Order, keys: bool, device: torch.device, multiple: int) -> list[Tensor]:
    tables = Tables((order,), (), device, multiple)
    before_all = np.iinfo(np.int32).min
    rows = (order.coordinates(keys, a, before_all) for a in range(order.spec.rank))
    return [tables.tensor(row.astype(np.int32)) for row in rows]


def at_places(mod: Callable[..., Tensor], tables: Tables) -> Callable[..., Tensor]:
    """A mod over row-major tokens (extra ones included) as one over the places of the order: the last two
    arguments are indices. Padding counts as the token that it copies."""
    if not tables.order.is_tiled:
        return mod
    query, key = (tables.tensor(tables.order.tokens(keys)[0].astype(np.int32)) for keys in (False, True))

    def at_tokens(*arguments: Tensor) -> Tensor:
        *rest, q_idx, kv_idx = arguments
        return mod(*rest, query[q_idx], key[kv_idx])

    return at_tokens

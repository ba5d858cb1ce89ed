"""mask_mods and score_mods of a problem, in four forms; always the complete mask.

"packed", "table" and "interval" have a structure that the grid and the token order fix; the numbers are
captured tensors, so that another window does not recompile. "arith" writes the window into the code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gnaflex.layout import Layout, real_tensors
from gnaflex.spec import GNA, GNAError
from gnaflex.window import IntArray, torch_source

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Form = Literal["auto", "packed", "table", "interval", "arith"]
FORMS = ("packed", "table", "interval", "arith")

# floor(k * r) with r = 1/d rounded up to float32 is k // d for every k below 2**22: the relative error is at
# most 1.5 * 2**-23, so the absolute one stays below 1/d. Above, the key side is gathered from a table.
EXACT_QUOTIENTS = 2**22
MOST_INTERVALS = 8  # what FlexAttention's FLASH backend packs (torch 2.13, inductor interval_mask_packing)
PADDED_TO = 256  # tables are read up to the end of the last block; 256 is the largest block in common use


@dataclass(frozen=True)
class MaskRecord:
    """What a mask was compiled from; it travels as attribute ``gnaflex`` of the mask_mod."""

    layout: Layout
    form: str
    block_size: tuple[int, int] | None = None
    full_width: bool | None = None


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
    layout = Layout(spec)
    return build(MaskRecord(layout, choose_form(layout, form)), resolve_device(device))


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
    """None is the current accelerator, or the CPU, as in ``create_block_mask``."""
    if device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device(device)


def choose_form(layout: Layout, form: str) -> str:
    """The form to build; raises when the one asked for cannot express the problem."""
    if form == "auto":
        return "table" if _reason_against("packed", layout) else "packed"
    if form not in FORMS:
        raise GNAError(f"form must be one of {('auto', *FORMS)}: got form={form!r}.")
    reason = _reason_against(form, layout)
    if reason:
        raise GNAError(f'form="{form}" cannot express {layout.spec!r}: {reason}\n  Write form="auto".')
    return form


def _reason_against(form: str, layout: Layout) -> str | None:
    if form == "packed" and (bits := _Fields.of(layout).bits) > 63:
        return f"its fields need {bits} bits > 63."
    if form == "arith" and layout.q_tile is not None:
        return "it is written for row-major order, not for tile-major."
    if form == "interval":
        return _reason_against_intervals(layout)
    return None


def build(record: MaskRecord, device: torch.device, padded_to: int = PADDED_TO) -> MaskMod:
    """The mask_mod of a record, its tables on ``device`` and padded to a multiple of ``padded_to`` tokens."""
    make = {"packed": _packed, "table": _table, "interval": _interval, "arith": _arith}[record.form]
    with real_tensors():
        to_device = functools.partial(_tensor, device=device, multiple=padded_to)
        mod = make(record.layout, to_device)
    mod.gnaflex = record  # type: ignore[attr-defined]
    return mod


def _tensor(values: IntArray, device: torch.device, multiple: int) -> Tensor:
    """A table as a tensor, its last entry repeated up to a multiple of a block."""
    tokens = values.shape[-1]
    if tokens % multiple == 0:
        return torch.from_numpy(values).to(device)
    padded = np.empty((*values.shape[:-1], -(-tokens // multiple) * multiple), values.dtype)
    padded[..., :tokens] = values
    padded[..., tokens:] = values[..., -1:]
    return torch.from_numpy(padded).to(device)


# ---- packed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fields:
    """The bit field of every axis in a packed coordinate: ``shift`` and ``width``, a guard bit above each."""

    shift: tuple[int, ...]
    width: tuple[int, ...]

    @staticmethod
    def of(layout: Layout) -> _Fields:
        width = tuple(int(len(one.token) - 1).bit_length() for one in layout.places)
        shift = tuple(sum(width[a + 1 :]) + len(width) - 1 - a for a in range(len(width)))
        return _Fields(shift, width)

    @property
    def bits(self) -> int:
        return sum(self.width) + len(self.width)

    @property
    def guard(self) -> int:
        return sum(1 << (shift + width) for shift, width in zip(self.shift, self.width, strict=True))

    def pack(self, layout: Layout, values: Sequence[IntArray], plus: int = 0) -> IntArray:
        """One integer per token from one value per place of every axis, and ``plus``."""
        dtype = np.int32 if self.bits <= 31 else np.int64
        parts: list[Any] = [
            (value << shift).astype(dtype) for value, shift in zip(values, self.shift, strict=True)
        ]
        return layout.sum_over_axes([parts[0] + plus, *parts[1:]])


def _packed(layout: Layout, to_device: Callable[[IntArray], Tensor]) -> MaskMod:
    """Every axis at once: with a guard bit over each field, ``key - lo`` and ``hi - 1 - key`` keep all guards
    exactly when the key lies in the window on every axis."""
    fields = _Fields.of(layout)
    guard = fields.guard
    first = to_device(fields.pack(layout, [one.lo for one in layout.places], -guard))
    last = to_device(fields.pack(layout, [one.hi - 1 for one in layout.places], guard))
    segments = _key_segments(layout, fields)
    if segments is None:
        keys = to_device(fields.pack(layout, [one.coordinate for one in layout.places]))

        def gathered_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            key = keys[kv_idx]
            return ((key - first[q_idx]) & (last[q_idx] - key) & guard) == guard

        return gathered_mask_mod

    def packed_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # No gather on the key: inductor's CPU code would repeat it for every row (1.15x against 1.05x).
        packed = _packed_key(kv_idx.to(torch.float32), segments).to(torch.int32)
        return ((packed - first[q_idx]) & (last[q_idx] - packed) & guard) == guard

    return packed_mask_mod


Terms = tuple[tuple[float, float], ...]  # (reciprocal, weight), the last reciprocal being 1


def _packed_key(token: Tensor, segments: Sequence[tuple[int, Terms]]) -> Tensor:
    """The packed coordinate of float32 token indices, exact below 2**22 tokens and 24 bits.

    A segment of mixed-radix digits spans ``unit`` tokens per step. Inside it the packed value is the sum of
    ``floor(index * reciprocal) * weight``: no weight is negative, so that no partial sum exceeds the result.
    """
    key, rest = torch.zeros_like(token), token
    for unit, terms in segments:
        index = torch.floor(rest * _rounded_up(unit)) if unit > 1 else rest
        for reciprocal, weight in terms:
            key = key + (torch.floor(index * reciprocal) if reciprocal < 1 else index) * weight
        rest = rest - index * unit
    return key


def _key_segments(layout: Layout, fields: _Fields) -> tuple[tuple[int, Terms], ...] | None:
    """How token indices turn into packed coordinates: row-major one segment of digits, tile-major one for the
    query tile, the key tile in it and the token in that. None where float32 would not be exact, or where
    dilation shuffles the coordinates."""
    if fields.bits > 24 or layout.num_tokens >= EXACT_QUOTIENTS or max(layout.spec.dilation) > 1:
        return None
    ones = (1,) * layout.spec.rank
    steps = [tuple(len(one.token) for one in layout.places), *layout.tiles, ones]
    if layout.q_tile is None:
        steps = [layout.spec.shape, ones]
    segments = []
    unit = math.prod(steps[0])
    for outer, inner in itertools.pairwise(steps):
        radices = [size // step for size, step in zip(outer, inner, strict=True)]
        weights = [step << shift for step, shift in zip(inner, fields.shift, strict=True)]
        unit //= math.prod(radices)
        if terms := _terms(radices, weights):
            segments.append((unit, terms))
    return tuple(segments)


def _terms(radices: Sequence[int], weights: Sequence[int]) -> Terms:
    """One term per digit that is not constant; digits that are contiguous in the packed value join."""
    terms: list[tuple[float, float]] = []
    below, carry = 1, 0
    for radix, weight in zip(reversed(radices), reversed(weights), strict=True):
        if radix > 1 and weight != carry:
            terms.append((_rounded_up(below), float(weight - carry)))
        if radix > 1:
            below, carry = below * radix, weight * radix
    return tuple(reversed(terms))


def _rounded_up(divisor: int) -> float:
    """The least float32 that is not below ``1 / divisor``."""
    nearest = np.float32(1.0 / divisor)
    return float(nearest if float(nearest) * divisor >= 1.0 else np.nextafter(nearest, np.float32(2)))


# ---- the other forms ---------------------------------------------------------------------------------


def _table(layout: Layout, to_device: Callable[[IntArray], Tensor]) -> MaskMod:
    """Axis by axis from tables of coordinates and windows; expresses every problem."""

    def stacked(name: str) -> Tensor:
        rows = []
        for a in range(layout.spec.rank):
            values = [
                getattr(one, name) if at == a else np.zeros(len(one.token), np.int64)
                for at, one in enumerate(layout.places)
            ]
            rows.append(layout.sum_over_axes(values).astype(np.int32))
        return to_device(np.stack(rows))

    coordinate, lo, hi = stacked("coordinate"), stacked("lo"), stacked("hi")
    rank = layout.spec.rank

    def table_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key = coordinate[0, kv_idx]
        ok = (key >= lo[0, q_idx]) & (key < hi[0, q_idx])
        for a in range(1, rank):
            key = coordinate[a, kv_idx]
            ok = ok & (key >= lo[a, q_idx]) & (key < hi[a, q_idx])
        return ok

    return table_mask_mod


def _reason_against_intervals(layout: Layout) -> str | None:
    if layout.q_tile is not None and layout.spec.rank > 1:
        return "in tile-major order the keys of a query are too many runs of tokens."
    runs = math.prod(layout.spec.window[: _run_axes(layout.spec)[0]]) if layout.q_tile is None else 1
    if runs > MOST_INTERVALS:
        return f"the keys of a query are up to {runs} runs of tokens > {MOST_INTERVALS}."
    return None


def _run_axes(spec: GNA) -> tuple[int, int]:
    """Of the axes of a row-major grid, how many leading ones have a run per key of their window, and how many
    come before the trailing dense ones. The one between, if any, has its whole window in one run."""
    moving = spec.rank
    while moving > 1 and spec.window[moving - 1] == spec.shape[moving - 1] and not spec.is_causal[moving - 1]:
        moving -= 1
    return moving - (spec.dilation[moving - 1] == 1), moving


def _interval(layout: Layout, to_device: Callable[[IntArray], Tensor]) -> MaskMod:
    """An OR of ``lo[q] <= k < hi[q]``, always over as many runs as the rank calls for (1, or 8)."""
    lo, hi = _runs(layout)
    count = 1 if layout.spec.rank == 1 and layout.spec.dilation == (1,) else MOST_INTERVALS
    empty = np.zeros((count - len(lo), lo.shape[1]), np.int32)
    first, stop = to_device(np.concatenate([lo, empty])), to_device(np.concatenate([hi, empty]))

    def interval_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ok = (kv_idx >= first[0, q_idx]) & (kv_idx < stop[0, q_idx])
        for run in range(1, count):
            ok = ok | ((kv_idx >= first[run, q_idx]) & (kv_idx < stop[run, q_idx]))
        return ok

    return interval_mask_mod


def _runs(layout: Layout) -> tuple[IntArray, IntArray]:
    """The runs of keys of every query, int32 [runs, tokens]; a query with fewer runs has empty ones."""
    spec, places = layout.spec, layout.places
    if layout.q_tile is not None:
        return places[0].lo[None].astype(np.int32), places[0].hi[None].astype(np.int32)
    tokens = np.stack(np.unravel_index(np.arange(spec.num_tokens), spec.shape))
    single, moving = _run_axes(spec)
    lo = [np.zeros(spec.num_tokens, np.int64)]
    exists = [np.ones(spec.num_tokens, bool)]
    for a in range(single):
        pitch = math.prod(spec.shape[a + 1 :])
        key, valid = (of_axis[:, tokens[a]] for of_axis in _window_tokens(layout, a))
        lo = [base + step * pitch for base in lo for step in key]
        exists = [there & here for there in exists for here in valid]
    pitch = math.prod(spec.shape[moving:])
    start, stop = np.zeros(1, np.int64), np.full(1, pitch)
    if single < moving:
        at = tokens[moving - 1]
        start, stop = places[moving - 1].lo[at] * pitch, places[moving - 1].hi[at] * pitch
    first, there = np.stack(lo), np.stack(exists)
    return tuple(np.where(there, first + edge, 0).astype(np.int32) for edge in (start, stop))  # type: ignore[return-value]


def _window_tokens(layout: Layout, a: int) -> tuple[IntArray, Any]:
    """The keys of every query of an axis as tokens, [window, length], and which of them exist."""
    axis, one = layout.spec.axes[a], layout.places[a]
    step = np.arange(axis.window)[:, None]
    group_start = one.coordinate - one.token // axis.dilation
    key = (one.lo - group_start + step) * axis.dilation + one.token % axis.dilation
    return key, one.lo + step < one.hi


def _arith(layout: Layout, to_device: Callable[[IntArray], Tensor]) -> MaskMod:
    """The window printed as torch code."""
    names: dict[str, Any] = {"torch": torch}
    exec(compile(torch_source(layout.spec), f"<{layout.spec!r}>", "exec"), names)
    mod: MaskMod = names["mask_mod"]
    return mod

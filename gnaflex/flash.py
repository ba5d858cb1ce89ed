"""FlexAttention's FLASH backend (flash-attn-4): what it asks of a call, and the masks that suit it.

What it asks was read in torch 2.13 and 2.15 (``torch/_inductor/kernel/flex``) and in flash-attn-4 4.0.0b36
(``interface.py``, ``config.py``, ``block_sparsity.py``). Masks of every form compile for Hopper and Blackwell
(torch 2.13, 4.0.0b36, CuTe DSL 4.8.1, 21 November 2026); nothing has run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from gnaflex import flex
from gnaflex.advice import PERMUTE_PAIRS
from gnaflex.compiled import captured_tensors
from gnaflex.cuts import Cuts
from gnaflex.forms import reason_against
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord
from gnaflex.order import Document, Order, order_of
from gnaflex.planner import Plan
from gnaflex.spec import GNA
from gnaflex.tiles import Tile

if TYPE_CHECKING:
    from gnaflex.dispatch import Call

log = logging.getLogger("gnaflex")

OPTION = {"BACKEND": "FLASH"}
NEEDS_TORCH = (2, 13)  # of older ones the source was not read; BACKEND itself came with 2.10
HOPPER, BLACKWELL = 128, 256  # query rows of a thread block, of which a mask's blocks must be multiples
Q_ROWS = {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL}  # by compute capability; 12.x knows no block lists
KV_ROWS = 128
HEAD_DIMS = range(16, 129, 8)  # wider ones take narrower key tiles, or have no backward with block lists
FORMS = ("interval", "table")
# A pair of a partial block whose mask is evaluated pair by pair, by one of a full block; assumed, no GPU yet.
PAIR_BY_PAIR = 2


# ---- the machine -------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def obstacle(device: torch.device) -> str:
    """Why FLASH runs nothing on a device, or ""."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU of the Blackwell or Hopper family, the query is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in Q_ROWS:
        return (
            "it needs a GPU of compute capability 10, 11 (Blackwell) or 9 (Hopper): "
            f"{device} has {major}.{minor}"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < NEEDS_TORCH:
        return f"it needs torch {'.'.join(map(str, NEEDS_TORCH))} or newer: this is {torch.__version__}"
    if not _installed():
        return "flash-attn-4 is not installed: pip install --pre flash-attn-4"
    return ""


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # an older flash_attn that does not load
        return False


@lru_cache(maxsize=32)
def q_rows(device: torch.device) -> int:
    """Query rows of a block; those of Blackwell where there is no such GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return BLACKWELL
    return Q_ROWS.get(torch.cuda.get_device_capability(device)[0], BLACKWELL)


def leads(device: torch.device) -> bool:
    """Whether "auto" may take FLASH on a device."""
    return not obstacle(device) and q_rows(device) == BLACKWELL


def options_of(call: Call) -> dict[str, Any]:
    """The kernel_options that ask torch for FLASH. It checks them itself, but ignores them on a CPU."""
    if call.query.device.type != "cuda":
        raise NotImplementedError("backend 'flash' needs an NVIDIA GPU. Write backend=\"flex\".")
    return {**(call.kernel_options or {}), **OPTION}


# ---- what speaks against a call ----------------------------------------------------------------------


def unsupported_reasons(call: Call) -> Iterator[str]:
    """Every reason why FLASH cannot run a call. What is cheap to tell comes first."""
    query, value = call.query, call.value
    yield from known_reasons(call.record, query.device, query.dtype, (query.shape[-1], value.shape[-1]))
    yield from _of_arguments(call)
    yield from _of_gradients(call)


def known_reasons(
    record: MaskRecord | None, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]
) -> Iterator[str]:
    """The reasons that need no tensors: those of the machine, the kind of tensors and the mask."""
    if reason := obstacle(device):
        yield reason
    if dtype not in (torch.bfloat16, torch.float16):
        yield f"it computes in bfloat16 and float16: the query is {str(dtype).removeprefix('torch.')}"
    if wrong := sorted(set(head_dims) - set(HEAD_DIMS)):
        found = " and ".join(map(str, wrong))
        yield f"head_dim must be a multiple of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}: got {found}"
    if record is not None:
        yield from _of_mask(record, q_rows(device))


def _of_mask(record: MaskRecord, rows: int) -> Iterator[str]:
    if record.form not in FORMS:
        yield (
            f'it takes masks of intervals or tables: this one is form="{record.form}". '
            f'Write gnaflex.block_mask(..., form="{form_of(record.orders, rows)}")'
        )
    assert record.block_size is not None
    q, kv = record.block_size
    if q % rows or kv != KV_ROWS:
        yield (
            f"it takes blocks of ({rows}, {KV_ROWS}) tokens: those of the mask have ({q}, {kv}). "
            f"Write gnaflex.block_mask(..., {_blocks_as_code(record.order, rows)})"
        )


def _of_lengths(cuts: Cuts | None) -> Iterator[str]:
    """A read at a constant index, which a single row becomes, is code that does not build (torch 2.13)."""
    for name in ("text_valid", "padding"):
        lengths = None if cuts is None else getattr(cuts, name)
        if lengths is not None and len(lengths) == 1:
            yield f"{name} of one row does not compile for it: give a row for each of several batch entries"


def _blocks_as_code(order: Order, rows: int) -> str:
    if not order.is_tiled:
        return f"block_size=({rows}, {KV_ROWS})"
    _, q_tile, kv_tile = best_tiles(order.documents[0].spec, rows)
    return f"q_tile={q_tile}, kv_tile={kv_tile}"


def _of_arguments(call: Call) -> Iterator[str]:
    if call.block_mask is not None and call.record is None:
        yield (
            "the mask was not made by gnaflex: torch's own flex_attention takes it, with "
            f"kernel_options={OPTION}"
        )
    if 0 in call.query.shape or 0 in call.key.shape:
        yield "it takes no empty tensors"
    options = dict(call.kernel_options or {})
    if options.pop("BACKEND", "FLASH") != "FLASH":
        assert call.kernel_options is not None
        yield f"kernel_options ask for BACKEND={call.kernel_options['BACKEND']!r}"
    if options:
        yield f"kernel_options {', '.join(sorted(options))} are those of Triton's kernels: leave them out"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"
    if call.record is not None:
        yield from _of_lengths(call.record.cuts)


def _of_gradients(call: Call) -> Iterator[str]:
    mod = call.score_mod
    if mod is not None and any(x.requires_grad for x in captured_tensors(mod)):
        yield "it has no gradients for tensors that a score_mod captures: .detach() them"
    if not (torch.is_grad_enabled() and call.needs_grad):
        return
    if call.aux is not None and call.aux.lse:
        yield "it has no gradients through the log-sum-exp: leave return_lse out"
    strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled() and strict and call.record is not None:
        yield "its backward with block lists is not deterministic, which torch was told to be"


def cautions(call: Call) -> Iterator[str]:
    """Why "auto" goes past FLASH for a call that it could run."""
    if q_rows(call.query.device) == HOPPER:
        yield "on Hopper it evaluates masks pair by pair, as FlexAttention's own kernels do; not timed yet"
    if call.score_mod is not None:
        yield "only trying tells whether a score_mod compiles for it"
    if call.record is not None and call.record.cuts is not None and call.record.cuts.where is not None:
        yield "only trying tells whether where= compiles for it"
    if torch.is_grad_enabled() and call.needs_grad:
        yield "only trying tells whether its backward compiles, which comes too late to take another"
    if why := _broken.get(_kind(call)):
        yield f"it failed before on such a call: {why}"


_broken: dict[Hashable, str] = {}  # kinds of calls that failed, and why


def _kind(call: Call) -> Hashable:
    """What a failure of one call says about others."""
    query, record = call.query, call.record
    mask = None
    if record is not None:
        order = record.order
        mask = record.form, record.block_size, order.is_tiled, order.has_text, record.cuts is not None
    return query.device, query.dtype, query.shape[-1], call.value.shape[-1], call.enable_gqa, mask


def gave_up(call: Call, error: Exception) -> bool:
    """Remember that a call of "auto" failed, so that such calls go elsewhere, and say so. A lack of memory
    says nothing about FLASH."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    log.warning('gnaflex: FlexAttention\'s FLASH backend failed, "auto" goes on without it: %s', why)
    _broken[_kind(call)] = why
    return True


# ---- masks that suit it ------------------------------------------------------------------------------


def form_of(orders: tuple[Order, ...], rows: int = BLACKWELL) -> str:
    """The form of a mask that costs least. On Blackwell torch turns an OR of at most 8 intervals of keys,
    read from tables by the query, into 32 pairs at a time; all else is evaluated pair by pair."""
    return "interval" if rows == BLACKWELL and reason_against("interval", orders) is None else "table"


@lru_cache(maxsize=64)
def cheapest_layout(spec: GNA, rows: int) -> Layout:
    """The token order with the least work, by exact counts of full and partial blocks of ``rows`` queries and
    128 keys, and of permuted tokens."""
    order = order_of(spec)
    form = form_of((order,), rows)
    counted = flex.pending_lists(MaskRecord((order,), form, (rows, KV_ROWS)), order, (False,))
    partial, full = (int(one.counts.sum()) for one in counted)
    cost, q_tile, kv_tile = best_tiles(spec, rows)
    return Layout(spec, q_tile, kv_tile) if cost < _pairs(full, partial, form, rows) else Layout(spec)


@lru_cache(maxsize=64)
def best_tiles(spec: GNA, rows: int) -> tuple[int, Tile, Tile]:
    """Of all tiles of ``rows`` queries and 128 keys those with the least work, in pairs of a full block."""
    return min((_cost(spec, rows, *tiles), *tiles) for tiles in _tiles(spec.rank, rows))


def _cost(spec: GNA, rows: int, q_tile: Tile, kv_tile: Tile) -> int:
    layout, counts = Layout(spec, q_tile, kv_tile), Plan(spec, q_tile, kv_tile, "static")
    full = counts.full_tiles
    form = form_of((Order((Document(layout),)),), rows)
    work = _pairs(full, counts.touched_tiles - full, form, rows)
    return work + layout.num_queries * PERMUTE_PAIRS


def _pairs(full: int, partial: int, form: str, rows: int) -> int:
    return (full + partial * (1 if form == "interval" else PAIR_BY_PAIR)) * rows * KV_ROWS


@lru_cache(maxsize=16)
def _tiles(rank: int, rows: int) -> tuple[tuple[Tile, Tile], ...]:
    """Every box of 128 tokens, with every box of ``rows`` that holds it once or twice along one axis."""
    steps = [2**n for n in range(KV_ROWS.bit_length())]
    found = []
    for kv in itertools.product(steps, repeat=rank):
        if math.prod(kv) != KV_ROWS:
            continue
        for axis in range(rank) if rows > KV_ROWS else (0,):
            q = tuple(n * rows // KV_ROWS if a == axis else n for a, n in enumerate(kv))
            found.append((q, kv))
    return tuple(found)

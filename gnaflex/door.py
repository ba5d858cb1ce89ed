"""The door: ``flex_attention`` and ``attention``, which backend runs a call, and why not each of the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from gnaflex import compiled, flex, gather, operators, reference
from gnaflex.layout import Layout, from_order, to_order
from gnaflex.mask import MaskRecord, ScoreMod, choose_form
from gnaflex.spec import GNA, GNAError
from gnaflex.tiles import touched_blocks

BACKENDS = ("cuda", "flex", "sdpa", "reference")
AUTO = ("cuda", "flex", "sdpa")  # what "auto" tries, in this order
# Permuting one token of q, k, v and o costs about as much as this many query-key pairs: 8 passes over its
# row at 10 GB/s against 4 FLOP per pair and channel at 100 GFLOP/s (two CPU cores; GPUs have a like ratio).
PERMUTE_PAIRS = 128


class Call(NamedTuple):
    """One attention call in [batch, heads, tokens, head_dim], tokens in the mask's own order."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: ScoreMod | None
    block_mask: BlockMask | None
    record: MaskRecord | None
    scale: float | None
    enable_gqa: bool
    kernel_options: dict[str, Any] | None
    aux: AuxRequest | None

    @property
    def needs_grad(self) -> bool:
        return self.query.requires_grad or self.key.requires_grad or self.value.requires_grad


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention``, compiled by itself and dispatched to the fastest
    backend that can run the call.

    Args:
        query: [batch, heads, tokens, head_dim]; key, value: the same with key heads (fewer with
            ``enable_gqa``) and, for the value, its own head_dim. Any strides. Tokens lie in the order of
            the mask; nothing is permuted.
        score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, return_aux: as in torch. Indices
            that a score_mod sees count in the order of the mask.
        backend: "auto", or one of "cuda", "flex" (FlexAttention, compiled standalone), "sdpa" (the key box of
            every query tile gathered, then scaled_dot_product_attention) and "reference" (dense, float64).
            One asked for by name never falls back.

    Returns:
        The output in the dtype of the query (under autocast: the autocast dtype, as with SDPA); with
        ``return_lse`` also the log-sum-exp [batch, heads, tokens], natural logarithm, float32.

    Raises:
        GNAError: tensors and mask do not fit.
        NotImplementedError: the backend cannot run the call; the message lists every reason.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((8, 8), window=4, stride=4, device="cpu")
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> gnaflex.flex_attention(q, k, v, block_mask=bm, backend="sdpa").shape
        torch.Size([1, 2, 64, 16])
    """
    if return_lse and return_aux is not None:
        raise GNAError("return_lse and return_aux exclude each other. Write return_aux=AuxRequest(lse=True).")
    aux = AuxRequest(lse=True) if return_lse else return_aux
    query, key, value = _autocast(query, key, value)
    record = None if block_mask is None else flex.record_of(block_mask)
    call = Call(query, key, value, score_mod, block_mask, record, scale, enable_gqa, kernel_options, aux)
    _check(call)
    if torch.compiler.is_dynamo_compiling():
        out = _while_compiling(call, backend)
    else:
        out = _RUN[_choose(call, backend)](call)
    if return_lse:
        return out[0], out[1].lse
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on heads-last grids (NATTEN's layout), in the token order that costs least.

    Args:
        query: [batch, *shape, heads, head_dim]; key, value: the same, with fewer heads for GQA and, for the
            value, its own head_dim.
        window, stride, dilation, is_causal: the problem, as in :class:`GNA`; the shape is the tensors'.
        scale: of the scores; None is ``head_dim ** -0.5``.
        score_mod: FlexAttention's; it sees row-major token indices.
        backend: as in :func:`flex_attention`.
        return_lse: also return the log-sum-exp [batch, *shape, heads], natural logarithm, float32.

    Returns:
        [batch, *shape, heads, head_dim of the value], in the dtype of the query.

    Raises:
        GNAError: the problem or the tensors are refused.
        NotImplementedError: the backend cannot run the call; the message lists every reason.

    Example:
        >>> import torch, gnaflex
        >>> q, k, v = torch.randn(3, 1, 8, 8, 2, 16).unbind(0)
        >>> gnaflex.attention(q, k, v, window=(4, 4), stride=2, backend="sdpa").shape
        torch.Size([1, 8, 8, 2, 16])
    """
    if torch.compiler.is_dynamo_compiling():
        return _attention_while_compiling(
            query, key, value, (window, stride, dilation, is_causal), scale, score_mod, backend, return_lse
        )
    query, key, value = _autocast(query, key, value)
    shape = query.shape
    if len(shape) < 4 or key.shape[:-2] != shape[:-2] or value.shape[:-1] != key.shape[:-1]:
        raise GNAError(
            "query, key and value must share batch and grid, key and value the heads: got "
            f"{tuple(shape)}, {tuple(key.shape)}, {tuple(value.shape)}.\n"
            "  The layout is [batch, *shape, heads, head_dim]."
        )
    if backend not in ("auto", *BACKENDS):
        raise _unknown(backend)
    try:
        spec, layout = _problem(tuple(shape[1:-2]), window, stride, dilation, is_causal)
    except TypeError:  # lists and arrays do not hash
        spec = GNA(tuple(shape[1:-2]), window, stride, dilation, is_causal)
        layout = _cheapest_layout(spec)
    if score_mod is not None or backend in ("sdpa", "reference"):
        layout = Layout(spec)
    aux = AuxRequest(lse=True) if return_lse else None
    q, k, v = (_heads_first(x, layout) for x in (query, key, value))
    gqa = query.shape[-2] != key.shape[-2]
    lazy_mask, record = None, _record(layout)
    call = Call(q, k, v, score_mod, lazy_mask, record, scale, gqa, None, aux)
    name = _choose(call, backend)
    if name in ("cuda", "flex"):
        call = call._replace(block_mask=_mask(record, q.device))
    out, lse = _RUN[name](call) if aux else (_RUN[name](call), None)
    out = _heads_last(out, layout, shape)
    if lse is None:
        return out
    return out, _heads_last(lse.lse[..., None], layout, shape)[..., 0]


# ---- what a call needs -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _problem(
    shape: tuple[int, ...], window: Any, stride: Any, dilation: Any, is_causal: Any
) -> tuple[GNA, Layout]:
    spec = GNA(shape, window, stride, dilation, is_causal)
    return spec, _cheapest_layout(spec)


@lru_cache(maxsize=256)
def _cheapest_layout(spec: GNA) -> Layout:
    """The token order with the least work, by exact counts of 128-token blocks and of permuted tokens."""
    row_major = Layout(spec)
    block = flex.DEFAULT_BLOCK
    best, cost = row_major, flex.listed_blocks(_record(row_major)) * block**2
    for tile in _boxes(block, spec.rank):
        if any(extent >= 2 * -(-n // d) for extent, n, d in zip(tile, spec.shape, spec.dilation, strict=True)):
            continue
        blocks = touched_blocks(spec, tile, tile)
        candidate = Layout(spec, tile, tile)
        if blocks * block**2 + candidate.num_tokens * PERMUTE_PAIRS < cost:
            best, cost = candidate, blocks * block**2 + candidate.num_tokens * PERMUTE_PAIRS
    return best


@lru_cache(maxsize=16)
def _boxes(size: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Every box of ``size`` tokens."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return tuple(box for box in itertools.product(divisors, repeat=rank) if math.prod(box) == size)


@lru_cache(maxsize=256)
def _record(layout: Layout) -> MaskRecord:
    block = (flex.DEFAULT_BLOCK, flex.DEFAULT_BLOCK)
    return MaskRecord(layout, choose_form(layout, "auto"), block)


@lru_cache(maxsize=32)
def _mask(record: MaskRecord, device: torch.device) -> BlockMask:
    return flex.compile_mask(record, device)


def _heads_first(x: Tensor, layout: Layout) -> Tensor:
    """[batch, *shape, heads, d] to [batch, heads, tokens, d] in the order of the layout; a view if row-major."""
    if layout.q_tile is not None:
        x = to_order(x.flatten(1, -3), layout, 1)
    else:
        x = x.flatten(1, -3)
    return x.transpose(1, 2)


def _heads_last(x: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    x = x.transpose(1, 2)
    if layout.q_tile is not None:
        x = from_order(x, layout, 1)
    return x.unflatten(1, shape[1:-2])


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to SDPA: floating tensors but float64 to the autocast dtype."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check(call: Call) -> None:
    query, key, value = call.query, call.key, call.value
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise GNAError(
            "flex_attention takes [batch, heads, tokens, head_dim]: got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}.\n"
            "  For heads-last grids write gnaflex.attention(q, k, v, window)."
        )
    if call.block_mask is None:
        return
    device = call.block_mask.kv_num_blocks.device
    if device != query.device:
        raise GNAError(
            f"mask and tensors must be on one device: the mask is on {device}, the query on {query.device}.\n"
            f'  Write block_mask.to("{query.device}").'
        )
    rows, columns = call.block_mask.seq_lengths
    if (query.shape[-2], key.shape[-2]) != (rows, columns):
        order = call.record and call.record.layout.q_tile
        hint = "Bring them into the mask's order: gnaflex.permute(x, block_mask)." if order else "Build one for them."
        raise GNAError(
            f"the mask is for {rows} queries and {columns} keys, the tensors have {query.shape[-2]} and "
            f"{key.shape[-2]}.\n  {hint}"
        )


# ---- which backend -----------------------------------------------------------------------------------


def _unknown(backend: str) -> GNAError:
    return GNAError(f'unknown backend {backend!r}. Write backend="auto", or one of {BACKENDS}.')


def _choose(call: Call, backend: str) -> str:
    if backend == "auto":
        for name in AUTO:
            if next(_REASONS[name](call), None) is None:
                return name
        reasons = {name: list(_REASONS[name](call)) for name in AUTO}
        raise NotImplementedError("no backend runs this call.\n" + _listed(reasons))
    if backend not in BACKENDS:
        raise _unknown(backend)
    reasons = {backend: [r for r in _REASONS[backend](call) if not r.startswith(_AUTO_ONLY)]}
    if reasons[backend]:
        able = [name for name in BACKENDS if next(_REASONS[name](call), None) is None]
        remedy = f'Write backend="{able[0]}".' if able else "No backend runs it."
        raise NotImplementedError(f"backend {backend!r} cannot run this call.\n{_listed(reasons)}\n  {remedy}")
    return backend


_AUTO_ONLY = '"auto" does not take it: '


def _listed(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {'; '.join(why) or 'runs'}" for name, why in reasons.items())


def _cuda_reasons(call: Call) -> Iterator[str]:
    from gnaflex.cuda_backend import unsupported_reasons

    yield from unsupported_reasons(call.query)


def _flex_reasons(call: Call) -> Iterator[str]:
    kind = call.query.device.type
    if kind in ("cpu", "mps"):
        if call.needs_grad and torch.is_grad_enabled():
            yield f"FlexAttention has no backward on {kind}"
        if call.aux is not None:
            yield f"FlexAttention returns no log-sum-exp on {kind} when compiled"
        if 0 in call.query.shape:
            yield "the CPU kernel takes no empty tensors"
    if kind == "cpu":
        if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            yield f"FlexAttention compiles for float32, bfloat16 and float16 on a CPU, not for {call.query.dtype}"
        if (need := _width_needed(call)) is not None:
            yield need
        if obstacle := compiled.cpu_obstacle():
            yield obstacle


def _width_needed(call: Call) -> str | None:
    """The CPU kernel needs block lists as wide as there are key blocks; what that takes when they are not."""
    record = call.record
    if record is None or record.block_size is None:
        return None
    tokens = record.layout.num_tokens
    rows, columns = (-(-tokens // size) for size in record.block_size)
    gigabytes = 16 * rows * columns / 2**30
    width = columns if call.block_mask is None else call.block_mask.kv_indices.shape[-1]
    if width == columns and (call.block_mask is not None or gigabytes * 2**30 <= flex.FULL_WIDTH_BYTES["cpu"]):
        return None
    return (
        f"the CPU kernel needs block lists of full width, which take {gigabytes:.1f} GiB for {tokens} tokens "
        "(block_mask(..., full_width=True))"
    )


def _sdpa_reasons(call: Call) -> Iterator[str]:
    if call.record is None and (call.block_mask is not None or call.score_mod is not None):
        yield "the mask was not made by gnaflex"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"
    if call.query.device.type == "cpu" and (need := _width_needed(call)) is not None:
        yield f"{_AUTO_ONLY}{need}; it would take hours"


def _reference_reasons(call: Call) -> Iterator[str]:
    if call.record is None:
        yield "the mask was not made by gnaflex"
    elif call.record.layout.q_tile is not None:
        yield "it takes row-major masks only"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"


_REASONS: dict[str, Callable[[Call], Iterator[str]]] = {
    "cuda": _cuda_reasons,
    "flex": _flex_reasons,
    "sdpa": _sdpa_reasons,
    "reference": _reference_reasons,
}


@dataclass(frozen=True)
class Explanation:
    """Which backend "auto" takes for a call, and every reason against each of the others."""

    backend: str | None
    reasons: dict[str, list[str]] = field(hash=False)

    def __str__(self) -> str:
        head = f"backend: {self.backend or 'none'}"
        rest = {name: why for name, why in self.reasons.items() if name != self.backend}
        return f"{head}\n{_listed({name: why or ['runs, but comes later in the order'] for name, why in rest.items()})}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which backend :func:`flex_attention` takes for these tensors, and why not each of the others.

    Args are those of :func:`flex_attention`; nothing runs.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((8, 8), window=4, device="cpu")
        >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
        >>> print(gnaflex.explain(q, q, q, bm))
        backend: sdpa
          cuda: this release of gnaflex has no CUTLASS kernel yet; it needs an NVIDIA GPU of the Hopper or \
Blackwell family, the query is on cpu
          flex: FlexAttention has no backward on cpu
          reference: runs, but comes later in the order
    """
    query, key, value = _autocast(query, key, value)
    record = None if block_mask is None else flex.record_of(block_mask)
    aux = AuxRequest(lse=True) if return_lse else None
    gqa = query.shape[1] != key.shape[1]
    call = Call(query, key, value, score_mod, block_mask, record, None, gqa, None, aux)
    _check(call)
    reasons = {name: list(_REASONS[name](call)) for name in BACKENDS}
    chosen = next((name for name in AUTO if not reasons[name]), None)
    return Explanation(chosen, reasons)


# ---- running -----------------------------------------------------------------------------------------


def _run_flex(call: Call) -> Any:
    tensors = call.query, call.key, call.value
    if call.query.device.type != "cuda" and call.needs_grad:  # grad mode is off, yet torch would refuse
        tensors = tuple(x.detach() for x in tensors)  # type: ignore[assignment]
    return compiled.flex_attention(
        *tensors, call.score_mod, call.block_mask, call.scale, call.enable_gqa, call.kernel_options, call.aux
    )


def _run_sdpa(call: Call) -> Any:
    want_lse = call.aux is not None and call.aux.lse
    layout = call.record.layout if call.record else Layout(GNA(call.query.shape[-2], -1))
    out = gather.attention(
        call.query,
        call.key,
        call.value,
        layout,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
        score_mod=call.score_mod,
        return_lse=want_lse,
    )
    if call.aux is None:
        return out
    return out[0], AuxOutput(lse=out[1])


def _run_reference(call: Call) -> Any:
    assert call.record is not None
    spec = call.record.layout.spec
    q, k, v = (x.transpose(1, 2).unflatten(1, spec.shape) for x in (call.query, call.key, call.value))
    out, lse = reference.reference_attention(
        q, k, v, spec.window, spec.stride, spec.dilation, spec.is_causal,
        scale=call.scale, score_mod=call.score_mod, return_lse=True,
    )  # fmt: skip
    out = out.flatten(1, -3).transpose(1, 2)
    if call.aux is None:
        return out
    return out, AuxOutput(lse=lse.flatten(1, -2).transpose(1, 2))


def _run_cuda(call: Call) -> Any:
    raise NotImplementedError("this release of gnaflex has no CUTLASS kernel yet")


_RUN: dict[str, Callable[[Call], Any]] = {
    "cuda": _run_cuda,
    "flex": _run_flex,
    "sdpa": _run_sdpa,
    "reference": _run_reference,
}


# ---- inside a user's torch.compile -------------------------------------------------------------------


def _while_compiling(call: Call, backend: str) -> Any:
    """On a GPU FlexAttention is traced into the user's graph. On a CPU a graph that holds anything else beside
    it does not build, so the whole call becomes one opaque operator."""
    plain = call.score_mod is None and call.kernel_options is None and call.record is not None
    if not plain or (call.query.device.type == "cuda" and backend in ("auto", "flex")):
        return torch.nn.attention.flex_attention.flex_attention(
            call.query, call.key, call.value, score_mod=call.score_mod, block_mask=call.block_mask, scale=call.scale,
            enable_gqa=call.enable_gqa, kernel_options=call.kernel_options, return_aux=call.aux,
        )  # fmt: skip
    assert call.record is not None
    out, lse = operators.attend(
        call.query, call.key, call.value, operators.encoded(call.record), call.scale, call.aux is not None, backend
    )
    return (out, AuxOutput(lse=lse)) if call.aux is not None else out


def _attention_while_compiling(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: tuple[Any, ...],
    scale: float | None,
    score_mod: ScoreMod | None,
    backend: str,
    return_lse: bool,
) -> Any:
    if score_mod is not None:
        raise NotImplementedError(
            "gnaflex.attention with a score_mod cannot be traced by torch.compile.\n"
            "  Call it outside the compiled function, or use gnaflex.flex_attention with block_mask()."
        )
    query, key, value = _autocast(query, key, value)
    rank = query.dim() - 3
    fields = [operators.per_axis(value, rank) for value in problem]
    out, lse = operators.attend_grid(query, key, value, *fields, scale, return_lse, backend)
    return (out, lse) if return_lse else out

"""Backends: which can run a call, why not the others, and running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from gnaflex import compiled, gather, reference
from gnaflex.flex import FULL_WIDTH_BYTES
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord, ScoreMod
from gnaflex.spec import GNA, GNAError

BACKENDS = ("cuda", "flex", "sdpa", "reference")
AUTO = ("cuda", "flex", "sdpa")  # what "auto" tries, in this order


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
        """Whether some input asks for gradients."""
        return self.query.requires_grad or self.key.requires_grad or self.value.requires_grad


def known(backend: str) -> None:
    """Refuse a backend that does not exist."""
    if backend != "auto" and backend not in BACKENDS:
        raise GNAError(f'unknown backend {backend!r}. Write backend="auto", or one of {BACKENDS}.')


def reasons_against(call: Call, backends: tuple[str, ...]) -> dict[str, list[str]]:
    """Every reason against every backend; an empty list where it can run the call."""
    return {name: list(_REASONS[name](call)) for name in backends}


def choose(call: Call, backend: str) -> str:
    """The backend that runs a call; one asked for by name never falls back."""
    known(backend)
    if backend == "auto":
        for name in AUTO:
            if next(_REASONS[name](call), None) is None:
                return name
        raise NotImplementedError("no backend runs this call.\n" + _listed(reasons_against(call, AUTO)))
    why = [reason for reason in _REASONS[backend](call) if not reason.startswith(_AUTO_ONLY)]
    if not why:
        return backend
    able = [name for name in BACKENDS if next(_REASONS[name](call), None) is None]
    remedy = f'Write backend="{able[0]}".' if able else "No backend runs it."
    raise NotImplementedError(
        f"backend {backend!r} cannot run this call.\n{_listed({backend: why})}\n  {remedy}"
    )


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
            yield f"FlexAttention on a CPU compiles for float32, bfloat16, float16, not {call.query.dtype}"
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
    if width == columns and (call.block_mask is not None or gigabytes * 2**30 <= FULL_WIDTH_BYTES["cpu"]):
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
        return f"{head}\n{_listed({name: why or ['runs, but comes later'] for name, why in rest.items()})}"


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
    tensors = call.query, call.key, call.value
    q, k, v = (x.transpose(1, 2).reshape(-1, *spec.shape, x.shape[1], x.shape[3]) for x in tensors)
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


RUN: dict[str, Callable[[Call], Any]] = {
    "cuda": _run_cuda,
    "flex": _run_flex,
    "sdpa": _run_sdpa,
    "reference": _run_reference,
}

"""Backends: which can run a call, why not the others, and running it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from gnaflex import compiled, flash, gather, gather_cost, lanes, reference
from gnaflex.cuts import Cuts
from gnaflex.flex import FULL_WIDTH_BYTES, listed_blocks
from gnaflex.mask import MaskRecord, ScoreMod, conditions_of
from gnaflex.order import order_of
from gnaflex.spec import GNA, GNAError
from gnaflex.tables import MaskMod

BACKENDS = ("cuda", "flash", "flex", "sdpa", "reference")
AUTO = ("cuda", "flash", "flex", "sdpa")  # what "auto" tries, in this order
# Of FlexAttention's generated kernels, by that of a CUTLASS kernel on the same GPU; assumed, no GPU yet
FLEX_RATE = {"sm_90a": 0.6, "sm_100a": 0.4, "sm_103a": 0.4}


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
        """Whether some input, or a tensor that the score_mod captures, asks for gradients."""
        if self.query.requires_grad or self.key.requires_grad or self.value.requires_grad:
            return True
        mod = self.score_mod
        return mod is not None and any(x.requires_grad for x in compiled.captured_tensors(mod))


def known(backend: str) -> None:
    """Refuse a backend that does not exist."""
    if backend != "auto" and backend not in BACKENDS:
        raise GNAError(f'unknown backend {backend!r}. Write backend="auto", or one of {BACKENDS}.')


def reasons_against(call: Call, backends: tuple[str, ...]) -> dict[str, list[str]]:
    """Every reason against every backend; an empty list where it can run the call."""
    return {name: list(_REASONS[name](call)) for name in backends}


def runs(call: Call, backend: str) -> bool:
    """Whether a backend can run a call, and "auto" would take it."""
    return next(_REASONS[backend](call), None) is None


def choose(call: Call, backend: str) -> str:
    """The backend that runs a call; one asked for by name never falls back."""
    known(backend)
    if backend == "auto":
        for name in AUTO:
            if runs(call, name):
                return name
        raise NotImplementedError("no backend runs this call.\n" + _listed(reasons_against(call, AUTO)))
    why = _obstacles(call, backend)
    if not why:
        return backend
    able = [name for name in BACKENDS if not _obstacles(call, name)]
    remedy = f'Write backend="{able[0]}".' if able else "No backend runs it."
    raise NotImplementedError(
        f"backend {backend!r} cannot run this call.\n{_listed({backend: why})}\n  {remedy}"
    )


def _obstacles(call: Call, backend: str) -> list[str]:
    """Reasons against a backend that was asked for by name."""
    return [reason for reason in _REASONS[backend](call) if not reason.startswith(_AUTO_ONLY)]


_AUTO_ONLY = '"auto" does not take it: '


def _listed(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {'; '.join(why) or 'runs'}" for name, why in reasons.items())


def _cuda_reasons(call: Call) -> Iterator[str]:
    from gnaflex.cuda_backend import not_ready, unsupported_reasons

    could = True
    for reason in unsupported_reasons(call):
        could = False
        yield reason
    if could:
        if why := cheaper_masked(call.record, call.record, call.query.device):
            yield why
        yield from not_ready(call)


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for a device."""
    from gnaflex.cuda_backend import machine

    return not machine.obstacle(device)


def cheaper_masked(record: MaskRecord | None, masked: MaskRecord | None, device: torch.device) -> str:
    """Why FlexAttention with the mask ``masked`` is likely faster than a kernel on the boxes of ``record``,
    which may be thin; or "". Of a device that kernels run on."""
    from gnaflex.cuda_backend import problem_of
    from gnaflex.cuda_backend.machine import architecture

    problem = problem_of(record)
    if masked is None or isinstance(problem, str):
        return ""
    # where functools.cached_property would keep it
    known: dict[str, str] = masked.__dict__.setdefault("cheaper_masked", {})
    arch = architecture(device)
    if arch not in known:
        known[arch] = _comparison(masked, problem.boxes_for(arch), FLEX_RATE[arch])
    return known[arch]


def _comparison(record: MaskRecord, boxes: Any, rate: float) -> str:
    """By exact counts of the pairs that each computes, and FlexAttention's rate."""
    if boxes is None or record.block_size is None:
        return ""
    ours = boxes.touched_tiles * boxes.q_rows * math.prod(boxes.kv_tile)
    theirs = listed_blocks(record) * math.prod(record.block_size)
    if ours * rate <= theirs:
        return ""
    return (
        f"{_AUTO_ONLY}boxes of {boxes.q_tile} queries fill {math.prod(boxes.q_tile)} of {boxes.q_rows} rows, "
        f"so that it computes {ours:.2g} pairs per head, FlexAttention with masks {theirs:.2g}"
    )


def _flash_reasons(call: Call) -> Iterator[str]:
    yield from flash.unsupported_reasons(call)
    yield from (f"{_AUTO_ONLY}{why}" for why in flash.cautions(call))


def _flex_reasons(call: Call) -> Iterator[str]:
    kind = call.query.device.type
    if kind in ("cpu", "mps"):
        if torch.is_grad_enabled() and call.needs_grad:
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
        elif why := gather_cost.cheaper(call):
            yield f"{_AUTO_ONLY}{why}"


def _width_needed(call: Call) -> str | None:
    """The CPU kernel needs block lists as wide as there are key blocks; what that takes when they are not."""
    record = call.record
    if record is None or record.block_size is None:
        return None
    tokens = record.order.num_queries, record.order.num_keys
    rows, columns = (-(-n // size) for n, size in zip(tokens, record.block_size, strict=True))
    gigabytes = 16 * rows * columns * max(len(record.heads), 1) / 2**30
    width = columns if call.block_mask is None else call.block_mask.kv_indices.shape[-1]
    if width == columns and (call.block_mask is not None or gigabytes * 2**30 <= FULL_WIDTH_BYTES["cpu"]):
        return None
    return (
        f"the CPU kernel needs block lists of full width, which take {gigabytes:.1f} GiB for {tokens[0]} "
        "tokens (block_mask(..., full_width=True))"
    )


def _sdpa_reasons(call: Call) -> Iterator[str]:
    if call.record is None and (call.block_mask is not None or call.score_mod is not None):
        yield "the mask was not made by gnaflex"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"
    if call.query.device.type == "cpu" and (hours := gather_cost.hours(call)) > 1:
        yield f'{_AUTO_ONLY}it would take about {hours:.0f} hours. backend="sdpa" does it all the same'


def _reference_reasons(call: Call) -> Iterator[str]:
    if call.record is None:
        yield "the mask was not made by gnaflex"
    else:
        documents = call.record.order.documents
        if call.record.order.is_tiled:
            yield "it takes row-major masks only"
        if documents[0].layout.slab is not None:
            yield "it takes whole grids, not shards"
        if len({(d.prefix, d.suffix) for d in documents}) > 1:
            yield "it takes packed grids with the same extra tokens only"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"


_REASONS: dict[str, Callable[[Call], Iterator[str]]] = {
    "cuda": _cuda_reasons,
    "flash": _flash_reasons,
    "flex": _flex_reasons,
    "sdpa": _sdpa_reasons,
    "reference": _reference_reasons,
}


@dataclass(frozen=True)
class Explanation:
    """Which backend "auto" takes for a call, every reason against each other one, and notes on the mask."""

    backend: str | None
    reasons: dict[str, list[str]] = field(hash=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"backend: {self.backend or 'none'}"
        rest = {name: why for name, why in self.reasons.items() if name != self.backend}
        listed = _listed({name: why or ["runs, but comes later"] for name, why in rest.items()})
        return "\n".join([head, listed, *self.notes])


# ---- running -----------------------------------------------------------------------------------------


def run(call: Call, backend: str) -> Any:
    """Run a call by the backend that takes it."""
    name = choose(call, backend)
    try:
        return RUN[name](call)
    except Exception as error:
        if not goes_on(call, name, backend, error):
            raise
    return run(call, backend)


def goes_on(call: Call, name: str, backend: str, error: Exception) -> bool:
    """Whether "auto" goes on without a backend that failed: FLASH, which only trying shows to compile."""
    return (backend, name) == ("auto", "flash") and flash.gave_up(call, error)


def _run_flex(call: Call) -> Any:
    tensors = call.query, call.key, call.value
    if call.query.device.type != "cuda" and call.needs_grad:  # grad mode is off, yet torch would refuse
        tensors = tuple(x.detach() for x in tensors)  # type: ignore[assignment]
    if call.query.device.type == "cpu":  # torch 2.9's kernel refuses one tensor in several places
        query, key, value = tensors
        key = key.clone() if key is query else key
        tensors = query, key, value.clone() if value is query or value is tensors[1] else value
    return compiled.flex_attention(
        *tensors, call.score_mod, call.block_mask, call.scale, call.enable_gqa, call.kernel_options, call.aux
    )


def _run_flash(call: Call) -> Any:
    options = {**(call.kernel_options or {}), **flash.OPTION}
    return compiled.flex_attention(
        *call[:3], call.score_mod, call.block_mask, call.scale, call.enable_gqa, options, call.aux
    )


def _run_sdpa(call: Call) -> Any:
    record = call.record
    orders = record.orders if record else (order_of(GNA(call.query.shape[-2], -1)),)
    lengths, where = (None, None) if record is None else conditions_of(record, call.query.device)
    attend = functools.partial(
        gather.attention,
        scale=call.scale,
        visible=lengths,
        return_lse=call.aux is not None and call.aux.lse,
    )
    mod = _under(where, call.score_mod)
    if record is None or not record.heads:
        tensors = call.query, call.key, call.value
        out = attend(*tensors, orders[0], enable_gqa=call.enable_gqa, score_mod=mod)
    else:
        out = _by_class(call, record, mod, attend)
    if call.aux is None:
        return out
    return out[0], AuxOutput(lse=out[1])


def _under(where: MaskMod | None, mod: ScoreMod | None) -> ScoreMod | None:
    """A score_mod that is -inf where the user's mask_mod forbids the pair."""
    if where is None:
        return mod

    def visible_score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        out = score if mod is None else mod(score, b, h, q_idx, kv_idx)
        return torch.where(where(b, h, q_idx, kv_idx), out, -float("inf"))

    return visible_score_mod


def _by_class(call: Call, record: MaskRecord, mod: ScoreMod | None, attend: Callable[..., Any]) -> Any:
    """Heads of equal windows together; the key heads of a group are repeated, as its heads may part."""
    device, group = call.query.device, call.query.shape[1] // call.key.shape[1]
    parts, order = [], []
    for which, problem in enumerate(record.orders):
        heads = [head for head, mine in enumerate(record.heads) if mine == which]
        of_query = torch.tensor(heads, device=device)
        of_key = of_query // group
        here = (call.query[:, of_query], call.key[:, of_key], call.value[:, of_key])
        parts.append(attend(*here, problem, enable_gqa=False, score_mod=_of_heads(mod, of_query)))
        order += heads
    back = torch.tensor(order, device=device).argsort()
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)[:, back]
    return tuple(torch.cat(part, 1)[:, back] for part in zip(*parts, strict=True))


def _of_heads(mod: ScoreMod | None, heads: Tensor) -> ScoreMod | None:
    """A score_mod for some heads only, which it still sees by their own numbers."""
    if mod is None:
        return None
    return lambda score, b, h, q_idx, kv_idx: mod(score, b, heads[h], q_idx, kv_idx)


def _run_reference(call: Call) -> Any:
    record = call.record
    assert record is not None
    orders = [record.orders[which] for which in record.heads or (0,)]
    document, cuts = record.order.documents[0], record.cuts or Cuts()
    out, lse = reference.masked_attention(
        call.query, call.key, call.value, [[one.spec for one in order.documents] for order in orders],
        prefix=document.prefix, suffix=document.suffix, extra_kv=document.extra_kv,
        text_valid=cuts.text_valid, padding=cuts.padding, where=cuts.where,
        scale=call.scale, score_mod=call.score_mod, return_lse=True,
    )  # fmt: skip
    if call.aux is None:
        return out
    return out, AuxOutput(lse=lse)


def kernel_advice(record: MaskRecord, device: torch.device) -> Iterator[str]:
    """What is known of a device's kernels, and the nearest problem that a kernel would run, where this one
    would need masks."""
    from gnaflex.cuda_backend import machine, nearest, problem_of
    from gnaflex.cuda_backend.config import tried

    if not machine.obstacle(device):
        yield f"{tried(machine.architecture(device))}; each proves itself on this machine before it is used"
    problem = problem_of(record)
    if not isinstance(problem, str) and problem.boxes is None and (near := nearest(problem.spec)):
        yield f"kernels: the nearest perfectly block-sparse problem with this window is {near!r}"


def kernel_lane(call: Call) -> lanes.Ready:
    """How the "cuda" backend runs a call that nothing speaks against, and all that are like it."""
    from gnaflex.cuda_backend import lane

    found: lanes.Ready = lane(call)
    return found


def _run_cuda(call: Call) -> Any:
    lane = kernel_lane(call)
    if call.block_mask is not None and runs(call, "cuda"):  # by name it may run what "auto" does not take
        lanes.keep(call.block_mask, call[:3], call.scale, call.enable_gqa, lane)
    out, lse = lane(*call[:3])
    return out if call.aux is None else (out, AuxOutput(lse=lse))


RUN: dict[str, Callable[[Call], Any]] = {
    "cuda": _run_cuda,
    "flash": _run_flash,
    "flex": _run_flex,
    "sdpa": _run_sdpa,
    "reference": _run_reference,
}

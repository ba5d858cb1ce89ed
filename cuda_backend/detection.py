"""Which calls a kernel runs, and every reason why it does not run the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from gnaflex.cuda_backend import gate, machine
from gnaflex.cuda_backend.config import HEAD_DIMS
from gnaflex.cuda_backend.fast_path import DTYPE_NAMES, Lane, Problem, is_prepared, layout_obstacle, prepared
from torch import Tensor
from torch.nn import Parameter

from gnaflex.lanes import looked_into
from gnaflex.planner import Plan
from gnaflex.spec import GNA

if TYPE_CHECKING:
    from gnaflex.dispatch import Call


def unsupported_reasons(call: Call) -> Iterator[str]:
    """Every reason why no CUTLASS kernel could run a call; :func:`not_ready` asks for the kernel itself. What
    is cheap to tell comes first."""
    query, value = call.query, call.value
    yield from known_reasons(call.record, query.device, query.dtype, (query.shape[-1], value.shape[-1]))
    yield from _of_tensors(call)
    yield from _of_arguments(call)


def not_ready(call: Call) -> Iterator[str]:
    """Why the kernel of a call, which it could run, may not run it now. It is compiled, proved and loaded by
    asking."""
    problem = problem_of(call.record)
    assert not isinstance(problem, str)
    yield from gate.reasons(problem, call.query)
    if not is_prepared(problem, call.query.device) and machine.is_capturing():
        yield "its work lists are not on the GPU yet, and a CUDA graph is being captured: call it once before"


def known_reasons(
    record: Any, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]
) -> Iterator[str]:
    """The reasons that need no tensors: those of the machine, the kind of tensors and the problem."""
    if reason := machine.obstacle(device):
        yield reason
    if dtype not in DTYPE_NAMES:
        yield f"it computes in bfloat16 and float16: the query is {str(dtype).removeprefix('torch.')}"
    if len(set(head_dims)) > 1:
        yield f"query and value must share head_dim: got {head_dims[0]} and {head_dims[1]}"
    if not set(head_dims) <= set(HEAD_DIMS):
        found = " and ".join(str(n) for n in sorted(set(head_dims) - set(HEAD_DIMS)))
        yield f"head_dim must be {' or '.join(map(str, HEAD_DIMS))}: got {found}"
    problem = problem_of(record)
    if isinstance(problem, str):
        yield problem
    elif problem.boxes_on(device) is None:
        yield not_block_sparse(problem.spec)


def lane(call: Call) -> Lane:
    """How to run a call that nothing speaks against, and all that are like it."""
    problem = problem_of(call.record)
    assert call.record is not None
    assert not isinstance(problem, str)
    launches, everything = prepared(problem, call.query.device)
    cuts = call.record.cuts
    valid = everything if cuts is None or cuts.text_valid is None else cuts.text_valid
    kernel = gate.launcher(problem, call.query)
    return Lane(call.query, call.key, call.value, launches, kernel, call.scale, valid)


def _of_tensors(call: Call) -> Iterator[str]:
    query, value = call.query, call.value
    if looked_into():
        yield "torch.func, forward-mode derivatives and tracers look inside a call"
        return  # such tensors have no memory
    for what, x in (("query", query), ("key", call.key), ("value", value)):
        if type(x) not in (Tensor, Parameter):
            yield f"it reads plain tensors: the {what} is a {type(x).__name__}"
            return  # it may have no memory
    if query.shape[1] != call.key.shape[1] and not call.enable_gqa:
        yield f"query and key have {query.shape[1]} and {call.key.shape[1]} heads: write enable_gqa=True"
    for what, x in (("query", query), ("key", call.key), ("value", value)):
        if reason := layout_obstacle(what, x):
            yield reason


def _of_arguments(call: Call) -> Iterator[str]:
    if call.score_mod is not None:
        yield "it knows no score_mod"
    if call.kernel_options:
        yield "kernel_options are FlexAttention's"
    if call.aux is not None and call.aux.max_scores:
        yield "it does not return max_scores"
    if torch.is_grad_enabled() and call.needs_grad:
        yield "it has no backward: forward and backward go to FlexAttention together"


def problem_of(record: Any) -> Problem | str:
    """What a mask's record asks a kernel to compute, or the reason why no kernel can."""
    if record is None:
        return "the mask was not made by gnaflex, or there is none"
    known = record.__dict__  # where functools.cached_property would keep it
    if "kernel_problem" not in known:
        known["kernel_problem"] = _of_record(record)
    problem: Problem | str = known["kernel_problem"]
    return problem


def _of_record(record: Any) -> Problem | str:
    if len(record.orders) > 1:
        return "windows differ among heads"
    documents, cuts = record.order.documents, record.cuts
    if len(documents) > 1:
        return "several grids are packed"
    (document,) = documents
    if record.order.is_tiled:
        return (
            "the mask is tile-major; kernels read row-major tokens as they lie: leave out q_tile and kv_tile"
        )
    if document.layout.slab is not None:
        return "the mask is a shard of a grid"
    for name in ("where", "padding"):
        if cuts is not None and getattr(cuts, name) is not None:
            return f"the mask has {name}=, which asks for a test per pair"
    return Problem(document.spec, document.prefix, document.suffix, document.extra_kv)


@lru_cache(maxsize=64)
def not_block_sparse(spec: GNA) -> str:
    """That no choice of boxes does without masks."""
    return f"{spec!r} needs masks inside tiles, whatever boxes of tokens the kernel takes"


@lru_cache(maxsize=64)
def nearest(spec: GNA) -> GNA | None:
    """The problem with the least change of strides whose boxes waste at most half of the kernel's work, None
    where no such strides exist; windows stay. A stride twice as long counts as much as one half as long."""
    choices = [sorted({axis.stride, *(2**i for i in range(axis.window.bit_length()))}) for axis in spec.axes]

    def distance(strides: tuple[int, ...]) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(strides, spec.stride, strict=True))

    found: list[Plan] = []
    least = math.inf
    for strides in sorted(itertools.product(*choices), key=distance):
        if found and distance(strides) > least:
            break
        boxes = Problem(GNA(spec.shape, spec.window, strides, spec.dilation, spec.is_causal)).boxes
        if boxes is not None and boxes.work_speedup >= boxes.flop_speedup / 2:
            found.append(boxes)
            least = distance(strides) + 1e-9
    best = max(found, key=lambda one: (round(one.work_speedup, 6), -max(one.spec.stride)), default=None)
    return None if best is None else best.spec

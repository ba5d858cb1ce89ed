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
from gnaflex.cuda_backend.fast_path import DTYPE_NAMES, Problem, attend, layout_obstacle
from gnaflex.cuda_backend.tile_walk import Q_ROWS
from torch import Tensor

from gnaflex.spec import GNA

if TYPE_CHECKING:
    from gnaflex.dispatch import Call


def unsupported_reasons(call: Call) -> Iterator[str]:
    """Every reason why no CUTLASS kernel runs a call; none if one does. What is cheap to tell comes first."""
    if reason := machine.obstacle(call.query.device):
        yield reason
    yield from _of_tensors(call)
    yield from _of_arguments(call)
    problem = problem_of(call.record)
    if isinstance(problem, str):
        yield problem
    elif problem.boxes is None:
        yield not_block_sparse(problem.spec)
    elif not machine.obstacle(call.query.device) and not any(_of_tensors(call)):
        yield from gate.reasons(problem, call.query)


def run(call: Call, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """A call that nothing speaks against: output and natural log-sum-exp; ``valid`` as in :func:`attend`."""
    problem = problem_of(call.record)
    assert not isinstance(problem, str)
    kernel = gate.launcher(problem, call.query)
    out, lse = attend(call.query, call.key, call.value, problem, kernel, scale=call.scale, valid=valid)
    return out, lse


def _of_tensors(call: Call) -> Iterator[str]:
    query, value = call.query, call.value
    if query.dtype not in DTYPE_NAMES:
        yield f"it computes in bfloat16 and float16: the query is {str(query.dtype).removeprefix('torch.')}"
    head_dims = {query.shape[-1], value.shape[-1]}
    if len(head_dims) > 1:
        yield f"query and value must share head_dim: got {query.shape[-1]} and {value.shape[-1]}"
    if not head_dims <= set(HEAD_DIMS):
        yield f"head_dim must be {' or '.join(map(str, HEAD_DIMS))}: got {query.shape[-1]}"
    for what, x in (("query", query), ("key", call.key), ("value", value)):
        if reason := layout_obstacle(what, x):
            yield reason


def _of_arguments(call: Call) -> Iterator[str]:
    if call.score_mod is not None:
        yield "it knows no score_mod"
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

    for strides in sorted(itertools.product(*choices), key=distance):
        other = GNA(spec.shape, spec.window, strides, spec.dilation, spec.is_causal)
        if math.prod(strides) >= Q_ROWS // 2 or any(
            axis.window == axis.group_length(0) for axis in other.axes
        ):
            boxes = Problem(other).boxes
            if boxes is not None and boxes.work_speedup >= boxes.flop_speedup / 2:
                return other
    return None

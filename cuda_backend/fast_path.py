"""The host side of a kernel: a problem's boxes and numbers, prepared once, and a call that launches them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from gnaflex.cuda_backend import machine, tile_walk
from gnaflex.cuda_backend.abi import Launcher
from gnaflex.cuda_backend.config import DTYPES, KernelConfig
from torch import Tensor

from gnaflex.planner import Plan
from gnaflex.spec import GNA

ALIGNMENT = 16  # bytes: what TMA asks of addresses and strides
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
assert set(DTYPE_NAMES.values()) == set(DTYPES)
LOG2_E = math.log2(math.e)


class Problem(NamedTuple):
    """What a kernel computes: a grid, row-major, with extra tokens before and behind it, queries and keys,
    and ``extra_kv`` tokens at the end, keys alone."""

    spec: GNA
    prefix: int = 0
    suffix: int = 0
    extra_kv: int = 0

    @property
    def texts(self) -> tuple[int, int, int]:
        """Tokens of every run of extra ones."""
        return self.prefix, self.suffix, self.extra_kv

    @property
    def boxes(self) -> Plan | None:
        """The boxes to walk, None where every choice would need masks."""
        boxes: Plan | None = tile_walk.chosen(self.spec)
        return boxes

    def config(self, arch: str, dtype: torch.dtype, head_dim: int) -> KernelConfig:
        """The kernel that walks them."""
        plan = self.boxes
        assert plan is not None
        return KernelConfig(arch, DTYPE_NAMES[dtype], head_dim, plan.q_tile, plan.kv_tile, any(self.texts))


class Prepared(NamedTuple):
    """A launch without its tensors: the work list on the device, the numbers that follow ``sizes`` in the
    order of abi.PARTS (up to ``start``), and how many items a head of a batch entry has."""

    work: Tensor
    numbers: tuple[int, ...]
    items: int


@lru_cache(maxsize=64)
def prepared(problem: Problem, device: torch.device) -> tuple[tuple[Prepared, ...], Tensor]:
    """The launches of a problem, and how many tokens its runs of extra ones have, [1, runs]."""
    plan = problem.boxes
    assert plan is not None
    return of_plan(problem, plan, device)


def of_plan(problem: Problem, plan: Plan, device: torch.device) -> tuple[tuple[Prepared, ...], Tensor]:
    """The same for a choice of boxes."""
    spec = problem.spec
    rows = [math.prod(spec.shape[a + 1 :]) for a in range(spec.rank)]
    columns = [sum(map(bool, problem.texts[:i])) if n else 0 for i, n in enumerate(problem.texts)]
    out = []
    for number, launch in enumerate(tile_walk.launches(plan)):
        are_queries = int(number == 0)
        numbers = (
            *launch.lengths,
            *(d * step for d, step in zip(spec.dilation, rows, strict=True)),
            *rows,
            *launch.groups,
            *problem.texts,
            *columns,
            are_queries,
            problem.prefix + int(np.dot(launch.first, rows)),
        )
        items = len(launch.work) * math.prod(launch.groups)
        items += are_queries * sum(-(-n // tile_walk.Q_ROWS) for n in problem.texts[:2])
        out.append(Prepared(torch.from_numpy(launch.work).to(device), numbers, items))
    valid = torch.tensor([[n for n in problem.texts if n] or [0]], dtype=torch.int32, device=device)
    return tuple(out), valid


def layout_obstacle(what: str, x: Tensor) -> str:
    """Why TMA cannot read a tensor [batch, heads, tokens, head_dim], or ""."""
    if x.stride(3) != 1:
        return f"the channels of the {what} must be contiguous: write {what}.contiguous()"
    unit = ALIGNMENT // x.element_size()
    for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if size > 1 and stride % unit:
            asked = f"strides of the {what} must be multiples of {unit}, got {x.stride()}"
            return f"{asked}: write {what}.contiguous()"
    if x.shape[2] > 1 and x.stride(2) == 0:
        return f"the {what} repeats one token, which TMA cannot read: write {what}.contiguous()"
    if x.data_ptr() % ALIGNMENT:
        return f"the {what} must start at a multiple of {ALIGNMENT} bytes: write {what}.clone()"
    return ""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    launcher: Launcher,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output, with the strides' order of the query, and natural log-sum-exp [batch, heads, tokens] float32.

    Args:
        query, key, value: [batch, heads, tokens, head_dim], tokens ``[prefix | grid | suffix | extra_kv]``;
            fewer heads of keys for GQA; readable by TMA (:func:`layout_obstacle`).
        launcher: the kernel of ``problem.config``.
        scale: of the scores; any number, None is ``head_dim ** -0.5``.
        valid: integers [batch or 1, runs of extra tokens]: how many tokens of a run are keys; None is all.
    """
    launches, everything = prepared(problem, query.device)
    return launched(query, key, value, launches, everything if valid is None else valid, launcher, scale)


def launched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    launches: tuple[Prepared, ...],
    valid: Tensor,
    launcher: Launcher,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The same with the launches given."""
    batch, heads, queries, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:  # the kernel subtracts the largest score times a positive scale
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    device = query.device
    out = _like(query)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if valid.dtype != torch.int32 or not valid.is_contiguous():
        valid = valid.to(torch.int32).contiguous()
    blocks, stream = machine.multiprocessors(device), machine.stream(device)
    tensors = (query, key, value, out)
    strides = [stride for x in tensors for stride in _strides(x)]
    each = batch * heads
    for one in launches if each else ():
        error = launcher(
            *(x.data_ptr() for x in (*tensors, lse, one.work, valid)),
            stream,
            *strides,
            *(batch, heads, key.shape[1], queries, key.shape[2], one.work.shape[0]),
            0 if valid.shape[0] == 1 else valid.shape[1],
            *one.numbers,
            min(blocks, one.items * each),
            scale * LOG2_E,
        )
        if error:
            raise RuntimeError(f"the CUTLASS kernel did not launch: CUDA error {error} on {device}")
    return out, lse


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Those of batch, heads, tokens; where there is just one of them, one that TMA takes."""
    batch, heads, tokens, head_dim = x.shape
    a, b, c, _ = x.stride()
    return a if batch > 1 else head_dim, b if heads > 1 else head_dim, c if tokens > 1 else head_dim


def _like(query: Tensor) -> Tensor:
    """Empty, dense, its dimensions in memory in the order of the query's."""
    if query.stride(1) < query.stride(2):
        return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    return query.new_empty(query.shape)

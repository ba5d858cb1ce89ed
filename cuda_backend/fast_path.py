"""The host side of a kernel: a problem's boxes and numbers, prepared once, and a call that launches them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from gnaflex.cuda_backend import machine, tile_walk
from gnaflex.cuda_backend.abi import Launcher
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, DTYPES, KernelConfig
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
        """The boxes to walk where no architecture is known, Hopper's; None where every choice would need
        masks, whatever the architecture."""
        return self.boxes_for("sm_90a")

    def boxes_for(self, arch: str) -> Plan | None:
        """The boxes that kernels of an architecture walk."""
        boxes: Plan | None = tile_walk.chosen(self.spec, BOXES_AT_ONCE[arch])
        return boxes

    def boxes_on(self, device: torch.device) -> Plan | None:
        """Those of a device, Hopper's where no kernel runs."""
        return self.boxes if machine.obstacle(device) else self.boxes_for(machine.architecture(device))

    def config(self, arch: str, dtype: torch.dtype, head_dim: int) -> KernelConfig:
        """The kernel that walks them."""
        plan = self.boxes_for(arch)
        assert plan is not None
        return KernelConfig(arch, DTYPE_NAMES[dtype], head_dim, plan.q_tile, plan.kv_tile, any(self.texts))


class Prepared(NamedTuple):
    """A launch without its tensors: the work list on the device, the numbers that follow ``sizes`` in the
    order of abi.PARTS (up to ``start``), and how many items a head of a batch entry has: what blocks take at
    once."""

    work: Tensor
    numbers: tuple[int, ...]
    items: int


_prepared: dict[tuple[Problem, torch.device], tuple[tuple[Prepared, ...], Tensor]] = {}


def is_prepared(problem: Problem, device: torch.device) -> bool:
    """Whether :func:`prepared` has nothing left to do."""
    return (problem, device) in _prepared


def prepared(problem: Problem, device: torch.device) -> tuple[tuple[Prepared, ...], Tensor]:
    """The launches of a problem, and how many tokens its runs of extra ones have, [1, runs].

    They are kept for good, as a captured CUDA graph reads them as long as it lives.
    """
    if (problem, device) not in _prepared:
        arch = machine.architecture(device)
        plan = problem.boxes_for(arch)
        assert plan is not None
        _prepared[problem, device] = machine.aside(
            device, of_plan, problem, plan, device, BOXES_AT_ONCE[arch]
        )
    return _prepared[problem, device]


def of_plan(
    problem: Problem, plan: Plan, device: torch.device, halves: int = 1
) -> tuple[tuple[Prepared, ...], Tensor]:
    """The same for a choice of boxes, so many of them at once."""
    spec = problem.spec
    rows = [math.prod(spec.shape[a + 1 :]) for a in range(spec.rank)]
    columns = [sum(map(bool, problem.texts[:i])) if n else 0 for i, n in enumerate(problem.texts)]
    out = []
    for number, launch in enumerate(tile_walk.launches(plan, halves)):
        are_queries = int(number == 0)
        numbers = (
            *launch.lengths,
            *(d * step for d, step in zip(spec.dilation, rows, strict=True)),
            *rows,
            *launch.groups,
            *problem.texts,
            *columns,
            are_queries,
            _rounds(problem, plan, launch, halves),
            problem.prefix + int(np.dot(launch.first, rows)),
        )
        text = sum(-(-n // tile_walk.Q_ROWS) for n in problem.texts[:2])
        items = len(launch.work) // halves * math.prod(launch.groups) + are_queries * -(-text // halves)
        out.append(Prepared(torch.from_numpy(launch.work).to(device), numbers, items))
    valid = torch.tensor([[n for n in problem.texts if n] or [0]], dtype=torch.int32, device=device)
    return tuple(out), valid


def _rounds(problem: Problem, plan: Plan, launch: tile_walk.Launch, halves: int) -> int:
    """How many items of boxes take as long as one of text queries, which see everything."""
    rows = math.prod(plan.kv_tile)
    text = sum(-(-n // rows) for n in problem.texts)
    items = launch.work.reshape(-1, halves, *launch.work.shape[1:])
    boxes = float(tile_walk.item_tiles(items, plan.kv_tile).mean())
    return round((-(-problem.spec.num_tokens // rows) + text) / (boxes + text))


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


class Lane:
    """A call with everything but addresses worked out, for all tensors of the same shapes and strides.

    Args:
        query, key, value: [batch, heads, tokens, head_dim], tokens ``[prefix | grid | suffix | extra_kv]``;
            fewer heads of keys for GQA; readable by TMA (:func:`layout_obstacle`).
        launches: those of the problem, for the boxes of the kernel.
        launcher: the kernel.
        scale: of the scores; any number, None is ``head_dim ** -0.5``.
        valid: integers [batch or 1, runs of extra tokens], contiguous: how many tokens of a run are keys.
        blocks: at most so many at once; None is one for each multiprocessor.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        launches: tuple[Prepared, ...],
        launcher: Launcher,
        scale: float | None,
        valid: Tensor,
        blocks: int | None = None,
    ) -> None:
        batch, heads, queries, head_dim = query.shape
        scale = head_dim**-0.5 if scale is None else float(scale)
        # the kernel subtracts the largest score times a positive scale
        self._sign = (scale > 0) - (scale < 0)
        self._device, self._launcher, self._launches, self._valid = query.device, launcher, launches, valid
        # dense, its dimensions in memory in the order of the query's
        self._swapped = query.stride(1) < query.stride(2)
        self._shape = (batch, queries, heads, head_dim) if self._swapped else tuple(query.shape)
        self._lse_shape = batch, heads, queries
        out = self._empty(query)
        if scale <= 0:
            query = self._with_sign(query)
        strides = [step for x in (query, key, value, out) for step in _strides(x)]
        sizes = batch, heads, key.shape[1], queries, key.shape[2]
        valid_step = 0 if valid.shape[0] == 1 else valid.shape[1]
        scale_log2 = (abs(scale) or 1.0) * LOG2_E
        blocks = blocks or machine.multiprocessors(query.device)
        each = batch * heads
        self._tails = [
            (
                *(*strides, *sizes, one.work.shape[0], valid_step, *one.numbers),
                *(min(blocks, one.items * each), scale_log2),
            )
            for one in (launches if each else ())
        ]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [batch, heads, tokens, head_dim], heads within or around tokens in memory as the query has
        them, and natural log-sum-exp [batch, heads, tokens] float32; the tensors may be other views of the
        same memory."""
        out = self._empty(query)
        lse = query.new_empty(self._lse_shape, dtype=torch.float32)
        if self._sign <= 0:
            query = self._with_sign(query)
        valid = self._valid.to(torch.int32)  # what it says may have changed since the last call
        first = (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr())
        with machine.on(self._device):
            last = valid.data_ptr(), machine.stream(self._device)
            for one, tail in zip(self._launches, self._tails, strict=False):
                if error := self._launcher(*first, one.work.data_ptr(), *last, *tail):
                    raise RuntimeError(
                        f"a CUTLASS kernel did not launch: CUDA error {error} on {self._device}"
                    )
        return out, lse

    def _empty(self, query: Tensor) -> Tensor:
        out = query.new_empty(self._shape)
        return out.transpose(1, 2) if self._swapped else out

    def _with_sign(self, query: Tensor) -> Tensor:
        return -query if self._sign < 0 else torch.zeros_like(query)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Those of batch, heads, tokens; where there is just one of them, one that TMA takes."""
    batch, heads, tokens, head_dim = x.shape
    a, b, c, _ = x.stride()
    return a if batch > 1 else head_dim, b if heads > 1 else head_dim, c if tokens > 1 else head_dim

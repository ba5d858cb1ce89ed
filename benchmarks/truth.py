"""What a provider must give: some queries' outputs and gradients in float64, and the error they may have."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gnaflex.reference import allowed_keys
from gnaflex.trial import BUDGET, exactly, rounded

from .problems import Problem

CHECKED = 48  # queries
GOLDEN = 0.6180339887498949
# Of an exponential by its size: exp_u20 of torch's CPU kernels; in float32 plain arithmetic errs less.
EXPONENTIAL = 2.0**-20
Tensors = tuple[Tensor, ...]


def rows_of(problem: Problem) -> list[int]:
    """Queries to check: the ends of the sequence and of the grid, the others spread by the golden ratio."""
    n, first = problem.tokens, problem.prefix
    ends = {0, n - 1, first, first + problem.spec.num_tokens - 1}
    return sorted(ends | {int(n * (i * GOLDEN % 1)) for i in range(1, CHECKED)})


def seen_by(problem: Problem, rows: list[int]) -> Tensor:
    """bool [rows, tokens]: whom these queries see, by the oracle's sets."""
    pairs = torch.ones(len(rows), problem.tokens, dtype=torch.bool)
    first, grid = problem.prefix, problem.spec.num_tokens
    for seen, token in zip(pairs, rows, strict=True):
        if first <= token < first + grid:
            seen[first : first + grid] = False
            seen[torch.tensor(sorted(allowed_keys(problem.spec, token - first))) + first] = True
    return pairs


class Truth:
    """Of one direction of a problem on q, k, v [1, heads, tokens, head_dim], under its mask and dense."""

    def __init__(self, problem: Problem, tensors: list[Tensor], gradients: bool) -> None:
        listed, device = rows_of(problem), tensors[0].device
        self.rows = torch.tensor(listed, device=device)
        self.tensors, self.gradients = tensors, gradients
        self._pairs = seen_by(problem, listed).to(device)
        self._given = [x.clone() for x in tensors]
        self._known: dict[bool, tuple[Tensors, float]] = {}

    def prepare(self, is_dense: bool) -> None:
        """Compute what is right, before anyone could change the inputs."""
        self._exact(is_dense)

    def was_changed(self) -> bool:
        """Whether a call wrote into its inputs; they are put right then."""
        changed = [x for x in zip(self.tensors, self._given, strict=True) if not torch.equal(*x)]
        for x, given in changed:
            x.copy_(given)
        return bool(changed)

    def error(self, found: Tensors, is_dense: bool = False) -> float:
        """The greatest error of what a call gave by what it may be: 1 is twice that of plain arithmetic in
        the dtype, or of an exponential; NaN and infinity are infinite."""
        exact, budget = self._exact(is_dense)
        return _difference(found, exact) / budget

    def _exact(self, is_dense: bool) -> tuple[Tensors, float]:
        if is_dense not in self._known:
            pairs = torch.ones_like(self._pairs) if is_dense else self._pairs
            exact = self._of_rows(
                lambda q, k, v: exactly(q, k, v, pairs, None)[0], [x.double() for x in self.tensors]
            )
            plainly = _stepwise if self.gradients else partial(rounded, scale=None)
            plain = self._of_rows(lambda q, k, v: plainly(q, k, v, pairs), self.tensors)
            least = EXPONENTIAL * max(x.abs().max().item() for x in exact)
            self._known[is_dense] = exact, BUDGET * max(_difference(plain, exact), least)
        return self._known[is_dense]

    def _of_rows(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> Tensors:
        """The outputs of the checked queries alone; or the gradients of q, k, v when only they have one."""
        q, k, v = tensors
        if not self.gradients:
            with torch.no_grad():
                return (attend(q[:, :, self.rows], k, v),)
        leaves = [x.detach().requires_grad_() for x in (q[:, :, self.rows], k, v)]
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, self._cotangent().to(out.dtype))

    def of_call(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensors:
        """What a call on all queries gives for the checked ones; NaN if anything else is not finite."""
        if not self.gradients:
            with torch.no_grad():
                out = call(*self.tensors)
                return (_if_finite(out)[:, :, self.rows],)
        leaves = [x.detach().requires_grad_() for x in self.tensors]
        out = call(*leaves)
        cotangent = torch.zeros_like(out)
        cotangent[:, :, self.rows] = self._cotangent().to(out.dtype)
        dq, dk, dv = torch.autograd.grad(out, leaves, cotangent)
        return _if_finite(dq)[:, :, self.rows], dk, dv

    def _cotangent(self) -> Tensor:
        """Of the checked queries, in the dtype: exact gradients are those of what calls are given."""
        like = self.tensors[0][:, :, self.rows]
        generator = torch.Generator(like.device).manual_seed(1)
        return torch.randn(like.shape, device=like.device, generator=generator).to(like.dtype)


def _if_finite(x: Tensor) -> Tensor:
    return x if x.isfinite().all() else torch.full_like(x, math.nan)


def _stepwise(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """Attention, every step in the dtype: fused backwards round in other places, and some add up in it."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    out: Tensor = scores.masked_fill(~pairs, -math.inf).softmax(-1) @ v
    return out


def _difference(found: Tensors, exact: Tensors) -> float:
    apart = [(a.double() - b.double()).abs() for a, b in zip(found, exact, strict=True)]
    return max(x.nan_to_num(nan=math.inf).max().item() for x in apart)

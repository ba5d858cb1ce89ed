"""The proof of a compiled kernel: a small fixed set of problems, against plain attention in float64.

``python -m gnaflex.trial CONFIG DEVICE`` is the child process that decides whether a kernel is trusted on
this machine: its last line is a JSON object with ``outcome`` and ``reason``. Sizes are uneven, strides
unusual, and memory is poisoned before.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnaflex.mask import mask_mod
from gnaflex.planner import Plan
from gnaflex.spec import GNA
from gnaflex.tiles import Tile

LIMIT_S = 600  # after which the child ends itself
BUDGET = 2.0  # the error of a kernel, by that of plain attention which rounds at the same places
# Of a log-sum-exp in float32: sums of a thousand terms, each with 2 units of exp2.approx's last place, and
# lg2.approx (CUDA programming guide, table of intrinsic functions).
LSE_ERROR = 1e-4
LSE_SHARE = 2.0**-20  # and of its size: a score in float32 is rounded some times
GOLDEN = (5**0.5 - 1) / 2  # multiples of it modulo 1 lie evenly
ROWS = 1024  # of queries that are compared at once


class Case(NamedTuple):
    """A problem for the boxes of a kernel, and tensors to try it on."""

    name: str
    spec: GNA
    texts: tuple[int, int, int] = (0, 0, 0)
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    strides: bool = False
    valid: tuple[tuple[int, ...], ...] | None = None
    scale: float | None = None
    blocks: int | None = None


def cases(config: Any) -> Iterator[Case]:
    """Problems whose stride groups are the query box, so that it needs no masks; uneven on every axis."""
    from gnaflex.cuda_backend.config import BOXES_AT_ONCE

    q, kv = config.q_box, config.kv_box
    text = (37, 130, 5) if config.text else (0, 0, 0)  # three times 128 queries: one without a partner
    runs = sum(map(bool, text))
    window = tuple(max(a, b + 1) for a, b in zip(q, kv, strict=True))
    window = tuple(w + (w % b == 0 and b > 1) for w, b in zip(window, kv, strict=True))
    shape = tuple(w + a + 1 for w, a in zip(window, q, strict=True))
    yield Case("clipped tiles", GNA(shape, window, q), text, heads=4)
    yield Case("clipped tiles, many a block", GNA(shape, window, q), text, 2, blocks=5)
    long = min(_lengthened(window, q, kv), key=lambda one: math.prod(map(sum, zip(one, q, strict=True))))
    shape = tuple(w + (a if w > b else 0) for w, b, a in zip(long, window, q, strict=True))
    yield Case("many tiles a box", GNA(shape, long, q), text, 1, scale=10.0, blocks=2)
    whole = tuple(-(-a // b) * b for a, b in zip(q, kv, strict=True))
    shape = tuple(w + a for w, a in zip(whole, q, strict=True))
    odd = max(5, whole[0] // kv[0] // 2 * 2 + 1) * kv[0]  # items of such start at every stage and phase
    shape_of_odd = (odd + q[0], *whole[1:])
    yield Case("many items a block", GNA(shape_of_odd, (odd, *whole[1:]), q), text, 1, 4, blocks=3)
    yield Case("whole tiles, strides", GNA(shape, whole, q), text, 2, 4, 2, strides=True)
    yield Case("dilation", GNA((3 * shape[0] + 1, *shape[1:]), whole, q, (3, *[1] * (len(q) - 1))), text)
    last = (*shape[:-1], 2 * shape[-1])
    yield Case("dilation of the last axis", GNA(last, whole, q, (*[1] * (len(q) - 1), 2)), text, scale=-0.2)
    if runs:
        yield Case("valid text", GNA(shape, whole, q), text, 2, valid=((5, 999, -3), (0, 64, 5)))
        yield Case("keys alone", GNA(shape, whole, q), (0, 0, 300), 1)
    if BOXES_AT_ONCE[config.arch] == 2:
        yield Case("shifted pairs", _shifted(q, kv), text, 2, 3, 1, blocks=3)


def _lengthened(window: Tile, q: Tile, kv: Tile) -> Iterator[Tile]:
    """Windows of five tiles more on one axis."""
    for axis in range(len(window)):
        longer = 5 * kv[axis] + max(q[axis], 3)
        yield (*window[:axis], longer, *window[axis + 1 :])


def _shifted(q: Tile, kv: Tile) -> GNA:
    """One box of queries for every key box, most of them whole tiles after another along the first axis."""
    step = math.lcm(q[0], kv[0])
    window = step + kv[0] + (kv[0] > 1)
    return GNA((window + 2 * step + q[0], *q[1:]), (window, *q[1:]), q)


def inputs(case: Case, config: Any, device: torch.device) -> list[Tensor]:
    """Queries, keys and values of a case, [batch, heads, tokens, head_dim], no two runs alike by chance."""
    generator = torch.Generator(device="cpu").manual_seed(len(case.name))
    tokens = case.spec.num_tokens + sum(case.texts[:2])
    sizes = ((case.heads, tokens), *[(case.kv_heads, tokens + case.texts[2])] * 2)
    out = []
    for number, (heads, rows) in enumerate(sizes):
        x = torch.randn(case.batch, heads, rows, config.head_dim, generator=generator)
        x = x.to(device, getattr(torch, config.dtype))
        out.append(_laid_out(x, number) if case.strides else x)
    return out


def _laid_out(x: Tensor, number: int) -> Tensor:
    """The same values with strides of their own: heads-last between other channels, heads-last, as it is."""
    if number == 0:
        return torch.cat([x, x + 1], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[-1]]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if number == 1 else x


def allowed(case: Case, entry: int, rows: Tensor) -> Tensor:
    """Which keys some rows of queries may see, [rows, keys], by the mask_mod of the problem."""
    prefix, suffix, extra = case.texts
    n = case.spec.num_tokens
    queries = prefix + n + suffix
    pairs = torch.ones(len(rows), queries + extra, dtype=torch.bool, device=rows.device)
    of_grid = (rows >= prefix) & (rows < prefix + n)
    at = torch.arange(n, device=rows.device)
    mod = mask_mod(case.spec, device=rows.device)
    pairs[of_grid, prefix : prefix + n] = mod(at[0], at[0], rows[of_grid, None] - prefix, at[None])
    starts = (0, prefix + n, queries)
    for start, count, length in zip(
        starts, case.texts, case.valid[entry] if case.valid else (), strict=False
    ):
        pairs[:, start + max(length, 0) : start + count] = False
    return pairs


def exactly(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(share, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~pairs, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def rounded(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None, growth: float = 0.0
) -> Tensor:
    """Attention as every fused kernel of a dtype rounds it: scores and sums in float32, weights and output in
    the dtype. The largest weight of a row is 1, or from 1 to 2 to the ``growth`` (config.GROWTH): where it is
    no power of two, it is rounded, too."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1).float() for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~pairs, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    apart = torch.arange(weights.shape[-2], device=weights.device)[:, None] * GOLDEN % 1
    weights = weights * 2 ** (growth * apart)
    return (weights.to(q.dtype).float() @ v / weights.sum(-1, keepdim=True)).to(q.dtype)


def disagreement(case: Case, config: Any, device: torch.device, launcher: Any) -> str:
    """What is wrong with a kernel's results for a case, or ""."""
    from gnaflex.cuda_backend.config import BOXES_AT_ONCE, GROWTH
    from gnaflex.cuda_backend.fast_path import Lane, Problem, of_plan

    problem = Problem(case.spec, *case.texts)
    plan = Plan(case.spec, config.q_box, config.kv_box, "dynamic", math.prod(config.q_box))
    launches, valid = of_plan(problem, plan, device, BOXES_AT_ONCE[config.arch])
    if case.valid is not None:
        valid = torch.tensor(case.valid, dtype=torch.int32, device=device)
    q, k, v = inputs(case, config, device)
    lane = Lane(q, k, v, launches, launcher, case.scale, valid, case.blocks)
    poison = [torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device=device)]
    del poison  # what is allocated next likely lies there
    out, lse = lane(q, k, v)
    for _ in range(2):
        again = lane(q, k, v)
        if not (torch.equal(out, again[0]) and torch.equal(lse, again[1])) and not out.isnan().any():
            return f"{case.name}: the same call gives other results"
    growth = GROWTH[config.arch]
    errors = [_errors(case, part, q, k, v, out, lse, growth) for part in _parts(q)]
    error, budget, lse_error = (max(one) for one in zip(*errors, strict=True))
    if not error <= BUDGET * budget:
        twice = f"{BUDGET * budget:.3g}, twice that of plain {config.dtype}"
        return f"{case.name}: error {error:.3g} exceeds {twice}"
    if not lse_error <= 1:
        return f"{case.name}: the log-sum-exp is off by {lse_error:.3g} times what float32 allows"
    return ""


def _parts(q: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Batch entry, head, and rows, few at a time: a trial shares the GPU with its user."""
    for entry in range(q.shape[0]):
        for rows in torch.split(torch.arange(q.shape[2], device=q.device), ROWS):
            for head in range(q.shape[1]):
                yield entry, head, rows


def _errors(
    case: Case,
    part: tuple[int, int, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    growth: float,
) -> tuple[float, float, float]:
    """The greatest error of the output in a part, that of rounding alone, and that of the log-sum-exp by what
    it may be; NaN counts as infinite."""
    entry, head, rows = part
    of_keys = slice(entry, entry + 1), [head * k.shape[1] // q.shape[1]]
    given = q[entry : entry + 1, [head]][:, :, rows], k[of_keys], v[of_keys]
    pairs = allowed(case, entry, rows)
    exact, exact_lse = exactly(*given, pairs, case.scale)
    plain = rounded(*given, pairs, case.scale, growth)
    lse_error = (lse[entry, head, rows].double() - exact_lse).abs() / (
        LSE_ERROR + LSE_SHARE * exact_lse.abs()
    )
    found = out[entry, head, rows].double() - exact, plain.double() - exact, lse_error
    worst = (x.abs().nan_to_num(nan=math.inf).max().item() for x in found)
    error, budget, of_lse = worst
    return error, budget, of_lse


def trial(config: Any, device: torch.device, launcher: Any) -> tuple[str, str]:
    """Outcome and reason of all cases."""
    for case in cases(config):
        try:
            why = disagreement(case, config, device, launcher)
        except torch.OutOfMemoryError as error:
            return "inconclusive", str(error).splitlines()[0]
        if why:
            return "failed", why
    return "proved", ""


def main(arguments: list[str]) -> None:
    """The child process."""
    from gnaflex.cuda_backend import gate
    from gnaflex.cuda_backend.config import KernelConfig

    if hasattr(signal, "alarm"):
        signal.alarm(LIMIT_S)  # the parent may be gone
    fields = json.loads(arguments[0])
    for box in ("q_box", "kv_box"):
        fields[box] = tuple(fields[box])
    config = KernelConfig(**fields)
    device = torch.device("cuda", int(arguments[1]))
    torch.cuda.set_device(device)
    outcome, reason = trial(config, device, gate.load(config))
    torch.cuda.synchronize(device)
    print(json.dumps({"outcome": outcome, "reason": reason}))


if __name__ == "__main__":
    main(sys.argv[1:])

"""One problem by every provider that can run it: checked against float64, timed in turn, checked again."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gnaflex.cuda_backend import fast_path
from torch import Tensor

from gnaflex.tiles import allowed_pairs

from .measure import Timed, finished, milliseconds, peak_mib, seconds
from .problems import Problem
from .providers import DENSE, PROVIDERS, CannotRun, Make, Ready
from .truth import Truth

FEWEST, MOST = 3, 15  # rounds
SHARE_S = 1.5  # of the time of a direction that a provider gets
SLOW_S = 4.0  # a call that takes longer is not repeated
MASKS = 3  # how often a mask is made anew
FORWARD, TRAINING = ("forward",), ("backward", "both")  # directions; "both" is forward and backward


@dataclass(frozen=True)
class Facts:
    """What a comparison is about: the problem, and what its pairs and tiles allow."""

    problem: str
    facts: dict[str, Any]
    tokens: int
    dtype: str
    flop_speedup: float
    work_speedup: float
    block_sparse: bool


@dataclass(frozen=True)
class Timing:
    """A provider on a problem in one direction, or ``why`` there is none. Times are medians.

    ``low`` and ``high`` bound the ``runs`` of ``ms``. ``mask_ms`` is the making of a mask, which ``layers``
    calls share; ``first_s`` the first call of a process that goes forward, or backward, compilers and mask
    included (of "backward" and "both" it is one, whose mask may be there already). ``error`` is the
    greatest of the checked rows by what it may be (truth.py). ``peak_mib`` is what a call takes at its peak,
    ``mask_peak_mib`` the making of its mask.

    ``speedup`` is the best dense time over that of a call with its share of the mask; ``achievable`` that by
    the problem's ``work_speedup``; ``predicted_ms`` what the planner says, given the best dense time.
    """

    problem: str
    provider: str
    direction: str
    why: str | None = None
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int | None = None
    mask_ms: float | None = None
    first_s: float | None = None
    error: float | None = None
    peak_mib: float | None = None
    mask_peak_mib: float | None = None
    speedup: float | None = None
    achievable: float | None = None
    predicted_ms: float | None = None


@dataclass(frozen=True)
class Contender:
    """A provider that gave the right result; the seconds of its first call and of one after it."""

    name: str
    ready: Ready
    first_s: float
    took_s: float
    error: float

    @property
    def is_slow(self) -> bool:
        """Whether the one call that was made after the first must do."""
        return self.took_s > SLOW_S

    @property
    def rounds(self) -> int:
        """How often it is timed."""
        return min(max(int(SHARE_S / self.took_s), FEWEST), MOST)


def compare(
    name: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    providers: Mapping[str, Make] = PROVIDERS,
) -> Iterator[Facts | Timing]:
    """Rows of all providers, forward and, where the problem trains, backward."""
    yield facts_of(name, problem, dtype)
    with contextlib.suppress(Exception):  # who cannot do without a compiler says so
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))  # what whoever compiles first would pay
    tensors = inputs(problem, device, dtype)
    for directions in (FORWARD, TRAINING) if problem.trains else (FORWARD,):
        truth = Truth(problem, tensors, gradients=directions == TRAINING)
        able = []
        for provider, make in providers.items():
            found = _contender(provider, make, problem, truth)
            if isinstance(found, Contender):
                able.append(found)
            else:
                yield from (Timing(name, provider, direction, found) for direction in directions)
        for direction in directions:
            yield from _timings(name, problem, truth, direction, able)


def facts_of(name: str, problem: Problem, dtype: torch.dtype) -> Facts:
    """What is counted, not measured."""
    spec, text = problem.spec, problem.tokens - problem.spec.num_tokens
    pairs = allowed_pairs(spec) + text * (problem.tokens + spec.num_tokens)
    return Facts(
        *(name, problem.facts, problem.tokens, str(dtype).removeprefix("torch.")),
        flop_speedup=problem.tokens**2 / pairs,
        work_speedup=problem.work_speedup,
        block_sparse=fast_path.Problem(spec).boxes is not None,
    )


def inputs(problem: Problem, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [1, heads, tokens, head_dim], heads-last in memory as models make them."""
    generator = torch.Generator(device).manual_seed(0)
    size = 1, problem.tokens, problem.heads, problem.head_dim
    return [torch.randn(size, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def _contender(provider: str, make: Make, problem: Problem, truth: Truth) -> Contender | str:
    """A provider after its first call, whose result is checked, and a second; or why there is none."""
    device, is_dense = truth.tensors[0].device, provider in DENSE
    truth.prepare(is_dense)
    try:
        start = time.perf_counter()
        ready = make(problem, device)
        found = truth.of_call(ready.call)
        finished(device)
        first_s = time.perf_counter() - start
        error = truth.error(found, is_dense)
        if why := _wrong(truth, error):
            return why
        took_s = first_s
        if ready.compiles or first_s <= SLOW_S:
            timed = _timed(ready, truth.tensors, "both" if truth.gradients else "forward")
            took_s = seconds(lambda: timed.call(None), device)
    except CannotRun as refusal:
        return str(refusal)
    except Exception as failure:  # of compilers too, and the others are still worth their time
        truth.was_changed()
        return _in_a_line(failure)
    return Contender(provider, ready, first_s, took_s, error)


def _wrong(truth: Truth, error: float) -> str:
    """What is wrong with a call that had this error, or ""."""
    if truth.was_changed():
        return "WRONG: it writes into q, k or v"
    return (
        "" if error <= 1 else f"WRONG: its error is {error:.3g} times what {truth.tensors[0].dtype} may have"
    )


def _in_a_line(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _timed(ready: Ready, tensors: list[Tensor], direction: str) -> Timed:
    """What is timed in a direction."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    cotangent = torch.ones_like(tensors[0])

    def forward(state: Any) -> Any:
        with torch.no_grad():
            return ready.call(*tensors)

    def backward(out: Tensor) -> Any:
        return torch.autograd.grad(out, leaves, cotangent)

    if direction == "forward":
        return Timed(forward)
    if direction == "backward":
        return Timed(backward, lambda: ready.call(*leaves))
    return Timed(lambda state: backward(ready.call(*leaves)))


def _timings(
    name: str, problem: Problem, truth: Truth, direction: str, able: list[Contender]
) -> Iterator[Timing]:
    """Rows of the providers that gave the right result."""
    device, failed = truth.tensors[0].device, dict[str, str]()
    if direction == "backward":  # of a slow one only forward and backward together are known
        failed = {
            one.name: f"forward and backward take {one.took_s:.0f} s: too long to time backward alone"
            for one in able
            if one.is_slow
        }
    quick = [one for one in able if not one.is_slow]
    calls = {
        one.name: _guarded(one.name, _timed(one.ready, truth.tensors, direction), failed) for one in quick
    }
    times = milliseconds(calls, {one.name: one.rounds for one in quick}, device)
    truth.was_changed()  # by one that failed halfway
    times |= {one.name: [1e3 * one.took_s] for one in able if one.is_slow}
    dense = min(
        (statistics.median(times[one]) for one in DENSE if one in times.keys() - failed.keys()), default=None
    )
    for one in able:
        if one.name not in failed:
            try:
                found = _measured(one, times[one.name], truth, direction)
                compared = _compared(one, found, problem, direction, dense)
                yield Timing(name, one.name, direction, **found, **compared)
            except Exception as error:
                failed[one.name] = str(error) if isinstance(error, CannotRun) else _in_a_line(error)
        if one.name in failed:
            yield Timing(name, one.name, direction, failed[one.name])


def _guarded(name: str, timed: Timed, failed: dict[str, str]) -> Timed:
    """The same, but that a failure is kept, and nothing is done any more: the others go on."""

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*state: Any) -> Any:
            if name in failed:
                return None
            try:
                return call(*state)
            except Exception as error:
                failed[name] = _in_a_line(error)

        return guarded

    return Timed(guard(timed.call), guard(timed.before))


def _measured(one: Contender, values: list[float], truth: Truth, direction: str) -> dict[str, Any]:
    """Time and memory of a call and of its mask; after a last check.

    Raises:
        CannotRun: the result is no longer right.
    """
    device, make, error = truth.tensors[0].device, one.ready.mask, one.error
    found: dict[str, Any] = {
        "ms": statistics.median(values), "low": min(values), "high": max(values), "runs": len(values),
        "first_s": one.first_s,
    }  # fmt: skip
    if not one.is_slow:
        error = max(error, truth.error(truth.of_call(one.ready.call), one.name in DENSE))
        if why := _wrong(truth, error):
            raise CannotRun(why)
        whole = _timed(one.ready, truth.tensors, "both" if truth.gradients else "forward")
        found["peak_mib"] = peak_mib(lambda: whole.call(None), device)
    found["error"] = error
    if make is None:
        return found
    with torch.no_grad():
        times = [1e3 * seconds(make, device) for _ in range(MASKS)]
        return found | {"mask_ms": statistics.median(times), "mask_peak_mib": peak_mib(make, device)}


def _compared(
    one: Contender, found: dict[str, Any], problem: Problem, direction: str, dense: float | None
) -> dict[str, Any]:
    """A time against the best dense one of the same run; the mask is made before forward."""
    if dense is None or one.name in DENSE:
        return {}
    mask_ms = found.get("mask_ms", 0) if direction != "backward" else 0
    speedup = dense / (found["ms"] + mask_ms / problem.layers)
    out = {"speedup": speedup, "achievable": speedup / problem.work_speedup}
    if direction == "forward" and one.ready.speedup is not None:
        out["predicted_ms"] = dense / one.ready.speedup
    return out

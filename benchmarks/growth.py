"""How time and memory grow with the tokens of a grid: of masks, and of attention under one fixed window.

Every subject is an item that walks the sizes upwards until the next one would cost too much, and says why in
a last row. Lists of block_mask are compact here (full_width=False): as wide as the mask has blocks, which the
CPU kernel of FlexAttention wants, they grow with the square of the tokens, like those of create_block_mask.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import gnaflex
from gnaflex.spec import GNA

from .comparison import inputs
from .engine import Item
from .measure import Timed, milliseconds, peak_mib, seconds
from .parts import dtype_on
from .problems import Problem
from .providers import PROVIDERS, CannotRun, torch_mask

SIZES = (
    (4, 16, 16), (8, 16, 16), (8, 16, 32), (8, 32, 32), (16, 32, 32), (16, 32, 64), (16, 64, 64),
    (32, 64, 64), (64, 64, 64), (64, 96, 96), (128, 96, 96),
)  # fmt: skip
WINDOW, TILE, HEAD_DIM = (4, 8, 8), (2, 8, 8), 64

CALL_S = 10.0  # a call that would take longer is not made
WALK_S = 90.0  # nor a size begun that would end later in its walk: 4 to 6 minutes for all on two CPU cores
SHARE = 0.5  # of the memory that is there, as the most that a size may take
RUNS, RUNS_S = 5, 2.0  # calls that are timed, or as many as this time holds
LEAST = 1e-6  # seconds or MiB: a call of a small mask may seem to take no memory at all


@dataclass(frozen=True)
class Point:
    """A subject at a size, or ``why`` its walk ended before it.

    ``ms`` is a median, ``low`` and ``high`` bound the ``runs``. ``mib`` is what a mask's lists hold,
    ``peak_mib`` what a call takes at its peak, its result included.
    """

    subject: str
    tokens: int
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int | None = None
    mib: float | None = None
    peak_mib: float | None = None
    why: str | None = None


Call = Callable[[], Any]


class Subject(NamedTuple):
    """Who is measured: ``make`` gives the call for a grid. That of a mask is work of the host."""

    name: str
    make: Callable[[GNA, torch.device], Call]
    stride: tuple[int, ...] | int = 1
    is_mask: bool = True


class Step(NamedTuple):
    """A point, the seconds that its size took in all, and the most MiB of any of its calls."""

    point: Point
    seconds: float
    mib: float


def items(device: torch.device) -> dict[str, Item]:
    """Every subject of a device; an item may take twice the seconds that it plans with."""
    return {one.name: Item(partial(walk, one, device), 2 * WALK_S) for one in subjects(device)}


# ---- who ---------------------------------------------------------------------------------------------


def subjects(device: torch.device) -> tuple[Subject, ...]:
    """Masks, then attention."""
    masks = (
        Subject("block_mask, tile-major", partial(_ours, TILE)),
        Subject("block_mask, row-major", partial(_ours, None)),
        Subject("create_block_mask, compiled", partial(_torchs, True)),
        Subject("create_block_mask, eager", partial(_torchs, False)),
    )
    names = ['gnaflex, "flex"', 'gnaflex, "sdpa"', "FlexAttention, create_block_mask", "dense, flash"]
    attention = [Subject(name, partial(_attention, name), is_mask=False) for name in names]
    if device.type == "cuda":
        sparse = 'gnaflex, "cuda"'  # takes problems that are perfectly block-sparse: the stride is the window
        name = f"{sparse}, stride {'x'.join(map(str, WINDOW))}"
        attention.insert(0, Subject(name, partial(_attention, sparse), WINDOW, is_mask=False))
    return (*masks, *attention)


def _ours(tile: tuple[int, ...] | None, spec: GNA, device: torch.device) -> Call:
    return partial(gnaflex.block_mask, spec, q_tile=tile, device=device, full_width=False)


def _torchs(is_compiled: bool, spec: GNA, device: torch.device) -> Call:
    make = torch.compile(create_block_mask, dynamic=False) if is_compiled else create_block_mask
    return torch_mask(Problem("", spec, heads=1, layers=1), device, make)


def _attention(provider: str, spec: GNA, device: torch.device) -> Call:
    problem = Problem(provider, spec, heads=1, layers=1, head_dim=HEAD_DIM)
    call = PROVIDERS[provider](problem, device).call
    return torch.no_grad()(partial(call, *inputs(problem, device, dtype_on(device))))


# ---- a walk ------------------------------------------------------------------------------------------


def walk(subject: Subject, device: torch.device) -> Iterator[Point]:
    """Points at growing sizes; the last one says why it is the last, unless all sizes were taken."""
    start, room = time.monotonic(), SHARE * available_mib(device)
    steps: list[Step] = []
    for shape in SIZES:
        spec = GNA(shape, WINDOW, subject.stride)
        spent = time.monotonic() - start
        found = _too_much(steps, spec.num_tokens, room, spent) or _step(subject, spec, device)
        if isinstance(found, str):
            yield Point(subject.name, spec.num_tokens, why=found)
            return
        steps.append(found)
        yield found.point


def available_mib(device: torch.device) -> float:
    """MiB of memory that nobody has taken."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] / 2**20)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def _too_much(steps: Sequence[Step], tokens: int, room: float, spent: float) -> str | None:
    """Which limit the last two sizes say that this one would pass."""
    if len(steps) < 2:
        return None
    sizes = [step.point.tokens for step in steps]
    call_s = _predicted(sizes, [(step.point.ms or 0.0) / 1e3 for step in steps], tokens)
    if call_s > CALL_S:
        return f"a call would take {call_s:.0f} s; the limit is {CALL_S:.0f} s"
    mib = _predicted(sizes, [step.mib for step in steps], tokens)
    if mib > room:
        return f"it would take {mib / 1024:.0f} GiB; the limit is {room / 1024:.0f} GiB"
    whole_s = steps[-1].seconds * tokens / sizes[-1]  # most of it compilers, so that no slope tells
    if spent + whole_s > WALK_S:
        return f"first call and runs would take {whole_s:.0f} s, after {spent:.0f} s of {WALK_S:.0f} s"
    return None


def _predicted(sizes: Sequence[int], values: Sequence[float], tokens: int) -> float:
    """A value at more tokens by the slope of the last two, taken as 1 to 2: less is what a call costs anyhow,
    and more is noise, as no work here is more than that of all pairs."""
    before, last = (max(value, LEAST) for value in values[-2:])
    slope = math.log(last / before) / math.log(sizes[-1] / sizes[-2])
    return last * math.pow(tokens / sizes[-1], min(max(slope, 1.0), 2.0))


def _step(subject: Subject, spec: GNA, device: torch.device) -> Step | str:
    """A size, or why it cannot be measured; graphs of other sizes are forgotten, as dynamo takes eight."""
    start = time.monotonic()
    torch.compiler.reset()
    try:
        call = subject.make(spec, device)
        made: list[Any] = []
        first = peak_mib(lambda: made.append(call()), device) or 0.0
        mib = held_mib(made[0]) if subject.is_mask else None
        made.clear()
        times, peak = _measured(call, subject.is_mask, device)
    except CannotRun as refusal:
        return str(refusal)
    except Exception as error:  # of compilers too
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    figures = statistics.median(times), min(times), max(times), len(times), mib, peak
    point = Point(subject.name, spec.num_tokens, *figures)
    return Step(point, time.monotonic() - start, max(first, peak or 0.0))


def _measured(call: Call, is_host: bool, device: torch.device) -> tuple[list[float], float | None]:
    """Milliseconds of calls, and the peak MiB of one, which is timed only if there is no time for another."""

    took: list[float] = []
    peak = peak_mib(lambda: took.append(seconds(call, device)), device)
    runs = min(RUNS, int(RUNS_S / took[0]))
    if not runs:
        return [1e3 * took[0]], peak
    if is_host:
        return [1e3 * seconds(call, device) for _ in range(runs)], peak
    return milliseconds({"": Timed(lambda state: call())}, {"": runs}, device)[""], peak


def held_mib(mask: Any) -> float:
    """MiB of a BlockMask's own tensors, its lists."""
    lists = [value for value in vars(mask).values() if isinstance(value, Tensor)]
    return sum(one.numel() * one.element_size() for one in lists) / 2**20


# ---- exponents ---------------------------------------------------------------------------------------


def exponent(points: Iterable[Mapping[str, Any]], field: str = "ms") -> float | None:
    """The slope of log ``field`` over log tokens of one subject's rows, by least squares over the upper half
    of its sizes, of three at least; None where there are fewer."""
    known = sorted((point["tokens"], point[field]) for point in points if (point.get(field) or 0) > 0)
    upper = known[-max(3, -(-len(known) // 2)) :]
    if len(upper) < 3:
        return None
    x, y = np.log(np.array(upper, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])

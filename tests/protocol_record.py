"""What the warp roles of a kernel do, as lists of events: their programs run as plain Python on a work list.

A kernel is described by its roles module and by who runs which program; nothing else is said twice.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Half(NamedTuple):
    """Key tiles of one half of a pair: boxes first, then lines."""

    boxes: int
    tiles: int


class Pair(NamedTuple):
    """What a program may ask of a pair (items.Pair), or of a Hopper item."""

    halves: tuple[Half, Half]
    skips: tuple[int, int]
    boxes: int
    tiles: int
    counts: tuple[int, int]
    present: tuple[int, int]


def pair(first: int, second: int | None = None, skip: int = 0, lines: int = 0) -> Pair:
    """Halves with so many boxes, the second's ``skip`` tiles later; the lines belong to both."""
    here = Half(first, first + lines)
    there = Half(0, 0) if second is None else Half(second, second + lines)
    boxes = max(first, skip + there.boxes)
    counts = here.tiles, there.tiles
    return Pair((here, there), (0, skip), boxes, boxes + lines, counts, (1, min(there.tiles, 1)))


def sees(pair: Any, h: int, j: int) -> bool:
    """As items.sees, on plain numbers."""
    half = pair.halves[h]
    return 0 <= j - pair.skips[h] < half.boxes or 0 <= j - pair.boxes < half.tiles - half.boxes


def tile_of(pair: Any, h: int, j: int) -> int:
    """As items.tile_of."""
    at = j - pair.skips[h] if j < pair.boxes else j - pair.boxes + pair.halves[h].boxes
    return int(at)


class Role(NamedTuple):
    """Threads that run a program together."""

    name: str
    program: str
    threads: int = 32
    args: tuple[int, ...] = ()


class Kernel(NamedTuple):
    """What is searched. ``local`` names what programs call that touches nothing shared."""

    barriers: dict[str, Any]
    buffers: dict[str, Any]
    actions: dict[str, Any]
    programs: Any
    roles: tuple[Role, ...]
    local: frozenset[str]

    @classmethod
    def of(cls, module: ModuleType, roles: tuple[Role, ...], local: str) -> Kernel:
        return cls(
            module.BARRIERS, module.BUFFERS, module.ACTIONS, module.Roles, roles, frozenset(local.split())
        )


class Event(NamedTuple):
    """``kind``: wait, arrive, commit, action, or drain, until at most ``n`` of a unit's actions are left.
    ``site``: the function and line that does it."""

    kind: str
    name: str
    site: tuple[str, int]
    n: int = 0
    h: int = 0
    uses: tuple[tuple[str, int], ...] = ()
    full: str = ""


class Recorder:
    """The ``self`` of a program."""

    def __init__(self, kernel: Kernel, work: list[Pair]) -> None:
        self.kernel, self.work = kernel, work
        self.events: list[Event] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in self.kernel.actions:
            return functools.partial(self.act, name)
        if name in self.kernel.local:
            return lambda *_: None
        raise AttributeError(f"a program calls {name}, which is neither an action nor said to be local")

    # ---- numbers -------------------------------------------------------------------------------------

    def turns(self) -> int:
        return len(self.work)

    def pair(self, turn: int) -> Pair:
        return self.work[turn]

    item = pair

    def half(self, turn: int, h: int) -> Half:
        return self.work[turn].halves[h]

    def sees(self, pair: Pair, h: int, j: int) -> bool:
        return sees(pair, h, j)

    def tile_of(self, pair: Pair, h: int, j: int) -> int:
        return tile_of(pair, h, j)

    def number(self, n: int) -> int:
        return n

    def numbers(self, *counts: int) -> tuple[int, ...]:
        return counts

    # ---- events --------------------------------------------------------------------------------------

    def wait(self, name: str, n: int, h: int = 0) -> None:
        self.note("wait", name, n, h)

    def arrive(self, name: str, n: int, h: int = 0) -> None:
        self.note("arrive", name, n, h, "threads", "one", "first")

    def commit(self, name: str, n: int, h: int = 0) -> None:
        self.note("commit", name, n, h, "mma")

    def stored(self) -> None:
        self.events.append(Event("drain", "store", _site()))

    def wait_products(self, left: int) -> None:
        self.events.append(Event("drain", "wgmma", _site(), left))

    def pass_turn(self, h: int) -> None:
        self.note("arrive", "turn", self.visits("turn", 1 - h), 1 - h, "named")

    def wait_turn(self, h: int) -> None:
        n = self.visits("turn", h)
        self.note("arrive", "turn", n, h, "named")
        self.note("wait", "turn", n, h)

    def visits(self, name: str, h: int) -> int:
        """How often this role has arrived at a hardware barrier: which phase it counts for next."""
        return sum(one.kind == "arrive" and (one.name, one.h) == (name, h) for one in self.events)

    def note(self, kind: str, name: str, n: int, h: int, *by: str) -> None:
        barrier = self.kernel.barriers.get(name)
        if barrier is None or (by and barrier.by not in by) or (h and not barrier.halves):
            raise ValueError(f"{kind} {name}, half {h}: no such barrier, or not one for this")
        self.events.append(Event(kind, name, _site(), n, h))

    def act(self, name: str, *_: Any, h: int = 0, **uses: int) -> None:
        action = self.kernel.actions[name]
        declared = {one.partition(":")[0] for one in action.reads} | {*action.writes}
        if declared != set(uses) or not declared <= set(self.kernel.buffers):
            raise ValueError(f"{name} says its use of {sorted(uses)}, declares {sorted(declared)}")
        self.events.append(Event("action", name, _site(), 0, h, tuple(uses.items()), action.full))


def _site() -> tuple[str, int]:
    """Where the program is."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_code.co_name, frame.f_lineno


def record(kernel: Kernel, role: Role, work: list[Pair]) -> list[Event]:
    """What a role does for a work list."""
    recorder = type("Recording", (Recorder, kernel.programs), {})(kernel, work)
    getattr(recorder, role.program)(*role.args)
    events: list[Event] = recorder.events
    return events

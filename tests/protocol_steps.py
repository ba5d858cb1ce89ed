"""The processes of a block as lists of steps, and what each step demands of the others.

A process is a warp role, a queue of the tensor cores or of stores, or one place that the TMA unit fills. What
a step demands are intervals: of another process' counter, or of a barrier's arrivals. WAITS: outside, the
process is blocked. WRONG: outside, a hand-over is broken as soon as the process is there. UNSAFE: as soon as
it could go on.

``fine`` makes every event a step. Else one wait, the accesses behind it and the arrivals
behind these are one step, and nothing is lost: between its wait and its first arrival nobody sees how far a
process is; an arrival is seen by those alone who wait for it, to whom a late one is a slow wait.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from protocol_record import Event, Kernel, Pair, Role, record

WAITS, UNSAFE, WRONG = 1, 2, 4
FOREVER = 1 << 40

Place = tuple[str, int, int]  # of a barrier: name, half, place
Cell = tuple[str, int, int, int]  # of a buffer: name, half, place, and which rows
Edit = Callable[[Role, list[Event]], list[Event]]


class Access(NamedTuple):
    """``wanted``: the action whose result is read, "" for any."""

    cell: Cell
    action: str
    use: int
    writes: bool
    wanted: str = ""


class Demand(NamedTuple):
    """That a process' counter, or how often a barrier was arrived at, be from ``low`` to ``high``."""

    of: str | Place
    low: int
    high: int
    flag: int
    why: str


class Step:
    """What a process does at once."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.demands: list[Demand] = []
        self.accesses: list[Access] = []
        self.arrivals: list[tuple[Place, int]] = []
        self.rank = 0  # of what came last: a wait, an access, an arrival or something issued

    def __str__(self) -> str:
        return ", ".join(self.text)


class System:
    """All processes for a work list. ``split``: the role whose threads are two processes, as its warps may
    run apart; ``edit``: what is changed in what a role does."""

    def __init__(
        self, kernel: Kernel, work: list[Pair], stages: int, split: str = "", fine: bool = False,
        edit: Edit = lambda role, events: events,
    ) -> None:  # fmt: skip
        self.kernel, self.stages, self.fine = kernel, stages, fine
        self.processes: dict[str, list[Step]] = defaultdict(list)
        self.rows = (0, 1) if split else (0,)
        for role in kernel.roles:
            events = edit(role, record(kernel, role, work))
            if role.name != split:
                _Writer(self, role.name, self.rows, role.threads).write(events)
            else:
                for row in self.rows:
                    _Writer(self, f"{role.name}{'ab'[row]}", (row,), role.threads // 2).write(events)

    def places(self, number: int | str) -> int:
        """As the kernel's."""
        if isinstance(number, int):
            return number
        return {"stages": self.stages, "stages + 1": self.stages + 1, "1 + 1": 2}[number]

    def place(self, name: str, n: int, h: int) -> tuple[Place, int]:
        """Where use ``n`` of a barrier lies, and which phase of it that is."""
        places = self.places(self.kernel.barriers[name].places)
        return (name, h, n % places), n // places

    def cells(self, name: str, n: int, h: int, rows: tuple[int, ...]) -> list[Cell]:
        """Where use ``n`` of a buffer lies."""
        buffer = self.kernel.buffers[name]
        return [(name, h if buffer.halves else 0, n % self.places(buffer.places), row) for row in rows]


class _Writer:
    """Lists the steps of a role, and those of its queues."""

    def __init__(self, system: System, name: str, rows: tuple[int, ...], threads: int) -> None:
        self.system, self.name, self.rows, self.threads = system, name, rows, threads
        self.steps = system.processes[name]
        self.done: dict[str, list[int]] = defaultdict(list)  # where every action of a queue is over

    def write(self, events: list[Event]) -> None:
        for event in events:
            getattr(self, event.kind)(event)

    def step(self, rank: int, *text: str) -> Step:
        """The current one, if it can take this too."""
        if not self.steps or self.system.fine or rank < self.steps[-1].rank or rank == 0:
            self.steps.append(Step())
        step = self.steps[-1]
        step.rank = rank
        step.text += text
        return step

    def wait(self, event: Event) -> None:
        barrier = self.system.kernel.barriers[event.name]
        place, phase = self.system.place(event.name, event.n, event.h)
        need = phase if barrier.is_free else phase + 1
        count, text = barrier.arrivals, f"wait for phase {need} of {said(place)}"
        step = self.step(0, text)
        step.demands.append(Demand(place, need * count, FOREVER, WAITS, text))
        span = (need - 1) * count, (need + 1) * count - 1
        step.demands.append(Demand(place, *span, WRONG, f"parity cannot tell when to {text}"))

    def drain(self, event: Event) -> None:
        queue = f"{self.name}: {event.name}"
        step = self.step(0, f"wait until {event.n} of {queue} are left")
        done = self.done[queue]
        if len(done) > event.n:
            step.demands.append(Demand(queue, done[-1 - event.n], FOREVER, WAITS, step.text[0]))

    def arrive(self, event: Event) -> None:
        """ "one" is one of every warp, as elect.sync has it; "first" that of the role, a mistake."""
        by = self.system.kernel.barriers[event.name].by
        if by != "first":
            weight = self.threads // 32 if by == "one" else self.threads
            self.arrival(event, self.step(2), weight)
        elif 0 in self.rows:
            self.arrival(event, self.step(2), 1)

    def arrival(self, event: Event, step: Step, weight: int) -> None:
        """Each counts for the phase that it is meant for."""
        place, phase = self.system.place(event.name, event.n, event.h)
        count = self.system.kernel.barriers[event.name].arrivals
        text = f"arrive at {said(place)} for phase {phase + 1}"
        step.text.append(text)
        before = sum(more for at, more in step.arrivals if at == place)
        step.arrivals.append((place, weight))
        span = phase * count - before, (phase + 1) * count - before - weight
        step.demands.append(Demand(place, *span, UNSAFE, f"it counts for another: {text}"))

    def commit(self, event: Event) -> None:
        self.step(2, f"commit {event.name}")
        self.arrival(event, self.queued(self.system.processes[f"{self.name}: mma"]), 1)

    def queued(self, queue: list[Step]) -> Step:
        """The last of a queue, which waits for the current step, as that puts it there."""
        step = Step()
        step.demands.append(Demand(self.name, len(self.steps), FOREVER, WAITS, f"not issued by {self.name}"))
        queue.append(step)
        return step

    def action(self, event: Event) -> None:
        action, uses = self.system.kernel.actions[event.name], dict(event.uses)
        accesses = []
        for one in (*action.reads, *action.writes):
            buffer, _, wanted = one.partition(":")
            for cell in self.system.cells(buffer, uses[buffer], event.h, self.rows):
                accesses.append(Access(cell, event.name, uses[buffer], one in action.writes, wanted))
        text = " ".join([event.name, *(f"{said(one.cell)}={one.use}" for one in accesses)])
        if action.unit != "threads":
            self.issue(event, action.unit, accesses, text)
        else:
            self.step(1, text).accesses += accesses

    def issue(self, event: Event, unit: str, accesses: list[Access], text: str) -> None:
        """TMA fills each place on its own; all else is done in order."""
        step = self.step(2, f"issue {text}")
        name = f"tma {said(accesses[0].cell)}" if unit == "tma" else f"{self.name}: {unit}"
        queue = self.system.processes[name]
        if unit == "tma":
            step.demands.append(Demand(name, len(queue), FOREVER, UNSAFE, f"still being filled: {name}"))
        one = self.queued(queue)
        one.text.append(text)
        one.accesses += accesses
        self.done[name].append(len(queue))
        if event.full:
            signal = Event("arrive", event.full, event.site, accesses[0].use, event.h)
            self.arrival(signal, self.queued(queue) if self.system.fine else one, 1)


def said(place: Place | Cell) -> str:
    """A place as messages name it: half and place only."""
    name, half, number = place[:3]
    return f"{name}.{half}[{number}]"

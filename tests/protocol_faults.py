"""Mistakes in a kernel's hand-overs, one at a time: in every line of its programs, every barrier and ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from protocol_record import Event, Kernel, Pair, Role, record
from protocol_steps import Edit, System

Line = tuple[str, str, tuple[str, int]]  # kind, name, site
Change = Callable[[list[Event], int], list[Event]]  # what stands instead of an event and the next


class Mistake(NamedTuple):
    """A kernel with it, or what it changes in what a role does."""

    name: str
    kernel: Kernel
    edit: Edit = lambda role, events: events

    def system(self, work: list[Pair], stages: int, split: str = "", fine: bool = False) -> System:
        """Its processes."""
        return System(self.kernel, work, stages, split, fine, self.edit)


def mistakes(kernel: Kernel, work: list[Pair], stages: int) -> list[Mistake]:
    """All of them, in lines that a work list reaches."""
    return [*_in_lines(kernel, work, stages), *_in_counts(kernel), *_in_rings(kernel)]


def _in_counts(kernel: Kernel) -> Iterator[Mistake]:
    """One arrival more or less; the first thread of a role arriving for all 128, as if they went together."""
    for name, barrier in kernel.barriers.items():
        count = barrier.arrivals
        for more in (-1, 1) if count > 1 else (1,):
            yield Mistake(f"{name} counts {more:+}", _with(kernel, name, arrivals=count + more))
        if barrier.by == "threads":
            yield Mistake(f"{name} by one of 128", _with(kernel, name, by="first", arrivals=count // 128))


def _in_rings(kernel: Kernel) -> Iterator[Mistake]:
    """Barriers for one place more than the buffer has."""
    for name, barrier in kernel.barriers.items():
        ring, _, state = name.partition("_")
        if state == "empty":
            more = f"{barrier.places} + 1"
            both = _with(_with(kernel, name, places=more), f"{ring}_full", places=more)
            yield Mistake(f"{ring} has a place too few", both)


def _with(kernel: Kernel, name: str, **changes: int | str) -> Kernel:
    return kernel._replace(barriers=kernel.barriers | {name: kernel.barriers[name]._replace(**changes)})


def _in_lines(kernel: Kernel, work: list[Pair], stages: int) -> Iterator[Mistake]:
    seen = {role: record(kernel, role, work) for role in kernel.roles}
    lines = {(one.kind, one.name, one.site) for events in seen.values() for one in events}
    for line in sorted(lines, key=lambda line: (line[2], line[:2])):
        for what, change in _changes(kernel, line, stages).items():
            edit = _at(line, change)
            if any(edit(role, events) != events for role, events in seen.items()):
                yield Mistake(f"{_said(line, lines)}: {what}", kernel, edit)


def _said(line: Line, lines: set[Line]) -> str:
    """A line by what it does, numbered where a program does it in several."""
    kind, name, (function, number) = line
    same = sorted(at for one, other, (where, at) in lines if (one, other, where) == (kind, name, function))
    return f"{function}: {kind} {name}" + f" {same.index(number) + 1}" * (len(same) > 1)


def _changes(kernel: Kernel, line: Line, stages: int) -> dict[str, Change]:
    kind, name, _ = line
    if kind == "action":
        changes: dict[str, Change] = {"after its arrival": _swapped}
        if kernel.actions[name].full:
            changes["not signalled"] = lambda events, i: [events[i]._replace(full=""), *events[i + 1 : i + 2]]
        return changes
    dropped: dict[str, Change] = {"dropped": lambda events, i: events[i + 1 : i + 2]}
    if kind == "drain":
        return dropped | {"one more left": _later(1)}
    if kind == "wait":
        places = kernel.barriers[name].places
        places = stages if isinstance(places, str) else places
        return dropped | {"next phase": _later(places)} | ({"next place": _later(1)} if places > 1 else {})
    return dropped


def _later(by: int) -> Change:
    return lambda events, i: [events[i]._replace(n=events[i].n + by), *events[i + 1 : i + 2]]


def _swapped(events: list[Event], i: int) -> list[Event]:
    both = events[i : i + 2]
    return both[::-1] if len(both) == 2 and both[1].kind in ("arrive", "commit") else both


def _at(line: Line, change: Change) -> Edit:
    def edit(role: Role, events: list[Event]) -> list[Event]:
        out, i = [], 0
        while i < len(events):
            if (events[i].kind, events[i].name, events[i].site) == line:
                out += change(events, i)
                i += 2
            else:
                out.append(events[i])
                i += 1
        return out

    return edit

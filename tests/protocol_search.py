"""Every interleaving of a kernel's warps and units, searched for deadlocks and broken hand-overs; no GPU.

How often each barrier was arrived at follows from how far every process is, so a state is a vector of program
counters, packed into an integer. All states after n steps are found from all after n - 1, each once.

In which order a place is written and read is taken from one run, in which every read finds what it wants;
then no state may allow another order. An access is open while its process could do it. Two that conflict are
never both open, so it does not matter how long either takes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from protocol_steps import FOREVER, UNSAFE, WAITS, WRONG, Access, Cell, Demand, Place, System, said

Keys = npt.NDArray[np.int64]
At = list[int]  # how many steps every process has done


class Found(NamedTuple):
    """How many states there are, or up to a fault; what is wrong and how one gets there, "" for nothing."""

    states: int
    fault: str = ""
    story: str = ""


class Block:
    """A system and its counters."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.names = list(system.processes)
        self.number = {name: p for p, name in enumerate(self.names)}
        self.steps = [system.processes[name] for name in self.names]
        self.arrived: dict[Place, dict[int, At]] = defaultdict(dict)  # after so many steps of a process
        for p, steps in enumerate(self.steps):
            for i, step in enumerate(steps):
                for place, weight in step.arrivals:
                    counts = self.arrived[place].setdefault(p, [0] * (len(steps) + 1))
                    counts[i + 1 :] = [counts[i + 1] + weight] * (len(steps) - i)

    def count(self, of: str | Place, at: At) -> int:
        """A counter in a state."""
        if isinstance(of, str):
            return at[self.number[of]]
        return sum(counts[at[p]] for p, counts in self.arrived[of].items())

    def unmet(self, p: int, at: At, flag: int) -> list[str]:
        """What a process demands in vain."""
        if at[p] == len(self.steps[p]):
            return []
        return [
            f"{one.why}: {one.of if isinstance(one.of, str) else said(one.of)} is at {count}, not at "
            f"{one.low} to {one.high if one.high < FOREVER else 'any'}"
            for one in self.steps[p][at[p]].demands
            if one.flag & flag and not one.low <= (count := self.count(one.of, at)) <= one.high
        ]

    def is_free(self, p: int, at: At) -> bool:
        """Whether a process could go on."""
        return at[p] < len(self.steps[p]) and not self.unmet(p, at, WAITS)

    def faults(self, at: At) -> list[str]:
        """What is wrong with a state."""
        free = [p for p in range(len(at)) if self.is_free(p, at)]
        out = [f"{self.names[p]}: {why}" for p in range(len(at)) for why in self.unmet(p, at, WRONG)]
        out += [f"{self.names[p]}: {why}" for p in free for why in self.unmet(p, at, UNSAFE)]
        if not free and at != self.end:
            out.append("deadlock")
        if at == self.end:
            out += [f"missing arrivals at {said(place)}" for place in self.arrived if self.is_partial(place)]
        return out

    @property
    def end(self) -> At:
        """When all is done."""
        return [len(steps) for steps in self.steps]

    def is_partial(self, place: Place) -> bool:
        """Whether a phase is half complete in the end; a hardware barrier may be, it goes with the block."""
        barrier = self.system.kernel.barriers[place[0]]
        return barrier.by != "named" and self.count(place, self.end) % int(barrier.arrivals) != 0

    def story(self, way: list[int], at: At) -> str:
        """Who went on, step by step, to a state, and what everybody does or lacks in it."""
        done = [0] * len(self.steps)
        lines = []
        for p in way:
            lines.append(f"{self.names[p]:>20}: {self.steps[p][done[p]]}")
            done[p] += 1
        lines.append("and now")
        for p, (name, steps) in enumerate(zip(self.names, self.steps, strict=True)):
            lines.append(f"{name:>20}: {steps[at[p]] if at[p] < len(steps) else 'done'}")
            flags = WRONG | UNSAFE if self.is_free(p, at) else WRONG | WAITS
            lines += [f"{'':>24}{why}" for why in self.unmet(p, at, flags)]
        return "\n".join(lines)

    # ---- one run ------------------------------------------------------------------------------------

    def run(self) -> Found:
        """Any interleaving, as far as it goes: what an access finds that it does not want, and from it the
        order of all accesses."""
        at, way = [0] * len(self.steps), []
        last: dict[Cell, tuple[str, int]] = {}
        self.order: list[tuple[int, int, Access]] = []
        while free := [p for p in range(len(at)) if self.is_free(p, at)]:
            p = free[0]
            for access in self.steps[p][at[p]].accesses:
                wrong = _contents(access, last)
                if wrong:
                    return Found(sum(at), f"{self.names[p]}: {'; '.join(wrong)}", self.story(way, at))
                self.order.append((p, at[p], access))
            way.append(p)
            at[p] += 1
        return Found(sum(at))

    def keep_order(self) -> None:
        """Demand of every access that all before it be done that it conflicts with. The later one's demand
        covers both: as nobody is ever blocked again who was free, it could go on if it came first."""
        by_cell: dict[Cell, list[tuple[int, int, Access]]] = defaultdict(list)
        for p, i, access in self.order:
            latest: dict[int, int] = {}
            for q, j, other in by_cell[access.cell]:
                if q != p and (access.writes or other.writes):
                    latest[q] = j
            for q, j in latest.items():
                why = f"{access.action} at {said(access.cell)} out of order with {self.names[q]}"
                self.steps[p][i].demands.append(Demand(self.names[q], j + 1, FOREVER, UNSAFE, why))
            by_cell[access.cell].append((p, i, access))


def _contents(access: Access, last: dict[Cell, tuple[str, int]]) -> list[str]:
    """What an access finds that it does not want. ``last`` is who wrote last; uses never go back."""
    action, use = last.get(access.cell, ("nothing", 0))
    wrong = []
    if access.wanted and (action, use) != (access.wanted, access.use):
        wrong.append(
            f"{access.action} reads {action} {use} at {said(access.cell)}, not {access.wanted} {access.use}"
        )
    if access.writes:
        if access.use < use:
            wrong.append(f"{access.action} writes use {access.use} of {said(access.cell)} after {use}")
        last[access.cell] = (access.action, access.use)
    return wrong


class Tables:
    """For every process and counter: flags of what is unmet, by where the process and the counter are."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.sizes = [len(steps) + 1 for steps in block.steps]
        bits = [size.bit_length() for size in self.sizes]
        self.shifts = [sum(bits[:p]) for p in range(len(bits))]
        self.masks = [(1 << one) - 1 for one in bits]
        assert sum(bits) < 64, "too many processes for a key of 64 bits"
        self.several = [place for place, by in block.arrived.items() if len(by) > 1]
        self.counts = [
            {p: np.array(counts, np.int32) for p, counts in block.arrived[x].items()} for x in self.several
        ]
        self.flags: list[dict[int, npt.NDArray[np.uint8]]] = []
        for p, size in enumerate(self.sizes):
            self.flags.append({p: np.zeros((size, size), np.uint8)})
            self.flags[p][p][-1] = WAITS
            for i, step in enumerate(block.steps[p]):
                for one in step.demands:
                    self.add(p, i, one)

    def add(self, p: int, i: int, demand: Demand) -> None:
        x, values = self.counter(p, demand.of)
        table = self.flags[p].setdefault(x, np.zeros((self.sizes[p], len(values)), np.uint8))
        outside = (values < demand.low) | (values > demand.high)
        table[i] |= np.where(outside, demand.flag, 0).astype(np.uint8)

    def counter(self, p: int, of: str | Place) -> tuple[int, npt.NDArray[np.int64]]:
        """Its number, a process' where only that one arrives, and all its values."""
        if isinstance(of, str):
            q = self.block.number[of]
            return q, np.arange(self.sizes[q])
        by = self.block.arrived.get(of, {})
        if len(by) > 1:
            return len(self.sizes) + self.several.index(of), np.arange(sum(map(max, by.values())) + 1)
        for q, counts in by.items():
            return q, np.array(counts)
        return p, np.zeros(self.sizes[p], np.int64)

    def values(self, keys: Keys) -> list[Keys]:
        """All counters in all states."""
        at = [keys >> shift & mask for shift, mask in zip(self.shifts, self.masks, strict=True)]
        return at + [sum(counts[at[p]] for p, counts in by.items()) for by in self.counts]  # type: ignore[misc]

    def state(self, key: int) -> At:
        """A state, unpacked."""
        return [int(key) >> shift & mask for shift, mask in zip(self.shifts, self.masks, strict=True)]

    def of(self, p: int, values: list[Keys]) -> npt.NDArray[np.uint8]:
        """A process' flags in all states."""
        out = np.zeros(len(values[0]), np.uint8)
        for x, table in self.flags[p].items():
            out |= table.ravel()[values[p] * table.shape[1] + values[x]]
        return out


def search(system: System) -> Found:
    """All states, or those up to a shortest way to a fault."""
    block = Block(system)
    found = block.run()
    if found.fault:
        return found
    block.keep_order()
    tables = Tables(block)
    levels = [np.zeros(1, np.int64)]
    for _ in range(sum(block.end) + 1):
        following, bad = _successors(tables, levels[-1])
        if len(bad):
            at = tables.state(bad[0])
            wrong = block.faults(at)
            if wrong:
                story = block.story(_way(tables, levels, int(bad[0])), at)
                return Found(sum(map(len, levels)), "; ".join(wrong), story)
        levels.append(following)
    return Found(sum(map(len, levels)))


def _successors(tables: Tables, keys: Keys) -> tuple[Keys, Keys]:
    """All states one step later; the states that are at fault or the end."""
    values = tables.values(keys)
    following, bad, stuck = [], np.zeros(len(keys), bool), np.ones(len(keys), bool)
    for p, shift in enumerate(tables.shifts):
        flags = tables.of(p, values)
        is_free = flags & WAITS == 0
        bad |= (flags & WRONG != 0) | is_free & (flags & UNSAFE != 0)
        stuck &= ~is_free
        following.append(keys[is_free] + (1 << shift))
    return np.unique(np.concatenate(following)), keys[bad | stuck]


def _way(tables: Tables, levels: list[Keys], key: int) -> list[int]:
    """Which processes went on, from the start to a state of the last level."""
    way: list[int] = []
    for level in levels[-2::-1]:  # nobody is ever blocked again who was free: each of these could go on
        p = next(
            p
            for p, one in enumerate(tables.shifts)
            if key >> one & tables.masks[p] and key - (1 << one) in level
        )
        key, way = key - (1 << tables.shifts[p]), [p, *way]
    return way

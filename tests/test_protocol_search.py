"""The search for broken hand-overs itself, on a ring between one producer and one consumer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from gnaflex.cuda_backend import protocol, sm100_roles
from protocol_record import Kernel, Role, pair, record
from protocol_search import Found, search
from protocol_steps import System


def ring(produce: str, consume: str, places: int = 1, turns: int = 3, first: int = 0) -> Found:
    """What is found in two programs of two warps each, line by line: "wait empty 0" is for the turn's use and
    0 more. One thread of a warp says "full". ``first``: 1 to name the consumer first."""

    def program(lines: str) -> object:
        def run(self: object) -> None:
            for n, line in itertools.product(range(turns), lines.split(", ")):
                verb, name, more = line.split()
                if verb == "do":
                    getattr(self, name)(x=n + int(more))
                else:
                    getattr(self, verb)(name, n + int(more))

        return run

    kernel = Kernel(
        {
            "full": protocol.Barrier("one", 2, places),
            "empty": protocol.Barrier("threads", 64, places, is_free=True),
            "loaded": protocol.Barrier("tma", 1, places),
            "both": protocol.Barrier("threads", 128),
        },
        {"x": protocol.Buffer(places)},
        {
            "fill": protocol.Action("threads", writes=("x",)),
            "spill": protocol.Action("threads", writes=("x",)),
            "read": protocol.Action("threads", ("x:fill",)),
            "load": protocol.Action("tma", writes=("x",), full="loaded"),
        },
        type("Programs", (), {"produce": program(produce), "consume": program(consume)}),
        (Role("producer", "produce", 64), Role("consumer", "consume", 64))[:: -1 if first else 1],
        frozenset(),
    )
    return search(System(kernel, [pair(1)] * turns, 1))


FILL, READ = "wait empty 0, do fill 0, arrive full 0", "wait full 0, do read 0, arrive empty 0"


def test_counts_all_interleavings() -> None:
    """After n and m turns, m <= n <= m + places."""
    assert ring(FILL, READ, places=1).states == 7
    assert ring(FILL, READ, places=2).states == 4 + 3 + 2
    assert ring(FILL, READ, places=3).states == 4 + 3 + 2 + 1


@pytest.mark.parametrize(
    "produce, consume, what",
    [
        (FILL, "wait full 0, do read 0, arrive empty 0, wait full 1", "deadlock"),
        ("do fill 0, arrive full 0", READ, "reads fill 2 at x.0[0], not fill 0"),
        (FILL, "do read 0, arrive empty 0", "read at x.0[0] out of order with producer"),
        ("wait empty 0, arrive full 0, do fill 0", READ, "out of order"),
        (FILL, "wait full 0, arrive empty 0, do read 0", "reads fill 1 at x.0[0], not fill 0"),
        ("wait empty 0, do spill 0, arrive full 0", READ, "reads spill 0 at x.0[0], not fill 0"),
        ("wait empty 0, do fill 1, arrive full 0", READ, "reads fill 1 at x.0[0], not fill 0"),
        ("wait empty 0, do fill 0, do fill -1, arrive full 0", READ, "writes use -1 of x.0[0] after 0"),
        ("do load 0", "arrive empty 0", "still being filled: tma x.0[0]"),
        ("arrive full 0", "wait full 0", "parity cannot tell when to wait for phase 1 of full.0[0]"),
        ("wait full 2, arrive full 0", READ, "parity cannot tell when to wait for phase 3 of full.0[0]"),
        (FILL, "wait full 0, do read 0, arrive empty 1", "it counts for another: arrive at empty.0[0]"),
        (f"{FILL}, arrive both 0, arrive both 0, arrive both 0", READ, "it counts for another"),
    ],
)
def test_every_kind_of_fault(produce: str, consume: str, what: str) -> None:
    one = ring(produce, consume)
    assert what in one.fault
    assert "and now\n" in one.story
    assert "producer: " in one.story


def test_overwritten_before_it_was_read() -> None:
    """Though the run that the order of accesses is taken from happens to read in time."""
    assert (
        "fill at x.0[0] out of order with consumer" in ring("do fill 0, arrive full 0", READ, first=1).fault
    )


def test_arrivals_that_are_missing_in_the_end() -> None:
    assert not ring(f"{FILL}, arrive both 0", f"{READ}, arrive both 0").fault
    assert ring(f"{FILL}, arrive both 0", READ, turns=1).fault == "missing arrivals at both.0[0]"


def test_a_story_is_a_shortest_way_to_a_fault() -> None:
    one = ring(FILL, "wait full 0, do read 0", turns=2)
    assert one.fault == "deadlock"
    assert [line.strip() for line in one.story.splitlines()] == [
        "producer: wait for phase 0 of empty.0[0], fill x.0[0]=0, arrive at full.0[0] for phase 1",
        "consumer: wait for phase 1 of full.0[0], read x.0[0]=0",
        "and now",
        "producer: wait for phase 1 of empty.0[0], fill x.0[0]=1, arrive at full.0[0] for phase 2",
        "wait for phase 1 of empty.0[0]: empty.0[0] is at 0, not at 64 to any",
        "consumer: wait for phase 2 of full.0[0], read x.0[0]=1",
        "wait for phase 2 of full.0[0]: full.0[0] is at 2, not at 4 to any",
    ]


@pytest.mark.parametrize(
    "line, what",
    [
        ("do pour 0", "pour, which is neither an action nor said to be local"),
        ("wait fill 0", "wait fill, half 0: no such barrier"),
        ("commit full 0", "commit full, half 0: no such barrier, or not one for this"),
    ],
)
def test_programs_do_what_is_declared(line: str, what: str) -> None:
    with pytest.raises((AttributeError, ValueError), match=what):
        ring(line, READ)


def refused(run: Callable[[Any], None], **changes: Any) -> str:
    """How a program over the barriers, buffers and actions of a kernel is refused."""
    kernel = Kernel.of(sm100_roles, (), "")._replace(programs=type("It", (), {"run": run}), **changes)
    with pytest.raises(ValueError) as error:
        record(kernel, Role("it", "run"), [])
    return str(error.value)


def test_programs_say_which_use_of_what() -> None:
    for uses in ({}, {"kv": 0, "q": 0}, {"x": 0}):
        said = "bring_keys says its use of"
        assert said in refused(functools.partialmethod(lambda self, uses: self.bring_keys(**uses), uses))
    assert "bring_keys says its use of" in refused(lambda self: self.bring_keys(kv=0), buffers={})
    assert "wait kv_full, half 1: no such" in refused(lambda self: self.wait("kv_full", 0, 1))

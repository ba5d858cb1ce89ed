"""The kernels' hand-overs without hardware: the programs that they are built from, in every interleaving.

A search that finds nothing proves something only if it finds mistakes; so these are made, one at a time.
"""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace

import pytest
from gnaflex.cuda_backend import sm90_roles, sm100_roles
from gnaflex.cuda_backend.compile import compiled
from gnaflex.cuda_backend.config import KernelConfig
from protocol_faults import Mistake, mistakes
from protocol_record import Event, Kernel, Role, pair, sees, tile_of
from protocol_search import Found, search
from protocol_steps import System

SM100 = Kernel.of(
    sm100_roles,
    (
        Role("load", "load"),
        Role("multiply", "multiply"),
        *(Role(f"weigh {h}", "weigh", sm100_roles.GROUP, (h,)) for h in (0, 1)),
        Role("correct", "correct", sm100_roles.GROUP),
        Role("store", "store"),
    ),
    local="start sum_up",
)
SM90 = Kernel.of(
    sm90_roles,
    (
        Role("load", "load"),
        *(Role(f"attend {h}", "attend", sm90_roles.GROUP, (h,)) for h in (0, 1)),
    ),
    local="start settle",
)
KERNELS = {"sm_90a": SM90, "sm_100a": SM100}
MOST = 4  # tiles of a half

# boxes of the first half, of the second (None: there is none), how many later these lie, lines of both
SHAPES = [
    *((n, None, 0, lines) for n in range(MOST + 1) for lines in range(3) if 0 < n + lines <= MOST),
    *(
        (a, b, skip, lines)
        for a, b, lines in itertools.product(range(MOST + 1), range(MOST + 1), range(3))
        for skip in range(a + 1)
        if 0 < a + lines <= MOST and 0 < b + lines <= MOST and (b > 0 or a == 0) and a <= skip + b
    ),
]
FEW = [  # one tile and two, alone and together, equal, behind, apart, with lines and of nothing but lines
    *((1, None, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (2, None, 0, 0), (2, 2, 1, 0)),
    *((3, 3, 0, 0), (1, None, 0, 1), (2, 1, 1, 1), (0, 0, 0, 1), (0, None, 0, 2)),
]

# What no search can find, and why it does no harm.
HARMLESS = {
    "sm_100a": {
        # The place after a value tile's is that of the next key tile, which comes after it in either ring:
        # ``multiply`` gives places back in their order, so this waits longer than it must.
        "load: wait kv_empty 2: next place",
    },
    "sm_90a": {
        # Whose turn it is decides who goes first, not what is read: these go to the other group too early.
        "attend: action outputs 1: after its arrival",
        # What comes next gives the queries back, which nothing rounds.
        "attend: action round 1: after its arrival",
        "attend: action round 2: after its arrival",
    },
}


def clean(system: System) -> int:
    found = search(system)
    assert not found.fault, f"{found.fault}\n{found.story}"
    return found.states


# ---- all interleavings -------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_every_pair(stages: int) -> None:
    for shape in SHAPES:
        clean(System(SM100, [pair(*shape)], stages))


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("first", FEW)
def test_every_pair_after_every_pair(first: tuple[int, int | None, int, int], stages: int) -> None:
    for second in FEW:
        clean(System(SM100, [pair(*first), pair(*second)], stages))


@pytest.mark.parametrize("stages", [2, 3])
def test_three_pairs(stages: int) -> None:
    for work in itertools.product(FEW[:3], repeat=3):
        clean(System(SM100, [pair(*one) for one in work], stages))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_items_on_hopper(stages: int) -> None:
    some = (range(1, MOST + 1), range(1, MOST + 1), (1, 3))
    for number in (1, 2, 3):
        for tiles in itertools.product(*some[-number:]):
            clean(System(SM90, [pair(n) for n in tiles], stages))


@pytest.mark.parametrize("role", ["weigh 0", "weigh 1", "correct"])
def test_warps_of_a_role_apart(role: str) -> None:
    for work in ([(2, 2, 1, 1)], [(1, 1, 0, 0), (2, 2, 1, 0)], [(1, None, 0, 0), (1, 1, 0, 0)]):
        together = System(SM100, [pair(*one) for one in work], 3)
        apart = System(SM100, [pair(*one) for one in work], 3, split=role)
        assert clean(apart) > clean(together)


@pytest.mark.parametrize("role", ["attend 0", "attend 1"])
def test_warps_of_a_hopper_group_apart(role: str) -> None:
    for tiles in ((4,), (1, 1, 2), (3, 2)):
        for stages in (1, 2):
            clean(System(SM90, [pair(n) for n in tiles], stages, split=role))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_event_a_step(kernel: str) -> None:
    """What is one step elsewhere changes nothing but the number of states."""
    for work in ([pair(4, 4)], [pair(2, 3, 1, 1)], [pair(1), pair(1)], [pair(1, 1), pair(1)]):
        fine = clean(System(KERNELS[kernel], work, 2, fine=True))
        assert fine > clean(System(KERNELS[kernel], work, 2))


# ---- mistakes ----------------------------------------------------------------------------------------

SEEDED = {  # work lists that reach every line
    "sm_100a": [[(2, 2, 1, 0), (1, None, 0, 0), (1, 1, 0, 0)], [(3, 3, 0, 0), (2, 2, 2, 0)]],
    "sm_90a": [[(2,), (1,), (3,)], [(4,), (4,)]],
}
SHORT = {"sm_100a": [(2, 2, 1, 0)], "sm_90a": [(2,), (1,)]}
STAGES = {"sm_100a": (2, 3), "sm_90a": (1, 2)}
APART = {"sm_100a": ("", "weigh 0", "weigh 1", "correct"), "sm_90a": ("", "attend 0", "attend 1")}


def seeded(kernel: str) -> list[Mistake]:
    return mistakes(KERNELS[kernel], [pair(*one) for one in SEEDED[kernel][0]], STAGES[kernel][0])


def found(mistake: Mistake, kernel: str) -> Found:
    """By the first search that finds it, else what the last one says."""
    for split, stages, work in itertools.product(APART[kernel], STAGES[kernel], SEEDED[kernel]):
        one = search(mistake.system([pair(*shape) for shape in work], stages, split))
        if one.fault:
            break
    return one


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_mistake_is_found(kernel: str) -> None:
    made = seeded(kernel)
    assert len({one.name for one in made}) == len(made) > 50
    assert {one.name for one in made if not found(one, kernel).fault} == HARMLESS[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_every_event_a_step_the_same_mistakes_are_found(kernel: str) -> None:
    work = [pair(*shape) for shape in SHORT[kernel]]
    for mistake in seeded(kernel):
        coarse, fine = (search(mistake.system(work, 2, fine=fine)) for fine in (False, True))
        assert bool(coarse.fault) == bool(fine.fault), mistake.name


@pytest.mark.parametrize("kernel", KERNELS)
def test_that_warps_are_apart_is_seen_only_where_they_are(kernel: str) -> None:
    made = [one for one in seeded(kernel) if one.name.endswith("by one of 128")]
    assert len(made) == sum(barrier.by == "threads" for barrier in KERNELS[kernel].barriers.values())
    for mistake in made:
        for work in SEEDED[kernel]:
            clean(mistake.system([pair(*shape) for shape in work], 2))
        assert "it counts for another" not in found(mistake, kernel).fault


def test_half_that_is_not_there_must_not_run_ahead() -> None:
    """As ``multiply`` once did: twice done with a half without tiles, before anybody asked whether once."""

    def early(role: Role, events: list[Event]) -> list[Event]:
        late = [one for one in events if (one.kind, one.name, one.h) == ("commit", "o_full", 1)]
        out = []
        for one in events:
            out += [] if one in late else [one]
            if (one.kind, one.name) == ("commit", "q_empty"):
                out.append(next(o for o in late if o.n == one.n))
        return out

    assert "o_full.1" in search(System(SM100, [pair(1), pair(1)], 4, edit=early)).fault
    clean(System(SM100, [pair(1), pair(2)], 4, edit=early))


# ---- the kernels -------------------------------------------------------------------------------------


def test_kernels_are_built_from_these_programs() -> None:
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    from gnaflex.cuda_backend.sm90_attend import PRODUCER_WARP, Attend90
    from gnaflex.cuda_backend.sm100_attend import CORRECT, LOAD, MULTIPLY, STORE, Attend100

    for built, module, kernel in ((Attend90, sm90_roles, SM90), (Attend100, sm100_roles, SM100)):
        assert built.BARRIERS is module.BARRIERS
        programs = {name for name in vars(module.Roles) if not name.startswith("_")}
        assert programs >= {role.program for role in kernel.roles}
        for name in programs:
            assert inspect.unwrap(getattr(built, name)) is vars(module.Roles)[name]
        for name in (*module.ACTIONS, *kernel.local):
            assert callable(getattr(built, name))
    warps = {role.name: role.threads // 32 for role in (*SM90.roles, *SM100.roles[1:])}
    assert warps["attend 0"] + warps["attend 1"] == PRODUCER_WARP
    assert (warps["weigh 0"] + warps["weigh 1"], warps["correct"]) == (CORRECT, MULTIPLY - CORRECT)
    assert (warps["multiply"], warps["load"], warps["store"]) == (LOAD - MULTIPLY, STORE - LOAD, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_programs_run_as_they_did_after_they_were_compiled(kernel: str) -> None:
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    compiled(KernelConfig(kernel, "bfloat16", 64, (8,), (16,)))
    clean(System(KERNELS[kernel], [pair(2), pair(1)], 2))


def test_pairs_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    from gnaflex.cuda_backend import items

    plain = SimpleNamespace(
        and_=lambda a, b: a and b, or_=lambda a, b: a or b, select_=lambda a, b, c: b if a else c
    )
    monkeypatch.setattr(items, "cutlass", plain)
    for shape in SHAPES:
        one = pair(*shape)
        for h, j in itertools.product((0, 1), range(one.tiles)):
            assert sees(one, h, j) == items.sees(one, h, j)
            if sees(one, h, j):
                assert tile_of(one, h, j) == items.tile_of(one, h, j)
        for h in (0, 1):
            mine = [tile_of(one, h, j) for j in range(one.tiles) if sees(one, h, j)]
            assert mine == list(range(one.counts[h]))

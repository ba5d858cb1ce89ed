"""The planner: exact counts against brute force, the paper's table, facts free of any oracle."""

from __future__ import annotations

import math
import random
import re
import time

import numpy as np
import pytest
from cases import NATTEN_CASES, random_spec

import gnaflex
from gnaflex.drawing import draw
from gnaflex.nearby import nearest
from gnaflex.paper import CONFIGURATIONS
from gnaflex.planner import plan
from gnaflex.reference import dense_mask
from gnaflex.searching import search
from gnaflex.spec import GNA, GNAError
from gnaflex.timing import end_to_end, estimate, sparse_share

# Tile speed-ups (worst, mean) and whether block-sparse, of the paper's rows; computed apart from gnaflex.
EXPECTED = {
    ((80, 80), (1, 1)): (6.10, 7.06, False),
    ((80, 80), (16, 1)): (8.53, 9.00, False),
    ((80, 80), (16, 16)): (10.24, 10.24, True),
    ((18, 24, 24), (1, 1, 1)): (3.27, 5.24, False),
    ((18, 24, 24), (2, 1, 1)): (3.60, 5.45, False),
    ((18, 24, 24), (1, 1, 8)): (5.45, 7.69, False),
    ((18, 24, 24), (2, 1, 8)): (6.00, 8.00, False),
    ((18, 24, 24), (1, 8, 8)): (9.09, 10.26, False),
    ((18, 24, 24), (2, 8, 8)): (10.00, 10.67, False),
    ((18, 24, 24), (16, 8, 8)): (11.11, 11.11, True),
    ((18, 24, 24), (18, 24, 24)): (6.67, 10.26, False),
}


def brute_force(spec, q_tile, kv_tile, kv_tiling):
    """Touched, full, clipped tiles, and visited tiles of the busiest query tile, token by token."""
    mask = dense_mask(spec).numpy()
    at = np.stack(np.unravel_index(np.arange(spec.num_tokens), spec.shape))
    d = np.array(spec.dilation)[:, None]
    inside, group = at // d, at % d
    q_ids = np.concatenate([group, inside // np.array(q_tile)[:, None]])
    tiles, q_tile_of = np.unique(q_ids, axis=1, return_inverse=True)
    q_tile_of = q_tile_of.reshape(-1)
    touched = full = clipped = busiest = 0
    for tile in range(tiles.shape[1]):
        queries = np.flatnonzero(q_tile_of == tile)
        seen = mask[queries]
        keys = np.flatnonzero((group == group[:, queries[:1]]).all(0))
        origin = np.zeros_like(d[:, 0])
        if kv_tiling == "dynamic":
            reached = inside[:, seen.any(0)]
            origin = reached.min(1)
            keys = keys[
                ((inside[:, keys] >= origin[:, None]) & (inside[:, keys] <= reached.max(1)[:, None])).all(0)
            ]
        kv_ids = (inside[:, keys] - origin[:, None]) // np.array(kv_tile)[:, None]
        _, kv_tile_of, sizes = np.unique(kv_ids, axis=1, return_inverse=True, return_counts=True)
        visited = 0
        for kv, size in enumerate(sizes):
            here = seen[:, keys[kv_tile_of.reshape(-1) == kv]]
            if here.any():
                visited += 1
                full += bool(here.all() and size == math.prod(kv_tile))
                clipped += bool(here.all() and size < math.prod(kv_tile))
        touched += visited
        busiest = max(busiest, visited)
    return touched, full, clipped, busiest


def random_tile(rng, spec):
    return tuple(
        rng.choice([1, 2, 3, 4, rng.randint(1, max(n // d, 1))])
        for n, d in zip(spec.shape, spec.dilation, strict=True)
    )


@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_brute_force(seed, kv_tiling):
    """10,000 problems in each tiling, all in all."""
    rng = random.Random(seed)
    sparse = 0
    for _ in range(1250):
        spec = random_spec(rng, rng.choice([1, 1, 2, 2, 3]), 30)
        q_tile, kv_tile = random_tile(rng, spec), random_tile(rng, spec)
        p = plan(spec, q_tile, kv_tile, kv_tiling)
        touched, full, clipped, busiest = brute_force(spec, q_tile, kv_tile, kv_tiling)
        assert (p.touched_tiles, p.full_tiles, p.clipped_tiles) == (touched, full, clipped), (
            spec,
            q_tile,
            kv_tile,
        )
        assert p.is_block_sparse == (touched == full + clipped)
        assert p.tile_speedup_worst == pytest.approx(-(-spec.num_tokens // math.prod(kv_tile)) / busiest)
        sparse += p.is_block_sparse
    assert 100 < sparse < 1150


def test_where_nattens_formula_errs():
    assert plan(GNA(32, 24, 8), (16,), (8,)).is_block_sparse
    assert not plan(GNA(16, 8, 1), (1,), (4,)).is_block_sparse


def test_the_papers_table():
    seen = 0
    for row in CONFIGURATIONS:
        p = row.plan
        if expected := EXPECTED.get((row.window, row.stride)):
            seen += 1
            assert (p.tile_speedup_worst, p.tile_speedup_mean) == pytest.approx(expected[:2], abs=0.006)
            assert p.is_block_sparse == expected[2]
        assert p.tile_speedup_worst <= p.tile_speedup_mean + 1e-12 <= p.flop_speedup + 1e-9
    assert seen == len(EXPECTED)
    assert len(CONFIGURATIONS) == 22


def test_work_speedups_of_the_grids_models_use():
    def work(shape, q_tile, kv_tiling):
        return plan(GNA(shape, (18, 24, 24), (16, 8, 8)), q_tile, (2, 8, 8), kv_tiling)

    figures = {
        ((33, 45, 80), (2, 8, 8), "dynamic"): (10.45, True),
        ((33, 45, 80), (4, 8, 8), "dynamic"): (9.88, True),
        ((30, 48, 80), (4, 8, 8), "dynamic"): (10.42, True),
        ((33, 45, 80), (2, 8, 8), "static"): (8.88, False),
        ((33, 45, 80), (4, 8, 8), "static"): (8.37, False),
    }
    for case, (speedup, is_sparse) in figures.items():
        p = work(*case)
        assert (round(p.work_speedup, 2), p.is_block_sparse) == (speedup, is_sparse)
    p = work((33, 45, 80), (2, 8, 8), "dynamic")
    assert (round(p.tile_speedup_worst, 2), round(p.flop_speedup, 2)) == (11.47, 11.46)


def test_a_dense_problem_and_a_blocked_one():
    dense = plan(GNA((8, 8), -1), (4, 4), (2, 8))
    assert dense.is_block_sparse
    assert dense.flop_speedup == dense.work_speedup == dense.tile_speedup_worst == 1
    assert dense.sparsity == 0
    blocked = plan(GNA((8, 8), 4, 4), (4, 4), (4, 4))
    assert (blocked.touched_tiles, blocked.full_tiles, blocked.work_speedup) == (4, 4, 4)


def test_permuting_the_axes_changes_nothing():
    rng = random.Random(5)
    for _ in range(50):
        spec = random_spec(rng, 3, 200)
        q_tile, kv_tile = random_tile(rng, spec), random_tile(rng, spec)
        turn = rng.sample(range(3), 3)
        fields = [
            [getattr(spec, name)[a] for a in turn]
            for name in ("shape", "window", "stride", "dilation", "is_causal")
        ]
        other = plan(GNA(*fields), [q_tile[a] for a in turn], [kv_tile[a] for a in turn], "dynamic")
        p = plan(spec, q_tile, kv_tile, "dynamic")
        assert (p.touched_tiles, p.full_tiles, p.partial_tiles) == (
            other.touched_tiles,
            other.full_tiles,
            other.partial_tiles,
        )


@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
def test_the_best_tiles_are_the_best_of_all_boxes(kv_tiling):
    rng = random.Random(kv_tiling)
    for _ in range(8):
        spec = random_spec(rng, 2, 150)
        found = plan(spec, kv_tiling=kv_tiling, q_rows=12, kv_rows=8)
        longest = [axis.group_length(0) for axis in spec.axes]
        boxes = {
            rows: [
                (a, b)
                for a in range(1, longest[0] + 1)
                for b in range(1, longest[1] + 1)
                if min(rows, math.prod(longest)) < 2 * a * b <= 2 * rows
            ]
            for rows in (12, 8)
        }
        plans = (plan(spec, q, kv, kv_tiling) for q in boxes[12] for kv in boxes[8])
        least = min((one.touched_tiles, one.partial_tiles) for one in plans)
        assert math.prod(found.q_tile) <= 12
        assert math.prod(found.kv_tile) <= 8
        assert (found.touched_tiles, found.partial_tiles) == least


def test_tiles_of_extent_one_make_causal_and_sliding_axes_perfect():
    causal = GNA((24, 16, 16), (8, 8, 8), (1, 8, 8), is_causal=(True, False, False))
    assert plan(causal, (1, 8, 8), (2, 8, 8), "dynamic").is_block_sparse
    assert not plan(causal, (2, 8, 8), (2, 8, 8), "dynamic").is_block_sparse


def test_plans_are_values():
    spec = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert plan(spec, (4, 8, 8), (2, 8, 8)) == plan(spec, (4, 8, 8), (2, 8, 8))
    assert len({plan(spec, (4, 8, 8), (2, 8, 8)), plan(spec, (4, 8, 8), (2, 8, 8))}) == 1
    assert gnaflex.plan is plan


def test_a_million_tokens_plan_quickly():
    spec = GNA((128, 96, 96), (16, 24, 24), is_causal=(True, False, False))
    start = time.perf_counter()
    p = plan(spec)
    assert p.touched_tiles > p.partial_tiles > 0
    assert time.perf_counter() - start < 2  # some ms; benchmarks/planning.py measures it


@pytest.mark.parametrize("spec", NATTEN_CASES[::7], ids=repr)
def test_natten_cases_plan(spec):
    for kv_tiling in ("static", "dynamic"):
        p = plan(spec, kv_tiling=kv_tiling)
        assert min(p.full_tiles, p.clipped_tiles, p.partial_tiles) >= 0  # differences of separate counts
        assert p.work_speedup <= p.flop_speedup * 1.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: plan(s, 8), "q_tile must have one positive integer extent"),
        (lambda s: plan(s, "ab"), "q_tile must have"),
        (lambda s: plan(s, (float("nan"), 8)), "q_tile must have"),
        (lambda s: plan(s, (8.0, 8)), "q_tile must have"),
        (lambda s: plan(s, (True, 8)), "q_tile must have"),
        (lambda s: plan(s, (2**63, 4)), "up to 67,108,864"),
        (lambda s: plan(s, q_rows=0), "q_rows must be an integer from 1 to 4,096: got q_rows=0"),
        (lambda s: plan(s, kv_rows=12.5), "kv_rows must be an integer"),
        (lambda s: plan((8, 8)), "a problem is needed: got tuple"),
        (lambda s: plan(GNA(2**31, 3)), "an axis must not exceed 67,108,864 tokens"),
        (lambda s: plan(GNA((4,) * 12, 2)), "too many boxes of 128 tokens at most for 12 axes"),
        (lambda s: search((8, 8), limit=-1), "limit must be an integer of at least 1: got limit=-1"),
        (lambda s: search((8, 8), windows=4.0), "every entry of windows must be an integer"),
        (lambda s: search((8, 8), strides=(2.5, 2)), "every entry of strides must be an integer"),
        (lambda s: search((8, 8), min_sparsity="0.5"), "sparsity must be a share"),
        (lambda s: search((8, 8), min_sparsity=0.6, max_sparsity=0.5), "sparsity must be a share"),
        (lambda s: search((8, 8), dilation="max"), "a search needs a dilation in numbers"),
        (lambda s: nearest(s, limit=2.5), "limit must be an integer from 1 to 100"),
        (lambda s: nearest(plan(s)), "a problem is needed: got Plan"),
        (lambda s: estimate(s, 24, 128), "a plan is needed: got GNA"),
        (lambda s: end_to_end(math.inf, 1.0), "speedup must be positive and finite"),
        (lambda s: end_to_end("2", 1.0), "speedup must be positive"),
        (lambda s: sparse_share(math.inf, 1), "steps must be an integer"),
        (lambda s: draw(s, width=40.5), "width must be an integer of at least 16"),
        (lambda s: draw(s, kind="window", q_tile=(9, 9)), "have no tiles"),
        (lambda s: draw(s, path="picture"), "must end in one of .png, .pdf, .svg"),
        (lambda s: draw(s, path="/nowhere/at/all.png"), "there is no folder '/nowhere/at'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(GNAError, match=re.escape(message)):
        call(GNA((8, 8), 3))


def test_numpy_integers_are_integers():
    spec = GNA((8, 8), 3)
    assert plan(spec, np.array([2, 4]), (np.int64(2), 4)) == plan(spec, (2, 4), (2, 4))
    assert search((8, 8), windows=np.int64(4)).rows == search((8, 8), windows=4).rows
    assert search((8, 8), windows=np.array([4, 3])).rows == search((8, 8), windows=(4, 3)).rows
    assert estimate(plan(spec), np.int64(24), 128) == estimate(plan(spec), 24, 128)
    assert draw(spec, kind="window", query=np.array([3, 3])) == draw(spec, kind="window", query=(3, 3))


def test_errors():
    spec = GNA((8, 8), 3)
    with pytest.raises(
        GNAError, match=r"q_tile must have one positive integer extent per axis, .*: got q_tile=\(8,\)"
    ):
        plan(spec, (8,))
    with pytest.raises(GNAError, match="kv_tile must have"):
        plan(spec, (8, 8), (0, 8))
    with pytest.raises(GNAError, match="kv_tile must have"):
        plan(spec, (8, 8), (1.5, 8))
    with pytest.raises(GNAError, match='kv_tiling must be one of "static", "dynamic"'):
        plan(spec, kv_tiling="fixed")

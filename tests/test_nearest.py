"""Search and nearest against plans of every window and stride of small grids."""

from __future__ import annotations

import itertools
import random

import pytest
from cases import random_spec

from gnaflex.nearby import nearest
from gnaflex.planner import plan
from gnaflex.searching import search
from gnaflex.spec import GNA, GNAError


def random_tile(rng, spec):
    return tuple(
        rng.randint(1, max(min(4, n // d), 1)) for n, d in zip(spec.shape, spec.dilation, strict=True)
    )


def every_problem(spec):
    """All windows and strides on the axes of a problem."""
    options = [
        [(w, s) for w in range(1, n // d + 1) for s in range(1, w + 1)]
        for n, d in zip(spec.shape, spec.dilation, strict=True)
    ]
    for chosen in itertools.product(*options):
        windows, strides = zip(*chosen, strict=True)
        yield GNA(spec.shape, windows, strides, spec.dilation, spec.is_causal)


@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
@pytest.mark.parametrize("seed", range(6))
def test_the_nearest_are_block_sparse_and_none_is_nearer(seed, kv_tiling):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.choice([1, 2]), 30)
    q_tile, kv_tile = random_tile(rng, spec), random_tile(rng, spec)
    found = nearest(spec, q_tile, kv_tile, kv_tiling, limit=5)
    distances = [one.distance for one in found]
    assert distances == sorted(distances)
    for one in found:
        assert one.plan == plan(one.spec, q_tile, kv_tile, kv_tiling)
        assert one.plan.is_block_sparse
        assert (one.distance == 0) == (one.spec == spec)
        assert (one.spec.shape, one.spec.dilation) == (spec.shape, spec.dilation)
    perfect = [one for one in every_problem(spec) if plan(one, q_tile, kv_tile, kv_tiling).is_block_sparse]
    assert bool(found) == bool(perfect)
    assert plan(spec, q_tile, kv_tile, kv_tiling).is_block_sparse == (bool(found) and found[0].spec == spec)
    if len(found) == 5:  # each that was left out is as far as the last at least
        far = nearest(spec, q_tile, kv_tile, kv_tiling, limit=len(perfect))
        assert min((one.distance for one in far[5:]), default=distances[-1]) >= distances[-1] - 1e-9


@pytest.mark.parametrize("shape", [(33, 45, 80), (21, 45, 80)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (5, 6, 7), (16, 8, 8)])
def test_grids_that_models_use(shape, stride):
    spec = GNA(shape, (18, 24, 24), stride)
    for tiles in ((None, None), ((2, 8, 8), (2, 8, 8))):
        found = nearest(spec, *tiles, limit=3)
        assert len(found) == 3
        for one in found:
            assert plan(one.spec, one.plan.q_tile, one.plan.kv_tile, "dynamic").is_block_sparse
        assert max(one.work_speedup for one in found) > 5 or tiles == (None, None)
        assert max(one.work_speedup for one in found) > 3


@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
def test_the_fastest_of_a_search_is_the_fastest_of_all(kv_tiling):
    rng = random.Random(kv_tiling)
    for _ in range(4):
        spec = random_spec(rng, 2, 40)
        base = GNA(spec.shape, 1)
        tiles = random_tile(rng, base), random_tile(rng, base)
        found = search(spec.shape, kv_tiling=kv_tiling, q_tile=tiles[0], kv_tile=tiles[1], limit=5)
        plans = [plan(one, *tiles, kv_tiling) for one in every_problem(base)]
        perfect = [one for one in plans if one.is_block_sparse]
        assert bool(found.rows) == bool(perfect)
        if perfect:
            best = min(one.touched_tiles for one in perfect)
            assert found.rows[0].plan.touched_tiles == best
        for row in (*found.rows, *found.front):
            again = plan(row.spec, row.plan.q_tile, row.plan.kv_tile, kv_tiling)
            assert again.is_block_sparse
            assert again.touched_tiles == row.plan.touched_tiles


def test_explanations():
    spec = GNA((64,), 16, 6)
    text = plan(spec, (8,), (8,), "dynamic").explain()
    assert "straddle stride groups whose windows differ" in text
    assert "stride 6 -> 8" in text
    assert plan(GNA((64,), 16, 16), (16,), (16,)).explain().startswith("Block-sparse: none of 4")
    assert "fixed grid of key tiles" in plan(GNA(64, 24, 8), (8,), (16,)).explain()


def test_errors():
    with pytest.raises(GNAError):
        search((8, 8), objective="fastest")
    with pytest.raises(GNAError):
        nearest(GNA((8, 8), 3), (1,), (1, 1))

"""Boxes for kernels, against the oracle: every query's keys, each once, and the boxes with the least work."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from cases import NATTEN_CASES, random_spec
from gnaflex.cuda_backend import tile_walk
from gnaflex.cuda_backend.tile_walk import KV_OVERHEAD, chosen, launches, unravel

from gnaflex.paper import CONFIGURATIONS
from gnaflex.planner import Plan
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA


def tokens(spec, launch, group, first, count):
    """Row-major tokens of a box that starts at ``first`` in a dilation group, cut off at its end."""
    axes = []
    for axis, length, g, lo, n in zip(spec.axes, launch.lengths, group, first, count, strict=True):
        axes.append(g + np.arange(lo, min(lo + n, length)) * axis.dilation)
    return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), spec.shape).ravel()


def seen(how: Plan):
    """How often a kernel that walks the boxes sees every pair, and how often it writes every query."""
    spec = how.spec
    pairs = np.zeros((spec.num_tokens, spec.num_tokens), int)
    written = np.zeros(spec.num_tokens, int)
    for launch in launches(how):
        groups = [range(f, f + n) for f, n in zip(launch.first, launch.groups, strict=True)]
        for group, (query, key, keys) in itertools.product(itertools.product(*groups), launch.work):
            rows = tokens(spec, launch, group, query, how.q_tile)
            written[rows] += 1
            counts = tuple(-(-n // t) for n, t in zip(keys.tolist(), how.kv_tile, strict=True))
            for i in range(math.prod(counts)):
                step = np.array(unravel(i, counts)) * how.kv_tile
                columns = tokens(spec, launch, group, key + step, np.minimum(how.kv_tile, keys - step))
                pairs[np.ix_(rows, columns)] += 1
    return pairs, written


@pytest.mark.parametrize("seed", range(8))
def test_every_query_sees_its_keys_once(seed):
    rng = random.Random(seed)
    found = 0
    while found < 60:
        spec = random_spec(rng, rng.randint(1, 3), 400)
        if how := chosen(spec):
            found += 1
            pairs, written = seen(how)
            assert (written == 1).all(), how
            assert np.array_equal(pairs, dense_mask(spec).int().numpy()), how


@pytest.mark.parametrize("spec", [one for one in NATTEN_CASES if one.num_tokens <= 5000])
def test_nattens_problems(spec):
    how = chosen(spec)
    if how is None:
        assert spec.num_tokens > 300 or any_legal(spec) is None
        return
    pairs, written = seen(how)
    assert (written == 1).all()
    assert np.array_equal(pairs, dense_mask(spec).int().numpy())


def extents(length, rows, step):
    return sorted({*range(1, min(length, rows) + 1), min(-(-length // step) * step, rows)})


def boxes(spec, rows, step):
    each = [extents(axis.group_length(0), rows, step) for axis in spec.axes]
    return [box for box in itertools.product(*each) if math.prod(box) <= rows and math.prod(box) % step == 0]


def any_legal(spec):
    """The least cost of all legal boxes without partial tiles, by plans of each pair; None where none is."""
    costs = [
        how.touched_tiles * (math.prod(kv) + KV_OVERHEAD)
        for q in boxes(spec, tile_walk.Q_ROWS, tile_walk.Q_STEP)
        for kv in boxes(spec, tile_walk.KV_ROWS, tile_walk.KV_STEP)
        if (how := Plan(spec, q, kv, "dynamic")).is_block_sparse
    ]
    return min(costs, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_the_boxes_with_the_least_work_of_all(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.choice((1, 1, 2)), 60)
    how = chosen(spec)
    cost = how and how.touched_tiles * (math.prod(how.kv_tile) + KV_OVERHEAD)
    assert cost == any_legal(spec)


@pytest.mark.parametrize(
    "spec, least",
    [
        (GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), 11.1),
        (GNA((33, 45, 80), (18, 24, 24), (16, 8, 8)), 10.4),
        (GNA((21, 45, 80), (18, 24, 24), (16, 8, 8)), 6.5),
        (GNA((256, 256), 80, 16), 10.2),
        (GNA((16, 44, 80), (16, 24, 16), (1, 8, 16)), 9.1),
        (GNA((16, 64, 64), (8, 16, 16), (1, 16, 16)), 32.0),  # stride 1 in time
        (GNA((16, 64, 64), (8, 16, 16), (1, 16, 16), 1, (True, False, False)), 40.0),
    ],
)
def test_problems_that_must_qualify(spec, least):
    how = chosen(spec)
    assert how is not None
    assert how.is_block_sparse
    assert how.work_speedup >= least


def test_the_papers_block_sparse_rows_qualify():
    for row in CONFIGURATIONS:
        if row.plan.is_block_sparse:
            assert chosen(row.plan.spec).work_speedup >= 0.99 * row.plan.work_speedup


def test_a_sliding_window_does_not_qualify():
    assert chosen(GNA((30, 48, 80), (18, 24, 24))) is None
    assert chosen(GNA(4096, 128, 1, 1, True)) is None


def test_the_dearest_boxes_come_first():
    how = chosen(GNA((16, 64, 64), (8, 16, 16), (1, 16, 16), 1, (True, False, False)))
    (launch,) = launches(how)
    tiles = tile_walk.tile_counts(launch.work[:, 2], how.kv_tile).prod(1)
    assert (np.diff(tiles) <= 0).all()
    assert tiles.sum() == how.touched_tiles
    assert launch.work.dtype == np.int32
    assert launch.work.flags.c_contiguous


def test_dilation_makes_a_launch_for_every_combination_of_group_lengths():
    spec = GNA((9, 16, 16), (1, 8, 8), (1, 8, 8), (1, 2, 1))
    assert len(launches(chosen(spec))) == 1
    uneven = GNA((17, 16), (8, 16), (8, 1), (2, 1))
    assert [(one.lengths, one.first, one.groups) for one in launches(chosen(uneven))] == [
        ((9, 16), (0, 0), (1, 1)),
        ((8, 16), (1, 0), (1, 1)),
    ]

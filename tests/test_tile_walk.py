"""Boxes for kernels, against the oracle: every query's keys once, the boxes with the least work, pairs."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from cases import NATTEN_CASES, random_spec
from gnaflex.cuda_backend import tile_walk
from gnaflex.cuda_backend.tile_walk import (
    ALONE,
    KV_OVERHEAD,
    chosen,
    item_tiles,
    launches,
    pair_counts,
    unravel,
)

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


# ---- pairs -----------------------------------------------------------------------------------------------


def random_plan(rng, rank, most):
    """Random boxes without masks, legal for a kernel or not."""
    spec, q_tile, kv_tile = random_spec(rng, rank, most), [], []
    for axis in spec.axes:
        kv_tile.append(rng.choice((1, 1, 2, 3, 5, 8)))
        extents = [q for q in range(1, axis.length + 1) if is_sparse(axis, q, kv_tile[-1])]
        q_tile.append(rng.choice((1, max(extents), rng.choice(extents))))
    return Plan(spec, tuple(q_tile), tuple(kv_tile), "dynamic")


def is_sparse(axis, q, kv):
    one = GNA(axis.length, axis.window, axis.stride, axis.dilation, axis.is_causal)
    return Plan(one, (q,), (kv,), "dynamic").is_block_sparse


def check_pairs(how, launch):
    """What a kernel takes for granted of every pair."""
    first, second = launch.work[::2].astype(int), launch.work[1::2].astype(int)
    absent = (second[:, 2] == 0).any(1)
    assert (first[:, 2] > 0).all()
    assert np.array_equal(second[absent, :2], first[absent, :2])
    assert not second[absent, 2].any()
    assert np.array_equal(second[~absent, 1:, 1:], first[~absent, 1:, 1:])
    later = second[:, 1, 0] - first[:, 1, 0]
    layers = tile_walk.tile_counts(first[:, 2, 0], how.kv_tile[0])
    assert (later >= 0).all()
    assert (later % how.kv_tile[0] == 0).all()
    assert (later[~absent] // how.kv_tile[0] < layers[~absent]).all()
    ends = later // how.kv_tile[0] + tile_walk.tile_counts(second[:, 2, 0], how.kv_tile[0])
    assert (ends >= layers)[~absent].all()


def boxes_of(launch):
    """What there is to do, each as (first query, first key, number of keys)."""
    return [tuple(map(tuple, box)) for box in launch.work.tolist() if all(box[2])]


def tiles_seen(how, first, second):
    """Per half of a pair, the numbers of its tiles among those of the pair, and how many these are."""
    counts = [[-(-n // t) for n, t in zip(half[2], how.kv_tile, strict=True)] for half in (first, second)]
    skip = (second[1][0] - first[1][0]) // how.kv_tile[0] * math.prod(counts[0][1:])
    each = set(range(math.prod(counts[0]))), set(range(skip, skip + math.prod(counts[1])))
    return each, max(max(one, default=-1) for one in each) + 1


def shared_and_alone(how, launch):
    """Tiles of the pairs of a launch that both halves see, and that one sees."""
    both = alone = 0
    for first, second in launch.work.reshape(-1, 2, 3, how.spec.rank).tolist():
        (one, other), count = tiles_seen(how, first, second)
        assert one | other == set(range(count))
        both += len(one & other)
        alone += len(one ^ other)
    return both, alone


def counted(how):
    """The same for all dilation groups."""
    each = [(shared_and_alone(how, one), math.prod(one.groups)) for one in launches(how, 2)]
    return tuple(sum(counts[i] * times for counts, times in each) for i in range(2))


@pytest.mark.parametrize("seed", range(8))
def test_pairs_keep_the_rules_and_do_all_there_is_to_do(seed):
    rng = random.Random(seed)
    met = set()
    for _ in range(150):
        how = random_plan(rng, rng.randint(1, 4), rng.choice((20, 100, 500)))
        for launch, one in zip(launches(how, 2), launches(how), strict=True):
            assert launch[:3] == one[:3]
            check_pairs(how, launch)
            assert sorted(boxes_of(launch)) == sorted(boxes_of(one)), how
            assert launch.work.dtype == np.int32
            assert launch.work.flags.c_contiguous
            tiles = item_tiles(launch.work.reshape(-1, 2, 3, how.spec.rank), how.kv_tile)
            halves = launch.work.reshape(-1, 2, 3, how.spec.rank).tolist()
            assert tiles.tolist() == [tiles_seen(how, *pair)[1] for pair in halves]
            order = [(-n, first) for n, (first, _) in zip(tiles.tolist(), halves, strict=True)]
            assert order == sorted(order)
            met |= {
                ("later", any(a[1] != b[1] for a, b in halves)),
                ("none", any(0 in b[2] for _, b in halves)),
            }
            met |= {("longer", any(0 not in b[2] and a[2] != b[2] for a, b in halves))}
        assert pair_counts(how) == counted(how), how
    assert len(met) == 6


def most_shared(how, boxes):
    """The most tiles that pairs of boxes can share, of all ways to pair them."""
    n = len(boxes)

    def shared(a, b):
        a, b = sorted((a, b), key=lambda box: box[1:])
        later = b[1][0] - a[1][0]
        if later % how.kv_tile[0] or (a[1][1:], a[2][1:]) != (b[1][1:], b[2][1:]):
            return 0
        (one, other), _ = tiles_seen(how, a, b)
        return len(one & other)

    weights = [[shared(a, b) for b in boxes] for a in boxes]
    best = [0] * (1 << n)
    for chosen_ones in range(1, 1 << n):
        top = chosen_ones.bit_length() - 1
        rest = chosen_ones ^ (1 << top)
        best[chosen_ones] = max(
            best[rest],
            *(best[rest ^ (1 << i)] + weights[top][i] for i in range(top) if rest >> i & 1),
            0,
        )
    return best[-1]


def random_chain(rng):
    """Boxes whose windows overlap along the first axis."""
    length, rest = rng.randint(6, 20), rng.choice(((), (), (2,)))
    window = rng.randint(2, length // 2 + 2)
    no = tuple(False for _ in rest)
    spec = GNA(
        (length, *rest), (window, *rest), (rng.randint(1, window), *rest), 1, (rng.random() < 0.4, *no)
    )
    kv = rng.choice((1, 1, 1, 2, 3))
    q = rng.choice([q for q in range(1, length // 3 + 1) if is_sparse(spec.axes[0], q, kv)])
    return Plan(spec, (q, *rest), (kv, *rest), "dynamic")


@pytest.mark.parametrize("seed", range(8))
def test_no_other_pairs_share_more(seed):
    rng = random.Random(seed)
    tried = met = 0
    while tried < 80:
        how = random_chain(rng) if rng.random() < 0.8 else random_plan(rng, rng.randint(1, 3), 40)
        for launch in launches(how, 2):
            boxes = boxes_of(launch)
            if 2 <= len(boxes) <= 10:
                tried += 1
                met += (launch.work[::2, 1] != launch.work[1::2, 1]).any(1).sum() > 1
                assert shared_and_alone(how, launch)[0] == most_shared(how, boxes), how
    assert met > 5


def seen_in_pairs(how):
    """As ``seen``, by the one sequence of tiles of each pair: the first half's, and further along the first
    axis."""
    spec = how.spec
    pairs = np.zeros((spec.num_tokens, spec.num_tokens), int)
    written = np.zeros(spec.num_tokens, int)
    for launch in launches(how, 2):
        groups = [range(f, f + n) for f, n in zip(launch.first, launch.groups, strict=True)]
        for group in itertools.product(*groups):
            for halves in launch.work.reshape(-1, 2, 3, spec.rank):
                each, count = tiles_seen(how, *halves.tolist())
                counts = tuple(-(-n // t) for n, t in zip(halves[0, 2].tolist(), how.kv_tile, strict=True))
                for (query, key, keys), mine in zip(halves, each, strict=True):
                    if not keys.all():
                        continue
                    rows = tokens(spec, launch, group, query, how.q_tile)
                    written[rows] += 1
                    for j in set(range(count)) & mine:
                        at = halves[0, 1] + np.array(unravel(j, counts)) * how.kv_tile
                        left = np.minimum(how.kv_tile, key + keys - at)
                        pairs[np.ix_(rows, tokens(spec, launch, group, at, left))] += 1
    return pairs, written


@pytest.mark.parametrize("seed", range(6))
def test_every_query_of_a_pair_sees_its_keys_once(seed):
    rng = random.Random(seed)
    for _ in range(60):
        how = random_plan(rng, rng.randint(1, 3), rng.choice((60, 200)))
        pairs, written = seen_in_pairs(how)
        assert (written == 1).all(), how
        assert np.array_equal(pairs, dense_mask(how.spec).int().numpy()), how


def least_cost_of_pairs(spec):
    """Of all legal boxes without partial tiles, by the tiles of their pairs; None where there are none."""
    return min(
        (
            cost_of_pairs(how)
            for q in boxes(spec, tile_walk.Q_ROWS, tile_walk.Q_STEP)
            for kv in boxes(spec, tile_walk.KV_ROWS, tile_walk.KV_STEP)
            if (how := Plan(spec, q, kv, "dynamic")).is_block_sparse
        ),
        default=None,
    )


def cost_of_pairs(how):
    both, alone = counted(how)
    return (2 * both + ALONE * alone) * (math.prod(how.kv_tile) + KV_OVERHEAD)


@pytest.mark.parametrize("seed", range(20))
def test_the_boxes_with_the_least_work_in_pairs(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.choice((1, 1, 2)), 60)
    how = chosen(spec, 2)
    least = least_cost_of_pairs(spec)
    assert least is None if how is None else cost_of_pairs(how) == pytest.approx(least)


def test_pairs_may_take_other_boxes():
    """One box alone sees each key range in the boxes with the fewest tiles; with others, two do."""
    rng, found = random.Random(0), 0
    for _ in range(300):
        spec = random_spec(rng, 2, 600)
        one, two = chosen(spec), chosen(spec, 2)
        assert (one is None) == (two is None)
        if one is not None and one != two:
            found += 1
            assert cost_of_pairs(two) < cost_of_pairs(one)
            assert one.touched_tiles * (math.prod(one.kv_tile) + KV_OVERHEAD) <= two.touched_tiles * (
                math.prod(two.kv_tile) + KV_OVERHEAD
            )
    assert found


def test_the_pairs_of_hunyuan_video():
    spec = GNA((32, 48, 80), (18, 24, 24), (16, 8, 8))
    (launch,) = launches(chosen(spec, 2), 2)
    assert (launch.work[::2, 1:] == launch.work[1::2, 1:]).all()  # 8 boxes of 2x8x8 a stride group
    shifted = GNA((32, 48, 80), (18, 24, 24), (2, 8, 8))
    how = chosen(shifted, 2)
    (launch,) = launches(how, 2)
    assert (how.q_tile, how.kv_tile) == ((2, 8, 8), (2, 8, 8))
    later = launch.work[1::2, 1, 0] - launch.work[::2, 1, 0]
    assert set(later.tolist()) == {0, 2}
    tiles = item_tiles(launch.work.reshape(-1, 2, 3, 3), how.kv_tile)
    assert set(tiles[later == 2].tolist()) == {10 * 3 * 3}
    assert pair_counts(how) == counted(how)


def test_the_pairs_of_many_boxes():
    how = chosen(GNA((1024, 2048), 256, 16), 2)
    (launch,) = launches(how, 2)
    assert len(launch.work) == how.query_tiles == 16384
    assert pair_counts(how) == (how.touched_tiles // 2, 0)

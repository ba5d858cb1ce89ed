"""The nearest problems, the search and the words of a plan, against brute force over plans."""

from __future__ import annotations

import itertools
import math
import time

import pytest

from gnaflex import fewest
from gnaflex.nearby import nearest
from gnaflex.planner import _boxes, plan
from gnaflex.reasons import explain
from gnaflex.searching import Row, search
from gnaflex.spec import GNA, GNAError
from gnaflex.tiles import allowed_pairs


def every_problem(shape, dilation=1, is_causal=False):
    base = GNA(shape, 1, 1, dilation, is_causal)
    options = [
        [(w, s) for w in range(1, axis.length // axis.dilation + 1) for s in range(1, w + 1)]
        for axis in base.axes
    ]
    for each in itertools.product(*options):
        yield GNA(shape, *zip(*each, strict=True), base.dilation, base.is_causal)


def every_tile(spec, q_tile, kv_tile, rows):
    boxes = [tuple(box) for box in _boxes(rows, tuple(a.group_length(0) for a in spec.axes)).tolist()]
    return itertools.product([q_tile] if q_tile else boxes, [kv_tile] if kv_tile else boxes)


def distance(spec, other):
    return sum(
        abs(math.log2(b.stride / a.stride)) + 12 * abs(math.log2(b.window / a.window))
        for a, b in zip(spec.axes, other.axes, strict=True)
    )


SMALL = [
    ((14,), 1, False, (3,), (2,)),
    ((13,), 2, False, (2,), (3,)),
    ((13,), 1, True, (1,), (3,)),
    ((13,), 1, False, None, None),
    ((6, 7), 1, False, (2, 3), (2, 2)),
    ((5, 6), (1, 2), (True, False), None, (2, 2)),
    ((5, 6), 1, False, None, None),
]


@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
@pytest.mark.parametrize("shape, dilation, is_causal, q_tile, kv_tile", SMALL)
def test_nearest_against_every_problem(shape, dilation, is_causal, q_tile, kv_tile, kv_tiling):
    rows, best = 6, {}
    problems = list(every_problem(shape, dilation, is_causal))
    for spec in problems:
        plans = [plan(spec, *tiles, kv_tiling) for tiles in every_tile(spec, q_tile, kv_tile, rows)]
        touched = [one.touched_tiles for one in plans if one.is_block_sparse]
        if touched:
            best[spec] = min(touched)
    for spec in problems[:: max(len(problems) // 4, 1)]:
        got = nearest(spec, q_tile, kv_tile, kv_tiling, q_rows=rows, kv_rows=rows)
        want = sorted((round(distance(spec, other), 3), touched) for other, touched in best.items())[:10]
        assert [(pytest.approx(one.distance, abs=2e-3), one.plan.touched_tiles) for one in got] == want
        assert len({one.spec for one in got}) == len(got)
        for one in got:
            assert one.plan.is_block_sparse
            assert one.distance == pytest.approx(distance(spec, one.spec), abs=1e-4)
            assert (one.spec == spec) == (not one.changes) == (one.distance == 0)


@pytest.mark.parametrize("block_sparse", [True, False])
@pytest.mark.parametrize("kv_tiling", ["static", "dynamic"])
@pytest.mark.parametrize("shape, dilation, is_causal, q_tile, kv_tile", SMALL)
def test_search_against_every_problem(shape, dilation, is_causal, q_tile, kv_tile, kv_tiling, block_sparse):
    rows, seen = 6, {}
    bounds = {"min_sparsity": 0.3, "max_sparsity": 0.9}
    for spec in every_problem(shape, dilation, is_causal):
        plans = [plan(spec, *tiles, kv_tiling) for tiles in every_tile(spec, q_tile, kv_tile, rows)]
        kept = [one for one in plans if one.is_block_sparse or not block_sparse]
        if kept and 0.3 <= kept[0].sparsity <= 0.9:
            key = tuple((axis.window, allowed_pairs(GNA(*axis))) for axis in spec.axes)
            seen.setdefault(key, []).append(
                min((p.touched_tiles, spec.stride, p.allowed_pairs) for p in kept)
            )
    options = {"kv_tiling": kv_tiling, "q_tile": q_tile, "kv_tile": kv_tile, "q_rows": rows, "kv_rows": rows}
    options |= bounds | {"dilation": dilation, "is_causal": is_causal, "block_sparse": block_sparse}
    for objective in ("work_speedup", "efficiency", "reach"):
        found = search(shape, **options, objective=objective, limit=10_000)
        best = sorted((min(each)[0], min(each)[2]) for each in seen.values())
        got = [(row.plan.touched_tiles, row.plan.allowed_pairs) for row in found]
        figures = [getattr(row, objective) for row in found]
        assert figures == pytest.approx(sorted(figures, reverse=True))
        assert sorted(got) == best
        check_rows(found.rows)
    front = {(t, a) for t, a in best if not any((u <= t and b >= a) and (u, b) != (t, a) for u, b in best)}
    assert [(row.plan.touched_tiles, row.plan.allowed_pairs) for row in found.front] == sorted(front)
    check_rows(found.front)


def check_rows(rows):
    for row in rows:
        again = plan(row.spec, row.plan.q_tile, row.plan.kv_tile, row.plan.kv_tiling)
        for name in ("touched_tiles", "flop_speedup", "sparsity", "is_block_sparse"):
            assert getattr(row.plan, name) == getattr(again, name), name
        assert row.efficiency == pytest.approx(row.work_speedup / again.flop_speedup)
        assert row.work_speedup <= again.work_speedup  # whose dense tiles are as small as its own


def test_rows_per_stride():
    found = search((12, 9), windows=(6, 5), each_stride=True, q_tile=(2, 1), kv_tile=(2, 3), limit=100)
    want = [spec for spec in every_problem((12, 9)) if spec.window == (6, 5)]
    want = {spec for spec in want if plan(spec, (2, 1), (2, 3), "dynamic").is_block_sparse}
    assert {row.spec for row in found} == want
    assert len(found) == len(want) > 5
    check_rows(found)


@pytest.mark.parametrize("shape", [(33, 45, 80), (21, 45, 80)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (16, 8, 6), (16, 8, 8), (5, 7, 9)])
@pytest.mark.parametrize("q_tile", [(2, 8, 8), (4, 8, 8)])
def test_nearest_on_video_grids(shape, stride, q_tile):
    spec = GNA(shape, (18, 24, 24), stride)
    first = nearest(spec, q_tile, (2, 8, 8))[0]
    assert first.plan.is_block_sparse
    assert first.spec.window == spec.window  # only strides move
    assert (first.distance == 0) == plan(spec, q_tile, (2, 8, 8), "dynamic").is_block_sparse
    assert first.work_speedup >= 0.8 * first.plan.flop_speedup


def test_nearest_with_free_tiles_fills_them():
    spec = GNA((33, 45, 80), (18, 24, 24), (16, 8, 7))
    for one in nearest(spec, limit=4):
        assert one.plan.is_block_sparse
        assert 128 >= math.prod(one.plan.q_tile) > 64
        assert 128 >= math.prod(one.plan.kv_tile) > 64


def test_keep():
    spec = GNA((33, 45, 80), (18, 24, 24), (16, 8, 6))
    assert {one.spec.window for one in nearest(spec, (4, 8, 8), (2, 8, 8), keep=["window"])} == {(18, 24, 24)}
    assert nearest(spec, (4, 8, 8), (2, 8, 8), keep=["window", "stride"]) == []
    assert nearest(spec, (4, 8, 8), (2, 8, 8), keep=["stride"])[0].spec.stride == (16, 8, 6)
    assert nearest(GNA(64, 8, 1, 1, True), (8,), (8,)) == []
    assert nearest(spec, (4, 8, 8), (2, 8, 8), keep="stride") == nearest(
        spec, (4, 8, 8), (2, 8, 8), keep=["stride"]
    )


@pytest.mark.parametrize(
    "spec, tile, distance",
    [
        (GNA(256, 128), 64, 6.0),
        (GNA(1024, 512), 128, 7.0),
        (GNA(8192, 512, 100), 128, 0.356144),
        (GNA(300_000, 5000, 7), 128, 4.192645),
    ],
)
def test_multiples_of_a_tile_are_found_however_far(spec, tile, distance):
    first = nearest(spec, (tile,), (tile,), limit=3)[0]
    assert (first.spec.stride, first.distance) == ((tile,), distance)
    assert plan(first.spec, (tile,), (tile,), "dynamic").is_block_sparse


def test_a_free_tile_is_charged_whole_rows():
    one = nearest(GNA((64, 64), 32), limit=1)[0]
    tokens = math.prod(one.plan.q_tile)
    assert tokens < 128
    assert one.work_speedup == 32 * 32 / one.plan.touched_tiles
    assert plan(one.spec, one.plan.q_tile, one.plan.kv_tile, "dynamic").work_speedup > one.work_speedup
    assert plan(GNA(65536, 1024, 100), (100,), (128,), "dynamic", q_rows=128).q_rows is None  # it was given


def test_equal_distances_of_different_axes_tie():
    spec = GNA((5, 4), (5, 4), (2, 2))
    found = nearest(spec, limit=5, keep=("stride",), q_rows=6, kv_rows=6)
    order = [(one.distance, one.plan.touched_tiles) for one in found]
    assert order == sorted(order)


def test_the_big_search_ends_soon():
    start = time.perf_counter()
    found = search((30, 48, 80), windows=range(2, 81, 2), min_sparsity=0.9, progress=True, limit=10)
    assert time.perf_counter() - start < 60
    assert found.problems == 240 * 600 * 1640
    assert all(row.plan.is_block_sparse and row.plan.sparsity >= 0.9 for row in found)
    check_rows((*found, *found.front))
    speeds, reaches = ([getattr(row, name) for row in found.front] for name in ("work_speedup", "reach"))
    assert speeds == sorted(speeds, reverse=True)
    assert reaches == sorted(reaches)
    tiles = search((30, 48, 80), windows=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))
    assert (tiles.rows[0].spec.stride, round(tiles.rows[0].work_speedup, 2)) == ((4, 8, 8), 10.42)
    assert tiles.rows[0].margin == (7, 8, 8)


def test_interrupt_removes_the_bar(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fewest.Fewest, "_with", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search((8, 8), progress=True)
    monkeypatch.undo()
    assert len(search((8, 8), progress=True, limit=3)) == 3  # rich allows one live display at a time


def test_margin_is_what_every_query_sees():
    for spec in every_problem((9,), 1, False):
        row = Row(plan(spec, (1,), (1,)), 1.0)
        windows = [row.plan.axes[0][0].needed[i] for i in range(9)]
        sure = max(
            m
            for m in range(9)
            if all(lo <= max(i - m, 0) and min(i + m + 1, 9) <= hi for i, (lo, hi) in enumerate(windows))
        )
        assert row.margin == (sure,), spec


def test_table():
    found = search((8, 8), windows=4, q_tile=(2, 2), kv_tile=(2, 2), limit=3)
    table = found.table()
    assert table.row_count == len(found)
    assert found.table(front=True).row_count == len(found.front)
    assert next(iter(table.columns[0].cells)) == "4x4"


ERRORS = {
    "kv_tiling must be": lambda: search(8, kv_tiling="both"),
    "objective must be one of": lambda: search(8, objective="time"),
    "nothing to try on axis 1: windows must lie in 1..4": lambda: search((8, 8), windows=(4, 5), dilation=2),
    "windows must have one entry per axis": lambda: search((8, 8), windows=(4, 4, 4)),
    "too much to search on axis 0": lambda: search(8192),
    "too many combinations": lambda: search((70, 70, 70, 70), q_tile=(2,) * 4, kv_tile=(2,) * 4),
    "keep must be one of": lambda: nearest(GNA(8, 4), keep=["shape"]),
    "limit must be an integer from 1 to 100": lambda: nearest(GNA(8, 4), limit=0),
    "q_tile must have one positive": lambda: nearest(GNA(8, 4), q_tile=(0,)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(GNAError, match=message.replace("(", r"\(")) as error:
        ERRORS[message]()
    assert "Write " in str(error.value)


STATIC = """\
Not block-sparse: 52,352 of 75,680 visited tiles (69%) need a mask; work speed-up 5.71, FLOPs allow 11.46.
axis 0 (length 33, window 18, stride 16; query tile 4, key tile 2): partial for 5 of 9 query tiles.
  5 see a window off the fixed grid of key tiles of 2: queries [16, 20) need keys [15, 33).
  Mend: window 18 -> 33; or a key tile of 1; or kv_tiling="dynamic".
axis 1 (length 45, window 24, stride 8; query tile 8, key tile 8): partial for 2 of 6 query tiles.
  2 see a window off the fixed grid of key tiles of 8: queries [32, 40) need keys [21, 45).
  Mend: window 24 -> 45; or a key tile of 1; or kv_tiling="dynamic".
axis 2 (length 80, window 24, stride 6; query tile 8, key tile 8): partial for 8 of 10 query tiles.
  8 straddle stride groups whose windows differ: queries [8, 16) need keys [0, 27), share [3, 24).
  Mend: stride 6 -> 8.
Smallest change with these tiles: GNA(shape=(33, 45, 80), window=(33, 45, 24), stride=(16, 8, 8)), \
work speed-up 2.61.
With kv_tiling="dynamic" it is block-sparse with axis 2: stride 6 -> 8: work speed-up 9.88."""

CAUSAL = """\
Not block-sparse: 3 of 3 visited tiles (100%) need a mask; work speed-up 1.33, FLOPs allow 2.46.
axis 0 (length 8, window 4, stride 1, causal; query tile 4, key tile 4): partial for 2 of 2 query tiles.
  2 hold several queries, whose windows end at themselves on a causal axis: \
queries [0, 4) need keys [0, 4), share [0, 1).
  Mend: a query tile of 1."""

DENSE = "Block-sparse: none of 82,620 visited tiles needs a mask; work speed-up 10.45, FLOPs allow 11.46."

DILATED = """\
Not block-sparse: 77 of 77 visited tiles (100%) need a mask; work speed-up 5.84, FLOPs allow 60.00.
axis 0 (length 16, window 2, stride 1; query tile 4, key tile 2): partial for 4 of 4 query tiles.
  4 straddle stride groups whose windows differ: queries [0, 4) need keys [0, 4), share none.
  Mend: window 2 -> 4 and stride 1 -> 4.
axis 1 (length 30, window 4, stride 2, dilation 7; query tile 8, key tile 8): partial for 2 of 7 query tiles.
  2 straddle stride groups whose windows differ: queries [0, 5) need keys [0, 5), share [1, 4).
axis 1: dilation 7 leaves groups of 4 tokens, which fill no query tile of 8 and key tile of 8."""


@pytest.mark.parametrize(
    "spec, tiles, text",
    [
        (GNA((33, 45, 80), (18, 24, 24), (16, 8, 6)), ((4, 8, 8), (2, 8, 8), "static"), STATIC),
        (GNA((33, 45, 80), (18, 24, 24), (16, 8, 8)), ((2, 8, 8), (2, 8, 8), "dynamic"), DENSE),
        (GNA(8, 4, 1, 1, True), ((4,), (4,), "dynamic"), CAUSAL),
        (GNA((16, 30), (2, 4), (1, 2), (1, 7)), ((4, 8), (2, 8), "static"), DILATED),
    ],
)
def test_explain(spec, tiles, text):
    assert explain(plan(spec, *tiles)) == text

"""Drawings: written out, against masks by definition, summaries that lose nothing, pictures, refusals."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import time
from textwrap import dedent

import numpy as np
import pytest
from cases import random_spec

from gnaflex import drawing, drawn
from gnaflex.drawing import draw, figure
from gnaflex.planner import plan
from gnaflex.reference import allowed_keys, dense_mask
from gnaflex.searching import search
from gnaflex.spec import GNA, GNAError

VIDEO = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
KINDS = ("blocks", "window", "tiles", "strides")

GOLDEN = {
    "1d blocks": (
        GNA(22, 6, 3),
        {"q_tile": (4,), "kv_tile": (4,)},
        """
        GNA(shape=(22,), window=(6,), stride=(3,))
        query tiles (4,), key tiles (4,), static; 6 down, 6 across
        ░░····
        ░░░···
        ·░░░··
        ··░░░·
        ···░░░
        ····█▒
        16 of 36 tile pairs visited: 1 full, 1 clipped, 14 partial
        █ full  ▒ clipped  ░ partial  · empty
        """,
    ),
    "2d blocks": (
        GNA((8, 8), (4, 4), (4, 1)),
        {"q_tile": (4, 2), "kv_tile": (2, 4)},
        """
        GNA(shape=(8, 8), window=(4, 4), stride=(4, 1))
        query tiles (4, 2), key tiles (2, 4), static; 8 down, 8 across
        █·█·····
        ░░░░····
        ░░░░····
        ·█·█····
        ····█·█·
        ····░░░░
        ····░░░░
        ·····█·█
        24 of 64 tile pairs visited: 8 full, 0 clipped, 16 partial
        █ full  ▒ clipped  ░ partial  · empty
        """,
    ),
    "3d blocks": (
        GNA((4, 4, 4), (2, 2, 4), (2, 2, 4)),
        {"q_tile": (2, 2, 2), "kv_tile": (2, 2, 4)},
        """
        GNA(shape=(4, 4, 4), window=(2, 2, 4), stride=(2, 2, 4))
        query tiles (2, 2, 2), key tiles (2, 2, 4), static; 8 down, 4 across
        █···
        █···
        ·█··
        ·█··
        ··█·
        ··█·
        ···█
        ···█
        8 of 32 tile pairs visited: 8 full, 0 clipped, 0 partial
        █ full  ▒ clipped  ░ partial  · empty
        """,
    ),
    "dilation groups of 4, 4 and 3 tokens": (
        GNA(11, 3, 1, 3),
        {"q_tile": (2,), "kv_tile": (2,)},
        """
        GNA(shape=(11,), window=(3,), dilation=(3,))
        query tiles (2,), key tiles (2,), static; 6 down, 6 across
        █░····
        ░█····
        ··█░··
        ··░█··
        ····█▒
        ····█▒
        12 of 36 tile pairs visited: 6 full, 2 clipped, 4 partial
        █ full  ▒ clipped  ░ partial  · empty
        """,
    ),
    "causal": (
        GNA(12, 4, is_causal=True),
        {"q_tile": (2,), "kv_tile": (2,)},
        """
        GNA(shape=(12,), window=(4,), is_causal=(True,))
        query tiles (2,), key tiles (2,), static; 6 down, 6 across
        ░·····
        █░····
        ░█░···
        ·░█░··
        ··░█░·
        ···░█░
        15 of 36 tile pairs visited: 5 full, 0 clipped, 10 partial
        █ full  ▒ clipped  ░ partial  · empty
        """,
    ),
    "summarised blocks": (
        GNA(80, 20, 4),
        {"q_tile": (2,), "kv_tile": (2,), "width": 16},
        """
        GNA(shape=(80,), window=(20,), stride=(4,))
        query tiles (2,), key tiles (2,), static; 40 down, 40 across
        ███░··········
        ███░··········
        ░▓██░·········
        ·░██▓░········
        ··░▓██░·······
        ···░██▓░······
        ····░▓██░·····
        ·····░██▓░····
        ······░▓██░···
        ·······░██▓░··
        ········░▓██░·
        ·········░██▓▒
        ··········████
        ··········████
        400 of 1,600 tile pairs visited: 400 full, 0 clipped, 0 partial
        a character stands for 3 x 3 tile pairs, visited: █ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none
        """,
    ),
    "1d window, summarised": (
        GNA(40, 10),
        {"kind": "window", "query": 3, "width": 16},
        """
        GNA(shape=(40,), window=(10,))
        query (3,) sees 10 of 40 tokens
        █Q█░··········
        Q the query  a character stands for 3 tokens, seen: █ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none
        """,
    ),
    "2d window, dilated": (
        GNA((6, 11), (3, 3), 1, (1, 3)),
        {"kind": "window", "query": (5, 4)},
        """
        GNA(shape=(6, 11), window=(3, 3), dilation=(1, 3))
        query (5, 4) sees 9 of 66 tokens
        ···········
        ···········
        ···········
        ·█··█··█···
        ·█··█··█···
        ·█··Q··█···
        Q the query  █ a key it sees  · any other
        """,
    ),
    "3d window, causal": (
        GNA((4, 3, 5), (2, 3, 3), (1, 1, 3), 1, (True, False, False)),
        {"kind": "window", "query": (2, 0, 1)},
        """
        GNA(shape=(4, 3, 5), window=(2, 3, 3), stride=(1, 1, 3), is_causal=(True, False, False))
        query (2, 0, 1) sees 18 of 60 tokens
        plane 1  plane 2
        ███··    █Q█··
        ███··    ███··
        ███··    ███··
        Q the query  █ a key it sees  · any other
        """,
    ),
    "a video's window": (
        VIDEO,
        {"kind": "window"},
        """
        GNA(shape=(30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
        query (15, 24, 40) sees 10,368 of 115,200 tokens
        planes 0-14           plane 15              planes 16-17
        ····················  ····················  ····················
        ····················  ····················  ····················
        ····················  ····················  ····················
        ····················  ····················  ····················
        ········██████······  ········██████······  ········██████······
        ········██████······  ········██████······  ········██████······
        ········██████······  ········██Q███······  ········██████······
        ········██████······  ········██████······  ········██████······
        ········██████······  ········██████······  ········██████······
        ········██████······  ········██████······  ········██████······
        ····················  ····················  ····················
        ····················  ····················  ····················
        Q the query  a character stands for 4 x 4 tokens, seen: █ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none
        """,
    ),
    "1d tiles, dynamic": (
        GNA(16, 6),
        {"kind": "tiles", "q_tile": (4,), "kv_tile": (2,), "kv_tiling": "dynamic"},
        """
        GNA(shape=(16,), window=(6,))
        query tiles (4,), key tiles (2,), dynamic
        3 5 5 4
        key tiles that a query tile visits: 3 to 5, mean 4.2
        """,
    ),
    "3d tiles": (
        GNA((6, 4, 8), (3, 2, 4)),
        {"kind": "tiles", "q_tile": (2, 2, 2), "kv_tile": (2, 2, 2)},
        """
        GNA(shape=(6, 4, 8), window=(3, 2, 4))
        query tiles (2, 2, 2), key tiles (2, 2, 2), static
        plane 0      plane 1      plane 2
         4  6  6  4   6  9  9  6   4  6  6  4
         8 12 12  8  12 18 18 12   8 12 12  8
        key tiles that a query tile visits: 4 to 18, mean 8.8
        """,
    ),
    "2d tiles, summarised": (
        GNA((48, 160), (8, 33)),
        {"kind": "tiles", "q_tile": (4, 8), "kv_tile": (4, 8), "width": 24},
        """
        GNA(shape=(48, 160), window=(8, 33))
        query tiles (4, 8), key tiles (4, 8), static
        ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ████████████████████
        ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
        key tiles that a query tile visits: 10 to 15, mean 14.2
        a character stands for 1 x 1 query tiles, of 15 visits: █ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none
        """,
    ),
    "strides": (
        GNA(24, 8, 2),
        {"kind": "strides", "q_tile": (4,), "kv_tile": (4,), "width": 40},
        """
        GNA(shape=(24,), window=(8,), stride=(2,))
        work_speedup over the strides of an axis; query tiles (4,), key tiles (4,), static
        axis 0, window 8
        1 █████████ 2.25
        2 █████████ 2.25 < given
        3 ████████ 2.00
        4 █████████ 2.25
        5 ████████ 2.00
        6 ████████ 2.00
        7 ███████ 1.80
        8 ████████████ 3.00 block-sparse
        """,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_written_out(name):
    what, arguments, want = GOLDEN[name]
    assert draw(what, **arguments) == dedent(want).strip("\n")


def _tile_major(spec, tile):
    """Tokens of every tile by definition: groups in row-major order, row-major tiles in each."""
    tiles = []
    for group in itertools.product(*map(range, spec.dilation)):
        families = [range(g, n, d) for g, n, d in zip(group, spec.shape, spec.dilation, strict=True)]
        cuts = [[f[at : at + t] for at in range(0, len(f), t)] for f, t in zip(families, tile, strict=True)]
        for box in itertools.product(*cuts):
            grid = np.meshgrid(*box, indexing="ij")
            tiles.append(np.ravel_multi_index([axis.ravel() for axis in grid], spec.shape))
    return tiles


def _kind(part, kv_rows):
    if not part.any():
        return "·"
    if not part.all():
        return "░"
    return "█" if part.shape[1] == kv_rows else "▒"


@pytest.mark.parametrize("seed", range(40))
def test_blocks_by_definition(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.randint(1, 4), 120)
    q_tile, kv_tile = (tuple(rng.randint(1, min(n, 6)) for n in spec.shape) for _ in range(2))
    mask = dense_mask(spec).numpy()
    want = [
        "".join(_kind(mask[np.ix_(q, k)], math.prod(kv_tile)) for k in _tile_major(spec, kv_tile))
        for q in _tile_major(spec, q_tile)
    ]
    got = draw(spec, q_tile=q_tile, kv_tile=kv_tile, width=200).splitlines()
    assert got[2:-2] == want
    assert draw(plan(spec, q_tile, kv_tile), width=200).splitlines() == got


@pytest.mark.parametrize("seed", range(40))
def test_window_by_definition(seed):
    rng = random.Random(100 + seed)
    spec = random_spec(rng, rng.randint(1, 3), 200)
    query = rng.randrange(spec.num_tokens)
    keys = np.zeros(spec.num_tokens, bool)
    keys[list(allowed_keys(spec, query))] = True
    marks = np.where(keys, "█", "·")
    marks[query] = "Q"
    planes = marks.reshape(-1, *([1] if spec.rank == 1 else []), *spec.shape[-2:])
    lines = draw(spec, kind="window", query=query, width=1000).splitlines()[2:-1]
    if spec.rank < 3:
        assert lines == ["".join(row) for row in planes[0]]
        return
    starts = [at for at, mark in enumerate(lines[0]) if mark == "p"]
    runs = [run.split()[1].split("-") for run in lines[0].split("  ") if run.strip()]
    seen = []
    for start, run in zip(starts, runs, strict=True):
        for at in range(int(run[0]), int(run[-1]) + 1):
            seen.append(at)
            assert [line.ljust(1000)[start : start + spec.shape[2]] for line in lines[1:]] == [
                "".join(row) for row in planes[at]
            ]
    assert seen == [at for at, plane in enumerate(planes) if (plane != "·").any()]


@pytest.mark.parametrize("seed", range(20))
def test_summaries_keep_counts(seed):
    rng = random.Random(200 + seed)
    spec = random_spec(rng, rng.randint(1, 3), 2000)
    how = plan(spec, *(tuple(rng.randint(1, min(n, 5)) for n in spec.shape) for _ in range(2)))
    blocks = drawn.BlockMap(how)
    for n in (1, rng.randint(2, 9), max(blocks.shape)):
        pooled = blocks.pooled(n)
        assert pooled.shape[:2] == tuple(-(-extent // n) for extent in blocks.shape)
        counts = dict(zip(drawn.BLOCK_KINDS, pooled.sum((0, 1)).tolist(), strict=True))
        assert counts["full"] == how.full_tiles
        assert counts["clipped"] == how.clipped_tiles
        assert counts["partial"] == how.partial_tiles
        assert sum(counts.values()) == math.prod(blocks.shape)


@pytest.mark.parametrize("tiling", ["static", "dynamic"])
def test_visits_add_up(tiling):
    rng = random.Random(7)
    for _ in range(40):
        how = plan(random_spec(rng, rng.randint(1, 4), 300), kv_tiling=tiling, q_rows=8, kv_rows=4)
        planes = drawn.visited(how)
        assert math.prod(int(part.sum()) for part in planes) == how.touched_tiles
        assert math.prod(map(len, planes)) == how.query_tiles


def test_strides_are_plans():
    spec = GNA((16, 70), (8, 64), (4, 5))
    rows = drawn.strides_of(plan(spec, (4, 4), (4, 4)))
    assert [one.stride for one in rows[0]] == list(range(1, 9))
    assert [one.stride for one in rows[1]] == [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64]
    for one in rows[1]:
        how = plan(GNA(spec.shape, spec.window, (4, one.stride)), (4, 4), (4, 4))
        assert (one.speedup, one.is_block_sparse) == (how.work_speedup, how.is_block_sparse)
        assert one.is_given == (one.stride == 5)


@pytest.mark.parametrize("width", [16, 40, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_drawings_keep_to_their_width(kind, width):
    for spec in (VIDEO, GNA(70000, 999, 33), GNA((200, 300), (20, 40), 1, (3, 2)), GNA((3, 4, 5, 6), 2)):
        text = draw(spec, kind=kind, width=width)
        if kind == "strides":
            lines = text.splitlines()[2:]
            assert max(len(line) for line in lines if "axis" not in line) <= width
        else:
            marks = [line for line in text.splitlines() if line and set(line) <= set("·░▒▓█Q ")]
            assert max(map(len, marks), default=0) <= width


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_grid_is_fast(kind):
    took = []
    for _ in range(3):
        start = time.perf_counter()
        draw(plan(VIDEO, (2, 8, 8), (2, 8, 8)), kind=kind)
        took.append(time.perf_counter() - start)
    assert min(took) < 1


SHOWN = (VIDEO, GNA((64, 64), 16, 4), GNA(301, 63, 1, 2), GNA((4, 5, 6, 7), 3, 1, 1, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SHOWN, ids=str)
def test_pictures_are_written(tmp_path, kind, spec):
    image = pytest.importorskip("matplotlib.image", reason="pictures need matplotlib")
    path = tmp_path / "drawing.png"
    assert draw(spec, kind=kind, path=path) == draw(spec, kind=kind)
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_pictures_show_the_numbers():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    how = plan(GNA((64, 64), 16, 4), (8, 8), (8, 8))
    assert "484 of 4,096 tile pairs" in figure(how)._suptitle.get_text()
    heat = figure(how, kind="tiles").axes[0].images[0].get_array()
    assert heat.sum() == how.touched_tiles
    keys = figure(how, kind="window").axes[0].images[0].get_array()
    assert keys.sum() == 256


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GNAError, match=r"pip install 'gnaflex\[demo\]'"):
        draw(GNA(8, 2), kind="window", path=tmp_path / "x.png")
    assert draw(GNA(8, 2), kind="window")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("kind must be one of", {"kind": "block"}),
        ("query is of use", {"query": 3}),
        ("width must be", {"width": 3}),
        ("query must be a token", {"kind": "window", "query": 20}),
        ("query must be a token", {"kind": "window", "query": -1}),
        ("query must be a token", {"kind": "window", "query": (1, 2)}),
        ("query must be a token", {"kind": "window", "query": 1.5}),
        ('Write kv_tiling="static", or kind="tiles"', {"kv_tiling": "dynamic"}),
        ("q_tile must have", {"q_tile": (2, 2)}),
    ],
)
def test_refusals(message, arguments):
    with pytest.raises(GNAError, match=message):
        draw(GNA(20, 4), **arguments)


def test_more_refusals(tmp_path):
    with pytest.raises(GNAError, match="must be a GNA, a Plan or a search's result: got int"):
        draw(20)
    with pytest.raises(GNAError, match="a Plan has its tiles"):
        draw(plan(GNA(20, 4)), q_tile=(4,))
    with pytest.raises(GNAError, match="Give larger tiles"):
        draw(GNA(100_000, 4), q_tile=(1,), kv_tile=(1,))
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    with pytest.raises(GNAError, match=r"Use the suffix \.png"):
        draw(GNA(20, 4), kind="window", path=tmp_path / "x.nothing")


def test_a_dynamic_plan_draws_its_visits():
    how = plan(GNA(16, 6), (4,), (2,), "dynamic")
    assert draw(how, kind="tiles").splitlines()[2] == "3 5 5 4"


FRONT = """
(16,): speed-up over reach, the front of 4 of 136 windows and strides
  4.00 │        ●
  3.67 │
  3.36 │
  3.08 │
  2.83 │
  2.59 │
  2.38 │
  2.18 │
  2.00 │                ●
  1.83 │
  1.68 │
  1.54 │
  1.41 │
  1.30 │                       ●
  1.19 │
  1.09 │
  1.00 │                               ●
       └────────────────────────────────
        0%           reach          100%
fastest: window 4 stride 4, 4.00 at reach 25%
farthest: window 16 stride 1, 1.00 at reach 100%
"""


def test_the_front_of_a_search():
    found = search((16,), q_rows=4, kv_rows=4)
    assert draw(found, width=40) == FRONT.strip("\n")
    one = search((16,), windows=[16])
    assert draw(one).count("●") == len(one.front) == 1
    assert max(map(len, draw(search((8, 12)), width=50).splitlines()[1:-2])) <= 50


def test_the_front_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = search((12, 16))
    drawn_line = figure(found).axes[0].lines[0]
    assert drawn_line.get_ydata() == pytest.approx([row.work_speedup for row in found.front])
    assert drawn_line.get_xdata() == pytest.approx([100 * row.reach for row in found.front])
    draw(found, path=tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_a_front_is_a_searchs_alone():
    found = search((16,), q_rows=4, kv_rows=4)
    with pytest.raises(GNAError, match="for what a search found"):
        draw(GNA(20, 4), kind="front")
    with pytest.raises(GNAError, match="got kind='blocks' of a SearchResult"):
        draw(found, kind="blocks")
    with pytest.raises(GNAError, match="no problem qualifies, of 136 windows"):
        draw(search((16,), min_sparsity=0.99))


def test_drawing_itself_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, types; sys.modules['torch'] = None; p = types.ModuleType('gnaflex');"
        "p.__path__ = ['gnaflex']; sys.modules['gnaflex'] = p; import gnaflex.drawing;"
        "print('matplotlib' in sys.modules)"
    )
    root = drawing.__file__.rsplit("/", 2)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr

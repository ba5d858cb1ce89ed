"""The planner's verbs of the command: text, JSON, exit codes, errors of a line or two."""

from __future__ import annotations

import json

import pytest

from gnaflex.cli import main
from gnaflex.paper import CONFIGURATIONS

VIDEO = ["30x48x80", "--window", "18x24x24", "--stride", "16x8x8"]


def run(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_golden(capsys):
    code, out, err = run(capsys, "plan", *VIDEO, "--q-tile", "4x8x8", "--kv-tile", "2x8x8", "--dynamic")
    assert (code, err) == (0, "")
    assert out == (
        "GNA(shape=(30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))\n"
        "  query tiles 4x8x8, key tiles 2x8x8, dynamic key tiling; sparsity 91.00%\n"
        "  38,880 tiles visited: 100.0% full, 0.0% partial, 0.0% clipped\n"
        "  perfectly block-sparse: yes\n"
        "  speed-up over dense: 10.42 by all tiles visited (work), 11.11 by those of the busiest query "
        "tile,\n"
        "    11.11 by those of the mean one; FLOPs allow 11.11\n"
    )


def test_plan_json(capsys):
    code, out, _ = run(capsys, "plan", *VIDEO, "--json", "--causal", "0", "--dilation", "1x2x1")
    found = json.loads(out)
    assert code == 0
    assert found["shape"] == [30, 48, 80]
    assert found["is_causal"] == [True, False, False]
    assert found["dilation"] == [1, 2, 1]
    assert found["touched_tiles"] == sum(
        found[name] for name in ("full_tiles", "partial_tiles", "clipped_tiles")
    )
    assert found["kv_tiling"] == "static"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--q-tile", "4x8"], "q_tile must have one positive integer extent per axis"),
        (["--kv-tile", "max"], "a tile is made of integers"),
        (["--stride", "20x8x8"], "stride must not exceed window"),
    ],
)
def test_mistakes_take_a_line_or_two(capsys, words, message):
    code, out, err = run(capsys, "plan", *VIDEO, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_paper(capsys):
    code, out, _ = run(capsys, "paper")
    assert code == 0
    assert "…" not in out
    lines = [line for line in out.splitlines() if line.lstrip().startswith(("FLUX", "Cosmos", "Hunyuan"))]
    assert len(lines) == len(CONFIGURATIONS)
    assert " ".join(lines[14].split()) == "HunyuanVideo 18x24x24 1x1x1 11.11 3.27 5.24 1.73 1.73 1.72 1.73"
    rows = json.loads(run(capsys, "paper", "--json")[1])
    assert rows[2]["printed_all_steps"] == {"flop": 1.88, "simulated": 1.88, "measured": 1.82}
    assert rows[3]["printed_all_steps"] is None


def test_explain(capsys):
    words = ("64", "--window", "16", "--stride", "6", "--q-tile", "8", "--kv-tile", "8", "--dynamic")
    code, out, _ = run(capsys, "explain", *words)
    assert code == 0
    assert out.splitlines()[0].startswith("Not block-sparse: 14 of 23 visited tiles (61%) need a mask")
    assert "stride 6 -> 8" in out
    found = json.loads(run(capsys, "explain", *words, "--json")[1])
    assert found["why"] == out.splitlines()


def test_nearest(capsys):
    words = ("33x45x80", "--window", "18x24x24", "--stride", "5x6x7", "--limit", "3")
    code, out, _ = run(capsys, "nearest", *words, "--q-tile", "2x8x8", "--kv-tile", "2x8x8")
    assert code == 0
    assert "18x24x24   6x8x8" in out
    found = json.loads(run(capsys, "nearest", *words, "--json")[1])
    assert len(found) == 3
    assert all(one["is_block_sparse"] for one in found)
    assert [one["distance"] for one in found] == sorted(one["distance"] for one in found)


def test_search(capsys, tmp_path):
    words = ("8x16", "--step", "4", "--limit", "4")
    code, out, _ = run(capsys, "search", *words)
    assert code == 0
    assert "Pareto front" in out
    found = json.loads(run(capsys, "search", *words, "--json")[1])
    assert 0 < len(found["rows"]) <= 4
    assert all(one["is_block_sparse"] for one in found["rows"] + found["front"])
    pytest.importorskip("matplotlib")
    assert run(capsys, "search", *words, "--out", str(tmp_path / "front.png"))[0] == 0
    assert (tmp_path / "front.png").stat().st_size > 5000
    code, _, err = run(capsys, "search", *words, "--min-sparsity", "2")
    assert code == 2
    assert "min_sparsity=2.0" in err
    speedups = [one["work_speedup"] for one in found["rows"]]
    assert speedups == sorted(speedups, reverse=True)


def test_draw(capsys, tmp_path):
    code, out, _ = run(
        capsys, "draw", "4x8", "--window", "2x4", "--stride", "2x4", "--kind", "window", "--query", "1x5"
    )
    assert code == 0
    assert out.splitlines()[2:6] == ["····████", "····█Q██", "········", "········"]
    pytest.importorskip("matplotlib")
    code, _, _ = run(capsys, "draw", *VIDEO, "--kind", "tiles", "--out", str(tmp_path / "tiles.png"))
    assert code == 0
    assert (tmp_path / "tiles.png").stat().st_size > 5000
    code, _, err = run(capsys, "draw", "8x8", "--window", "3", "--dynamic")
    assert code == 2
    assert "static" in err

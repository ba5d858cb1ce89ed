"""The README's tables of a comparison and of growth, from files made here."""

from __future__ import annotations

import pytest

from benchmarks import engine, tables


def timing(problem, provider, ms=None, direction="forward", **more):
    row = {"problem": problem, "provider": provider, "direction": direction, "ms": ms} | more
    return {key: value for key, value in row.items() if value is not None}


def facts(problem, work_speedup, block_sparse=False):
    return {
        "problem": problem, "facts": {}, "tokens": 7680, "work_speedup": work_speedup,
        "block_sparse": block_sparse,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def write(name, *rows):
        engine.write(tmp_path / f"{name}.json", {}, {"item": {"status": "ok", "rows": list(rows)}})
        return tmp_path

    return write


ROWS = (
    facts("video", 6.67, block_sparse=True),
    timing("video", "dense cuDNN", why="no GPU. Take one."),
    timing("video", "dense flash", 1200.0, first_s=1.5, error=0.5),
    timing(
        "video",
        "gnaflex flex",
        200.0,
        speedup=6.0,
        achievable=0.9,
        predicted_ms=180.0,
        first_s=5.0,
        mask_ms=3.0,
    ),
    timing("video", "NATTEN", 9000.0, speedup=0.13, achievable=0.02),
    timing("video", "gnaflex flex", 1.0, "backward", speedup=99.0, achievable=1.0),
    facts("picture", 4.0),
    timing("picture", "dense cuDNN", why="no GPU. Take one."),
    timing("picture", "dense flash", 50.0, first_s=0.5, error=0.7),
    timing("picture", "gnaflex flex", 20.0, speedup=2.5, achievable=0.625, predicted_ms=30.0, first_s=7.0),
    timing("picture", "NATTEN", why="no memory"),
    facts("without dense", 4.0),
    timing("without dense", "gnaflex flex", 20.0),
)


def test_a_comparison(folder):
    assert tables._backends(folder("backends", *ROWS)).splitlines() == [
        "| problem | tokens | possible | best dense | gnaflex flex | NATTEN |",
        "|---|---|---|---|---|---|",
        "| video (block-sparse) | 7,680 | 6.67 | 1,200 ms | **6.00 (90 %)** | 0.13 (2 %) |",
        "| picture | 7,680 | 4.00 | 50 ms | **2.50 (62 %)** |  |",
        "",
        "Not run there: dense cuDNN: no GPU.",
    ]


def test_what_else_it_costs(folder):
    assert tables._costs(folder("backends", *ROWS)).splitlines() == [
        "| median of all problems | first call, s | mask, ms | call, MiB | error | planner's prediction |",
        "|---|---|---|---|---|---|",
        "| dense flash | 1 |  |  | 0.6 |  |",
        "| gnaflex flex | 6 | 3 |  |  | +20 % |",
        "| NATTEN |  |  |  |  |  |",
    ]


def test_growth(folder):
    points = [
        {"subject": "mask", "tokens": 2**n, "ms": 2.0**n / 4096, "peak_mib": 4.0**n / 2**20}
        for n in range(10, 21)
    ]
    ends = [
        {"subject": "mask", "tokens": 2**21, "why": "slow"},
        {"subject": "cuda", "tokens": 1, "why": "no GPU"},
    ]
    found = tables._growth(folder("growth", *points, *ends))
    header, _, row = found.splitlines()
    assert row.startswith("| mask | 1,048,576 | 256 | 1.00 | 2.00 |")
    assert header.count("|") == row.count("|")


@pytest.mark.parametrize(
    "value, shown", [(0.01234, "0.0123"), (12.34, "12.3"), (999.4, "999"), (12345.6, "12,346")]
)
def test_numbers(value, shown):
    assert tables._short(value) == shown

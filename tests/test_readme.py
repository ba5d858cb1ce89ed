"""The README: its code runs, its commands are what CI runs, its figures stand in the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.results import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ORDERS = ("row-major", "tile-major")


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(code("python"))))
def test_code_runs(number):
    subprocess.run([sys.executable, "-c", code("python")[number]], check=True, capture_output=True, cwd=ROOT)


def test_the_two_commands():
    demo, tests = code("sh")
    assert demo.strip() == "pip install torch==2.13.0 '.[demo]' && gnaflex demo"
    assert tests.strip() == "pip install torch==2.13.0 '.[test]' && pytest"


@pytest.fixture(scope="module")
def figures():
    """Medians of a part by what they are of: those of the one folder that has it."""

    def of(part):
        (path,) = tables.RESULTS.glob(f"*/{part}.json")
        return load(path).figures

    return of


def test_tables_are_what_the_results_say():
    """``python -m benchmarks.tables`` writes them anew."""
    stale = [name for name, old, new in tables.blocks(README) if old != new]
    assert not stale
    assert {name.partition(" of ")[0] for name, *_ in tables.blocks(README)} == set(tables.TABLES)


def test_every_device_with_a_comparison_has_its_table():
    there = {path.parent.name for path in tables.RESULTS.glob("*/backends.json")}
    assert there == {name.partition(" of ")[2] for name, *_ in tables.blocks(README) if "backends" in name}


def test_a_stale_table_is_found_and_mended(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    monkeypatch.setitem(tables.TABLES, "paper", lambda folder: f"| {folder.name} |\n")
    text = "a\n<!-- table: paper of x -->\n| old |\n<!-- end -->\nb <!-- table: paper -->\n<!-- end -->\n"
    tables.README.write_text(text)
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "stale: paper of x, paper\n"
    assert tables.README.read_text() == text
    assert tables.main([]) == 0
    assert tables.README.read_text() == text.replace("| old |", "| x |").replace(
        "paper -->\n<", "paper -->\n| results |\n<"
    )
    assert tables.main(["--check"]) == 0


def test_figures_of_masks_stand_in_a_results_file(figures):
    rows = figures("compile_time")
    took, times = re.search(r"takes ([\d.]+) s for.*?: ([\d,]+) times as long", README).groups()
    assert float(took) == pytest.approx(rows["30x48x80: compiled create_block_mask"]["median"], rel=0.05)
    name = "30x48x80: times faster than compiled create_block_mask"
    assert float(times.replace(",", "")) == pytest.approx(rows[name]["median"], rel=0.05)
    rows = figures("cpu_attention")
    for order in ORDERS:
        said = re.search(rf"([\d.]+) \({order}\)", README).group(1)
        name = f"16x32x32 window 9x13x13 fp32, {order}: over the same lists all full"
        assert float(said) == pytest.approx(rows[name]["median"], abs=0.02)


def test_figures_of_joint_masks_stand_in_a_results_file(figures):
    rows = figures("joint_masks")
    said = re.search(r"takes ([\d.]+) \(row-major\) and ([\d.]+) \(tile-major\) times the same lists", README)
    for order, one in zip(ORDERS, said.groups(), strict=True):
        name = f"16x32x32 window 9x13x13 fp32, {order}, suffix: over the same lists all full"
        assert float(one) == pytest.approx(rows[name]["median"], abs=0.01)
    assert rows["graphs over ten windows, prompts and biases of one grid"]["median"] == 1


def test_figures_of_dispatch_stand_in_a_results_file(figures):
    rows = figures("dispatch_cost")
    names = (f"{name} to the launch of a kernel" for name in ("flex_attention", "attention"))
    plain, grid = (rows[name]["median"] for name in names)
    said = f"takes {plain:.0f} us (`flex_attention`) or {grid:.0f} us (`attention`) until the launch"
    assert said in README


def test_figures_of_planning_stand_in_a_results_file(figures):
    rows = figures("planning")
    said = re.search(
        r"takes ([\d.]+) to ([\d.]+) ms with.*?and ([\d.]+) to ([\d.]+) ms with", README
    ).groups()
    for (least, most), kind in zip((said[:2], said[2:]), ("tiles given", "best tiles"), strict=True):
        medians = [
            row["median"] for what, row in rows.items() if what.startswith("plan 128") and kind in what
        ]
        assert float(least) == pytest.approx(min(medians), rel=0.15)
        assert float(most) == pytest.approx(max(medians), rel=0.05)
    many = rows["plan random 3-D problems of 1.2 M tokens, best tiles"]
    said = re.search(r"3-D problems ([\d.]+) ms \(at most ([\d.]+)\)", README).groups()
    assert [float(one) for one in said] == pytest.approx([many["median"], many["high"]], rel=0.02)
    searched = [row["median"] for what, row in rows.items() if what.startswith("search")]
    assert float(re.search(r"are searched in ([\d.]+) s", README).group(1)) == pytest.approx(
        max(searched), rel=0.05
    )


def test_figures_of_the_comparison_stand_in_a_results_file():
    """How long it takes, and by how much "sdpa" beats "flex" where "auto" takes it."""
    (path,) = tables.RESULTS.glob("*-cores/backends.json")
    assert "of the problems, in ten minutes" in README
    assert 540 < sum(item["seconds"] for item in json.loads(path.read_text())["items"].values()) < 600
    times = {(point["subject"], point["tokens"]): point["ms"] for point in growth(path) if "ms" in point}
    ratios = [times['gnaflex, "flex"', n] / ms for (who, n), ms in times.items()
              if who == 'gnaflex, "sdpa"' and ('gnaflex, "flex"', n) in times]  # fmt: skip
    assert "up to four times" in README
    assert round(max(ratios)) == 4


def growth(path):
    return load(path.parent / "growth.json").points


def test_every_public_name_has_its_line():
    import gnaflex

    for name in gnaflex.__all__:
        assert name in README or name == "GNAError", name

"""The README: its code runs, its commands are what CI runs, its figures stand in the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODELS = ("| FLUX.1-dev 4K |", "| Cosmos-7B |", "| HunyuanVideo |")
CALLS, ORDERS = ("first call", "later calls"), ("row-major", "tile-major")


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(code("python"))))
def test_code_runs(number):
    subprocess.run([sys.executable, "-c", code("python")[number]], check=True, capture_output=True, cwd=ROOT)


def test_the_two_commands():
    demo, tests = code("sh")
    assert demo.strip() == "pip install torch==2.13.0 '.[demo]' && gnaflex demo"
    assert tests.strip() == "pip install torch==2.13.0 '.[test]' && pytest"


def test_figures_stand_in_a_results_file():
    """The table and the sentence below it are what the committed compile_time results say."""
    (path,) = (ROOT / "benchmarks" / "results").glob("*/compile_time.json")
    rows = {row["what"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    table = re.findall(r"^\| (.*) \| ([\d.]+) ms \| ([\d.]+) ms \|$", README, re.MULTILINE)
    assert len(table) == 7
    for what, first, later in table:
        assert float(first) == pytest.approx(rows[f"{what}: first call in a process"], rel=0.05)
        assert float(later) == pytest.approx(rows[f"{what}: later calls"], rel=0.05)
    took, times = re.search(r"takes ([\d.]+) s for.*?: ([\d,]+) times as long", README).groups()
    assert float(took) == pytest.approx(rows["30x48x80: compiled create_block_mask"], rel=0.05)
    name = "30x48x80: times faster than compiled create_block_mask"
    assert float(times.replace(",", "")) == pytest.approx(rows[name], rel=0.05)
    (path,) = (ROOT / "benchmarks" / "results").glob("*/cpu_attention.json")
    rows = {row["what"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    for order in ("row-major", "tile-major"):
        said = re.search(rf"([\d.]+) \({order}\)", README).group(1)
        name = f"16x32x32 window 9x13x13 fp32, {order}: over the same lists all full"
        assert float(said) == pytest.approx(rows[name], abs=0.02)


def test_figures_of_joint_masks_stand_in_a_results_file():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/joint_masks.json")
    rows = {row["what"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    table = re.findall(r"^\| (.*), `(.*)` \| (.*), (.*) ms \| (.*), (.*) ms \|$", README, re.MULTILINE)
    assert len(table) == 6
    for what, extra, *figures in table:
        names = [f"{what}, {text}: {call}" for call in CALLS for text in ("without text", extra)]
        assert [float(one) for one in figures] == pytest.approx([rows[name] for name in names], abs=0.06)
    said = re.search(r"takes ([\d.]+) \(row-major\) and ([\d.]+) \(tile-major\) times the same lists", README)
    names = [
        f"16x32x32 window 9x13x13 fp32, {order}, suffix: over the same lists all full" for order in ORDERS
    ]
    assert [float(one) for one in said.groups()] == pytest.approx([rows[name] for name in names], abs=0.01)
    assert rows["graphs over ten windows, prompts and biases of one grid"] == 1


def test_figures_of_dispatch_stand_in_a_results_file():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/dispatch_cost.json")
    rows = {row["what"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    plain, grid = (rows[f"{name} to the launch of a kernel"] for name in ("flex_attention", "attention"))
    said = f"takes {plain:.0f} us (`flex_attention`) or {grid:.0f} us (`attention`) until the launch"
    assert said in README


def test_figures_of_planning_stand_in_a_results_file():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/planning.json")
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
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


def test_the_papers_table_is_what_the_planner_counts():
    from gnaflex.paper import CONFIGURATIONS

    lines = [line for line in README.splitlines() if line.startswith(MODELS)]
    table = [[one.strip() for one in line.split("|")[1:-1]] for line in lines if "→" not in line]
    assert len(table) == len(CONFIGURATIONS)
    for (_, window, stride, *figures), row in zip(table, CONFIGURATIONS, strict=True):
        plan = row.plan
        assert window == "x".join(map(str, row.window))
        assert stride == "x".join(map(str, row.stride))
        counted = (plan.flop_speedup, plan.tile_speedup_worst, plan.tile_speedup_mean)
        assert figures[:3] == [f"{one:.2f}" for one in counted]
        assert (figures[3] == "yes") == plan.is_block_sparse
        printed = row.all_steps
        models = (
            row.simulated(),
            printed and printed.simulated,
            row.estimated(),
            printed and printed.measured,
        )
        assert figures[4:] == ["" if one is None else f"{one:.2f}" for one in models]


def test_every_public_name_has_its_line():
    import gnaflex

    for name in gnaflex.__all__:
        assert name in README or name == "GNAError", name

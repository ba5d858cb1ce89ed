"""The command of the benchmarks: its words, its files, what it prints; no item is measured here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import engine, parts, problems, report, run
from gnaflex.cli import main as gnaflex_main

ROW = {
    "problem": "a",
    "provider": "flex",
    "direction": "forward",
    "ms": 2.0,
    "low": 1.9,
    "high": 2.1,
    "runs": 3,
}
GOOD, BAD = {"a": ROW}, {"a": ROW | {"ms": 9.0, "low": 8.9, "high": 9.1}}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """main() with items that print rows; its exit code, the file that it wrote, and what items saw."""
    seen = tmp_path / "seen"

    def call(*words, rows=GOOD, code=0):
        items = {name: engine.Item(lambda: iter(()), 30.0) for name in rows}
        monkeypatch.setattr(parts, "items", lambda part, which, device: items)

        def command_of(part, which, name):
            text = (
                f"import os; open({str(seen)!r}, 'a').write(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '\\n')\n"
            )
            text += f"print({engine.MARK + json.dumps(rows[name])!r}); raise SystemExit({code})"
            return [sys.executable, "-c", text]

        monkeypatch.setattr(run, "_command", command_of)
        done = run.main([*words, "--out", str(tmp_path / "out")])
        found = [*(tmp_path / "out").rglob("*.json")]
        return done, found, seen.read_text().split() if seen.exists() else []

    return call


def test_a_run_writes_what_was_measured(command, tmp_path, capsys):
    code, (path,), caches = command()
    assert code == 0
    assert path.name == "backends.json"
    found = json.loads(path.read_text())
    assert found["items"]["a"]["rows"] == [ROW]
    assert (found["environment"]["set"], found["environment"]["torch"]) == ("small", torch.__version__)
    assert f"wrote {path}" in capsys.readouterr().out
    assert len(caches) == 1
    assert not Path(caches[0]).exists()  # compilers begin with nothing, and leave nothing


def test_resume_leaves_out_what_is_there(command):
    command()
    assert len(command("--resume")[2]) == 1
    assert len(command()[2]) == 2


def test_the_exit_code_is_that_of_items(command):
    assert command(code=3)[0] == 1
    assert command("--resume")[0] == 0


def test_compare_reads_the_file_before_it_is_written_anew(command, capsys):
    _, (path,), _ = command()
    assert command("--compare", str(path), rows=BAD)[0] == 0
    assert "a, flex, forward: 2 ms -> 9 ms (4.50 times)" in capsys.readouterr().out
    command("--compare", str(path), rows=BAD)
    assert "nothing moved beyond the spread" in capsys.readouterr().out


def test_other_sets_and_parts_have_files_of_their_own(command):
    command("--set", "quick")
    command("growth", "compile_time")
    names = {path.name for path in command("all")[1]}
    assert names == {"backends-quick.json"} | {f"{part}.json" for part in parts.PARTS}


def test_where_results_go(monkeypatch, tmp_path):
    gpu, cpu = {"device": "NVIDIA H200"}, {"device": "cpu", "cpu": "AMD EPYC", "cores": 2}
    assert run._path("backends", "full", gpu, None) == engine.RESULTS / "nvidia-h200" / "backends.json"
    assert run._path("backends", "small", gpu, None).name == "backends-small.json"
    assert run._path("growth", "small", cpu, tmp_path) == tmp_path / "amd-epyc-2-cores" / "growth.json"
    assert run._path("backends", "quick", cpu, None) is None
    monkeypatch.setattr(
        run, "HERE", tmp_path / "site-packages" / "benchmarks"
    )  # no clone: not into the package
    assert run._path("backends", "small", cpu, None).parts[0] == "gnaflex-results"


@pytest.mark.parametrize(
    "words, said",
    [
        (["nope"], "unknown part 'nope'. Write one of backends, growth, "),
        (["--only", "nope"], "backends has no item 'nope'. Add --list to see them."),
        (["--compare", "nope.json"], "--compare nope.json is no results file. Write the path of an"),
        (["--compare", "pyproject.toml"], "--compare pyproject.toml is no results file."),
    ],
)
def test_words_that_make_no_sense(words, said, capsys):
    assert run.main(words) == 2
    assert f"not run: {said}" in capsys.readouterr().err
    assert gnaflex_main(["bench", *words]) == 2
    assert f"gnaflex bench: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("has_gpu, which", [(True, "full"), (False, "small")])
def test_the_set_is_that_of_the_device(has_gpu, which, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    limit = parts.LIMIT_S[which]
    assert lines[:-1] == [f"backends: {name} (at most {limit:.0f} s)" for name in problems.SETS[which]]
    assert lines[-1] == "backends: dispatch (at most 60 s)"
    assert gnaflex_main(["bench", "--set", "quick", "--list", "--only", "HunyuanVideo"]) == 0
    assert capsys.readouterr().out == "backends: HunyuanVideo (at most 120 s)\n"


@pytest.mark.parametrize("part", parts.PARTS)
def test_every_part_has_items(part):
    found = parts.items(part, "quick", torch.device("cpu"))
    assert found
    assert all(callable(one.measure) and one.limit_s > 0 for one in found.values())


def test_an_item_prints_its_rows(monkeypatch, capsys):
    one = problems.QUICK["HunyuanVideo"]
    compared = []
    monkeypatch.setattr("benchmarks.comparison.compare", lambda *given: compared.append(given) or iter(()))
    assert run.main(["backends", "--set", "quick", "--item", "HunyuanVideo"]) == 0
    assert compared == [("HunyuanVideo", one, torch.device("cpu"), torch.float32)]
    assert parts.dtype_on(torch.device("cuda")) is torch.bfloat16


def test_children_run_the_module_that_runs(monkeypatch):
    words = run._command("backends", "quick", "a b")
    assert words == [*(sys.executable, "-m", "benchmarks.run", "backends", "--set", "quick", "--item", "a b")]


def test_gnaflex_bench_is_the_same_command(monkeypatch, capsys):
    from gnaflex.benchmarks import run as installed

    assert installed._command("backends", "quick", "a")[2] == "gnaflex.benchmarks.run"
    monkeypatch.setattr(installed, "_part", lambda *given: 1)
    assert gnaflex_main(["bench"]) == 1
    assert "some items did not end well" in capsys.readouterr().err


# ---- what is printed -----------------------------------------------------------------------------------


def told(*rows, status="ok", why=""):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.tell(console, "name", engine.Outcome(status, 3.0, list(rows), why))
    return console.export_text()


def test_a_comparison_as_a_table():
    no = {"problem": "a", "provider": "cuda", "why": "no GPU [here]"}
    rows = [
        ROW | {"speedup": 5.0, "achievable": 0.8},
        no | {"direction": "forward"},
        no | {"direction": "both"},
    ]
    said = told(*rows, ROW | {"direction": "both"})
    assert "name: ok, 3 s" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["flex", "2", "1.9", "..", "2.1", "5.00", "0.80"] in lines
    assert said.count("flex") == 2
    assert said.count("cuda") == 1
    assert "cuda does not run (forward, both): no GPU [here]" in said


def test_figures_and_points_and_failures():
    figure = {"what": "f", "median": 1.0, "low": 0.5, "high": 2.0, "unit": "us", "must": 3.0, "aim": 1.0}
    said = told(
        figure | {"verdict": "aim"}, {"subject": "mask", "tokens": 4, "ms": 2}, status="failed", why="[x]"
    )
    assert ["f", "1", "us", "0.5", "..", "2", "3", "1", "aim"] in [line.split() for line in said.splitlines()]
    assert "subject mask, tokens 4, ms 2" in said
    assert "[x]" in said


def test_without_rich_there_are_lines(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert command()[0] == 0
    assert "a: ok, " in capsys.readouterr().out


def test_a_part_of_one_item_has_time_for_it():
    assert parts.budget_s("backends", "small") == parts.BUDGET_S["small"] == 600
    for part in parts.ONE_ITEM:
        (item,) = parts.items(part, "small", torch.device("cpu")).values()
        assert parts.budget_s(part, "small") >= item.limit_s

"""Benchmarks as processes: what ends well, fails, hangs or has no time; budgets, results files, rows."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.measure import row

ROOT = Path(__file__).parent.parent
ROW = {"what": "a", "median": 1.0, "unit": "x", "note": "n"}
LINE = engine.MARK + json.dumps(ROW)
ENV = dict(os.environ)
FACTS = {"device": "NVIDIA H200"}
GOOD, BAD = f"print({LINE!r})", "raise SystemExit(2)"


# ---- one item ----------------------------------------------------------------------------------------


def run(code, left=30.0, limit=20.0, env=ENV):
    return engine.run([sys.executable, "-c", code], left, limit, env)


def test_an_item_that_goes_well():
    out = run(GOOD)
    assert (out.status, out.rows, out.why) == ("ok", [ROW], "")
    assert out.seconds > 0


def test_warnings_may_stand_anywhere():
    noise = f"[1] warning\n{LINE} and more\ntext {LINE}\n{{}}\n[1]\nnan"
    late = "sys.stderr.write('late'); sys.stdout.buffer.write(bytes([255]))"
    out = run(f"import sys; print({noise!r}, end=''); {late}")
    assert (out.status, out.rows) == ("ok", [ROW, ROW])


def test_an_item_that_fails_keeps_its_rows():
    out = run(f"print({LINE!r}, flush=True); raise SystemError('for a test')")
    assert (out.status, out.rows) == ("failed", [ROW])
    assert out.why.startswith("exit status 1: ")
    assert "SystemError: for a test" in out.why


@pytest.mark.parametrize("said", ["", "rows: []", LINE[:-4], engine.MARK + "nothing"])
def test_an_item_without_rows_fails(said):
    out = run(f"print({said!r})")
    assert (out.status, out.rows) == ("failed", [])
    assert out.why == f"exit status 0: {said}\n"


def test_only_the_end_of_a_long_output_is_kept():
    out = run("print('x' * 100_000 + 'end'); raise SystemExit(3)")
    assert out.status == "failed"
    assert out.why.endswith("xend\n")
    assert len(out.why) < engine.TAIL + 50


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_item_that_hangs_is_killed_with_its_children():
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"print('x' * 20_000, {LINE!r}, 'child', child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    out = run(code, left=2.5, limit=1.0)
    assert (out.status, out.rows) == ("too late", [ROW])
    assert out.why.startswith("after 2 s: xxx")
    assert len(out.why) < engine.TAIL + 50
    assert out.seconds < 20
    for _ in range(100):
        if not is_alive(pid := int(out.why.split()[-1])):
            break
        time.sleep(0.02)
    assert not is_alive(pid)


def test_an_item_whose_output_stays_open(monkeypatch):
    monkeypatch.setattr(engine, "DRAIN_S", 0.2)
    code = (
        "import subprocess, time\n"
        "subprocess.Popen(['sleep', '6'], start_new_session=True)\n"
        f"print({LINE!r}, flush=True)\n"
        "time.sleep(60)"
    )
    out = run(code, left=1.5, limit=1.0)
    assert (out.status, out.rows) == ("too late", [ROW])
    assert out.seconds < 5


def test_no_item_is_begun_that_has_no_time():
    out = run(BAD, left=19, limit=60)
    assert (out.status, out.seconds, out.rows, out.why) == ("no time left", 0, [], "it may take 60 s")
    assert run(BAD, left=-1, limit=10).status == "no time left"
    assert run(GOOD, left=19, limit=19).status == "ok"
    assert run(GOOD, left=20, limit=60).status == "ok"


def test_ctrl_c_leaves_nothing_running(monkeypatch):
    children = []

    def interrupted(self, *_, timeout=None):
        children.append(self.pid)
        if len(children) == 1:
            raise KeyboardInterrupt
        return "", None

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)")
    assert not is_alive(children[0])


# ---- a suite of items --------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """Of a results file, in a folder that is not there yet."""
    return tmp_path / "nvidia-h200" / "suite.json"


@pytest.fixture
def suite(path):
    """Items by what their process does, run; gives what the results file has of them."""

    def call(items, budget_s=60.0, resume=False, limit=10.0, **more):
        command = lambda name: [sys.executable, "-c", items[name]]  # noqa: E731
        job = engine.Job(dict.fromkeys(items, limit), command, path, FACTS)
        known = engine.suite(job, budget_s, resume, more.pop("env", ENV), **more)
        assert json.loads(path.read_text()) == {"environment": FACTS, "items": known}
        assert [*path.parent.iterdir()] == [path]
        return known

    return call


def statuses(known):
    return {name: one["status"] for name, one in known.items()}


def test_a_suite(suite, capsys):
    known = suite({"a": GOOD, "b": BAD, "c": GOOD})
    assert statuses(known) == {"a": "ok", "b": "failed", "c": "ok"}
    assert known["a"]["rows"] == [ROW]
    assert known["b"]["why"] == "exit status 2: "
    said = re.sub(r"\d+ s", "N s", capsys.readouterr().out).splitlines()
    a, b, c = "a: ok, N s", "b: failed, N s exit status 2:", "c: ok, N s"
    assert said == [a, "    a: 1 x n", b, c, "    a: 1 x n"]
    again = suite({"a": BAD, "b": GOOD}, resume=True)
    assert statuses(again) == {"a": "ok", "b": "ok", "c": "ok"}  # a is not run again, c not forgotten
    assert "a: there already" in capsys.readouterr().out
    assert statuses(suite({"c": GOOD})) == {"c": "ok"}  # without resume the file is begun anew


def test_a_suite_writes_after_every_item(suite, path):
    look = f"import json; assert list(json.load(open({str(path)!r}))['items']) == ['a']; {GOOD}"
    assert statuses(suite({"a": GOOD, "b": look})) == {"a": "ok", "b": "ok"}


def test_items_get_the_environment(suite):
    look = f"import os; assert os.environ['FOR_A_TEST'] == 'x'; {GOOD}"
    assert statuses(suite({"a": look}, env={"FOR_A_TEST": "x"})) == {"a": "ok"}


def test_whoever_watches_is_told(suite, capsys):
    told = []
    ended = lambda name, outcome: told.append(f"{name} {outcome.status}")  # noqa: E731
    suite({"a": GOOD, "b": BAD}, begun=told.append, ended=ended)
    assert told == ["a", "a ok", "b", "b failed"]
    suite({"a": GOOD}, resume=True, begun=told.append, ended=ended)
    assert told[4:] == []
    assert capsys.readouterr().out == "a: there already\n"


def test_a_suite_without_a_file(path):
    job = engine.Job({"a": 10.0}, lambda name: [sys.executable, "-c", GOOD], None, FACTS)
    assert statuses(engine.suite(job, 60.0, True, ENV)) == {"a": "ok"}
    assert not path.parent.exists()


def test_a_suite_stops_at_its_budget(suite, monkeypatch):
    items = {"a": "import time; time.sleep(60)", "b": GOOD}
    assert statuses(suite(items, 0)) == {"a": "no time left", "b": "no time left"}
    assert statuses(suite({"b": GOOD}, 11, resume=True)) == {"a": "no time left", "b": "ok"}
    now, lefts = itertools.count(0, 7), []
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(now))
    outcome = engine.Outcome("ok", 1.0, [ROW])
    monkeypatch.setattr(engine, "run", lambda words, left, limit, env: lefts.append((left, limit)) or outcome)
    suite(items, 20)
    assert lefts == [(10, 10), (6, 10)]  # a limit of 10, then 20 - 2 * 7


@pytest.mark.parametrize("text", ['{"items": ', "[1]", '{"environment": {}}'])
def test_a_damaged_file_is_none(suite, path, text):
    assert engine.read(path) == {}  # nor is one that is not there
    path.parent.mkdir()
    path.write_text(text)
    assert engine.read(path) == {}
    assert statuses(suite({"a": GOOD}, resume=True)) == {"a": "ok"}


def test_a_file_is_replaced_as_a_whole(path, monkeypatch):
    engine.write(path, FACTS, {"a": 1})
    with pytest.raises(TypeError):
        engine.write(path, FACTS, {"a": object()})
    monkeypatch.setattr(Path, "replace", lambda self, target: None)  # what comes before it
    engine.write(path, FACTS, {"a": 2})
    assert engine.read(path) == {"a": 1}


def test_failures():
    known = {name: {"status": name} for name in ("ok", "failed", "too late", "no time left")}
    for name, code in (("ok", 0), ("failed", 1), ("too late", 1), ("no time left", 0), ("unknown", 0)):
        assert engine.failures(known, [name]) == code
        assert engine.failures(known, ["ok", name]) == code
    assert engine.failures(known, []) == 0


# ---- rows and words ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A row of another kind, without a verdict."""

    who: str
    ms: float | None = None
    facts: dict | None = None
    runs: int = 123456


def test_rows_as_json():
    assert engine.as_json(Found("a")) == {"who": "a", "runs": 123456}
    found = Found("a", 1.23456789, {"shape": (2, 3)}, 0)
    assert engine.as_json(found) == {"who": "a", "ms": 1.235, "facts": {"shape": (2, 3)}, "runs": 0}
    without = engine.as_json(row("w", [1.0, 2.0], "ms"))
    numbers = {"median": 1.5, "low": 1.0, "high": 2.0, "runs": 2}
    assert without == {"what": "w", "unit": "ms", "note": "", "verdict": ""} | numbers
    bounded = engine.as_json(row("w", [2.5], "ms", 3, 2, "n"))
    assert (bounded["must"], bounded["aim"], bounded["note"], bounded["verdict"]) == (3, 2, "n", "must")


def test_rows_are_printed_as_they_come(capsys):
    rows = [row("first", [1.0, 2.0, 4.0], "ms", 3, 2, "a note"), Found("b", 3.0)]
    seen = []

    def measure():
        print("text without an end", end="")
        for one in rows:
            yield one
            said = capsys.readouterr().out
            assert f"\n{engine.MARK}" in said
            seen.append(engine.rows_in(said))
        raise RuntimeError("too bad")

    with pytest.raises(RuntimeError, match="too bad"):
        engine.emit(measure())
    assert seen == [[engine.as_json(one)] for one in rows]
    assert seen[0][0]["verdict"] == "aim"


def test_rows_come_through_before_a_crash():
    code = (
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from dataclasses import make_dataclass\n"
        "from benchmarks import engine\n"
        "engine.emit(os._exit(9) if n else make_dataclass('One', ['n'])(n) for n in (0, 1))"
    )
    out = run(code, env={name: value for name, value in ENV.items() if name != "PYTHONUNBUFFERED"})
    assert (out.status, out.rows, out.why[:13]) == ("failed", [{"n": 0}], "exit status 9")


def test_what_is_told(capsys):
    rows = [
        ROW | {"median": 1234567.0, "note": ""},
        {"who": "b", "ms": 1.5, "facts": {"shape": [2]}},
    ]
    engine.tell("one", engine.Outcome("too late", 7.6, rows, "after 8 s: \n"))
    assert capsys.readouterr().out.splitlines() == [
        *("one: too late, 8 s after 8 s:", "    a: 1.235e+06 x ", "    who b, ms 1.5, facts {'shape': [2]}")
    ]


@pytest.mark.parametrize(
    "facts, name",
    [
        ({"device": "NVIDIA H200", "cpu": "x", "cores": 1}, "nvidia-h200"),
        ({"device": "NVIDIA GeForce RTX 4090 (Ti)"}, "nvidia-geforce-rtx-4090-ti"),
        ({"device": "cpu", "cpu": "AMD EPYC", "cores": 2}, "amd-epyc-2-cores"),
        ({"cpu": "Intel(R) Xeon(R)", "cores": 16}, "intel-r-xeon-r-16-cores"),
    ],
)
def test_every_device_has_a_folder(facts, name):
    assert engine.folder(facts) == name


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("8m", 480), ("480", 480), ("1.5h", 5400), ("0", 0)])
def test_durations(text, seconds):
    assert engine.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8 m", "m", "-1", "8d", "1e3"])
def test_no_durations(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a time such as 90s or 8m is needed: got "):
        engine.duration(text)

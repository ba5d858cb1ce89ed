"""Rows and their bounds, time on a CPU's clock and a GPU's, peak memory, and what is said of the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Timed

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# ---- rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "must, aim, verdicts",
    [
        (3, 2, {1: "aim", 2: "aim", 2.5: "must", 3: "must", 3.1: "MISSED", math.nan: "MISSED"}),
        (0.85, 0.95, {1: "aim", 0.95: "aim", 0.9: "must", 0.85: "must", 0.84: "MISSED", math.nan: "MISSED"}),
        (2, 2, {1: "aim", 2: "aim", 3: "MISSED"}),
        (0, -1, {-1: "aim", 0: "must", 1: "MISSED"}),
        (None, None, {1: ""}),
        (3, None, {1: "", 4: ""}),
        (None, 2, {1: "", 4: ""}),
    ],
)
def test_verdicts(must, aim, verdicts):
    for median, verdict in verdicts.items():
        assert measure.row("a", [float(median)], "ms", must, aim).verdict == verdict


def test_a_row_is_of_all_runs():
    found = measure.row("a", [5.0, 1.0, 2.0], "ms", 3, 2, "a note")
    assert found == measure.Row("a", 2.0, 1.0, 5.0, 3, "ms", 3, 2, "a note")
    assert measure.row("a", [1.0, 2.0], "x") == measure.Row("a", 1.5, 1.0, 2.0, 2, "x", None, None, "")


# ---- time --------------------------------------------------------------------------------------------


@pytest.fixture
def log():
    """What happened, in its order."""
    return []


@pytest.fixture
def passes(monkeypatch):
    """Passes seconds on a clock that stands still else."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_the_time_of_a_call(passes):
    assert measure.seconds(lambda: passes(3)) == 3


def test_rounds_but_the_first(passes, log):
    took = iter((100, 200, 1, 2, 3, 4))
    call = {name: lambda name=name: (log.append(name), passes(next(took))) for name in "ab"}
    assert measure.interleaved(call, 2) == {"a": [1, 3], "b": [2, 4]}
    assert log == [*"ababab"]


def test_ratios_are_of_rounds():
    times = {"a": [2.0, 9.0], "b": [1.0, 3.0]}
    assert measure.ratios(times, "a", "b") == [2, 3]
    with pytest.raises(ValueError):
        measure.ratios(times | {"b": [1.0]}, "a", "b")


def test_numbers_of_a_fresh_process():
    assert measure.fresh_process("import sys; print(1.5, 'torch' in sys.modules and 7 or 2)") == [1.5, 2]
    with pytest.raises(subprocess.CalledProcessError):
        measure.fresh_process("print(1); raise SystemExit(3)")


def test_milliseconds(passes, log):
    calls = {
        "a": Timed(lambda state: (log.append(("a", state)), passes(0.25))),
        "b": Timed(
            lambda state: (log.append(("b", state)), passes(0.5)),
            lambda: (passes(100), f"after {len(log)}")[1],
        ),
        "never": Timed(lambda state: log.append("never")),
    }
    taken = measure.milliseconds(calls, {"a": 3, "b": 2, "never": 0}, CPU)
    assert taken == {"a": [250] * 3, "b": [500] * 2, "never": []}
    assert log == [("a", None), ("b", "after 1"), ("a", None), ("b", "after 3"), ("a", None)]
    assert measure.milliseconds({}, {}, CPU) == {}


@pytest.fixture
def gpu(monkeypatch, log):
    """A GPU that logs; what is between two events takes 7 milliseconds."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = 7 * log.count("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    class Memory:
        def zero_(self):
            log.append("flush")

    def empty(size, dtype, device):
        assert (size, dtype, device) == (256 * 2**20, torch.int8, CUDA)
        return Memory()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"finished {device}"))


@pytest.mark.usefixtures("gpu")
def test_milliseconds_of_a_gpu(log):
    timed = Timed(lambda state: log.append(f"call after {state}"), lambda: log.append("before") or "it")
    assert measure.milliseconds({"a": timed}, {"a": 2}, CUDA) == {"a": [7.0, 7.0]}
    one = ["before", *["flush"] * measure.FLUSHES, "record", "call after it", "record", "synchronize"]
    assert log == one * 2


@pytest.mark.usefixtures("gpu")
def test_finished(log):
    measure.finished(CPU)
    assert log == []
    measure.finished(CUDA)
    assert log == ["finished cuda:0"]


# ---- memory ------------------------------------------------------------------------------------------

MIB = 2**20


def large():
    """64 MiB, which are given back at once."""
    torch.ones(64 * MIB, dtype=torch.int8)


kept = []


def small_ones():
    """64 MiB in pieces below one that stays, so that the C library does not give them back by itself."""
    pieces = [bytearray(32 * 1024) for _ in range(2048)]
    kept.append(pieces.pop())


@pytest.mark.skipif(not os.access(measure.CLEAR, os.W_OK), reason="no /proc/self/clear_refs")
def test_peak_memory():
    assert measure.peak_mib(lambda: None, CPU) < 8
    for call in (large, small_ones):
        for _ in range(2):  # the second time there is something to be given back
            assert 60 <= measure.peak_mib(call, CPU) <= 80, call.__name__
        assert measure.peak_mib(lambda: None, CPU) < 8
    there = torch.ones(64 * MIB, dtype=torch.int8)
    assert measure.peak_mib(lambda: None, CPU) < 8
    assert there.all()


@pytest.mark.parametrize("what", ["STATUS", "CLEAR"])
def test_no_peak_without_proc(monkeypatch, tmp_path, log, what):
    monkeypatch.setattr(measure, what, tmp_path / "proc" / "self")
    assert measure.peak_mib(lambda: log.append("called"), CPU) is None
    assert log == ["called"]


def test_the_peak_is_what_linux_tells(monkeypatch, tmp_path):
    status, clear = tmp_path / "status", tmp_path / "clear"
    monkeypatch.setattr(measure, "STATUS", status)
    monkeypatch.setattr(measure, "CLEAR", clear)
    for before, after, peak in (
        ("VmRSS:\t2048 kB", "VmHWM:\t    5120 kB\nVmRSS:\t1 kB", 3),
        ("XVmRSS:\t1 kB\nVmRSS:\t9000 kB", "VmHWM:\t5120 kB", 0),
        ("VmHWM:\t5120 kB", "VmHWM:\t5120 kB", None),
        ("VmRSS:\t2048 kB", "VmRSS:\t5120 kB", None),
    ):
        status.write_text(f"Name:\tpython\n{before}\nThreads:\t1\n")
        found = measure.peak_mib(lambda after=after: status.write_text(f"Name:\tpython\n{after}\n"), CPU)
        assert found == peak
        assert clear.read_text() == "5"


@pytest.mark.usefixtures("gpu")
def test_peak_memory_of_a_gpu(monkeypatch, log):
    mib = {"reset_peak_memory_stats": 0, "memory_allocated": 10, "max_memory_allocated": 25}
    for name, n in mib.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, n=n: (log.append(name), n * MIB)[1])
    assert measure.peak_mib(lambda: log.append("call"), CUDA) == 15
    before = ["finished cuda:0", "reset_peak_memory_stats", "memory_allocated"]
    assert log == [*before, "call", "finished cuda:0", "max_memory_allocated"]


# ---- where -------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Makes a program by its shell script; there are no others."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return make


@pytest.mark.usefixtures("program")
def test_an_environment_without_git(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "gpu_facts", lambda: pytest.fail("there is no GPU"))
    found = measure.environment()
    assert found["commit"] == ""
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert (found["cores"], found["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert found["date"] == datetime.date.today().isoformat()
    assert found["python"] == platform.python_version()
    assert found["cpu"]
    assert found["load_before"] >= 0


@pytest.mark.parametrize(
    "commit, changes, found",
    [("echo 1a2b3c4", "", "1a2b3c4"), ("echo 1a2b3c4", "echo ' M a'", "1a2b3c4+"), ("", "echo ' M a'", "")],
)
def test_the_commit(program, tmp_path, commit, changes, found):
    script = f'[ "$1" = rev-parse ] && {{ {commit or ":"}; exit; }}\n{changes}\npwd >{tmp_path}/where'
    program("git", script)
    assert measure.environment()["commit"] == found
    where = Path((tmp_path / "where").read_text().strip())
    assert where.samefile(Path(measure.__file__).parent.parent)


def test_an_installed_package_has_no_commit(program, tmp_path, monkeypatch):
    """It may lie in a tree that is someone else's."""
    program("git", "echo 1a2b3c4")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "site-packages" / "benchmarks" / "measure.py"))
    assert measure.environment()["commit"] == ""


@pytest.mark.usefixtures("program")
def test_a_machine_without_cpuinfo(monkeypatch):
    read = Path.read_text

    def refuse(self, *options, **more):
        if self == Path("/proc/cpuinfo"):
            raise FileNotFoundError(self)
        return read(self, *options, **more)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(platform, "processor", lambda: "a processor")
    assert measure.environment()["cpu"] == "a processor"


def test_versions_are_of_what_is_installed(monkeypatch, program):
    def version(package):
        if package != "natten":
            raise importlib.metadata.PackageNotFoundError(package)
        return "0.21.7"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = measure.environment()
    assert found["natten"] == "0.21.7"
    assert not {*measure.PACKAGES} - {"natten"} & {*found}


SMI = 'echo "580.159.04, 1980 MHz, 345 MHz, 700.00 W, 30, 143771 MiB"; echo "1, 2, 3, 4, 5, 6"'


def test_facts_of_a_gpu(program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    program("nvidia-smi", SMI)
    expected = {
        "driver_version": "580.159.04",
        "clocks.max.sm": "1980 MHz",
        "clocks.current.sm": "345 MHz",
        "power.limit": "700.00 W",
        "temperature.gpu": "30",
        "memory.total": "143771 MiB",
    }
    assert measure.gpu_facts() == expected
    found = measure.environment()
    assert found["device"] == "NVIDIA H200"
    assert expected.items() <= found.items()


def test_no_facts_of_a_gpu(program, monkeypatch):
    assert measure.gpu_facts() == {}  # without nvidia-smi
    program("nvidia-smi", "exit 9")
    assert measure.gpu_facts() == {}

    def hangs(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert measure.gpu_facts() == {}


def test_nvidia_smi_is_asked_and_nothing_set(program, tmp_path):
    program("nvidia-smi", f'echo "$@" >{tmp_path}/asked')
    measure.gpu_facts()
    words = (tmp_path / "asked").read_text().split()
    assert [word.partition("=")[0] for word in words] == ["--query-gpu", "--format"]

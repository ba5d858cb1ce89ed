"""What every benchmark shares: rows, interleaved timing, peak memory, and the environment of a result."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2
FLUSHES = 4  # as many as keep the GPU busy until the host has launched what is timed
PACKAGES = ("triton", "natten", "flash-attn-4", "nvidia-cutlass-dsl")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Row:
    """One figure: the median over ``runs``, the least and the greatest, and the bounds it is held against."""

    what: str
    median: float
    low: float
    high: float
    runs: int
    unit: str
    must: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Which bound the median meets."""
        if self.must is None or self.aim is None:
            return ""
        less_is_better = self.aim <= self.must
        for bound, word in ((self.aim, "aim"), (self.must, "must")):
            if self.median <= bound if less_is_better else self.median >= bound:
                return word
        return "MISSED"


def row(
    what: str,
    values: list[float],
    unit: str,
    must: float | None = None,
    aim: float | None = None,
    note: str = "",
) -> Row:
    """A row from repeated measurements."""
    return Row(what, statistics.median(values), min(values), max(values), len(values), unit, must, aim, note)


# ---- time --------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """The wall time of one call, on a GPU until its work is done."""
    start = time.perf_counter()
    call()
    if device is not None:
        finished(device)
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the calls in turn in every round, after one round that does not count."""
    out: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            took = seconds(call)
            if turn:
                out[name].append(took)
    return out


class Timed(NamedTuple):
    """What is timed, and what is done before every time, which is not."""

    call: Callable[[Any], Any]
    before: Callable[[], Any] = lambda: None


def milliseconds(
    calls: Mapping[str, Timed], rounds: Mapping[str, int], device: torch.device
) -> dict[str, list[float]]:
    """Of every call, the calls in turn in every round, each in as many rounds as it is given.

    On a GPU by events, the L2 cold and the GPU busy until the host has launched the call; so time of the host
    counts only where it exceeds that.
    """
    clock = _gpu_clock(device) if device.type == "cuda" else _wall_clock
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(rounds.values(), default=0)):
        for name, timed in calls.items():
            if turn < rounds[name]:
                taken[name].append(clock(timed))
    return taken


def _wall_clock(timed: Timed) -> float:
    state = timed.before()
    start = time.perf_counter()
    timed.call(state)
    return 1e3 * (time.perf_counter() - start)


def _gpu_clock(device: torch.device) -> Callable[[Timed], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(timed: Timed) -> float:
        state = timed.before()
        for _ in range(FLUSHES):
            flush.zero_()
        make: Callable[..., Any] = torch.cuda.Event
        start, end = (make(enable_timing=True) for _ in range(2))
        start.record()
        timed.call(state)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return clock


def finished(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times: dict[str, list[float]], over: str, under: str) -> list[float]:
    """The ratio of two calls round by round."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def fresh_process(code: str) -> list[float]:
    """The numbers that ``code`` prints in a fresh Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


# ---- memory ------------------------------------------------------------------------------------------


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call takes at its peak beyond what is there before; None where that cannot be read.

    On a GPU of torch's allocator; else of the process's resident pages.
    """
    finished(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        finished(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    before = _resident("VmRSS") if _reset() else None
    call()
    after = _resident("VmHWM")
    return None if before is None or after is None else max(after - before, 0.0)


def _reset() -> bool:
    """Give back what the C library kept of earlier calls, and make the peak what is resident now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        return True
    return False


def _resident(field: str) -> float | None:
    """MiB, as the kernel of Linux tells."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE):
            return int(found.group(1)) / 1024
    return None


# ---- where -------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, versions and date; of a GPU its driver, clocks and limits, too."""
    found = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    return found | dict(_versions()) | (gpu_facts() if found["device"] != "cpu" else {})


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()):
            return found.group(1)
    return platform.processor()


def _commit() -> str:
    """That of the source tree, with a + if it has changes; "" where there is none, or no git."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():  # installed, maybe inside a tree that is someone else's
        return ""
    with contextlib.suppress(FileNotFoundError):
        commit, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
        return commit.strip() + "+" * bool(commit and changes)
    return ""


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def gpu_facts() -> dict[str, Any]:
    """Driver, clocks and limits, as nvidia-smi reads them; nothing is set."""
    asked = "driver_version,clocks.max.sm,clocks.current.sm,power.limit,temperature.gpu,memory.total"
    words = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        said = [word.strip() for word in done.stdout.splitlines()[0].split(",")]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(asked.split(","), said, strict=False))

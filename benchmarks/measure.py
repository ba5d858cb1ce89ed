"""What every benchmark shares: rows, interleaved timing, and the environment a result was taken in."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


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


def seconds(call: Callable[[], Any]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the calls in turn in every round, after one round that does not count."""
    out: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            took = seconds(call)
            if turn:
                out[name].append(took)
    return out


def ratios(times: dict[str, list[float]], over: str, under: str) -> list[float]:
    """The ratio of two calls round by round."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def fresh_process(code: str) -> list[float]:
    """The numbers that ``code`` prints in a fresh Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def environment() -> dict[str, Any]:
    """Machine, versions and date."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())
        model = found.group(1) if found else ""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows with their verdicts, rounded to what the noise leaves."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(one).items()}
        | {"verdict": one.verdict}
        for one in rows
    ]

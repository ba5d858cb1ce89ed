"""Items in processes of their own, most telling first, until a budget of time is spent.

An item is a generator of rows (dataclasses). Its process prints every row as it comes, so what was measured
before a crash, a hang or Ctrl-C is kept; the results file is written after each item, and a later run goes on
where it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
TAIL = 6000  # characters of an item's output that are kept when it fails
DRAIN_S = 5.0  # for the rest of the output of a killed item, which a process that it detached may hold open
MARK = "benchmark row: "  # before every row that an item prints; anything else may stand around


class Item(NamedTuple):
    """A measurement, and the seconds it may take."""

    measure: Callable[[], Iterable[Any]]
    limit_s: float


class Outcome(NamedTuple):
    """How an item ended: "ok", "failed", "too late" or "no time left"; its rows; why it is not "ok"."""

    status: str
    seconds: float
    rows: list[dict[str, Any]]
    why: str = ""


class Job(NamedTuple):
    """Items by their limits in seconds, the command that runs one, and the file of their results, if any."""

    limits: Mapping[str, float]
    command: Callable[[str], list[str]]
    path: Path | None
    facts: Mapping[str, Any]


def suite(
    job: Job,
    budget_s: float,
    resume: bool,
    env: Mapping[str, str],
    begun: Callable[[str], None] = lambda name: None,
    ended: Callable[[str, Outcome], None] = lambda name, outcome: tell(name, outcome),
) -> dict[str, Any]:
    """Run items until the budget is spent; what is known of all of them then, results written after each."""
    known = read(job.path) if resume and job.path else {}
    end = time.monotonic() + budget_s
    for name, limit in job.limits.items():
        if known.get(name, {}).get("status") == "ok":
            print(f"{name}: there already", flush=True)
            continue
        begun(name)
        outcome = run(job.command(name), min(limit, end - time.monotonic()), limit, env)
        known[name] = outcome._asdict()
        if job.path:
            write(job.path, job.facts, known)
        ended(name, outcome)
    return known


def failures(known: Mapping[str, Any], names: Iterable[str]) -> int:
    """The exit code: whether some item that ran did not end well."""
    return int(any(known.get(name, {}).get("status") in ("failed", "too late") for name in names))


def run(words: list[str], left: float, limit: float, env: Mapping[str, str]) -> Outcome:
    """One item as a process; the rows that it printed count however it ends."""
    if left < min(limit, 20):
        return Outcome("no time left", 0.0, [], f"it may take {limit:.0f} s")
    start = time.monotonic()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            out, _ = child.communicate(timeout=left)
        except BaseException as error:  # Ctrl-C too: nothing is left running
            out = _killed(child)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            took = time.monotonic() - start
            return Outcome("too late", took, rows_in(out), f"after {left:.0f} s: {out[-TAIL:]}")
    took, rows = time.monotonic() - start, rows_in(out)
    if child.returncode or not rows:
        return Outcome("failed", took, rows, f"exit status {child.returncode}: {out[-TAIL:]}")
    return Outcome("ok", took, rows)


def _killed(child: subprocess.Popen[str]) -> str:
    """What it had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        return child.communicate(timeout=DRAIN_S)[0]
    except subprocess.TimeoutExpired as error:
        said = error.output or ""
        return said if isinstance(said, str) else said.decode(errors="replace")


# ---- rows, on their way and in files -----------------------------------------------------------------


def emit(rows: Iterable[Any]) -> None:
    """What the process of an item does: print its rows as they come."""
    for one in rows:
        sys.stdout.write(f"\n{MARK}{json.dumps(as_json(one))}\n")
        sys.stdout.flush()


def rows_in(out: str) -> list[dict[str, Any]]:
    """The rows in an item's output; what is cut off, or behind them in a line, is left out."""
    rows = []
    for text in out.split(MARK)[1:]:
        with contextlib.suppress(ValueError):
            rows.append(json.JSONDecoder().raw_decode(text)[0])
    return rows


def as_json(row: Any) -> dict[str, Any]:
    """A row with its verdict, if it has one; without what is None; rounded to what the noise leaves."""
    fields = asdict(row) | ({"verdict": row.verdict} if hasattr(row, "verdict") else {})
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in fields.items()
        if value is not None
    }


def tell(name: str, outcome: Outcome) -> None:
    """An outcome as lines of text."""
    print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
    for one in outcome.rows:
        if "what" in one:
            print(f"    {one['what']}: {one['median']:.4g} {one['unit']} {one['note']}", flush=True)
        else:
            print(f"    {', '.join(f'{key} {value}' for key, value in one.items())}", flush=True)


def read(path: Path) -> dict[str, Any]:
    """The items of a results file; none if it is damaged or not there."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())["items"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return known


def write(path: Path, facts: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """A results file, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": facts, "items": known}, indent=1) + "\n")
    part.replace(path)


def folder(facts: Mapping[str, Any]) -> str:
    """The name of a device's folder of results."""
    device = facts.get("device", "cpu")
    name = device if device != "cpu" else f"{facts.get('cpu')} {facts.get('cores')} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def duration(text: str) -> float:
    """Seconds of "90s", "8m" or "480"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a time such as 90s or 8m is needed: got {text!r}")
    return float(found.group(1)) * {"s": 1, "m": 60, "h": 3600, None: 1}[found.group(2)]

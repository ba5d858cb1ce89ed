"""Run benchmarks and write what they measured: ``python -m benchmarks.run [NAME ...] [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.measure import Row, as_json, environment

NAMES = ("compile_time", "cpu_attention", "dispatch_cost", "joint_masks", "planning")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(NAMES)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs, nothing that takes minutes, no file"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown benchmark {sorted(unknown)}; choose from {', '.join(NAMES)}")
    for name in options.names or NAMES:
        found = environment()
        rows = _measured(name, options.quick)
        Console().print(_table(name, rows))
        if not options.quick:
            _write(options.out, name, found, rows)


def _measured(name: str, quick: bool) -> list[Row]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    rows = []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(name)
        for one in importlib.import_module(f"benchmarks.{name}").measure(quick):
            rows.append(one)
            progress.update(task, description=f"{name}: {one.what}")
    return rows


def _table(name: str, rows: list[Row]) -> Table:
    table = Table("what", "median", "range", "must", "aim", "meets", "note", title=name)
    for one in rows:
        bounds = ["" if bound is None else f"{bound:g}" for bound in (one.must, one.aim)]
        spread = f"{one.low:.4g} .. {one.high:.4g}"
        table.add_row(one.what, f"{one.median:.4g} {one.unit}", spread, *bounds, one.verdict, one.note)
    return table


def _write(out: Path, name: str, found: dict[str, object], rows: list[Row]) -> None:
    machine = re.sub(r"[^a-z0-9]+", "-", f"{found['cpu']} {found['cores']} cores".lower()).strip("-")
    path = out / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": found, "rows": as_json(rows)}, indent=1) + "\n")
    Console().print(f"wrote {path}")


if __name__ == "__main__":
    main()

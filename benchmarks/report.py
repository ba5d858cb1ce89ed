"""What an item measured, as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .engine import Outcome

WIDTH = 118  # where output is no terminal rich assumes 80, and cuts figures off
WHY = 160  # characters of a reason; the file has it whole
COLUMNS = {  # of a timing: title, field, format
    "ms": "{ms:.4g}",
    "range": "{low:.3g} .. {high:.3g}",
    "mask ms": "{mask_ms:.3g}",
    "first s": "{first_s:.3g}",
    "MiB": "{peak_mib:.0f}",
    "error": "{error:.2f}",
    "speed-up": "{speedup:.2f}",
    "achieved": "{achievable:.2f}",
    "predicted": "{predicted_ms:.3g} ({wrong:+.0%})",
}


def console() -> Console:
    """One that is wide enough for the tables."""
    return Console(width=max(Console().width, WIDTH))


def tell(console: Console, name: str, outcome: Outcome) -> None:
    """An outcome: its tables, and why it did not end well."""
    console.print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s", markup=False)
    timings = [row for row in outcome.rows if "provider" in row]
    for direction in dict.fromkeys(row["direction"] for row in timings):
        console.print(comparison([row for row in timings if row["direction"] == direction], direction))
    for line in reasons(timings):
        console.print(line, highlight=False, markup=False, overflow="fold")
    if figures := [row for row in outcome.rows if "what" in row]:
        console.print(generic(figures))
    for point in (row for row in outcome.rows if "subject" in row):
        console.print(", ".join(f"{key} {value}" for key, value in point.items()), markup=False)
    if outcome.status != "ok":
        console.print(outcome.why[-2000:], markup=False)


def comparison(timings: list[dict[str, Any]], direction: str) -> Table:
    """One problem by all providers, in one direction."""
    table = _table(direction, *COLUMNS)
    for row in timings:
        if "why" not in row:
            table.add_row(row["provider"], *(_cell(form, row) for form in COLUMNS.values()))
    return table


def reasons(timings: list[dict[str, Any]]) -> list[str]:
    """Why providers do not run, once for all directions with one reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in timings:
        if "why" in row:
            found.setdefault((row["provider"], row["why"][:WHY]), []).append(row["direction"])
    return [f"{who} does not run ({', '.join(which)}): {why}" for (who, why), which in found.items()]


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name != "note")
    return table


def _cell(form: str, row: dict[str, Any]) -> str:
    """A figure, or nothing where it was not measured."""
    if "predicted_ms" in row:
        row = row | {"wrong": row["predicted_ms"] / row["ms"] - 1}
    try:
        return form.format_map(row)
    except KeyError:
        return ""


def generic(rows: list[dict[str, Any]]) -> Table:
    """Figures with their bounds."""
    table = _table("what", "median", "range", "must", "aim", "meets", "note")
    for row in rows:
        bounds = [f"{row[bound]:g}" if row.get(bound) is not None else "" for bound in ("must", "aim")]
        spread = f"{row['low']:.4g} .. {row['high']:.4g}"
        verdict, note = row.get("verdict", ""), row.get("note", "")
        table.add_row(row["what"], f"{row['median']:.4g} {row['unit']}", spread, *bounds, verdict, note)
    return table

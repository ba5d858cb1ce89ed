"""The README's tables, from results files and the planner: ``python -m benchmarks.tables`` writes them anew.

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end -->``; a test fails when the
README says something else than the files.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gnaflex.paper import CONFIGURATIONS

from .engine import RESULTS
from .results import Results, load

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
CALLS = ("first call", "later calls")


def main(words: list[str] | None = None) -> int:
    """Write the tables, or with --check say which are stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="only say which tables are stale")
    options = parser.parse_args(words)
    text = README.read_text()
    stale = [name for name, old, new in blocks(text) if old != new]
    if stale and not options.check:
        README.write_text(BLOCK.sub(lambda found: found[1] + table(found[2]), text))
    print(f"stale: {', '.join(stale)}" if stale else "every table is what the results say")
    return int(bool(stale) and options.check)


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Every table of a text: its name, what stands there, and what should."""
    for found in BLOCK.finditer(text):
        yield found[2], found[0].removeprefix(found[1]), table(found[2])


def table(name: str) -> str:
    """A table by its name, as markdown; "backends of amd-epyc-2-cores" is of that folder of results."""
    kind, _, folder = name.partition(" of ")
    return TABLES[kind](RESULTS / folder if folder else RESULTS)


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles, *lines = (f"| {' | '.join(line)} |\n" for line in (header, *rows))
    return titles + f"|{'---|' * titles.count(' |')}\n" + "".join(lines)


# ---- masks -------------------------------------------------------------------------------------------


def _masks(folder: Path) -> str:
    """First and later calls of block_mask."""
    found = load(folder / "compile_time.json").figures
    first, later = ": first call in a process", ": later calls"
    rows = [
        (what.removesuffix(first), _ms(found[what]), _ms(found[what.removesuffix(first) + later]))
        for what in found
        if what.endswith(first)
    ]
    return _markdown(("mask", "first call in a process", "later calls"), rows)


def _joint_masks(folder: Path) -> str:
    """The same with text tokens beside without."""
    found = load(folder / "joint_masks.json").figures
    rows = []
    for what in found:
        if match := re.fullmatch(r"(.*), ((?:prefix|suffix)=\d+): first call", what):
            mask, extra = match.groups()
            pairs = [
                ", ".join(_number(found[f"{mask}, {text}: {call}"]) for text in ("without text", extra))
                + " ms"
                for call in CALLS
            ]
            rows.append((f"{mask}, `{extra}`", *pairs))
    calls = (f"{call}: without, with" for call in ("first call", "later calls"))
    return _markdown(("mask, and its text tokens", *calls), rows)


def _ms(row: dict[str, Any]) -> str:
    return f"{_number(row)} ms"


def _number(row: dict[str, Any]) -> str:
    return f"{row['median']:.1f}"


# ---- the paper ---------------------------------------------------------------------------------------


def _paper(folder: Path) -> str:
    """The paper's table beside exact counts."""
    counted = "model", "window", "stride", "FLOPs", "worst tile", "mean tile", "block-sparse", "whole model"
    header = (*counted, "paper, simulated", "estimated", "paper, B200")
    return _markdown(header, map(_configuration, CONFIGURATIONS))


def _configuration(row: Any) -> list[str]:
    plan, printed = row.plan, row.all_steps
    counted = (plan.flop_speedup, plan.tile_speedup_worst, plan.tile_speedup_mean)
    models = row.simulated(), printed and printed.simulated, row.estimated(), printed and printed.measured
    return [
        row.model.name,
        *("x".join(map(str, extents)) for extents in (row.window, row.stride)),
        *(f"{one:.2f}" for one in counted),
        "yes" if plan.is_block_sparse else "",
        *("" if one is None else f"{one:.2f}" for one in models),
    ]


# ---- backends ----------------------------------------------------------------------------------------


def _backends(folder: Path) -> str:
    """Forward, problem by problem: how far each provider gets."""
    found = load(folder / "backends.json")
    forward = [row for row in found.timings if row["direction"] == "forward"]
    able = [name for name in dict.fromkeys(row["provider"] for row in forward) if _ran(forward, name)]
    sparse = [name for name in able if not name.startswith("dense")]
    header = ("problem", "tokens", "possible", "best dense", *(_title(name) for name in sparse))
    rows = [_problem(facts, forward, sparse) for facts in found.facts.values()]
    return _markdown(header, [row for row in rows if row]) + _not_run(forward, able)


def _not_run(forward: list[dict[str, Any]], able: list[str]) -> str:
    """Who ran nothing, and the first reason."""
    reasons = {row["provider"]: row["why"] for row in reversed(forward) if row["provider"] not in able}
    lines = (f"{_title(name)}: {_short_reason(reasons[name])}" for name in sorted(reasons))
    return f"\nNot run there: {'; '.join(lines)}.\n" if reasons else ""


def _short_reason(why: str) -> str:
    """The first of several, without the name of an error."""
    return re.sub(r"^\w+Error: ", "", re.split(r"[.;] ", why)[0])


def _ran(timings: list[dict[str, Any]], name: str) -> bool:
    return any(row["provider"] == name and "ms" in row for row in timings)


def _title(provider: str) -> str:
    return re.sub(r'"(\w+)"', r'`"\1"`', provider)


def _problem(facts: dict[str, Any], forward: list[dict[str, Any]], providers: list[str]) -> list[str]:
    mine = {row["provider"]: row for row in forward if row["problem"] == facts["problem"] and "ms" in row}
    dense = min((row["ms"] for name, row in mine.items() if name.startswith("dense")), default=None)
    if dense is None:
        return []
    name = f"{facts['problem']}{' (block-sparse)' if facts['block_sparse'] else ''}"
    cells = [_speed(mine.get(provider)) for provider in providers]
    best = max((at for at in range(len(cells)) if cells[at]), key=lambda at: _speedup(mine, providers[at]))
    cells[best] = f"**{cells[best]}**"
    return [name, f"{facts['tokens']:,}", f"{facts['work_speedup']:.2f}", f"{_short(dense)} ms", *cells]


def _speedup(mine: dict[str, dict[str, Any]], provider: str) -> float:
    return float(mine[provider].get("speedup", 0))


def _speed(row: dict[str, Any] | None) -> str:
    """The speed-up, and the share of what is possible."""
    if row is None:
        return ""
    return f"{row['speedup']:.2f} ({row['achievable']:.0%})".replace("%", " %")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _costs(folder: Path) -> str:
    """What a call costs beside its time: medians over the problems."""
    found = load(folder / "backends.json")
    forward = [row for row in found.timings if row["direction"] == "forward" and "ms" in row]
    names = dict.fromkeys(row["provider"] for row in forward)
    fields = {"first call, s": "first_s", "mask, ms": "mask_ms", "call, MiB": "peak_mib", "error": "error"}
    rows = []
    for name in names:
        mine = [row for row in forward if row["provider"] == name]
        wrong = [row["predicted_ms"] / row["ms"] - 1 for row in mine if "predicted_ms" in row]
        prediction = f"{statistics.median(wrong):+.0%}".replace("%", " %") if wrong else ""
        rows.append([_title(name), *(_median(mine, field) for field in fields.values()), prediction])
    return _markdown(("median of all problems", *fields, "planner's prediction"), rows)


def _median(rows: list[dict[str, Any]], field: str) -> str:
    values = [row[field] for row in rows if field in row]
    return f"{statistics.median(values):.2g}" if values else ""


def _growth(folder: Path) -> str:
    """How far each subject goes, and its exponents."""
    from .growth import exponent

    found: Results = load(folder / "growth.json")
    rows = []
    for subject in dict.fromkeys(point["subject"] for point in found.points):
        mine = [point for point in found.points if point["subject"] == subject and "ms" in point]
        if mine:
            powers = (exponent(mine, field) for field in ("ms", "peak_mib"))
            figures = ("" if power is None else f"{power:.2f}" for power in powers)
            rows.append([_title(subject), f"{mine[-1]['tokens']:,}", _short(mine[-1]["ms"]), *figures])
    return _markdown(("", "most tokens", "ms there", "time grows as tokens to the", "memory to the"), rows)


def _models(folder: Path) -> str:
    """Steps of whole models, dense and sparse."""
    found: dict[str, dict[str, str]] = {}
    for what, row in load(folder / "models.json").figures.items():
        model, _, way = what.partition(": ")
        found.setdefault(model, {})[way] = f"{_short(row['median'])} ms"
    ways = list(dict.fromkeys(way for mine in found.values() for way in mine))
    rows = [(model, *(mine.get(way, "") for way in ways)) for model, mine in found.items()]
    return _markdown(("a step of", *ways), rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "masks": _masks,
    "masks with text": _joint_masks,
    "paper": _paper,
    "backends": _backends,
    "costs": _costs,
    "growth": _growth,
    "models": _models,
}

if __name__ == "__main__":
    sys.exit(main())

"""Measure and write what was measured: ``python -m benchmarks.run``, or ``gnaflex bench``.

The part "backends", the default, takes every problem by every provider: its full set on a GPU, the small
likenesses on a CPU (ten minutes on two cores). Problems come most telling first, each in a process of its
own, within --budget; the results file is written after each, and --resume goes on where it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engine

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent


class Refused(Exception):
    """Words that make no sense here, and what to write instead."""


def main(words: list[str] | None = None) -> int:
    """Parse and run; the exit code says whether every item that ran went well, 2 that the words are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    try:
        return run(parser.parse_args(words))
    except Refused as why:
        print(f"not run: {why}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    from .parts import PARTS
    from .problems import SETS

    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, all; backends by default"
    )
    parser.add_argument("--set", choices=list(SETS), help="problems (default full on a GPU, else small)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these items alone; --list shows them")
    parser.add_argument("--budget", type=engine.duration, help="for a part: 90s, 8m (default 10m, full 1h)")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="then print what moved since that file")
    parser.add_argument("--out", type=Path, help="folder of results; the quick set writes only if given")
    parser.add_argument("--list", action="store_true", help="list the items and what each may take")
    parser.add_argument("--item", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Do what the words say."""
    from .parts import PARTS, items

    device = _device()
    which = options.set or ("full" if device.type == "cuda" else "small")
    parts = list(PARTS) if options.parts == ["all"] else options.parts or ["backends"]
    if unknown := [part for part in parts if part not in PARTS]:
        raise Refused(f"unknown part {unknown[0]!r}. Write one of {', '.join(PARTS)}, or all.")
    if options.compare and not engine.read(options.compare):
        raise Refused(
            f"--compare {options.compare} is no results file. Write the path of an earlier backends.json."
        )
    if options.item:
        engine.emit(items(parts[0], which, device)[options.item].measure())
        return 0
    limits = {part: _limits(part, items(part, which, device), options.only) for part in parts}
    if options.list:
        for part, mine in limits.items():
            print(*(f"{part}: {name} (at most {limit:.0f} s)" for name, limit in mine.items()), sep="\n")
        return 0
    return max(_part(part, which, mine, options) for part, mine in limits.items())


def _limits(part: str, items: dict[str, engine.Item], only: list[str] | None) -> dict[str, float]:
    """Seconds that each item may take, of those that are wanted."""
    if unknown := sorted(set(only or ()) - set(items)):
        raise Refused(f"{part} has no item {unknown[0]!r}. Add --list to see them.")
    return {name: one.limit_s for name, one in items.items() if name in (only or items)}


def _part(part: str, which: str, limits: dict[str, float], options: argparse.Namespace) -> int:
    from . import changes
    from .measure import environment
    from .parts import budget_s

    old = engine.read(options.compare) if options.compare else {}  # before it is overwritten
    facts = {**environment(), "set": which}
    path = _path(part, which, facts, options.out)
    job = engine.Job(limits, lambda name: _command(part, which, name), path, facts)
    with tempfile.TemporaryDirectory(prefix="gnaflex-bench") as compiled, _progress(part, limits) as listener:
        env = dict(os.environ, PYTHONUNBUFFERED="1", TORCHINDUCTOR_CACHE_DIR=compiled)
        known = engine.suite(job, options.budget or budget_s(part, which), options.resume, env, *listener)
    if path:
        print(f"wrote {path}")
    if options.compare:
        changes.tell(changes.moved(old, known), changes.shared(old, known))
    return engine.failures(known, limits)


def _command(part: str, which: str, name: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.run", part, "--set", which, "--item", name]


def _path(part: str, which: str, facts: dict[str, Any], out: Path | None) -> Path | None:
    """The results file; the set is in its name where it is not that of the device."""
    if which == "quick" and out is None:
        return None
    is_clone = (HERE.parent / "pyproject.toml").is_file()
    folder = (out or (engine.RESULTS if is_clone else Path("gnaflex-results"))) / engine.folder(facts)
    usual = "small" if facts["device"] == "cpu" else "full"
    return folder / f"{part}{'' if which == usual else f'-{which}'}.json"


def _device() -> torch.device:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def _progress(part: str, limits: dict[str, float]) -> Iterator[tuple[Any, ...]]:
    """What to call before and after every item: a bar and tables where there is rich, else lines."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield ()
        return
    from . import report

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=report.console(), transient=True) as progress:
        task = progress.add_task(part, total=len(limits))

        def begun(name: str) -> None:
            progress.update(task, description=f"{part}: {name}")

        def ended(name: str, outcome: engine.Outcome) -> None:
            progress.advance(task)
            report.tell(progress.console, name, outcome)

        yield begun, ended


if __name__ == "__main__":
    sys.exit(main())

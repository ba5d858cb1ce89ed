"""What there is to know from a GPU, most telling first, within minutes.

    python -m benchmarks.gpu_suite --prepare FOLDER --arch sm_90a   # where CuTe DSL is: link the kernels
    python -m benchmarks.gpu_suite --kernels FOLDER --budget 8m --resume      # where the GPU is

Both from the root of the repository, which need not be installed; without --kernels the kernels are compiled
there. Every item is a process with a time limit of its own; the results file is written after each, and
--resume goes on where it ends.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gnaflex.cuda_backend.config import ARCHITECTURES
from gnaflex.cuda_backend.gate import linked_name

from benchmarks import gpu_items
from benchmarks.measure import Row, environment

RESULTS = Path(__file__).parent / "results"
TAIL = 6000  # characters of an item's output that are kept when it fails
DRAIN_S = 5.0  # for the rest of the output of a killed item, which a process that it detached may hold open
MARK = "gpu_suite row: "  # before every row that an item prints; anything else may stand around


class Outcome(NamedTuple):
    """How an item ended: "ok", "failed", "too late" or "no time left"; its rows; why it is not "ok"."""

    status: str
    seconds: float
    rows: list[dict[str, Any]]
    why: str = ""


def main(words: list[str] | None = None) -> int:
    """Parse and run; the exit code says whether every item that ran went well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="link the kernels of the suite, no GPU"
    )
    archs = "what GPUs --prepare is for (default that of this machine, else sm_90a)"
    parser.add_argument("--arch", choices=ARCHITECTURES, default=gpu_items.ARCH, help=archs)
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="take kernels that were linked there")
    parser.add_argument("--budget", type=duration, default=480.0, help="for all items: 90s, 8m (default)")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has")
    parser.add_argument("--only", nargs="+", choices=list(gpu_items.ITEMS), help="these items alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--item", choices=list(gpu_items.ITEMS), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.prepare:
        return _prepare(options.prepare, options.arch)
    if options.item:
        return _one(options.item)
    import torch

    if not torch.cuda.is_available():
        print("not run: this machine has no CUDA GPU. --prepare FOLDER links the kernels for one that has.")
        return 1
    if options.kernels and (missing := _missing(options.kernels)):
        print(f"not run: {options.kernels} lacks {', '.join(missing)}. --prepare FOLDER links them.")
        return 1
    return suite(options, options.only or list(gpu_items.ITEMS))


def duration(text: str) -> float:
    """Seconds of "90s", "8m" or "480"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a time such as 90s or 8m is needed: got {text!r}")
    return float(found.group(1)) * {"s": 1, "m": 60, "h": 3600, None: 1}[found.group(2)]


def suite(options: argparse.Namespace, names: list[str]) -> int:
    """Run items until the budget is spent; results are written after each."""
    found = _machine() | gpu_facts()
    path = options.out / _slug(found["device"]) / "gpu_suite.json"
    known = _read(path) if options.resume else {}
    end = time.monotonic() + options.budget
    env = dict(os.environ, GNAFLEX_PROOF="trust", PYTHONUNBUFFERED="1")  # so that rows come at once
    if options.kernels:
        env["GNAFLEX_KERNELS"] = str(options.kernels.resolve())
    for name in names:
        if known.get(name, {}).get("status") == "ok":
            print(f"{name}: there already", flush=True)
            continue
        limit = gpu_items.ITEMS[name].limit_s
        words = [sys.executable, "-m", "benchmarks.gpu_suite", "--item", name]
        outcome = run(words, min(limit, end - time.monotonic()), limit, env)
        known[name] = outcome._asdict()
        _write(path, found, known)
        print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
        for one in outcome.rows:
            print(f"    {one['what']}: {one['median']:.4g} {one['unit']} {one['note']}", flush=True)
    return int(any(known.get(name, {}).get("status") in ("failed", "too late") for name in names))


def run(words: list[str], left: float, limit: float, env: dict[str, str]) -> Outcome:
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
            return Outcome("too late", took, _rows(out), f"after {left:.0f} s: {out[-TAIL:]}")
    took, rows = time.monotonic() - start, _rows(out)
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


def _rows(out: str) -> list[dict[str, Any]]:
    """The rows in an item's output; what is cut off, or behind them in a line, is left out."""
    rows = []
    for text in out.split(MARK)[1:]:
        with contextlib.suppress(ValueError):
            rows.append(json.JSONDecoder().raw_decode(text)[0])
    return rows


def _one(name: str) -> int:
    for one in gpu_items.ITEMS[name].measure():
        sys.stdout.write(f"\n{MARK}{json.dumps(_row(one))}\n")
    return 0


def _row(one: Row) -> dict[str, Any]:
    return asdict(one) | {"verdict": one.verdict}


def _prepare(folder: Path, arch: str) -> int:
    from gnaflex.cuda_backend.cache import get
    from gnaflex.cuda_backend.compile import to_object, to_shared

    folder.mkdir(parents=True, exist_ok=True)
    for config in gpu_items.configs(arch):
        path = folder / linked_name(config)
        to_shared(get(config, to_object), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    return 0


def _machine() -> dict[str, Any]:
    import torch

    try:
        return environment()
    except FileNotFoundError:  # it asks git, which is not everywhere
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}


def _missing(folder: Path) -> list[str]:
    names = [linked_name(config) for config in gpu_items.configs()]
    return [name for name in names if not (folder / name).is_file()]


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


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _read(path: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(path.read_text())["items"]
    except (OSError, ValueError, KeyError):
        return {}
    return known


def _write(path: Path, found: dict[str, Any], known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": found, "items": known}, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())

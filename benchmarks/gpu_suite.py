"""What there is to know from a GPU, most telling first, within minutes.

    python -m benchmarks.gpu_suite --prepare FOLDER --arch sm_90a   # where CuTe DSL is: link the kernels
    python -m benchmarks.gpu_suite --kernels FOLDER --budget 8m --resume      # where the GPU is

Both from the root of the repository, which need not be installed; without --kernels the kernels are compiled
there. Every item is a process with a time limit of its own; the results file is written after each, and
--resume goes on where it ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gnaflex.cuda_backend.config import ARCHITECTURES
from gnaflex.cuda_backend.gate import linked_name

from . import engine, gpu_items
from .measure import environment


def main(words: list[str] | None = None) -> int:
    """Parse and run; the exit code says whether every item that ran went well."""
    options = _parser().parse_args(words)
    if options.prepare:
        return _prepare(options.prepare, options.arch)
    if options.item:
        engine.emit(gpu_items.ITEMS[options.item].measure())
        return 0
    import torch

    if not torch.cuda.is_available():
        print("not run: this machine has no CUDA GPU. --prepare FOLDER links the kernels for one that has.")
        return 1
    if options.kernels and (missing := _missing(options.kernels)):
        print(f"not run: {options.kernels} lacks {', '.join(missing)}. --prepare FOLDER links them.")
        return 1
    return suite(options, options.only or list(gpu_items.ITEMS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.gpu_suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="link the kernels of the suite, no GPU"
    )
    archs = "what GPUs --prepare is for (default that of this machine, else sm_90a)"
    parser.add_argument("--arch", choices=ARCHITECTURES, default=gpu_items.ARCH, help=archs)
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="take kernels that were linked there")
    budget = "for all items: 90s, 8m (default)"
    parser.add_argument("--budget", type=engine.duration, default=480.0, help=budget)
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has")
    parser.add_argument("--only", nargs="+", choices=list(gpu_items.ITEMS), help="these items alone")
    parser.add_argument("--out", type=Path, default=engine.RESULTS, help="folder of results")
    parser.add_argument("--item", choices=list(gpu_items.ITEMS), help=argparse.SUPPRESS)
    return parser


def suite(options: argparse.Namespace, names: list[str]) -> int:
    """Run items until the budget is spent; results are written after each."""
    facts = environment()
    env = dict(os.environ, GNAFLEX_PROOF="trust", PYTHONUNBUFFERED="1")  # so that rows come at once
    if options.kernels:
        env["GNAFLEX_KERNELS"] = str(options.kernels.resolve())
    limits = {name: gpu_items.ITEMS[name].limit_s for name in names}
    path = options.out / engine.folder(facts) / "gpu_suite.json"
    known = engine.suite(engine.Job(limits, _command, path, facts), options.budget, options.resume, env)
    return engine.failures(known, names)


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.gpu_suite", "--item", name]


def _prepare(folder: Path, arch: str) -> int:
    from gnaflex.cuda_backend.cache import get
    from gnaflex.cuda_backend.compile import to_object, to_shared

    folder.mkdir(parents=True, exist_ok=True)
    for config in gpu_items.configs(arch):
        path = folder / linked_name(config)
        to_shared(get(config, to_object), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    return 0


def _missing(folder: Path) -> list[str]:
    names = [linked_name(config) for config in gpu_items.configs()]
    return [name for name in names if not (folder / name).is_file()]


if __name__ == "__main__":
    sys.exit(main())

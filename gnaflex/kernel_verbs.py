"""The verbs about kernels: compile them into the cache ahead of time, and the doctor's table."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gnaflex.plan_verbs import by
from gnaflex.spec import GNA, GNAError
from gnaflex.words import USAGE, CommandError, Verb, add_form, extents, problem

if TYPE_CHECKING:
    import torch

TEXTS = ("prefix", "suffix", "extra_kv")
# What leaves a word out means; a command that is suggested leaves it out too.
OF_GRID: dict[str, Any] = {"window": None, "stride": 1, "dilation": 1, "causal": ()}
OF_KERNEL: dict[str, Any] = dict.fromkeys(TEXTS, 0)
OF_KERNEL |= {"arch": "sm_90a", "head_dim": (128,), "dtype": "bfloat16"}


# ---- gnaflex compile ---------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def head_dims(text: str) -> tuple[int, ...]:
    """``"64,128"`` as a tuple."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128, or 64,128")
    return tuple(map(int, text.split(",")))


def _compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape",
        metavar="SHAPE",
        nargs="?",
        type=extents,
        help="tokens per axis, like 30x48x80 (default all problems of the paper)",
    )
    parser.add_argument("--window", type=extents, help="keys per axis, -1: all, as in --window=-1x8")
    parser.add_argument("--stride", type=extents, default=1, help="queries that share a window (default 1)")
    add_form(parser)
    for name, where in zip(TEXTS, ("before the grid", "behind it", "that are keys alone"), strict=True):
        words = f"extra tokens {where} (default 0)"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=count, default=0, help=words)
    archs = "sm_90a: Hopper (default); sm_100a, sm_103a: Blackwell"
    parser.add_argument("--arch", default="sm_90a", help=archs)
    parser.add_argument(
        "--head-dim", action="extend", type=head_dims, help="64, 128, or 64,128; repeatable (default 128)"
    )
    dtypes = ("bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="of tensors (default bfloat16)")


def _compile(options: argparse.Namespace) -> None:
    options.head_dim = tuple(options.head_dim or OF_KERNEL["head_dim"])
    configs = _configs(options)
    from gnaflex import doctor
    from gnaflex.cuda_backend import cache

    if why := _cache_obstacle():
        raise CommandError(why)
    for config in configs:
        start = time.perf_counter()
        word, size = doctor.made(config)
        print(f"{config.name}  {word}  {time.perf_counter() - start:.1f} s  {size:,} bytes", flush=True)
        if cache.stored(config) is None:
            raise CommandError(f"the kernel could not be kept in {cache.folder()}.")
    print(cache.folder())


def _configs(options: argparse.Namespace) -> list[Any]:
    """The kernels that are asked for, each once."""
    import torch

    from gnaflex.cuda_backend.config import ARCHITECTURES, HEAD_DIMS, obstacles
    from gnaflex.cuda_backend.fast_path import Problem

    for word, given, known in (
        ("arch", (options.arch,), ARCHITECTURES),
        ("head-dim", options.head_dim, HEAD_DIMS),
    ):
        if wrong := [one for one in given if one not in known]:
            raise GNAError(
                f"--{word} must be {' or '.join(map(str, known))}: got {wrong[0]}. Use --{word} {known[0]}."
            )
    texts = {name: getattr(options, name) for name in TEXTS}
    problems = [Problem(spec, **texts) for spec in _specs(options)]
    found = [
        each.config(options.arch, getattr(torch, options.dtype), head_dim)
        for each in problems
        if each.boxes_for(options.arch) is not None
        for head_dim in options.head_dim
    ]
    if why := [reason for config in found for reason in obstacles(config)]:
        raise GNAError(f"no kernel can be compiled for this: {why[0]}.")
    return list(dict.fromkeys(found))


def _specs(options: argparse.Namespace) -> list[GNA]:
    """The problem, which must have boxes, or those of the paper."""
    if options.shape is None:
        for name, default in OF_GRID.items():
            if getattr(options, name) != default:
                raise CommandError(f"--{name} needs a SHAPE: gnaflex compile SHAPE --{name} ...", USAGE)
        from gnaflex.paper import CONFIGURATIONS

        return [GNA(row.model.shape, row.window, row.stride) for row in CONFIGURATIONS]
    if options.window is None:
        raise CommandError("SHAPE needs a window: add --window.", USAGE)
    spec = problem(options)
    _require_boxes(spec, options)
    return [spec]


def _require_boxes(spec: GNA, options: argparse.Namespace) -> None:
    from gnaflex.cuda_backend import nearest
    from gnaflex.cuda_backend.detection import not_block_sparse
    from gnaflex.cuda_backend.fast_path import Problem

    if Problem(spec).boxes is not None:
        return
    other = nearest(spec)
    remedy = "No other strides change that." if other is None else f"Nearest: {_command(other, options)}"
    raise CommandError(f"{not_block_sparse(spec)}.\n  {remedy}")


def _command(spec: GNA, options: argparse.Namespace) -> str:
    """The words that compile another problem in the same way."""
    words = ["gnaflex compile", by(spec.shape), "--window", by(spec.window), "--stride", by(spec.stride)]
    if max(spec.dilation) > 1:
        words += ["--dilation", by(spec.dilation)]
    if any(spec.is_causal):
        words += ["--causal", ",".join(str(axis) for axis, flag in enumerate(spec.is_causal) if flag)]
    for name, default in OF_KERNEL.items():
        if (value := getattr(options, name)) != default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return " ".join(words)


# ---- gnaflex doctor ----------------------------------------------------------------------------------


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few checks of each kind (about 20 seconds)")
    parser.add_argument("--again", action="store_true", help="prove kernels anew, whatever is on record")
    parser.add_argument("--device", help="cpu, cuda:1, ... (default cuda:0 if there is one, else cpu)")


def _doctor(options: argparse.Namespace) -> None:
    from gnaflex import doctor

    device = _device(options.device)
    for fact in _facts(device):
        print(f"- {_markdown(fact)}")
    print("\n| check | result | detail | s |\n|---|---|---|---|", flush=True)
    results: Counter[str] = Counter()
    checks = doctor.checks(device, quick=options.quick, again=options.again)
    for name, result, detail, seconds in doctor.rows(checks):
        cells = name, result, _markdown(_without_paths(detail)), f"{seconds:.1f}"
        print("|", " | ".join(cells), "|", flush=True)
        results[result] += 1
    print("\n" + ", ".join(f"{results[name]} {name}" for name in doctor.RESULTS), flush=True)
    if failed := results[doctor.FAILED]:
        raise CommandError(f"{failed} of {results.total()} checks failed.")


def _device(name: str | None) -> torch.device:
    import torch

    device = name or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=device).device  # with its number, as a kernel's proof wants it
    except (RuntimeError, AssertionError) as error:
        raise GNAError(f"there is no device {name!r} here. Write --device cpu.") from error


def _markdown(text: str) -> str:
    """A text as a cell of a table: one line, nothing in it taken for a cell's end or a tag."""
    return re.sub(r"([\\|<])", r"\\\1", " ".join(text.split()))


# ---- the machine -------------------------------------------------------------------------------------


def _facts(device: torch.device) -> Iterator[str]:
    """What a bug report should say of a machine, a line each."""
    import torch

    from gnaflex.cuda_backend.config import ARCHITECTURES, tried

    yield f"gnaflex {_version('gnaflex')}, Python {platform.python_version()}"
    yield f"{platform.system()} {platform.release()}, {os.cpu_count()} x {_processor()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield f"Triton {_version('triton', 'pytorch-triton', 'triton-windows')}"
    yield f"nvidia-cutlass-dsl {_version('nvidia-cutlass-dsl')}"
    yield f"device {device}: {_gpu(device) if device.type == 'cuda' else 'no GPU'}"
    for arch in ARCHITECTURES:
        yield tried(arch)
    yield f"kernel cache: {_cache()}"
    for name in sorted(os.environ):
        if name.startswith("GNAFLEX_"):
            yield _without_home(f"{name}={os.environ[name]}")


def _version(*packages: str) -> str:
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _processor() -> str:
    """Its name where Linux tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^model name\s*: (.*)", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> str:
    from gnaflex.cuda_backend import machine

    driver, count = machine.driver(), machine.multiprocessors(device)
    return f"{machine.name(device)}, driver {driver}, {count} multiprocessors"


def _cache() -> str:
    from gnaflex.cuda_backend import cache

    try:
        where = _without_home(str(cache.folder()))
    except GNAError:
        where = "no folder"
    why = _without_home(_cache_obstacle().partition("\n")[0])
    return f"{where}, {f'cannot be used: {why}' if why else 'can be used'}"


def _cache_obstacle() -> str:
    """Why no kernel can be kept in the cache's folder, which is created where it is missing; or ""."""
    from gnaflex.cuda_backend import cache

    try:
        with tempfile.TemporaryFile(dir=cache._prepared()):
            return ""
    except GNAError as error:
        return str(error)
    except OSError as error:
        return f"{cache.folder()}: {error.strerror or error}.\n  {cache.ELSEWHERE}"


def _without_home(text: str) -> str:
    """A text with the user's home directory written as ~."""
    home = os.path.expanduser("~").rstrip(os.sep)
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def _without_paths(text: str) -> str:
    """A text in which of every absolute path the last part is left."""
    return re.sub(r"(?<![\w:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+", "…/", _without_home(text))


VERBS = (
    Verb(
        "compile",
        "Compile kernels into the cache ahead of time, without a GPU: of a problem, or of the paper's.",
        "gnaflex compile 30x48x80 --window 18x24x24 --stride 16x8x8\n  gnaflex compile --head-dim 64,128",
        _compile_arguments,
        _compile,
    ),
    Verb(
        "doctor",
        "Test masks, backends and kernels on this machine, and print a table to paste into a bug report.",
        "gnaflex doctor --quick",
        _doctor_arguments,
        _doctor,
    ),
)

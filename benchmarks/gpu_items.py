"""The items of gpu_suite: what is measured on a GPU, most telling first."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from gnaflex.cuda_backend import gate, machine
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.fast_path import Lane, Problem, prepared
from gnaflex.cuda_backend.tile_walk import pair_counts
from torch import Tensor

import gnaflex
from gnaflex.planner import Plan

from . import comparison, problems
from .comparison import Facts, Timing
from .engine import Item
from .measure import Row, Timed, milliseconds, row

ROUNDS, WARM = 9, 2  # that count, and before them
CALLS = 200  # whose mean is the time of a call on the host
AT_ONCE = 4  # proofs
PROOF_S = 45.0
DEVICE = torch.device("cuda", 0)


def _arch() -> str:
    """That of the device at hand; Hopper where there is none that kernels run on."""
    found = torch.cuda.get_device_capability(DEVICE) if torch.cuda.is_available() else (0, 0)
    return str(machine.ARCHITECTURE.get(found, "sm_90a"))


ARCH = _arch()
COMPARED = (
    "HunyuanVideo",
    "FLUX.1-dev 4K",
    "HunyuanVideo, default grid",
    "Cosmos-7B",
    "HunyuanVideo, 256 text tokens",
)
KERNEL = 'gnaflex, "cuda"'


def walked(problem: problems.Problem) -> Problem:
    """A problem as the kernel has it."""
    return Problem(problem.spec, problem.prefix, problem.suffix)


VIDEO = problems.FULL["HunyuanVideo"]
HEAD_DIM = 128
TINY = gnaflex.GNA((16, 32), (8, 16), (8, 16))  # its kernel is that of "FLUX.1-dev 4K"
# Small variants for the tests; boxes as in tests/test_gpu.py
EXTRA = (
    ("bfloat16", 64, (2, 8, 8), (2, 8, 8)),
    ("float16", 128, (2, 8, 8), (2, 8, 8), True),
    ("float16", 64, (8, 16), (8, 16), True),
    ("bfloat16", 128, (128,), (128,)),
    ("bfloat16", 128, (1, 5, 24), (3, 4, 8)),
    ("bfloat16", 128, (3, 5, 8), (3, 2, 8), True),
    ("bfloat16", 128, (2, 4, 16), (2, 4, 16)),
)
SMALLEST = EXTRA[2]


def kernel(problem: Problem, arch: str = "") -> KernelConfig:
    """The variant that runs a problem, here if nothing else is said."""
    return problem.config(arch or ARCH, torch.bfloat16, HEAD_DIM)


def configs(arch: str = "") -> list[KernelConfig]:
    """Every variant that the items launch, each once."""
    arch = arch or ARCH
    compared = [kernel(walked(problems.FULL[name]), arch) for name in COMPARED]
    extra = [KernelConfig(arch, *fields) for fields in EXTRA]
    loads = [_loads(kernel(problem, arch)) for problem in (walked(VIDEO), _line())]
    return list(dict.fromkeys([*compared, *extra, *loads]))


def _loads(config: KernelConfig) -> KernelConfig:
    return KernelConfig(config.arch, config.dtype, config.head_dim, config.q_box, config.kv_box, False, True)


def _line() -> Problem:
    """As many tokens in a row as those of the video, every 128 of them over as many keys."""
    spec = VIDEO.spec
    return Problem(gnaflex.GNA((spec.num_tokens,), (math.prod(spec.window),), (128,)))


def yes(what: str, holds: bool, note: str = "") -> Row:
    """1 or 0: what must hold."""
    return row(what, [float(holds)], "", 0.5, 1, note)


def lane(problem: Problem, tensors: list[Tensor], config: KernelConfig) -> Timed:
    """A kernel on these tensors."""
    launches, valid = prepared(problem, DEVICE)
    q, k, v = tensors
    one = Lane(q, k, v, launches, gate.load(config), None, valid)
    return Timed(lambda state: one(q, k, v))


# ---- items -------------------------------------------------------------------------------------------


def box_loads() -> Iterator[Row]:
    """Boxes of row-major tokens against as many tokens in a row, heads-last both: the same kernel, arithmetic
    left out."""
    problem, line = walked(VIDEO), _line()
    plan, boxes = problem.boxes_for(ARCH), line.boxes_for(ARCH)
    assert plan is not None
    assert boxes is not None
    tensors = comparison.inputs(VIDEO, DEVICE, torch.bfloat16)
    calls = {
        "boxes": lane(problem, tensors, _loads(kernel(problem))),
        "contiguous": lane(line, tensors, _loads(kernel(line))),
    }
    taken = milliseconds(calls, dict.fromkeys(calls, WARM + ROUNDS), DEVICE)
    times = {name: values[WARM:] for name, values in taken.items()}
    for name, how in (("boxes", plan), ("contiguous", boxes)):
        bytes_read = VIDEO.heads * _brought(how) * math.prod(how.kv_tile) * HEAD_DIM * 2 * 2
        rates = [bytes_read / ms / 1e9 for ms in times[name]]
        yield row(f"keys and values by {name}, {how.q_tile} queries over {how.kv_tile}", rates, "TB/s")
    per_tile = {
        name: [ms / _brought(how) for ms in times[name]]
        for name, how in (("boxes", plan), ("contiguous", boxes))
    }
    ratio = [a / b for a, b in zip(per_tile["boxes"], per_tile["contiguous"], strict=True)]
    yield row("time of a tile, boxes over contiguous", ratio, "x", 1.25, 1.05)


def _brought(plan: Plan) -> int:
    """Key tiles that blocks bring, for one box of queries or two."""
    return plan.touched_tiles if BOXES_AT_ONCE[ARCH] == 1 else sum(pair_counts(plan))


def proofs() -> Iterator[Row]:
    """The trial that stands between a kernel and its users, for every variant of the suite; each in a process
    of its own, so that one that crashes or hangs does not hide the others."""
    those = [config for config in configs() if not config.loads_only]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for config, (outcome, note) in zip(those, pool.map(_tried, those), strict=True):
            yield yes(f"proof of {config.name}", outcome == "proved", note)


def _tried(config: KernelConfig) -> tuple[str, str]:
    """The outcome of a trial, and how it came to it."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            gate.command(config, DEVICE), capture_output=True, text=True, errors="replace", timeout=PROOF_S
        )
        said = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        outcome, reason = said["outcome"], said["reason"]
    except subprocess.TimeoutExpired:
        outcome, reason = "no answer", ""
    except (ValueError, TypeError, KeyError):
        outcome, reason = "no verdict", f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"
    return outcome, f"{time.perf_counter() - start:.1f} s, {outcome} {reason}".rstrip()


def compared(name: str) -> Iterator[Facts | Timing | Row]:
    """A problem by every provider, forward, and whether the kernel comes as near as it must to what tiles
    allow.

    Raises:
        RuntimeError: when all rows are out, if the kernel did not run or was wrong.
    """
    why: str | None = f"{KERNEL} is no provider"
    forward = replace(problems.FULL[name], trains=False)  # the kernel has no backward, and time is short here
    for one in comparison.compare(name, forward, DEVICE, torch.bfloat16):
        yield one
        if isinstance(one, Timing) and one.provider == KERNEL:
            why = one.why
            if one.achievable is not None:  # now, as a provider may hang later
                yield row(f"{name}: fraction of the achievable", [one.achievable], "x", 0.85, 0.95)
    if why:
        raise RuntimeError(f"{name}: the kernel did not run, or was wrong: {why}")


def dispatch() -> Iterator[Row]:
    """Microseconds of the host per call, the GPU idle or busy as may be, and a call in a CUDA graph."""
    bm = gnaflex.block_mask(TINY, device=DEVICE)
    q, k, v = comparison.inputs(problems.Problem("", TINY, 2, 1, HEAD_DIM), DEVICE, torch.bfloat16)
    call = partial(gnaflex.flex_attention, q, k, v, block_mask=bm, backend="cuda")
    grid = torch.randn(1, *TINY.shape, 2, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    heads_last = partial(gnaflex.attention, grid, grid, grid, TINY.window, TINY.stride, backend="cuda")
    for name, one in (("flex_attention", call), ("attention", heads_last)):
        values = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                one()
            values.append((time.perf_counter() - start) / CALLS * 1e6)
        yield row(f"host time of {name}, launch included", values[2:], "us", 20, 12)
    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    yield yes("a replayed CUDA graph gives the same", torch.equal(got, want))


def tests() -> Iterator[Row]:
    """pytest -m gpu; a test that was skipped counts as one that failed."""
    words = [sys.executable, "-m", "pytest", "-o", "addopts=-rs", "-v", "--tb=short", "--maxfail=20"]
    words += ["-m", "gpu", "tests/test_gpu.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        last = ""
        for last in child.stdout:  # at once, so that it is known which test hangs
            print(last, end="", flush=True)
    good = child.returncode == 0 and "skipped" not in last
    yield yes("GPU tests pass", good, last.strip("= \n"))
    if not good:
        raise RuntimeError(f"pytest ended with {child.returncode}")


def sanitizer() -> Iterator[Row]:
    """compute-sanitizer on the trial of the smallest variant."""
    words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    # every tensor an allocation of its own, whose ends memcheck knows
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    words += gate.command(KernelConfig(ARCH, *SMALLEST), DEVICE)
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=env)
    print(done.stdout, done.stderr)
    said = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    clean = done.returncode == 0 and any("ERROR SUMMARY: 0 errors" in line for line in said)
    note = " ".join(said) or f"exit status {done.returncode}: {done.stdout[-300:]}"
    yield yes("memcheck finds nothing", clean, note)


ITEMS = {
    "box loads": Item(box_loads, 60),
    "proofs": Item(proofs, 150),
    **{f"compare {name}": Item(partial(compared, name), 150) for name in COMPARED},
    "dispatch": Item(dispatch, 60),
    "tests": Item(tests, 360),
    "sanitizer": Item(sanitizer, 180),
}

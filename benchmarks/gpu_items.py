"""The items of gpu_suite: what is measured on a GPU, most telling first."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from gnaflex.cuda_backend import gate, machine
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.fast_path import Lane, Problem, prepared
from gnaflex.cuda_backend.tile_walk import KV_ROWS, Q_ROWS, pair_counts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import gnaflex
from benchmarks.measure import Row, row
from gnaflex.planner import Plan

ROUNDS = 9
FLUSH_BYTES = 256 * 2**20  # more than any L2
CALLS = 200  # whose mean is the time of a call on the host
FLUSHES = 4  # as many as keep the GPU busy until the host has launched what is timed
AT_ONCE = 4  # proofs
PROOF_S = 45.0
DEVICE = torch.device("cuda", 0)


def _arch() -> str:
    """That of the device at hand; Hopper where there is none that kernels run on."""
    found = torch.cuda.get_device_capability(DEVICE) if torch.cuda.is_available() else None
    return machine.ARCHITECTURE.get(found, "sm_90a")


ARCH = _arch()


class Item(NamedTuple):
    """A measurement, and the seconds it may take."""

    measure: Callable[[], Iterator[Row]]
    limit_s: float


# Heads and head_dim as the models have them (data of the paper, tables 1 to 6); bf16, batch 1.
PROBLEMS = {
    "hunyuan 30x48x80": (Problem(gnaflex.GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))), 24),
    "flux 256x256": (Problem(gnaflex.GNA((256, 256), (80, 80), (16, 16))), 24),
    "hunyuan 33x45x80": (Problem(gnaflex.GNA((33, 45, 80), (18, 24, 24), (16, 8, 8))), 24),
    "cosmos 16x44x80": (Problem(gnaflex.GNA((16, 44, 80), (16, 24, 16), (1, 8, 16))), 32),
    "hunyuan 30x48x80 and 256 text": (
        Problem(gnaflex.GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), suffix=256),
        24,
    ),
    "dense 16x44x80": (Problem(gnaflex.GNA((16, 44, 80), (16, 44, 80))), 32),
}
HEAD_DIM = 128
TINY = gnaflex.GNA((16, 32), (8, 16), (8, 16))  # its kernel is that of "flux 256x256"
# Small variants for the tests; boxes as in tests/test_gpu.py
EXTRA = (
    ("bfloat16", 64, (2, 8, 8), (2, 8, 8)),
    ("float16", 128, (2, 8, 8), (2, 8, 8), True),
    ("float16", 64, (8, 16), (8, 16), True),
    ("bfloat16", 128, (128,), (128,)),
    ("bfloat16", 128, (1, 5, 24), (3, 4, 8)),
    ("bfloat16", 128, (3, 5, 8), (3, 2, 8), True),
)
SMALLEST = EXTRA[2]


def kernel(problem: Problem, arch: str = "") -> KernelConfig:
    """The variant that runs a problem, here if nothing else is said."""
    return problem.config(arch or ARCH, torch.bfloat16, HEAD_DIM)


def configs(arch: str = "") -> list[KernelConfig]:
    """Every variant that the items launch, each once."""
    arch = arch or ARCH
    timed = [kernel(problem, arch) for problem, _ in PROBLEMS.values()]
    extra = [KernelConfig(arch, *fields) for fields in EXTRA]
    loads = [_loads(kernel(problem, arch)) for problem in (PROBLEMS["hunyuan 30x48x80"][0], _line())]
    return list(dict.fromkeys([*timed, *extra, *loads]))


def _loads(config: KernelConfig) -> KernelConfig:
    return KernelConfig(config.arch, config.dtype, config.head_dim, config.q_box, config.kv_box, False, True)


def _line() -> Problem:
    """As many tokens in a row, every 128 of them over as many keys as those of the first problem see."""
    spec = PROBLEMS["hunyuan 30x48x80"][0].spec
    return Problem(gnaflex.GNA((spec.num_tokens,), (math.prod(spec.window),), (128,)))


# ---- inputs and time ---------------------------------------------------------------------------------


def inputs(problem: Problem, heads: int) -> list[Tensor]:
    """q, k, v [1, heads, tokens, head_dim] bf16, heads-last in memory as models make them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens = problem.spec.num_tokens + problem.prefix + problem.suffix
    sizes = tokens, tokens + problem.extra_kv, tokens + problem.extra_kv
    make = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return [make(1, n, heads, HEAD_DIM).transpose(1, 2) for n in sizes]


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Of every call on the GPU, by events, the calls in turn in every round, L2 cold; two rounds first that
    do not count."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name, call in calls.items():
            for _ in range(FLUSHES):
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                taken[name].append(start.elapsed_time(end))
    return taken


def yes(what: str, holds: bool, note: str = "") -> Row:
    """1 or 0: what must hold."""
    return row(what, [float(holds)], "", 0.5, 1, note)


def lane(problem: Problem, tensors: list[Tensor], config: KernelConfig | None = None) -> Callable[[], Any]:
    """The kernel on these tensors."""
    launches, valid = prepared(problem, DEVICE)
    launcher = gate.load(config or kernel(problem))
    one = Lane(*tensors, launches, launcher, None, valid)
    return lambda: one(*tensors)


# ---- items -------------------------------------------------------------------------------------------


def box_loads() -> Iterator[Row]:
    """Boxes of row-major tokens against as many tokens in a row, heads-last both: the same kernel, arithmetic
    left out."""
    problem, heads = PROBLEMS["hunyuan 30x48x80"]
    line = _line()
    plan, boxes = problem.boxes_for(ARCH), line.boxes_for(ARCH)
    assert plan is not None
    assert boxes is not None
    tensors = inputs(problem, heads)
    calls = {
        "boxes": lane(problem, tensors, _loads(kernel(problem))),
        "contiguous": lane(line, tensors, _loads(kernel(line))),
    }
    times = milliseconds(calls)
    for name, how in (("boxes", plan), ("contiguous", boxes)):
        bytes_read = heads * _brought(how) * math.prod(how.kv_tile) * HEAD_DIM * 2 * 2
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


def timed(name: str) -> Iterator[Row]:
    """A problem by every provider: dense by cuDNN, FlexAttention with its permutation, the kernel."""
    problem, heads = PROBLEMS[name]
    spec, plan = problem.spec, problem.boxes_for(ARCH)
    assert plan is not None
    q, k, v = inputs(problem, heads)
    bm = gnaflex.block_mask(spec.shape, spec.window, spec.stride, suffix=problem.suffix, device=DEVICE)
    cuda = partial(gnaflex.flex_attention, q, k, v, block_mask=bm, backend="cuda")
    calls = {
        "dense cuDNN": partial(_dense, SDPBackend.CUDNN_ATTENTION, q, k, v),
        "dense flash": partial(_dense, SDPBackend.FLASH_ATTENTION, q, k, v),
        "cuda": cuda,
    }
    pairs = q.shape[2] * k.shape[2]
    work = {"cuda": _pairs(problem, plan), "flex": _pairs(problem, plan)}
    times = yield from _times(name, calls, {one: heads * work.get(one, pairs) for one in calls})
    if "cuda" not in times:
        raise RuntimeError(f"{name}: the kernel did not run")
    if dense := times.get("dense cuDNN"):
        bound = _bound(problem, plan)
        achieved = [d * bound / ms for d, ms in zip(dense, times["cuda"], strict=True)]
        yield row(
            f"{name}: fraction of the achievable", achieved, "x", 0.85, 0.95, f"dense time x {bound:.4f}"
        )
        speedup = [d / ms for d, ms in zip(dense, times["cuda"], strict=True)]
        yield row(f"{name}: over dense cuDNN", speedup, "x")
    # apart, as it compiles for long
    flex = partial(_flex, problem, q, k, v)
    calls = {"flex": flex, "cuda beside flex": cuda}
    times = yield from _times(name, calls, dict.fromkeys(calls, heads * work["flex"]))
    if len(times) == len(calls):
        ratio = [f / ms for f, ms in zip(*times.values(), strict=True)]
        yield row(f"{name}: over FlexAttention", ratio, "x")
        difference = (cuda().float() - flex().float()).abs().max().item()
        yield row(f"{name}: greatest difference from FlexAttention", [difference], "")


def _times(
    name: str, calls: dict[str, Callable[[], Any]], pairs: dict[str, int]
) -> Generator[Row, None, dict[str, list[float]]]:
    """Rows of the calls that run, with the rate of the pairs that each must compute; the milliseconds."""
    able, why = _able(calls)
    for one, reason in why.items():
        yield yes(f"{name}: {one} runs", False, reason)
    times = milliseconds(able)
    for one, values in times.items():
        rate = statistics.median(4e-9 * HEAD_DIM * pairs[one] / ms for ms in values)
        yield row(f"{name}: {one}", values, "ms", note=f"{rate:.0f} TFLOP/s of what it must compute")
    return times


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _flex(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention as a user gets it: tile-major where counts say so, permutation included."""
    spec = problem.spec
    if problem.suffix:
        bm = _tiled(problem)
        x = (gnaflex.permute(one, bm) for one in (q, k, v))
        return gnaflex.unpermute(gnaflex.flex_attention(*x, block_mask=bm, backend="flex"), bm)
    grids = (x.transpose(1, 2).unflatten(1, spec.shape) for x in (q, k, v))
    out = gnaflex.attention(*grids, spec.window, spec.stride, backend="flex")
    return out.flatten(1, -3).transpose(1, 2)


def _tiled(problem: Problem) -> Any:
    spec = problem.spec
    if problem not in _masks:
        _masks[problem] = gnaflex.block_mask(
            spec.shape, spec.window, spec.stride, suffix=problem.suffix, q_tile=(2, 8, 8), device=DEVICE
        )
    return _masks[problem]


_masks: dict[Problem, Any] = {}


def _able(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls that run, and why the others do not."""
    able, why = {}, {}
    for name, call in calls.items():
        try:
            call()
            torch.cuda.synchronize()
            able[name] = call
        except Exception as error:  # of compilers too, and the others are still worth their time
            traceback.print_exc()
            why[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return able, why


def _bound(problem: Problem, plan: Plan) -> float:
    """Rows times keys of the tiles that query boxes visit, by those of dense tiles of 128 x 128. That a tile
    takes longer which one half of a pair sees alone shows in the fraction of the achievable."""
    n = problem.spec.num_tokens + problem.prefix + problem.suffix
    return Q_ROWS * _visited(problem, plan) / (_up(n, Q_ROWS) * _up(n + problem.extra_kv, KV_ROWS))


def _visited(problem: Problem, plan: Plan) -> int:
    """Keys of all query tiles of 128 rows, as the kernel takes them: boxes, and lines of every run of text;
    queries that are text see the grid by lines too."""
    rows = math.prod(plan.kv_tile)
    text = sum(_up(n, rows) for n in problem.texts)
    queries = sum(_up(n, Q_ROWS) // Q_ROWS for n in problem.texts[:2])
    boxes = plan.touched_tiles * rows + plan.query_tiles * text
    return boxes + queries * (_up(problem.spec.num_tokens, rows) + text)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _pairs(problem: Problem, plan: Plan) -> int:
    """Pairs that must be computed."""
    n, text = problem.spec.num_tokens, sum(problem.texts)
    return plan.allowed_pairs + n * text + (problem.prefix + problem.suffix) * (n + text)


def dispatch() -> Iterator[Row]:
    """Microseconds of the host per call, the GPU idle or busy as may be, and a call in a CUDA graph."""
    bm = gnaflex.block_mask(TINY, device=DEVICE)
    q, k, v = inputs(Problem(TINY), 2)
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
    **{f"time {name}": Item(partial(timed, name), 120) for name in PROBLEMS},
    "dispatch": Item(dispatch, 60),
    "tests": Item(tests, 360),
    "sanitizer": Item(sanitizer, 180),
}

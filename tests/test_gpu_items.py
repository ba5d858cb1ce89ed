"""The items of gpu_suite where there is no GPU: what they measure and count, on a stand-in of the kernel."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys

import numpy as np
import pytest
import test_gpu
import torch
from gnaflex.cuda_backend import gate, machine, tile_walk
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from hopper import hopper  # noqa: F401
from little import FEW, LITTLE
from programs import program
from stand_in import StandIn

from benchmarks import comparison, engine, gpu_items, gpu_suite, problems, providers
from benchmarks.comparison import Facts, Timing
from benchmarks.measure import Row
from gnaflex import compiled, dispatch
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

CPU = torch.device("cpu")


# ---- items, dry --------------------------------------------------------------------------------------

MS = 1e-6  # of a kernel that loads boxes
HUNYUAN = "HunyuanVideo"
SMALL = {
    HUNYUAN: problems.Problem("", GNA((5, 17, 24), (2, 8, 8), (2, 8, 8)), 2, 60, 64, trains=True),
    "FLUX.1-dev 4K": problems.Problem("", GNA((19, 40), (9, 16), (8, 16)), 1, 57, 64),
    "HunyuanVideo, 256 text tokens": problems.Problem(
        "", GNA((5, 9, 24), (2, 5, 8), (2, 4, 8)), 1, 60, 64, 0, 150
    ),
}
KERNEL = 'gnaflex, "cuda"'


def milliseconds(calls, rounds, device):
    """As measure's, of calls that take a millionth of a millisecond once they are warm."""
    assert device == CPU
    for timed in calls.values():
        timed.call(timed.before())
    return {name: [1.0, 1.0, *[MS] * (rounds[name] - 2)] for name in calls}


@pytest.fixture
def dry(monkeypatch, hopper):  # noqa: F811
    """Items on the CPU, small problems on a stand-in, where nothing compiles."""
    loaded = []
    for name, value in {"DEVICE": CPU, "VIDEO": SMALL[HUNYUAN], "HEAD_DIM": 64}.items():
        monkeypatch.setattr(gpu_items, name, value)
    for name, problem in SMALL.items():
        monkeypatch.setitem(problems.FULL, name, problem)
    for name in ("FlexAttention, create_block_mask", "NATTEN"):
        monkeypatch.delitem(providers.PROVIDERS, name)
    monkeypatch.setattr(comparison, "SHARE_S", 0)
    monkeypatch.setattr(comparison, "FEWEST", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gate, "load", lambda config: loaded.append(StandIn(config)) or loaded[-1])
    monkeypatch.setattr(compiled, "cpu_obstacle", lambda: "")
    monkeypatch.setitem(dispatch.RUN, "flex", dispatch.RUN["sdpa"])
    test_gpu.forget()
    yield loaded
    test_gpu.forget()


def rows(measured):
    found = list(measured)
    for one in found:
        assert all(map(math.isfinite, (one.median, one.low, one.high)))
        assert one.low <= one.median <= one.high
    assert len({one.what for one in found}) == len(found)
    return {one.what: one for one in found}


def counted_tiles(problem, boxes):
    """Tiles of all boxes of queries, from the mask of every pair: the box of keys that some query sees."""
    spec, total = problem.spec, 0
    seen = dense_mask(spec).numpy()
    starts = [range(0, n, q) for n, q in zip(spec.shape, boxes.q_tile, strict=True)]
    for start in itertools.product(*starts):
        axes = [np.arange(s, min(s + q, n)) for s, q, n in zip(start, boxes.q_tile, spec.shape, strict=True)]
        queries = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), spec.shape).ravel()
        keys = np.stack(np.unravel_index(np.flatnonzero(seen[queries].any(0)), spec.shape))
        extents = np.ptp(keys, axis=1) + 1
        total += math.prod(-(-n // box) for n, box in zip(extents.tolist(), boxes.kv_tile, strict=True))
    return total


@pytest.fixture(params=["sm_90a", "sm_100a"])
def arch(request, monkeypatch, dry):
    """Of the device at hand."""
    monkeypatch.setattr(machine, "architecture", lambda device: request.param)
    monkeypatch.setattr(gpu_items, "ARCH", request.param)
    return request.param


def compare(name):
    """What the item yields: timings by provider and direction, and the others."""
    item = gpu_items.ITEMS[f"compare {name}"]
    assert item.limit_s == 150
    found = list(item.measure())
    timings = {(one.provider, one.direction): one for one in found if isinstance(one, Timing)}
    return timings, [one for one in found if not isinstance(one, Timing)], found


@pytest.mark.parametrize("name", SMALL)
def test_a_comparison(arch, hopper, name):  # noqa: F811
    one = SMALL[name]
    timings, (facts, bound), found = compare(name)
    assert isinstance(facts, Facts)
    assert (facts.problem, facts.tokens, facts.dtype) == (name, one.tokens, "bfloat16")
    pairs = dense_mask(one.spec, suffix=one.suffix).sum().item()
    assert facts.flop_speedup == pytest.approx(one.tokens**2 / pairs)
    kernel = timings[KERNEL, "forward"]
    assert (kernel.problem, kernel.why) == (name, None)
    assert 0 < kernel.error <= 1
    assert kernel.achievable == pytest.approx(kernel.speedup / facts.work_speedup)
    value = kernel.achievable
    assert bound == Row(f"{name}: fraction of the achievable", value, value, value, 1, "x", 0.85, 0.95)
    assert found[found.index(kernel) + 1] is bound
    assert timings["dense, flash", "forward"].ms > 0
    assert timings["dense, cuDNN", "forward"].why  # on a CPU; it spoils nothing
    variants = {config for config, _ in hopper}
    assert variants == {gpu_items.kernel(gpu_items.walked(one))}
    assert variants < {*gpu_items.configs()}
    assert {direction for _, direction in timings} == {"forward"}  # the kernel has no backward


def test_the_kernel_takes_the_boxes_of_the_bound():
    for problem in map(problems.FULL.get, gpu_items.COMPARED):
        boxes = gpu_items.walked(problem).boxes
        assert problem.dense_pairs / problem.pairs(boxes) == pytest.approx(problem.work_speedup), problem.name


@pytest.mark.parametrize("problem", SMALL.values(), ids=lambda one: str(one.spec))
def test_tiles_are_those_of_the_mask(problem):
    boxes = gpu_items.walked(problem).boxes
    assert boxes.touched_tiles == counted_tiles(problem, boxes)


def refused(problem, device):
    raise providers.CannotRun("no such GPU")


def zeros(problem, device):
    return providers.Ready(lambda q, k, v: torch.zeros_like(q))


@pytest.mark.usefixtures("dry")
@pytest.mark.parametrize("make, why", [(refused, "no such GPU"), (zeros, "WRONG: its error is ")])
def test_a_kernel_that_does_not_run_or_is_wrong(monkeypatch, make, why):
    monkeypatch.setitem(providers.PROVIDERS, KERNEL, make)
    found = []
    with pytest.raises(RuntimeError, match=f"{HUNYUAN}: the kernel did not run, or was wrong: {why}"):
        found.extend(gpu_items.ITEMS[f"compare {HUNYUAN}"].measure())
    told = {(one.provider, one.direction) for one in found if isinstance(one, Timing)}
    assert told == {(provider, "forward") for provider in providers.PROVIDERS}
    assert not any(isinstance(one, Row) for one in found)


@pytest.mark.usefixtures("dry")
def test_a_comparison_without_a_kernel_or_dense_attention(monkeypatch):
    name = "FLUX.1-dev 4K"
    for one in providers.DENSE:
        monkeypatch.delitem(providers.PROVIDERS, one)
    timings, others, _ = compare(name)
    assert [type(one) for one in others] == [Facts]  # nothing to hold the kernel against
    assert timings[KERNEL, "forward"].ms > 0
    monkeypatch.delitem(providers.PROVIDERS, KERNEL)
    with pytest.raises(RuntimeError, match=f'{name}: .*: gnaflex, "cuda" is no provider'):
        compare(name)


@pytest.mark.usefixtures("dry")
def test_a_comparison_is_printed(capsys):
    assert gpu_suite.main(["--item", "compare FLUX.1-dev 4K"]) == 0
    found = engine.rows_in(capsys.readouterr().out)
    (kernel,) = (one for one in found if one.get("provider") == KERNEL)
    (bound,) = (one for one in found if "what" in one)
    assert bound["what"] == "FLUX.1-dev 4K: fraction of the achievable"
    assert bound["median"] == kernel["achievable"]
    engine.tell("a", engine.Outcome("ok", 1.0, found))
    assert f"    problem FLUX.1-dev 4K, provider {KERNEL}, direction forward, ms " in capsys.readouterr().out


def brought(problem, arch):
    """Key tiles that come from memory: once for each box of queries, or for the two of a pair."""
    boxes, halves = problem.boxes_for(arch), BOXES_AT_ONCE[arch]
    (launch,) = tile_walk.launches(boxes, halves)
    items = launch.work.reshape(-1, halves, *launch.work.shape[1:])
    tiles = tile_walk.item_tiles(items, boxes.kv_tile).sum()
    assert halves == 2 or tiles == counted_tiles(problem, boxes)
    return tiles


def test_box_loads(dry, arch, monkeypatch):
    monkeypatch.setattr(gpu_items, "milliseconds", milliseconds)
    found = rows(gpu_items.box_loads())
    problem, line = gpu_items.walked(SMALL[HUNYUAN]), gpu_items._line()
    both = (problem, problem.boxes_for(arch)), (line, line.boxes_for(arch))
    assert [kernel.config for kernel in dry] == [
        KernelConfig(arch, "bfloat16", 64, boxes.q_tile, boxes.kv_tile, False, True) for _, boxes in both
    ]
    assert [len(kernel.calls) for kernel in dry] == [len(tile_walk.launches(boxes)) for _, boxes in both]
    for what, (one, boxes) in zip(("boxes", "contiguous"), both, strict=True):
        moved = SMALL[HUNYUAN].heads * brought(one, arch) * math.prod(boxes.kv_tile) * 64 * (2 + 2)
        (rate,) = (row for name, row in found.items() if name.startswith(f"keys and values by {what}"))
        assert rate.low == rate.median == pytest.approx(moved / (MS / 1e3) / 1e12)
        assert rate.runs == gpu_items.ROUNDS
    ratio = brought(line, arch) / brought(problem, arch)
    assert ratio < 1
    assert found["time of a tile, boxes over contiguous"].median == pytest.approx(ratio)


def test_box_loads_compares_like_with_like():
    boxes, line = gpu_items.walked(gpu_items.VIDEO), gpu_items._line()
    assert boxes.spec.num_tokens == line.spec.num_tokens
    assert boxes.boxes.touched_tiles == line.boxes.touched_tiles
    assert boxes.boxes.query_tiles == line.boxes.query_tiles
    configs = [gpu_items._loads(gpu_items.kernel(one)) for one in (boxes, line)]
    assert {(config.kv_rows, config.stages, math.prod(config.q_box)) for config in configs} == {(128, 2, 128)}
    assert {*configs} < {*gpu_items.configs()}


class Graph:
    """Does again what the kernel did last."""

    def replay(self):
        for kernel in self.kernels.values():
            last = kernel.calls[-1]
            batch, heads, _, queries, *_ = last["sizes"]
            lse = torch.empty(batch, heads, queries)  # nobody kept the one of that call
            kernel.launch(**{**last, "lse": lse.data_ptr()})


@pytest.mark.parametrize("is_right", [True, False])
def test_dispatch(dry, hopper, monkeypatch, is_right):  # noqa: F811
    monkeypatch.setattr(Graph, "kernels", hopper if is_right else {}, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(gpu_items, "TINY", FEW)
    monkeypatch.setattr(gpu_items, "CALLS", 2)
    found = rows(gpu_items.dispatch())
    assert found["a replayed CUDA graph gives the same"].median == is_right
    assert found["host time of attention, launch included"].median > 0
    assert sum(len(kernel.calls) for kernel in hopper.values()) == 2 * 12 * 2 + 2


def say(text, status=0, error=""):
    """A command that prints."""
    code = f"import sys; print({text!r}); print({error!r}, file=sys.stderr); sys.exit({status})"
    return [sys.executable, "-c", code]


def test_proofs(monkeypatch):
    answers = [
        say('warning\n{"outcome": "proved", "reason": ""}'),
        say('{"outcome": "failed", "reason": "clipped tiles: error 3"}'),
        say("", 9, "an illegal memory access"),
        say("[1, 2]"),
        [sys.executable, "-c", "import time; time.sleep(30)"],
    ]
    of = dict(zip(LITTLE + test_gpu.CONFIGS, answers, strict=False))
    monkeypatch.setattr(gpu_items, "configs", lambda: [*of, *map(gpu_items._loads, of)])
    monkeypatch.setattr(gpu_items, "PROOF_S", 2.0)
    monkeypatch.setattr(gate, "command", lambda config, device: of[config])
    found = rows(gpu_items.proofs())
    assert [one.median for one in found.values()] == [1, 0, 0, 0, 0]
    assert [one.verdict for one in found.values()] == ["aim", *["MISSED"] * 4]
    assert [one.split(" s, ")[1] for one in (row.note for row in found.values())] == [
        "proved",
        "failed clipped tiles: error 3",
        "no verdict exit status 9: an illegal memory access",
        "no verdict exit status 0:",
        "no answer",
    ]


@pytest.mark.parametrize(
    "last, status, good",
    [
        ("==== 200 passed in 3.00s ====", 0, True),
        ("==== 207 skipped in 3.00s ====", 0, False),
        ("==== 1 passed, 2 skipped in 3.00s ====", 0, False),
        ("==== 1 failed, 2 passed in 3.00s ====", 1, False),
    ],
)
def test_tests(monkeypatch, tmp_path, capfd, last, status, good):
    say = program(tmp_path / "python", f'echo "arguments: $@"; echo "{last}"; exit {status}')
    monkeypatch.setattr(sys, "executable", say)
    measured = gpu_items.tests()
    found = next(measured)
    assert (found.median, found.note) == (good, last.strip("= "))
    with (
        contextlib.nullcontext() if good else pytest.raises(RuntimeError, match=f"pytest ended with {status}")
    ):
        assert not list(measured)
    said = capfd.readouterr().out
    assert "-m pytest" in said
    assert "-m gpu tests/test_gpu.py" in said


@pytest.mark.parametrize(
    "said, status, clean",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= ERROR SUMMARY: 3 errors", 9, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),
        ("Device not supported", 1, False),
        ("", 0, False),
    ],
)
def test_sanitizer(monkeypatch, tmp_path, said, status, clean):
    alone = 'test -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" || exit 3'
    program(tmp_path / "compute-sanitizer", f'{alone}; echo "$@"; echo "{said}"; exit {status}')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gate, "command", lambda config, device: ["try", config.name])
    (found,) = gpu_items.sanitizer()
    assert found.median == clean
    assert said in found.note

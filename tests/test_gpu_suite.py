"""The GPU's tests and benchmarks where there is none: their checks on a stand-in, items dry, the command.

What they are to find out within minutes on a borrowed machine must not fail for a mistake of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import test_gpu
import torch
from gnaflex.cuda_backend import cache, compile, gate, machine, tile_walk
from gnaflex.cuda_backend.config import ARCHITECTURES, BOXES_AT_ONCE, KernelConfig, obstacles
from gnaflex.cuda_backend.fast_path import Problem
from hopper import hopper  # noqa: F401
from stand_in import DTYPES, StandIn, at

from benchmarks import comparison, engine, gpu_items, gpu_suite, problems, providers
from benchmarks.comparison import Facts, Timing
from benchmarks.measure import Row
from gnaflex import compiled, dispatch
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

CPU = torch.device("cpu")
LITTLE = [
    KernelConfig("sm_90a", "bfloat16", 64, (2, 4), (2, 8), True),
    KernelConfig("sm_90a", "float16", 128, (8,), (16,), True),
    KernelConfig("sm_90a", "bfloat16", 64, (2, 2, 2), (2, 2, 4), False),
    KernelConfig("sm_100a", "bfloat16", 64, (2, 4), (2, 8), True),
    KernelConfig("sm_100a", "bfloat16", 64, (2, 2, 2), (2, 2, 4), False),
]
FEW = GNA((8, 16), 8, 8)


# ---- the checks of test_gpu.py -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_are_kernels_for_all_that_goes_through_the_door(arch):
    configs = gpu_items.configs(arch)
    for dtype, head_dim, problem in test_gpu.DOOR:
        assert problem.config(arch, dtype, head_dim) in configs, problem
    for spec in (test_gpu.SMALL, gpu_items.TINY):
        assert gpu_items.kernel(Problem(spec), arch) in configs
    for name in gpu_items.COMPARED:
        one = problems.FULL[name]
        compared = Problem(one.spec, one.prefix, one.suffix)
        assert compared.config(arch, torch.bfloat16, one.head_dim) in configs, name
    assert not [why for config in configs for why in obstacles(config)]
    names = [config.name for config in configs]
    assert len({*names}) == len(names)


def test_the_architecture_is_that_of_the_device(monkeypatch):
    assert [config for config in gpu_items.configs() if not config.loads_only] == test_gpu.CONFIGS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, arch in (((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a"), ((8, 0), "sm_90a")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        assert gpu_items._arch() == arch
        monkeypatch.setattr(gpu_items, "ARCH", arch)
        assert {config.arch for config in gpu_items.configs()} == {arch}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("config", LITTLE, ids=lambda one: one.name)
def test_a_right_kernel_passes(config):
    for name, one in test_gpu.tries(config).items():
        try:
            test_gpu.check(config, StandIn(config), one, CPU)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert test_gpu.check_random(config, StandIn(config), CPU, 12, 60, most=200) == 12
    assert test_gpu.check_random(config, StandIn(config), CPU, 25, -1) == 0


class Wrong(StandIn):
    """A kernel whose results ``spoil`` changes."""

    def __init__(self, config, spoil):
        super().__init__(config)
        self.spoil = spoil

    def launch(self, **numbers):
        super().launch(**numbers)
        batch, heads, _, queries, *_ = numbers["sizes"]
        shape, strides = (batch, heads, queries, self.config.head_dim), (*numbers["strides"][9:], 1)
        out = at(numbers["o"], DTYPES[self.config.dtype], shape, strides)
        lse = at(numbers["lse"], torch.float32, shape[:3], (heads * queries, queries, 1))
        self.spoil(self, numbers, out, lse)


def beside(kernel, numbers, out, lse):
    at(numbers["o"] + 2 * out.numel(), out.dtype, (8,), (1,)).zero_()


def in_front(kernel, numbers, out, lse):
    at(numbers["o"] - 16, out.dtype, (8,), (1,)).zero_()


def input_changes(kernel, numbers, out, lse):
    at(numbers["v"], out.dtype, (1,), (1,)).add_(1)


MISTAKES = {
    "a row is not written": (lambda *a: a[2][0, 0, 3].fill_(math.nan), "not written"),
    "infinite": (lambda *a: a[2][0, -1, -1, 0].fill_(math.inf), "not finite"),
    "no lse": (lambda *a: a[3][0, 0, 3].fill_(math.nan), "log-sum-exp of rows"),
    "writes behind": (beside, "beside the output"),
    "writes in front": (in_front, "beside the output"),
    "changes an input": (input_changes, "an input has changed"),
    "not the same twice": (lambda *a: a[2][0, 0, 0].mul_(1 + 0.1 * len(a[0].calls)), "two runs differ"),
    "lse differs": (lambda *a: a[3][0, 0, 0].add_(1e-5 * len(a[0].calls)), "log-sum-exp of two runs"),
    "lse in base 2": (lambda *a: a[3].mul_(math.log2(math.e)), "log-sum-exp is off"),
    "a key of a thousand is left out": (lambda *a: a[3][0, 0, 0].sub_(1e-3), "log-sum-exp is off"),
    "swaps two rows": (lambda *a: a[2][0, 0, :2].copy_(a[2][0, 0, :2].flip(0)), "greatest error"),
    "all a little off": (lambda *a: a[2].mul_(1.02), "error"),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_kernel_does_not(name):
    spoil, message = MISTAKES[name]
    one = test_gpu.tries(LITTLE[0])["odd"]
    with pytest.raises(AssertionError, match=message):
        test_gpu.check(LITTLE[0], Wrong(LITTLE[0], spoil), one, CPU)


@pytest.mark.usefixtures("hopper")
def test_a_random_problem_that_fails_is_named():
    wrong = Wrong(LITTLE[2], lambda *a: a[2].zero_())
    with pytest.raises(AssertionError, match=r"number 0, Try\(problem=Problem\(spec=GNA\("):
        test_gpu.check_random(LITTLE[2], wrong, CPU, 5, 60, most=60)


@pytest.fixture
def launched(hopper):  # noqa: F811
    test_gpu.forget()
    yield lambda: sum(len(kernel.calls) for kernel in hopper.values())
    test_gpu.forget()


@pytest.mark.parametrize(
    "problem", [Problem(FEW), Problem(FEW, 3, 20, 5), Problem(GNA((9, 22), (4, 8), (4, 8)))], ids=str
)
def test_the_checks_of_the_door(launched, problem):
    test_gpu.check_door(torch.bfloat16, 64, problem, CPU, launched)


def test_the_check_of_auto(launched):
    test_gpu.check_auto(CPU, launched, FEW)


def test_the_check_of_compiled_functions(launched):
    found = dict(test_gpu.check_compiled(CPU, launched, FEW, changes=2, backend="aot_eager"))
    assert found == {"flex": [1, 1], "grid": [1, 1]}


def test_tests_say_why_they_are_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert test_gpu.no_gpu() == "torch sees no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(test_gpu.machine, "obstacle", lambda device: f"{device} is too old")
    assert test_gpu.no_gpu() == "cuda:0 is too old"


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
    trains = [timings.get((KERNEL, direction)) for direction in ("backward", "both")]
    assert all("no backward" in timing.why for timing in trains) if one.trains else trains == [None, None]


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


def wrong_gradients(problem, device):
    right = providers.PROVIDERS['gnaflex, "sdpa"'](problem, device).call
    return providers.Ready(lambda q, k, v: right(q, k, v) * (3 if q.requires_grad else 1))


@pytest.mark.usefixtures("dry")
@pytest.mark.parametrize(
    "make, why, has_bound",
    [
        (refused, "no such GPU", False),
        (zeros, "WRONG: its error is ", False),
        (wrong_gradients, "WRONG: its error is ", True),
    ],
)
def test_a_kernel_that_does_not_run_or_is_wrong(monkeypatch, make, why, has_bound):
    monkeypatch.setitem(providers.PROVIDERS, KERNEL, make)
    found = []
    with pytest.raises(RuntimeError, match=f"{HUNYUAN}: the kernel did not run, or was wrong: {why}"):
        found.extend(gpu_items.ITEMS[f"compare {HUNYUAN}"].measure())
    told = {(one.provider, one.direction) for one in found if isinstance(one, Timing)}
    assert told == {*itertools.product(providers.PROVIDERS, ("forward", "backward", "both"))}
    assert [type(one) for one in found].count(Row) == has_bound


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


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


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


# ---- the command -------------------------------------------------------------------------------------

ROW = {"what": "a", "median": 1.0, "unit": "x", "note": "n"}
GOOD, BAD = f"print({engine.MARK + json.dumps(ROW)!r})", "raise SystemExit(2)"


@pytest.mark.parametrize("text", ["", "8d"])
def test_no_budget(text, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main([f"--budget={text}"])
    assert f"a time such as 90s or 8m is needed: got {text!r}" in capsys.readouterr().err


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Items by what their process does; a call of the suite gives its exit code and what is in its file."""
    items = {}
    script = (
        "import os, sys; *words, name = sys.argv[1:]; "
        'assert words == ["-m", "benchmarks.gpu_suite", "--item"]; exec(os.environ["CODE_" + name])'
    )

    def call(*words):
        monkeypatch.setattr(gpu_items, "ITEMS", {name: engine.Item(None, 10) for name in items})
        for name, code in items.items():
            monkeypatch.setenv(f"CODE_{name}", code)
        code = gpu_suite.main(["--out", str(tmp_path), *words])
        (path,) = tmp_path.rglob("*.json")
        assert not [*tmp_path.rglob("*.part")]
        assert path == tmp_path / "nvidia-h200" / "gpu_suite.json"
        return code, json.loads(path.read_text())

    python = program(tmp_path / "python", f"exec {sys.executable} -c '{script}' \"$@\"")
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    call.items = items
    return call


def statuses(found):
    return {name: one["status"] for name, one in found["items"].items()}


def test_a_suite(suite, capsys):
    suite.items |= {"a": GOOD, "b": BAD, "c": GOOD}
    code, found = suite("--budget", "60s")
    assert code == 1
    assert statuses(found) == {"a": "ok", "b": "failed", "c": "ok"}
    assert found["items"]["a"]["rows"] == [ROW]
    assert found["environment"]["device"] == "NVIDIA H200"
    assert found["environment"]["torch"] == torch.__version__
    assert "    a: 1 x n\n" in capsys.readouterr().out
    suite.items |= {"a": BAD, "b": GOOD}
    code, found = suite("--resume")
    assert code == 0  # a is not run again
    assert statuses(found) == {"a": "ok", "b": "ok", "c": "ok"}
    suite.items |= {"b": BAD}
    assert suite("--only", "b", "--resume")[0] == 0
    code, found = suite("--only", "c")
    assert (code, statuses(found)) == (0, {"c": "ok"})  # without --resume the file is begun anew


def test_a_suite_without_time(suite):
    suite.items |= {"a": BAD}
    code, found = suite("--budget", "0")
    assert (code, statuses(found)) == (0, {"a": "no time left"})
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "suite", lambda job, *rest: given.update(job=job, rest=rest) or {})
        suite("--budget", "2m")
    assert given["job"].limits == {"a": 10}
    assert given["rest"][:2] == (120, False)


def test_kernels_are_handed_on_and_must_be_there(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("kernels")
    folder.mkdir()
    monkeypatch.setattr(gpu_items, "configs", lambda: LITTLE)
    for config in LITTLE[1:]:
        (folder / gate.linked_name(config)).touch()
    given = {"GNAFLEX_KERNELS": str(folder.resolve()), "GNAFLEX_PROOF": "trust", "PYTHONUNBUFFERED": "1"}
    for name in given:
        monkeypatch.delenv(name, raising=False)
    suite.items |= {"a": f"assert {given}.items() <= os.environ.items(); {GOOD}"}
    assert gpu_suite.main(["--kernels", str(folder)]) == 1
    assert f"not run: kernels lacks {gate.linked_name(LITTLE[0])}." in capsys.readouterr().out
    (folder / gate.linked_name(LITTLE[0])).touch()
    assert statuses(suite("--kernels", str(folder))[1]) == {"a": "ok"}


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 1
    assert capsys.readouterr().out.startswith("not run: this machine has no CUDA GPU.")


def test_an_item(monkeypatch, capsys):
    def measure():
        yield gpu_items.row("first", [1.0, 2.0, 4.0], "ms", 3, 2, "a note")
        raise RuntimeError("too bad")

    monkeypatch.setattr(gpu_items, "ITEMS", {"one": engine.Item(measure, 1)})
    with pytest.raises(RuntimeError, match="too bad"):
        gpu_suite.main(["--item", "one"])
    (found,) = engine.rows_in(capsys.readouterr().out)
    assert (found["what"], found["median"], found["verdict"]) == ("first", 2.0, "aim")
    monkeypatch.setattr(gpu_items, "ITEMS", {"one": engine.Item(lambda: iter(()), 1)})
    assert gpu_suite.main(["--item", "one"]) == 0


def test_prepare(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(gpu_items, "configs", lambda arch: asked.append(arch) or LITTLE)
    monkeypatch.setattr(cache, "get", lambda config, build: f"{config.name} by {build.__name__}".encode())
    monkeypatch.setattr(compile, "to_shared", lambda code, path: path.write_bytes(code))
    folder = tmp_path / "a" / "b"
    assert gpu_suite.main(["--prepare", str(folder), "--arch", "sm_100a"]) == 0
    assert asked == ["sm_100a"]
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == {gate.linked_name(config): f"{config.name} by to_object" for config in LITTLE}
    assert gate._ahead(LITTLE[0]) is None
    monkeypatch.setenv("GNAFLEX_KERNELS", str(folder))
    assert gate._ahead(LITTLE[0]) == folder / gate.linked_name(
        LITTLE[0]
    )  # under the name by which it is sought
    assert f"{gate.linked_name(LITTLE[0])}: " in capsys.readouterr().out

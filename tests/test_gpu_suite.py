"""The GPU's tests and benchmarks where there is none: their checks on a stand-in, every item dry, the runner.

What they are to find out within minutes on a borrowed machine must not fail for a mistake of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_gpu
import torch
from gnaflex.cuda_backend import cache, compile, gate, machine, tile_walk
from gnaflex.cuda_backend.config import ARCHITECTURES, BOXES_AT_ONCE, KernelConfig, obstacles
from gnaflex.cuda_backend.fast_path import Problem
from hopper import hopper  # noqa: F401
from stand_in import DTYPES, StandIn, at
from torch.nn.attention import SDPBackend

from benchmarks import gpu_items, gpu_suite
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

MS = 1e-6  # of everything that is timed
HUNYUAN = "hunyuan 30x48x80"
PROBLEMS = {
    HUNYUAN: (Problem(GNA((5, 17, 24), (2, 8, 8), (2, 8, 8))), 2),
    "ragged": (Problem(GNA((19, 40), (9, 16), (8, 16))), 3),
    "text": (Problem(GNA((5, 9, 24), (2, 5, 8), (2, 4, 8)), suffix=150), 2),
    "all text": (Problem(GNA((9, 24), (4, 8), (1, 8)), 7, 150, 20), 2),
}


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        assert self.at <= other.at
        return MS


@pytest.fixture
def dry(monkeypatch, hopper):  # noqa: F811
    """Items on the CPU, all their calls on a stand-in that takes a millionth of a millisecond."""
    loaded = []
    backends = SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH, FLASH_ATTENTION=SDPBackend.FLASH_ATTENTION)
    for name, value in {
        "DEVICE": CPU, "PROBLEMS": PROBLEMS, "HEAD_DIM": 64, "ROUNDS": 1, "FLUSH_BYTES": 64,
        "SDPBackend": backends, "_masks": {},
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu_items, name, value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
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


def counted_bound(problem, boxes):
    """Rows times keys that the kernel takes, by those of a dense kernel of 128 x 128."""
    spec, (prefix, suffix, extra) = problem.spec, problem.texts
    rows = math.prod(boxes.kv_tile)
    lines = sum(math.ceil(n / rows) for n in problem.texts)
    query_boxes = math.prod(math.ceil(n / q) for n, q in zip(spec.shape, boxes.q_tile, strict=True))
    text_queries = math.ceil(prefix / 128) + math.ceil(suffix / 128)
    tiles = counted_tiles(problem, boxes) + query_boxes * lines
    tiles += text_queries * (math.ceil(spec.num_tokens / rows) + lines)
    tokens = spec.num_tokens + prefix + suffix
    return tiles * rows / (math.ceil(tokens / 128) * math.ceil((tokens + extra) / 128) * 128)


@pytest.fixture(params=["sm_90a", "sm_100a"])
def arch(request, monkeypatch, dry):
    """Of the device at hand."""
    monkeypatch.setattr(machine, "architecture", lambda device: request.param)
    monkeypatch.setattr(gpu_items, "ARCH", request.param)
    return request.param


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_timed_problem(arch, name):
    problem, heads = PROBLEMS[name]
    boxes = problem.boxes_for(arch)
    bound = counted_bound(problem, boxes)
    if problem.prefix or problem.extra_kv:  # no problem of the suite has them: by formula alone
        assert gpu_items._bound(problem, boxes) == pytest.approx(bound)
        return
    found = rows(gpu_items.timed(name))
    assert found[f"{name}: fraction of the achievable"].median == pytest.approx(bound)
    assert found[f"{name}: fraction of the achievable"].note == f"dense time x {bound:.4f}"
    for what in ("over dense cuDNN", "over FlexAttention"):
        assert found[f"{name}: {what}"].median == pytest.approx(1)
    pairs = dense_mask(problem.spec, suffix=problem.suffix).sum().item()
    everything = (problem.spec.num_tokens + problem.suffix) ** 2
    for what, count in (("cuda", pairs), ("flex", pairs), ("dense cuDNN", everything)):
        rate = 2 * 2 * count * 64 * heads / (MS / 1e3) / 1e12  # two products, two operations each
        assert (found[f"{name}: {what}"].median, found[f"{name}: {what}"].runs) == (MS, 1)
        assert found[f"{name}: {what}"].note == f"{rate:.0f} TFLOP/s of what it must compute"
    assert 0 < found[f"{name}: greatest difference from FlexAttention"].median < 0.05


@pytest.mark.parametrize("problem", [one for one, _ in PROBLEMS.values()], ids=str)
def test_formulas(problem):
    texts = dict(zip(("prefix", "suffix", "extra_kv"), problem.texts, strict=True))
    assert gpu_items._pairs(problem, problem.boxes) == dense_mask(problem.spec, **texts).sum().item()
    assert problem.boxes.touched_tiles == counted_tiles(problem, problem.boxes)


def test_the_bound_of_a_video_is_its_speedup():
    for problem, _ in gpu_items.PROBLEMS.values():
        if not any(problem.texts):
            found = 1 / gpu_items._bound(problem, problem.boxes)
            assert found == pytest.approx(problem.boxes.work_speedup)


@pytest.mark.usefixtures("dry")
def test_what_does_not_run_is_told(monkeypatch, capsys):
    def refuse(*_, **__):
        raise KeyError("no such backend")

    monkeypatch.setattr(gpu_items, "_dense", refuse)
    found = rows(gpu_items.timed("ragged"))
    assert found["ragged: dense cuDNN runs"].note == "KeyError: 'no such backend'"
    assert found["ragged: dense cuDNN runs"].verdict == "MISSED"
    assert found["ragged: cuda"].median == MS
    assert "ragged: fraction of the achievable" not in found
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(gpu_items.gnaflex, "flex_attention", refuse)
    seen = []
    with pytest.raises(RuntimeError, match="the kernel did not run"):
        seen += [one.what for one in gpu_items.timed("ragged")]
    measured = gpu_items.timed("ragged")
    assert "ragged: cuda runs" in [next(measured).what for _ in range(3)]


def brought(problem, arch):
    """Key tiles that come from memory: once for each box of queries, or for the two of a pair."""
    boxes, halves = problem.boxes_for(arch), BOXES_AT_ONCE[arch]
    (launch,) = tile_walk.launches(boxes, halves)
    items = launch.work.reshape(-1, halves, *launch.work.shape[1:])
    tiles = tile_walk.item_tiles(items, boxes.kv_tile).sum()
    assert halves == 2 or tiles == counted_tiles(problem, boxes)
    return tiles


def test_box_loads(dry, arch):
    found = rows(gpu_items.box_loads())
    problem, heads = PROBLEMS[HUNYUAN]
    line = gpu_items._line()
    both = (problem, problem.boxes_for(arch)), (line, line.boxes_for(arch))
    assert [kernel.config for kernel in dry] == [
        KernelConfig(arch, "bfloat16", 64, boxes.q_tile, boxes.kv_tile, False, True) for _, boxes in both
    ]
    for what, (one, boxes) in zip(("boxes", "contiguous"), both, strict=True):
        moved = heads * brought(one, arch) * math.prod(boxes.kv_tile) * 64 * (2 + 2)
        (rate,) = (row.median for name, row in found.items() if name.startswith(f"keys and values by {what}"))
        assert rate == pytest.approx(moved / (MS / 1e3) / 1e12)
    ratio = brought(line, arch) / brought(problem, arch)
    assert ratio < 1
    assert found["time of a tile, boxes over contiguous"].median == pytest.approx(ratio)


def test_box_loads_compares_like_with_like():
    boxes, line = gpu_items.PROBLEMS[HUNYUAN][0], gpu_items._line()
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


# ---- the runner --------------------------------------------------------------------------------------

ROW = {"what": "a", "median": 1.0, "unit": "x", "note": "n"}
LINE = gpu_suite.MARK + json.dumps(ROW)
ENV = dict(os.environ)


def run(code, left=30.0, limit=20.0):
    return gpu_suite.run([sys.executable, "-c", code], left, limit, ENV)


def test_an_item_that_goes_well():
    out = run(f"print({LINE!r})")
    assert (out.status, out.rows, out.why) == ("ok", [ROW], "")
    assert out.seconds > 0


def test_warnings_may_stand_anywhere():
    noise = f"warning\n{LINE} and more\ntext {LINE}\n{{}}\n[1]\nnan"
    late = "sys.stderr.write('late'); sys.stdout.buffer.write(bytes([255]))"
    out = run(f"import sys; print({noise!r}, end=''); {late}")
    assert (out.status, out.rows) == ("ok", [ROW, ROW])


def test_an_item_that_fails_keeps_its_rows():
    out = run(f"print({LINE!r}, flush=True); raise SystemError('for a test')")
    assert (out.status, out.rows) == ("failed", [ROW])
    assert out.why.startswith("exit status 1: ")
    assert "SystemError: for a test" in out.why


@pytest.mark.parametrize("said", ["", "rows: []", LINE[:-4], gpu_suite.MARK + "nothing"])
def test_an_item_without_rows_fails(said):
    out = run(f"print({said!r})")
    assert (out.status, out.rows) == ("failed", [])
    assert out.why == f"exit status 0: {said}\n"


def test_only_the_end_of_a_long_output_is_kept():
    out = run("print('x' * 100_000 + 'end'); raise SystemExit(3)")
    assert out.status == "failed"
    assert out.why.endswith("xend\n")
    assert len(out.why) < gpu_suite.TAIL + 50


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_item_that_hangs_is_killed_with_its_children():
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"print('child', child.pid, {LINE!r}, flush=True)\n"
        "time.sleep(60)"
    )
    out = run(code, left=1.5, limit=1.0)
    assert (out.status, out.rows) == ("too late", [ROW])
    assert out.why.startswith("after 2 s: child ")
    assert out.seconds < 20
    for _ in range(100):
        if not is_alive(pid := int(out.why.split()[4])):
            break
        time.sleep(0.02)
    assert not is_alive(pid)


def test_an_item_whose_output_stays_open(monkeypatch):
    monkeypatch.setattr(gpu_suite, "DRAIN_S", 0.2)
    code = (
        "import subprocess, time\n"
        "subprocess.Popen(['sleep', '6'], start_new_session=True)\n"
        f"print({LINE!r}, flush=True)\n"
        "time.sleep(60)"
    )
    out = run(code, left=1.5, limit=1.0)
    assert (out.status, out.rows) == ("too late", [ROW])
    assert out.seconds < 5


def test_no_item_is_begun_that_has_no_time():
    assert run("raise SystemExit(1)", left=19, limit=60).status == "no time left"
    assert run("raise SystemExit(1)", left=-1, limit=10).status == "no time left"
    assert run(f"print({LINE!r})", left=19, limit=19).status == "ok"


def test_ctrl_c_leaves_nothing_running(monkeypatch):
    children = []

    def interrupted(self, *_, timeout=None):
        children.append(self.pid)
        if len(children) == 1:
            raise KeyboardInterrupt
        return "", None

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)")
    assert not is_alive(children[0])


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("8m", 480), ("480", 480), ("1.5h", 5400), ("0", 0)])
def test_durations(text, seconds):
    assert gpu_suite.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8 m", "m", "-1", "8d", "1e3"])
def test_no_durations(text, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main([f"--budget={text}"])
    assert f"a time such as 90s or 8m is needed: got {text!r}" in capsys.readouterr().err


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Items by what their process does; a call of the suite gives its exit code and what is in its file."""
    items = {}
    script = 'import os, sys; exec(os.environ["CODE_" + sys.argv[-1]])'

    def call(*words):
        monkeypatch.setattr(gpu_items, "ITEMS", {name: gpu_items.Item(None, 10) for name in items})
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


GOOD, BAD = f"print({LINE!r})", "raise SystemExit(2)"


def statuses(found):
    return {name: one["status"] for name, one in found["items"].items()}


def test_a_suite(suite, capsys):
    suite.items |= {"a": GOOD, "b": BAD, "c": GOOD}
    code, found = suite("--budget", "60s")
    assert code == 1
    assert statuses(found) == {"a": "ok", "b": "failed", "c": "ok"}
    assert found["items"]["a"]["rows"] == [ROW]
    assert found["environment"]["device"] == "NVIDIA H200"
    said = capsys.readouterr().out
    assert "a: ok, " in said
    assert "    a: 1 x n\n" in said
    assert "b: failed, 0 s exit status 2:" in said
    suite.items |= {"a": BAD, "b": GOOD}
    code, found = suite("--resume")
    assert code == 0  # a is not run again
    assert statuses(found) == {"a": "ok", "b": "ok", "c": "ok"}
    assert "a: there already" in capsys.readouterr().out
    assert statuses(suite("--only", "b", "--resume")[1]) == {"a": "ok", "b": "ok", "c": "ok"}
    code, found = suite("--only", "c")
    assert (code, statuses(found)) == (0, {"c": "ok"})  # without --resume the file is begun anew


def test_a_suite_writes_after_every_item(suite, tmp_path):
    path = tmp_path / "nvidia-h200" / "gpu_suite.json"
    look = f"import json; assert list(json.load(open({str(path)!r}))['items']) == ['a']; {GOOD}"
    suite.items |= {"a": GOOD, "b": look}
    assert statuses(suite()[1]) == {"a": "ok", "b": "ok"}


def test_a_suite_stops_at_its_budget(suite):
    suite.items |= {"a": "import time; time.sleep(60)", "b": GOOD}
    code, found = suite("--budget", "0")
    assert code == 0
    assert statuses(found) == {"a": "no time left", "b": "no time left"}
    code, found = suite("--budget", "11", "--only", "b", "--resume")
    assert statuses(found) == {"a": "no time left", "b": "ok"}
    now = itertools.count(0, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_suite.time, "monotonic", lambda: next(now))
        patch.setattr(gpu_suite.gpu_items, "ITEMS", {})
        lefts = []
        outcome = gpu_suite.Outcome("ok", 1.0, [ROW])
        patch.setattr(gpu_suite, "run", lambda words, left, limit, env: lefts.append(left) or outcome)
        suite("--budget", "20")
    assert lefts == [10, 6]  # a limit of 10, then 20 - 2 * 7


def test_a_damaged_file_is_none(suite, tmp_path):
    path = tmp_path / "nvidia-h200" / "gpu_suite.json"
    path.parent.mkdir()
    path.write_text('{"items": ')
    suite.items |= {"a": GOOD}
    assert statuses(suite("--resume")[1]) == {"a": "ok"}


def test_kernels_are_handed_on_and_must_be_there(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("kernels")
    folder.mkdir()
    monkeypatch.setattr(gpu_items, "configs", lambda: LITTLE)
    for config in LITTLE[1:]:
        (folder / gate.linked_name(config)).touch()
    given = {"GNAFLEX_KERNELS": str(folder.resolve()), "GNAFLEX_PROOF": "trust", "PYTHONUNBUFFERED": "1"}
    suite.items |= {"a": f"assert {given}.items() <= os.environ.items(); {GOOD}"}
    assert gpu_suite.main(["--kernels", str(folder)]) == 1
    assert f"not run: kernels lacks {gate.linked_name(LITTLE[0])}." in capsys.readouterr().out
    (folder / gate.linked_name(LITTLE[0])).touch()
    assert statuses(suite("--kernels", str(folder))[1]) == {"a": "ok"}


def test_a_machine_without_git(suite, monkeypatch):
    def environment():
        raise FileNotFoundError("git")

    monkeypatch.setattr(gpu_suite, "environment", environment)
    suite.items |= {"a": GOOD}
    _, found = suite()
    assert found["environment"]["torch"] == torch.__version__


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 1
    assert capsys.readouterr().out.startswith("not run: this machine has no CUDA GPU.")


def test_items_print_rows_at_once(monkeypatch, capsys):
    def measure():
        yield gpu_items.row("first", [1.0, 2.0, 4.0], "ms", 3, 2, "a note")
        seen.append(gpu_suite._rows(capsys.readouterr().out))
        raise RuntimeError("too bad")

    seen = []
    monkeypatch.setattr(gpu_items, "ITEMS", {"one": gpu_items.Item(measure, 1)})
    with pytest.raises(RuntimeError, match="too bad"):
        gpu_suite.main(["--item", "one"])
    ((found,),) = seen
    assert (found["what"], found["median"], found["verdict"]) == ("first", 2.0, "aim")
    monkeypatch.setattr(gpu_items, "ITEMS", {"one": gpu_items.Item(lambda: iter(()), 1)})
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


def test_facts_of_the_gpu(monkeypatch, tmp_path):
    program(tmp_path / "nvidia-smi", 'echo "580.159.04, 1980 MHz, 345 MHz, 700.00 W, 30, 143771 MiB"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu_suite.gpu_facts()
    assert found["driver_version"] == "580.159.04"
    assert found["memory.total"] == "143771 MiB"
    program(tmp_path / "nvidia-smi", "exit 9")
    assert gpu_suite.gpu_facts() == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_suite.gpu_facts() == {}

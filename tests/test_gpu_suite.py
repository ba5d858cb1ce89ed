"""The GPU's tests and benchmarks where there is none: their checks on a stand-in, the command.

What they are to find out within minutes on a borrowed machine must not fail for a mistake of their own.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import test_gpu
import torch
from gnaflex.cuda_backend import cache, compile, gate
from gnaflex.cuda_backend.config import ARCHITECTURES, obstacles
from gnaflex.cuda_backend.fast_path import Problem
from hopper import hopper  # noqa: F401
from little import FEW, LITTLE
from programs import program
from stand_in import DTYPES, StandIn, at

from benchmarks import engine, gpu_items, gpu_suite, problems
from gnaflex.spec import GNA

CPU = torch.device("cpu")


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

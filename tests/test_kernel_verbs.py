"""``gnaflex compile`` and ``gnaflex doctor``: lines, tables, exit codes; two kernels are really compiled."""

from __future__ import annotations

import importlib.machinery
import io
import json
import re
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gnaflex.cuda_backend import cache, gate, machine, proof
from gnaflex.cuda_backend.config import ARCHITECTURES, DTYPES, HEAD_DIMS, RUN_ON
from hopper import hopper  # noqa: F401 (a fixture)

from gnaflex import dispatch, doctor, kernel_verbs
from gnaflex.cli import main
from gnaflex.doctor import Check
from gnaflex.paper import CONFIGURATIONS

CPU = torch.device("cpu")
VIDEO = ["6x12x20", "--window", "4x8x8", "--stride", "2x8x8"]
QUICK = [config.name for config in doctor.compiled(quick=True)]  # the first two are Hopper's
OBJECT = b"\x7fELF" + bytes(1230)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home directory that holds the cache; nothing is known of any kernel."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv(proof.SWITCH, raising=False)
    proof._known.clear()
    return tmp_path


@pytest.fixture
def built(monkeypatch):
    """The kernels that a compiler was asked for."""
    configs = []

    def build(config):
        configs.append(config)
        return OBJECT

    installed = types.ModuleType("cutlass")
    installed.__spec__ = importlib.machinery.ModuleSpec("cutlass", None)
    monkeypatch.setitem(sys.modules, "cutlass", installed)
    monkeypatch.setattr(doctor, "to_object", build)
    return configs


@pytest.fixture
def brief(monkeypatch, built):
    """A doctor without compilers: FlexAttention's takes long on a CPU."""
    monkeypatch.setattr(doctor, "BACKENDS", ("cuda", "sdpa", "reference"))


def run(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def cells(line):
    """Of a row of a GitHub table: | ends a cell, \\| does not."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [re.sub(r"\\(.)", r"\1", one.strip()) for one in re.findall(r"((?:\\.|[^\\|])*)\|", line)[1:]]


def table(out):
    """The rows by the name of the check: result and detail; and the last line."""
    head, rule, *rows = [line for line in out.splitlines() if line.startswith("|")]
    assert cells(head) == ["check", "result", "detail", "s"]
    assert re.fullmatch(r"\|(-+\|){4}", rule)
    found = {}
    for row in rows:
        name, result, detail, seconds = cells(row)
        assert re.fullmatch(r"\d+\.\d", seconds)
        assert result in doctor.RESULTS
        found[name] = result, detail
    assert len(found) == len(rows)
    return found, out.splitlines()[-1]


def examined(capsys, *words, code=0):
    """The table of a doctor that ends with this code."""
    found, out, err = run(capsys, "doctor", "--device", "cpu", *words)
    assert found == code, err
    rows, last = table(out)
    assert bool(err) == bool(code)
    return rows, last


# ---- gnaflex compile ---------------------------------------------------------------------------------


def test_doctor_compiles_kernels_and_compile_finds_them(capsys, monkeypatch, home):
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    monkeypatch.setattr(doctor, "BACKENDS", ("reference",))
    monkeypatch.setattr(doctor, "PROBLEMS", doctor.PROBLEMS[:1])
    rows, _ = examined(capsys, "--quick")
    for config in doctor.compiled(quick=True):
        code = cache.stored(config)
        assert code.startswith(b"\x7fELF")
        assert rows[f"compile {config.name}"] == ("ok", f"compiled, {len(code):,} bytes")
    code, out, err = run(capsys, "compile", *VIDEO, "--head-dim", "64")
    first, folder = out.splitlines()
    assert re.fullmatch(rf"{QUICK[0]}  already there  0\.\d s  [\d,]+ bytes", first)
    assert (code, folder, err) == (0, str(home / "kernels"), "")


def test_compile_of_a_problem(capsys, built, home):
    texts = ["--prefix", "2", "--head-dim", "64,128", "--head-dim", "64", "--dtype", "float16"]
    code, out, err = run(capsys, "compile", *VIDEO, *texts)
    names = [f"sm_90a-float16-{d}-2x8x8-2x8x8-text" for d in (64, 128)]
    assert [config.name for config in built] == names
    assert [cache.stored(config) for config in built] == [OBJECT, OBJECT]
    for line, name in zip(out.splitlines(), names, strict=False):
        assert re.fullmatch(rf"{name}  compiled  \d+\.\d s  1,234 bytes", line)
    assert (code, out.splitlines()[2:], err) == (0, [str(home / "kernels")], "")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compile_for_an_architecture(arch, capsys, built):
    words = ["24x32", "--window", "12x8", "--stride", "2x8", "--arch", arch]
    assert run(capsys, "compile", *words)[0] == 0
    keys = (12, 8) if arch == "sm_90a" else (6, 8)  # in pairs, more tiles that both see
    assert [(one.arch, one.q_box, one.kv_box) for one in built] == [(arch, (2, 8), keys)]


@pytest.mark.parametrize("text", ["prefix", "suffix", "extra-kv"])
def test_compile_with_extra_tokens(text, capsys, built):
    assert run(capsys, "compile", *VIDEO, f"--{text}", "3")[0] == 0
    assert [config.text for config in built] == [True]


def test_compile_without_a_problem_takes_those_of_the_paper(capsys, built):
    code, out, _ = run(capsys, "compile")
    names = [config.name for config in built]
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == names
    assert len(names) == len(set(names)) < len(CONFIGURATIONS)
    assert {"sm_90a-bfloat16-128-2x8x8-2x8x8", "sm_90a-bfloat16-128-8x16-8x16"} <= set(names)
    assert {config.rank for config in built} == {2, 3}
    assert {(config.head_dim, config.dtype, config.text) for config in built} == {(128, "bfloat16", False)}


def test_a_line_appears_when_its_kernel_is_done(monkeypatch):
    class Output(io.StringIO):
        shown = ""

        def flush(self):
            self.shown = self.getvalue()

    output, before = Output(), []

    def build(config):
        before.append(output.shown.count("compiled"))
        return OBJECT

    monkeypatch.setattr(doctor, "to_object", build)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["compile", *VIDEO, "--head-dim", "64,128"]) == 0
    assert before == [0, 1]


def test_an_interrupted_compile_keeps_what_is_done(capsys, monkeypatch):
    done = []

    def build(config):
        if done:
            raise KeyboardInterrupt
        done.append(config)
        return OBJECT

    monkeypatch.setattr(doctor, "to_object", build)
    code, out, err = run(capsys, "compile")
    assert (code, len(out.splitlines())) == (130, 1)
    assert "interrupted" in err
    assert cache.stored(done[0]) == OBJECT


@pytest.fixture
def ctrl_c():
    """Sets what Ctrl-C does; a process in the background starts with none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times, ends", [(1, True), (2, False)])
def test_ctrl_c_waits_for_the_compiler(times, ends, capsys, monkeypatch, ctrl_c):
    """CuTe DSL may abort the process when it is interrupted; a second Ctrl-C does not wait."""
    ended = []

    def build(config):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        ended.append(config)
        return OBJECT

    monkeypatch.setattr(doctor, "to_object", build)
    assert run(capsys, "compile") == (130, "", "gnaflex compile: interrupted.\n")
    assert bool(ended) == ends
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_what_it_was_after_a_kernel(capsys, built, ctrl_c):
    assert run(capsys, "compile", *VIDEO)[0] == 0
    assert len(built) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_ctrl_c_is_ignored_it_stays_so(capsys, monkeypatch, ctrl_c):
    def build(config):
        signal.raise_signal(signal.SIGINT)
        return OBJECT

    monkeypatch.setattr(doctor, "to_object", build)
    ctrl_c(signal.SIG_IGN)
    assert run(capsys, "compile", *VIDEO)[0] == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_kernels_compile_in_any_thread(built, ctrl_c):
    config = doctor.variants("sm_90a", quick=True)[0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(doctor.made, config).result() == ("compiled", len(OBJECT))


def test_compile_refuses_what_needs_masks_and_says_what_does_not(capsys, built):
    near = ["--prefix", "3", "--extra-kv", "1", "--head-dim", "64,128", "--dtype", "float16"]
    words = ["30x48x80", "--window", "18x24x24", "--stride", "1", "--dilation", "1x1x2", *near]
    code, out, err = run(capsys, "compile", *words)
    assert (code, out, built) == (1, "", [])
    assert "needs masks inside tiles" in err
    program, verb, *again = re.search("Nearest: (.*)", err)[1].split()
    assert (program, verb) == ("gnaflex", "compile")
    assert "--suffix" not in again
    assert "--arch" not in again
    assert again[-len(near) :] == near
    assert again[:3] == words[:3]
    assert again[again.index("--dilation") + 1] == "1x1x2"
    assert run(capsys, "compile", *again)[0] == 0
    assert [(config.head_dim, config.dtype, config.text) for config in built] == [
        (64, "float16", True),
        (128, "float16", True),
    ]


def test_the_suggested_command_is_short_where_the_given_one_is(capsys, built, monkeypatch):
    import gnaflex.cuda_backend

    other = gnaflex.GNA((64, 64), 16, 8, 1, (True, False))
    monkeypatch.setattr(gnaflex.cuda_backend, "nearest", lambda spec: other)
    words = ["compile", "64x64", "--window", "15x15", "--causal", "0"]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert err.endswith("Nearest: gnaflex compile 64x64 --window 16x16 --stride 8x8 --causal 0\n")
    monkeypatch.setattr(gnaflex.cuda_backend, "nearest", lambda spec: None)
    code, _, err = run(capsys, *words)
    assert (code, built) == (1, [])
    assert "No other strides change that" in err
    assert "Nearest" not in err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--arch", "sm_80"], "--arch must be sm_90a or sm_100a or sm_103a: got sm_80"),
        (["--head-dim", "64,96"], "--head-dim must be 64 or 128: got 96"),
        (["--head-dim", "64x128"], "'64x128' is not like 128, or 64,128"),
        (["--dtype", "float32"], "bfloat16"),
        (["--prefix", "-1"], "at least 0"),
        (["--window", "4"], "--window needs a SHAPE"),
        (["--stride", "4"], "--stride needs a SHAPE"),
        (["--dilation", "2"], "--dilation needs a SHAPE"),
        (["--causal", "0"], "--causal needs a SHAPE"),
        (["8x8"], "add --window"),
        (["4x4x4x4", "--window=-1"], "boxes need 1 to 3 axes"),
        ([*VIDEO, "--causal", "3"], "axes are 0 to 2"),
    ],
)
def test_mistakes(words, says, capsys, built):
    code, out, err = run(capsys, "compile", *words)
    assert (code, out, built) == (2, "", [])
    assert says in err
    assert len(err.splitlines()) <= 2


def test_compile_without_a_compiler(capsys, monkeypatch, home):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    code, out, err = run(capsys, "compile", *VIDEO)
    assert (code, out) == (2, "")
    assert "pip install 'gnaflex[cuda]'" in err
    assert len(err.splitlines()) == 1
    assert not [path for path in (home / "kernels").iterdir() if path.suffix != ".lock"]


def test_compile_where_nothing_can_be_kept(capsys, built, monkeypatch, home):
    (home / "file").touch()
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(home / "file" / "kernels"))
    code, out, err = run(capsys, "compile", *VIDEO)
    assert (code, out, built) == (1, "", [])
    assert str(home / "file" / "kernels") in err
    assert "export GNAFLEX_CACHE_DIR=" in err

    (home / "shared").mkdir()
    (home / "shared").chmod(0o777)
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(home / "shared"))
    code, out, err = run(capsys, "compile", *VIDEO)
    assert (code, out, built) == (1, "", [])
    assert "must be its user's alone" in err


def test_a_kernel_that_was_not_kept_is_no_success(capsys, built, monkeypatch, home):
    def full(entry, payload):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    cache._warn.cache_clear()
    with pytest.warns(UserWarning, match="No space left"):
        code, _, err = run(capsys, "compile", *VIDEO)
    assert (code, len(built)) == (1, 1)
    assert f"could not be kept in {home / 'kernels'}" in err


# ---- the doctor's table ------------------------------------------------------------------------------


def test_a_healthy_machine(capsys, brief, built):
    rows, last = examined(capsys, "--quick")
    assert list(rows) == [
        "masks",
        *(f"compile {name}" for name in QUICK),
        "kernels run",
        "cuda, float32",
        "sdpa, float32",
        "backward, float32",
    ]
    not_run = rows.pop("kernels run"), rows.pop("cuda, float32")
    for result, detail in not_run:
        assert result == "not checked"
        assert detail.startswith("it needs a Hopper or Blackwell")
    assert {result for result, _ in rows.values()} == {"ok"}
    assert [config.name for config in built] == QUICK
    assert last == "7 ok, 0 failed, 2 not checked"
    assert rows[f"compile {QUICK[0]}"][1] == "compiled, 1,234 bytes"
    rows, _ = examined(capsys, "--quick")
    assert rows[f"compile {QUICK[0]}"][1] == "already there, 1,234 bytes"


def test_the_whole_doctor(capsys, brief, built):
    rows, last = examined(capsys)
    kinds = {(config.arch, config.dtype, config.head_dim, config.rank, config.text) for config in built}
    assert len(built) == len(kinds) == 2 * len(DTYPES) * len(HEAD_DIMS) * 3 * 2 + 2
    assert {config.arch for config in built} == set(ARCHITECTURES)
    assert set(QUICK) <= {config.name for config in built}
    for config in built:
        assert rows.pop(f"compile {config.name}") == ("ok", "compiled, 1,234 bytes")
    assert list(rows) == [
        *("masks", "kernels run", "cuda, float32", "sdpa, float32"),
        *("cuda, bfloat16", "sdpa, bfloat16", "backward, float32"),
    ]
    assert len(rows["sdpa, bfloat16"][1].split("; ")) == len(doctor.PROBLEMS)
    assert last == "54 ok, 0 failed, 3 not checked"


def test_what_fails_is_told_and_the_others_go_on(capsys, monkeypatch):
    def broken():
        raise RuntimeError(f"a | b\nfile {Path.home()}/secret/lib.so, /opt/secret/x.py:3 <no tag>\n")

    given = [
        Check("one", lambda: ("ok", "")),
        Check("two", broken),
        Check("three", lambda: ("failed", "left | right\nbelow \\|")),
        Check("four", lambda: ("not checked", "no GPU")),
        Check("five", lambda: 1 / 0),
        Check("six", lambda: ("failed", f"{Path.home()}/a.o and {Path.home()}")),
    ]
    monkeypatch.setattr(doctor, "checks", lambda device, quick, again: given)
    code, out, err = run(capsys, "doctor")
    rows, last = table(out)
    assert rows == {
        "one": ("ok", ""),
        "two": ("failed", "RuntimeError: file …/lib.so, …/x.py:3 <no tag>"),
        "three": ("failed", "left | right below \\|"),
        "four": ("not checked", "no GPU"),
        "five": ("failed", "ZeroDivisionError: division by zero"),
        "six": ("failed", "~/a.o and ~"),
    }
    assert "\\<no tag>" in out
    assert last == "1 ok, 4 failed, 1 not checked"
    assert (code, err) == (1, "gnaflex doctor: 4 of 6 checks failed.\n")


def test_nothing_failed_is_success(capsys, monkeypatch):
    given = [Check("one", lambda: ("not checked", "no GPU"))]
    monkeypatch.setattr(doctor, "checks", lambda device, quick, again: given)
    assert run(capsys, "doctor")[0] == 0


def test_words_reach_the_checks(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "checks", lambda *args, **options: seen.append((args, options)) or [])
    assert run(capsys, "doctor", "--device", "cpu", "--again")[0] == 0
    assert run(capsys, "doctor", "--device", "cpu", "--quick")[0] == 0
    again, quick = {"quick": False, "again": True}, {"quick": True, "again": False}
    assert seen == [((CPU,), again), ((CPU,), quick)]


def test_an_interrupted_doctor(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    given = [Check("one", lambda: ("ok", "")), Check("two", stop), Check("three", stop)]
    monkeypatch.setattr(doctor, "checks", lambda device, quick, again: given)
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (130, "gnaflex doctor: interrupted.\n")
    assert "| one | ok |" in out


def test_a_device_that_is_not_there(capsys):
    code, out, err = run(capsys, "doctor", "--device", "nonsense")
    assert (code, out) == (2, "")
    assert "--device cpu" in err


# ---- facts -------------------------------------------------------------------------------------------


@pytest.fixture
def facts(capsys, monkeypatch):
    """The lines before the table."""

    def of(*words):
        monkeypatch.setattr(doctor, "checks", lambda device, quick, again: [])
        code, out, _ = run(capsys, "doctor", *words)
        assert code == 0
        assert str(Path.home()) not in out
        head = out.partition("\n\n")[0].splitlines()
        assert all(line.startswith("- ") for line in head)
        return head

    return of


def test_facts(facts, monkeypatch):
    monkeypatch.setenv("GNAFLEX_OTHER", f"{Path.home()}/other")
    lines = facts("--device", "cpu")
    assert any(line.startswith("- gnaflex 0.") for line in lines)
    for fact in (
        f"- torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "- device cpu: no GPU",
        "- kernels for sm_90a: compiled and checked statically, not run on a GPU by its authors",
        "- kernels for sm_100a: compiled and checked statically, not run on a GPU by its authors",
        "- kernels for sm_103a: compiled and checked statically, not run on a GPU by its authors",
        "- kernel cache: ~/kernels, can be used",
        "- GNAFLEX_CACHE_DIR=~/kernels",
        "- GNAFLEX_OTHER=~/other",
    ):
        assert fact in lines
    for package in ("Triton", "nvidia-cutlass-dsl"):
        (line,) = [line for line in lines if line.startswith(f"- {package} ")]
        assert re.fullmatch(r"none|\d+\.\d.*", line.split()[-1])


@pytest.mark.parametrize(
    "home, text, written",
    [
        ("/home/al", "/home/al/x /home/alice/x /home/al", "~/x /home/alice/x ~"),
        ("/", "/x/y", "/x/y"),
    ],
)
def test_home(home, text, written, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert kernel_verbs._without_home(text) == written


def test_versions_of_what_is_missing(facts, monkeypatch):
    monkeypatch.setattr(kernel_verbs.importlib.metadata, "version", missing)
    lines = facts("--device", "cpu")
    assert {"- Triton none", "- nvidia-cutlass-dsl none"} <= set(lines)


def missing(package):
    raise kernel_verbs.importlib.metadata.PackageNotFoundError(package)


def test_a_cache_that_cannot_be_used(facts, monkeypatch, home):
    (home / "kernels").touch()
    (line,) = [line for line in facts() if "kernel cache" in line]
    assert line.startswith("- kernel cache: ~/kernels, cannot be used: ~/kernels: ")
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", "~nobody-at-all/kernels")
    (line,) = [line for line in facts() if "kernel cache" in line]
    assert line.startswith("- kernel cache: no folder, cannot be used: ")


def test_facts_of_a_gpu(facts, monkeypatch):
    monkeypatch.setattr(kernel_verbs, "_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H200 (sm_90)")
    monkeypatch.setattr(machine, "driver", lambda: "575.1")
    monkeypatch.setattr(machine, "multiprocessors", lambda device: 132)
    monkeypatch.setitem(RUN_ON, "sm_90a", "an H200, 2026-12-01")
    lines = facts()
    assert "- device cuda:1: NVIDIA H200 (sm_90), driver 575.1, 132 multiprocessors" in lines
    assert "- kernels for sm_90a: run by their authors on an H200, 2026-12-01" in lines


# ---- masks and backends ------------------------------------------------------------------------------


def test_a_wrong_pair_is_found(monkeypatch):
    """One pair of one problem after another."""
    right = doctor.dense_mask
    for wrong, _ in doctor.MASKS:

        def dense_mask(spec, wrong=wrong, **options):
            mask = right(spec, **options)
            mask[-1, -1] ^= spec == wrong
            return mask

        monkeypatch.setattr(doctor, "dense_mask", dense_mask)
        result, detail = doctor.masks_are_exact(CPU)
        assert (result, detail) == ("failed", f"not the pairs of the definition: {wrong!r}")


@pytest.mark.parametrize("kind", ["kv", "full_kv"])
def test_a_lost_block_is_found(kind, monkeypatch):
    right = doctor.block_mask

    def block_mask(*args, **options):
        bm = right(*args, **options)
        getattr(bm, f"{kind}_num_blocks").zero_()
        return bm

    monkeypatch.setattr(doctor, "block_mask", block_mask)
    assert doctor.masks_are_exact(CPU)[0] == "failed"


def test_the_masks_ask_for_every_kind_of_problem():
    specs = [spec for spec, _ in doctor.MASKS]
    assert {spec.rank for spec in specs} == {1, 2, 3}
    for has in (
        lambda spec: max(spec.stride) > 1,
        lambda spec: max(spec.dilation) > 1,
        lambda spec: any(spec.is_causal),
    ):
        assert any(map(has, specs))
    assert any("prefix" in options for _, options in doctor.MASKS)


def sdpa_that(monkeypatch, change):
    right = dispatch.RUN["sdpa"]
    monkeypatch.setitem(dispatch.RUN, "sdpa", lambda call: change(right(call)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda x: x * 1.02, lambda x: x / 0 * 0], ids=["off", "nan"])
def test_a_wrong_output_is_found(change, dtype, monkeypatch):
    assert doctor.backend_agrees("sdpa", doctor.PROBLEMS, dtype, CPU)[0] == "ok"
    sdpa_that(monkeypatch, change)
    result, detail = doctor.backend_agrees("sdpa", doctor.PROBLEMS, dtype, CPU)
    assert result == "failed"
    assert re.match(r"error \S+ of at most \S+; error", detail)


def test_a_wrong_output_of_the_second_problem_is_found(monkeypatch):
    spec = doctor.PROBLEMS[1].spec
    right = dispatch.RUN["sdpa"]

    def wrong_there(call):
        return right(call) * (1.02 if call.record.order.spec == spec else 1)

    monkeypatch.setitem(dispatch.RUN, "sdpa", wrong_there)
    assert doctor.backend_agrees("sdpa", doctor.PROBLEMS[:1], torch.float32, CPU)[0] == "ok"
    assert doctor.backend_agrees("sdpa", doctor.PROBLEMS, torch.float32, CPU)[0] == "failed"


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is a little off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.02


def test_a_wrong_gradient_is_found(monkeypatch):
    result, detail = doctor.backward_agrees(torch.float32, CPU)
    assert (result, detail.count("of at most")) == ("ok", 3)
    assert detail.startswith("sdpa: error ")
    sdpa_that(monkeypatch, Wrong.apply)
    assert doctor.backward_agrees(torch.float32, CPU)[0] == "failed"


def test_no_backward(monkeypatch):
    nothing = dispatch.Explanation(None, {})
    monkeypatch.setattr(doctor, "explain", lambda *args: nothing)
    assert doctor.backward_agrees(torch.float32, CPU)[0] == "not checked"


def test_a_backend_that_cannot_run_says_why_first():
    result, detail = doctor.backend_agrees("cuda", doctor.PROBLEMS, torch.float32, CPU)
    assert (result, detail) == ("not checked", machine.obstacle(CPU))


# ---- kernels -----------------------------------------------------------------------------------------


def test_without_a_compiler(capsys, brief, monkeypatch):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    rows, last = examined(capsys, "--quick")
    said = "CuTe DSL is not installed: pip install 'gnaflex[cuda]'"
    assert rows["kernels compile"] == ("not checked", said)
    assert not any(name.startswith("compile ") for name in rows)
    assert last == "3 ok, 0 failed, 3 not checked"


def test_an_empty_kernel_and_a_failing_compiler(capsys, brief, monkeypatch):
    def build(config):
        if config.text:
            raise RuntimeError("ptxas said\nerror : no")
        return b""

    monkeypatch.setattr(doctor, "to_object", build)
    rows, last = examined(capsys, "--quick", code=1)
    assert rows[f"compile {QUICK[0]}"] == ("failed", "compiled, 0 bytes")
    assert rows[f"compile {QUICK[1]}"] == ("failed", "RuntimeError: error : no")
    assert last == "3 ok, 4 failed, 2 not checked"


def test_a_doctor_that_finds_its_kernels_imports_no_compiler():
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    for config in doctor.compiled(quick=True):
        cache.get(config, lambda config: OBJECT)
    code = (
        "import sys\n"
        "from gnaflex import doctor\n"
        "from gnaflex.cli import main\n"
        "doctor.BACKENDS = ()\n"
        "assert main(['doctor', '--quick', '--device', 'cpu']) == 0\n"
        "assert 'cutlass' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already there") == len(QUICK)


def test_kernels_are_right_on_a_gpu(hopper):  # noqa: F811
    result, detail = doctor.backend_agrees("cuda", doctor.PROBLEMS, torch.bfloat16, CPU)
    assert result == "ok"
    assert len(hopper) == len(doctor.PROBLEMS)
    assert detail.count("of at most") == 2


@pytest.fixture
def says(hopper, brief, monkeypatch):  # noqa: F811
    """What a kernel's child process says, on a GPU of which nothing is known."""
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H200 (sm_90)")
    monkeypatch.setattr(machine, "driver", lambda: "575.1")
    monkeypatch.setattr(doctor, "PROBLEMS", doctor.PROBLEMS[:1])

    def said(outcome, reason=""):
        answer = json.dumps({"outcome": outcome, "reason": reason})
        monkeypatch.setattr(gate, "command", lambda config, device: ["echo", answer])

    return said


RUN = f"run {QUICK[0]}"


def test_kernels_are_proved(says, capsys):
    says("proved")
    rows, _ = examined(capsys, "--quick")
    assert rows[RUN] == ("ok", "proved")
    assert "kernels run" not in rows


@pytest.mark.filterwarnings("error")
def test_a_kernel_that_fails_is_tried_again_on_request(says, capsys):
    says("failed", "clipped tiles: error 1 exceeds 0.1")
    rows, last = examined(capsys, "--quick", code=1)
    hint = "; gnaflex doctor --again tries once more"
    assert rows[RUN] == ("failed", f"failed: clipped tiles: error 1 exceeds 0.1{hint}")
    assert " 1 failed," in last
    says("proved")
    assert examined(capsys, "--quick", code=1)[0][RUN][0] == "failed"
    assert examined(capsys, "--quick", "--again")[0][RUN] == ("ok", "proved")
    says("failed", "late")
    assert examined(capsys, "--quick")[0][RUN] == ("ok", "proved")
    assert examined(capsys, "--quick", "--again", code=1)[0][RUN] == ("failed", "failed: late")


def test_a_kernel_that_could_not_be_tried(says, capsys):
    says("inconclusive", "out of memory")
    assert examined(capsys, "--quick")[0][RUN] == ("not checked", "inconclusive: out of memory")


@pytest.mark.parametrize("setting, outcome", [("trust", "trusted"), ("never", "failed")])
def test_a_switch_is_no_fault_of_a_kernel(setting, outcome, says, capsys, monkeypatch):
    monkeypatch.setenv(proof.SWITCH, setting)
    says("failed", "not asked")
    rows, _ = examined(capsys, "--quick")
    assert rows[RUN] == ("not checked", f"{outcome}: {proof.SWITCH}={setting}")


def test_a_switch_that_makes_no_sense(says, capsys, monkeypatch):
    monkeypatch.setenv(proof.SWITCH, "maybe")
    rows, _ = examined(capsys, "--quick", code=1)
    assert rows[RUN][0] == "failed"
    assert "GNAFLEX_PROOF=run" in rows[RUN][1]

"""The gate in front of compiled kernels: what a check may do, what is kept of it, and who runs it.

The checks are stand-ins: a few lines of Python in a process of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from gnaflex.cuda_backend import proof
from gnaflex.cuda_backend.proof import Subject, Verdict, forget, now_is_no_time, recorded, verdict

from gnaflex.spec import GNAError

SUBJECT = Subject("NVIDIA H200 (sm_90)", "580.159.04", "0.1.0", "c0ffee")
OTHER = SUBJECT._replace(variant="decade")
LIMIT_S = 20.0  # far more than any stand-in takes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that knows nothing."""
    folder = tmp_path / "home" / "cache"  # neither exists
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(folder))
    for name in ("GNAFLEX_PROOF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(proof, "_warned", {})
    forget_memory(monkeypatch)
    return folder


def forget_memory(monkeypatch):
    monkeypatch.setattr(proof, "_known", {})


def python(code):
    return [sys.executable, "-I", "-S", "-c", code]


def answer(outcome, reason=""):
    return f"print({json.dumps({'outcome': outcome, 'reason': reason})!r})"


class Counted:
    """A stand-in that says ``outcome``, and how often it has run."""

    def __init__(self, path, outcome="proved", seconds=0.0):
        self.path = path
        note = f"import os, time; f = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)"
        self.command = python(f"{note}; os.write(f, b'x'); time.sleep({seconds})\n{answer(outcome, 'why')}")

    @property
    def runs(self):
        return len(self.path.read_bytes()) if self.path.exists() else 0


@pytest.fixture
def counted(tmp_path):
    return Counted(tmp_path / "runs")


def failure(command, subject=SUBJECT, limit_s=LIMIT_S):
    """The reason of a verdict that must be a failure, with its warning."""
    with pytest.warns(RuntimeWarning, match=subject.variant):
        found = verdict(subject, command, limit_s=limit_s)
    assert found.outcome == "failed"
    assert not found.passes
    return found.reason


def holder(path):
    """Code of a process that holds a lock for as long as it lives: so one sees even a zombie dead."""
    return (
        "import fcntl, os, time\n"
        f"f = open({str(path) + '.new'!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        f"f.write(str(os.getpid())); f.flush(); os.rename(f.name, {str(path)!r}); time.sleep(60)"
    )


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.01)


def is_alive(path, patience_s=0.0):
    """Whether the process of :func:`holder` lives, at the latest after ``patience_s``."""
    end = time.monotonic() + patience_s
    with open(path) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                if time.monotonic() >= end:
                    return True
            time.sleep(0.01)


def fork(call):
    """Run ``call()`` in a forked child; its process id, and a pipe that brings what it returned, as JSON."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12, of forks among threads
        pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(write)
    return pid, open(read)


def result(child):
    pid, pipe = child
    with pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(said)


def in_fork(call):
    return result(fork(call))


def in_process(call):
    """Like :func:`fork`, but the child takes itself for a process of its own."""

    def alone():
        proof._is_forked = False
        return call()

    return fork(alone)


# ---- what a check says ---------------------------------------------------------------------------------


def test_a_check_that_agrees_proves_the_kernel():
    found = verdict(SUBJECT, python("print('compiling')\n" + answer("proved", "all equal")), limit_s=LIMIT_S)
    assert found == Verdict("proved", "")
    assert found.passes
    assert recorded(SUBJECT) == found
    assert recorded(OTHER) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (answer("failed", "row 7 is off by 0.5"), "row 7 is off by 0.5"),
        ("import os; os.abort()", "killed by signal 6 (Abort"),
        ("import sys; print('a\\nsaid \\n', file=sys.stderr); sys.exit(3)", "status 3 and no verdict: said"),
        (answer("proved") + "; import sys; sys.exit(1)", "ended with exit status 1"),
        (answer("proved") + "; print('freeing')", "exit status 0 and no verdict"),
        ("", "exit status 0 and no verdict"),
        (answer("trusted"), "no verdict"),
        (answer("pending"), "no verdict"),
        ("print('[1]')", "no verdict"),
        ("print('{\"outcome\": \"proved\"}')", "no verdict"),
        ("print('[' * 60000)", "no verdict"),
        ("import sys; sys.exit('--a and --b are mutually exclusive')", "exit status 1"),
    ],
)  # fmt: skip
def test_everything_else_is_a_failure(code, words):
    assert words in failure(python(code))
    assert recorded(SUBJECT).outcome == "failed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_was_ended_from_outside_says_nothing(number):
    found = proof.verdict(SUBJECT, python(f"import os; os.kill(os.getpid(), {int(number)})"))
    assert (found.outcome, proof.recorded(SUBJECT).outcome) == ("inconclusive", "inconclusive")
    assert "was killed by signal" in found.reason


def test_a_signal_without_a_name_has_a_number():
    assert "signal 40" in failure(python("import os; os.kill(os.getpid(), 40)"))


def test_a_quote_is_at_most_200_characters():
    reason = failure(python(f"import sys; sys.exit('{'y' * 500}')"))
    assert reason.endswith(": " + "y" * 200)


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "MemoryError",
        "OSError: [Errno 12] Cannot allocate memory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "exclusive-thread device already in use by a different thread",
        "RuntimeError: no CUDA-capable device is detected",
    ],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_room_on_the_device_is_no_failure(text, stream, caplog):
    code = f"import sys; print({text!r}, file=sys.{stream}); print('bye', file=sys.stderr); sys.exit(1)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verdict(SUBJECT, python(code), limit_s=LIMIT_S)
    assert found == Verdict("inconclusive", f"no room for a check: {text}")
    assert not found.passes
    assert text in caplog.text


def test_a_check_may_say_itself_that_it_is_inconclusive():
    found = verdict(SUBJECT, python(answer("inconclusive", "busy")), limit_s=LIMIT_S)
    assert found == Verdict("inconclusive", "busy")


def test_a_program_that_cannot_start_says_nothing_about_the_kernel(tmp_path):
    found = verdict(SUBJECT, [str(tmp_path / "no such program")])
    assert found.outcome == "inconclusive"
    assert "could not be started" in found.reason
    assert "no such program" in found.reason


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path):
    lock = tmp_path / "lock"
    code = "import os, subprocess, sys, time\n"
    code += f"subprocess.Popen([sys.executable, '-c', {holder(lock)!r}])\n"
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    assert failure(python(code), limit_s=2.0) == "no answer within 2 s"
    wait_for(lock)
    assert not is_alive(lock, patience_s=5)
    with pytest.raises(ChildProcessError):  # no zombie either
        os.waitpid(int((tmp_path / "pid").read_text()), os.WNOHANG)


def test_what_a_check_leaves_behind_is_killed_too(tmp_path):
    lock = tmp_path / "lock"
    code = f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {holder(lock)!r}])\n"
    code += f"while not os.path.exists({str(lock)!r}): time.sleep(0.01)\n"
    assert verdict(SUBJECT, python(code + answer("proved")), limit_s=LIMIT_S).outcome == "proved"
    assert not is_alive(lock, patience_s=5)


def test_a_detached_process_that_keeps_the_pipes_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "DRAIN_S", 0.1)
    lock = tmp_path / "lock"
    code = "import os, subprocess, sys, time\n"
    code += f"subprocess.Popen([sys.executable, '-c', {holder(lock)!r}], start_new_session=True)\n"
    code += f"while not os.path.exists({str(lock)!r}): time.sleep(0.01)\n"
    threads = threading.enumerate()
    try:
        assert verdict(SUBJECT, python(code + answer("proved")), limit_s=LIMIT_S).outcome == "proved"
        assert is_alive(lock)
        assert all(thread.daemon for thread in threading.enumerate() if thread not in threads)
    finally:
        os.kill(int(lock.read_text()), signal.SIGKILL)


def test_a_process_that_cannot_be_killed_is_left(tmp_path, monkeypatch):
    lock, kill = tmp_path / "lock", os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, signal: None)
    monkeypatch.setattr(proof, "END_S", 0.1)
    monkeypatch.setattr(proof, "DRAIN_S", 0.1)
    try:
        assert failure(python(holder(lock)), limit_s=1.0) == "no answer within 1 s"
        wait_for(lock)
        assert is_alive(lock)
    finally:
        kill(int(lock.read_text()), signal.SIGKILL)


def test_ten_megabytes_of_output():
    code = "import sys\nfor f in (sys.stdout, sys.stderr): f.write(('x' * 79 + '\\n') * 65536)\n"
    assert verdict(SUBJECT, python(code + answer("proved")), limit_s=LIMIT_S).outcome == "proved"


def test_only_the_last_of_the_output_is_kept():
    code = "import sys\nprint('out of memory', 'x' * 70000, file=sys.stderr)\nsys.exit('the end')"
    assert "the end" in failure(python(code))


def test_output_that_is_no_text_is_read():
    code = "import os\nos.write(2, b'\\xff\\n')\nos.write(1, b'\\xff\\n')\n"
    assert verdict(SUBJECT, python(code + answer("proved")), limit_s=LIMIT_S).outcome == "proved"


def test_a_check_has_no_input():
    code = f"import sys\nassert sys.stdin.read() == ''\n{answer('proved')}"
    read, write = os.pipe()
    os.write(write, b"typed")
    os.close(write)
    ours = os.dup(0)
    os.dup2(read, 0)
    try:
        assert verdict(SUBJECT, python(code), limit_s=LIMIT_S).outcome == "proved"
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(read)


def test_ctrl_c_kills_the_check_and_goes_through(tmp_path):
    lock = tmp_path / "lock"

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            verdict(SUBJECT, python(holder(lock)))
        assert recorded(SUBJECT) is None
        return verdict(SUBJECT, python(answer("proved")))

    child = in_process(interrupted)
    wait_for(lock)
    os.kill(child[0], signal.SIGINT)
    assert result(child) == ["proved", ""]
    assert not is_alive(lock, patience_s=5)


# ---- what is kept --------------------------------------------------------------------------------------


def test_a_check_runs_once(counted, monkeypatch):
    for _ in range(2):
        assert verdict(SUBJECT, counted.command, limit_s=LIMIT_S).outcome == "proved"
    forget_memory(monkeypatch)  # as a new process
    assert recorded(SUBJECT) == Verdict("proved", "")
    assert verdict(SUBJECT, counted.command, limit_s=LIMIT_S).outcome == "proved"
    assert counted.runs == 1


def test_what_came_from_disk_is_remembered(counted, cache, monkeypatch):
    verdict(SUBJECT, counted.command, limit_s=LIMIT_S)
    forget_memory(monkeypatch)
    recorded(SUBJECT)
    for path in cache.glob("proofs/*.json"):
        path.unlink()
    assert recorded(SUBJECT) == Verdict("proved", "")


def test_a_failure_is_kept_and_warned_of_by_the_next_process(tmp_path, monkeypatch):
    counted = Counted(tmp_path / "runs", "failed")
    assert failure(counted.command) == "why"
    forget_memory(monkeypatch)
    monkeypatch.setattr(proof, "_warned", {})
    assert failure(counted.command) == "why"
    assert counted.runs == 1


def test_a_record(counted, cache):
    umask = os.umask(0)
    try:
        verdict(SUBJECT, counted.command, limit_s=LIMIT_S)
    finally:
        os.umask(umask)
    (path,) = cache.glob("proofs/*.json")
    entry = json.loads(path.read_text())
    assert len(path.stem) == 32
    assert int(path.stem, 16) >= 0
    assert time.strptime(entry.pop("date"), "%Y-%m-%dT%H:%M:%S+00:00")
    assert 0 < entry.pop("seconds") < LIMIT_S
    assert entry == {**SUBJECT._asdict(), "outcome": "proved", "reason": ""}
    assert {stat.S_IMODE(p.stat().st_mode) for p in cache.glob("proofs/*.*")} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (cache, cache / "proofs")} == {0o700}
    assert not list(cache.glob("proofs/*.tmp"))


@pytest.mark.parametrize("field", Subject._fields)
def test_another_subject_is_proved_anew(counted, cache, field):
    verdict(SUBJECT, counted.command, limit_s=LIMIT_S)
    verdict(SUBJECT._replace(**{field: "another"}), counted.command, limit_s=LIMIT_S)
    assert counted.runs == 2
    assert len(list(cache.glob("proofs/*.json"))) == 2


GOOD = {**SUBJECT._asdict(), "outcome": "proved", "reason": ""}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        json.dumps(GOOD).encode()[:-1],
        b"[" * 100_000,
        b"[]",
        json.dumps(GOOD | {"outcome": "inconclusive"}).encode(),
        json.dumps(GOOD | {"outcome": "trusted"}).encode(),
        json.dumps(GOOD | {"reason": 1}).encode(),
        json.dumps(GOOD | {"driver": "1.0"}).encode(),
        json.dumps(GOOD | {"variant": ["c0ffee"]}).encode(),
        json.dumps({"outcome": "proved", "reason": ""}).encode(),
    ],
)
def test_a_record_that_is_damaged_or_of_something_else_is_none(counted, cache, monkeypatch, content):
    verdict(SUBJECT, counted.command, limit_s=LIMIT_S)
    (path,) = cache.glob("proofs/*.json")
    path.write_bytes(content)
    forget_memory(monkeypatch)
    assert recorded(SUBJECT) is None
    assert verdict(SUBJECT, counted.command, limit_s=LIMIT_S).outcome == "proved"
    assert counted.runs == 2
    forget_memory(monkeypatch)
    assert recorded(SUBJECT) == Verdict("proved", "")


def file_in_the_way(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("not a folder")


def no_home(cache, monkeypatch):
    def folder():
        raise GNAError("no home")

    monkeypatch.setattr(proof, "folder", folder)


def full_disk(cache, monkeypatch):
    def replace(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("fault", [file_in_the_way, no_home, full_disk])
def test_without_a_record_the_verdict_holds_in_this_process(counted, cache, monkeypatch, fault):
    fault(cache, monkeypatch)
    for _ in range(2):
        assert verdict(SUBJECT, counted.command, limit_s=LIMIT_S).outcome == "proved"
    assert counted.runs == 1
    assert not list(cache.glob("proofs/*.tmp"))
    forget_memory(monkeypatch)
    assert recorded(SUBJECT) is None


def test_an_inconclusive_check_is_tried_again_after_ten_minutes(tmp_path, cache, monkeypatch):
    counted, clock, later = Counted(tmp_path / "runs", "inconclusive"), time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
    for later[0], runs in ((0.0, 1), (570.0, 1), (601.0, 2)):
        assert verdict(SUBJECT, counted.command, limit_s=LIMIT_S) == Verdict("inconclusive", "why")
        assert counted.runs == runs
    assert not list(cache.glob("proofs/*.json"))


def test_forgetting_one_subject(counted, monkeypatch):
    for subject in (SUBJECT, OTHER):
        verdict(subject, counted.command, limit_s=LIMIT_S)
    forget(SUBJECT)
    forget(SUBJECT)
    forget_memory(monkeypatch)
    assert recorded(SUBJECT) is None
    assert recorded(OTHER) == Verdict("proved", "")


@pytest.mark.parametrize("subject", [SUBJECT, None])
def test_what_is_forgotten_is_checked_again_and_warned_of_again(tmp_path, subject):
    counted = Counted(tmp_path / "runs", "failed")
    forget(subject)
    failure(counted.command)
    forget(subject)
    assert recorded(SUBJECT) is None
    failure(counted.command)
    assert counted.runs == 2


def test_forgetting_one_subject_leaves_the_others_warned_of(tmp_path):
    counted = Counted(tmp_path / "runs", "failed")
    for subject in (SUBJECT, OTHER):
        failure(counted.command, subject)
    forget(SUBJECT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdict(OTHER, counted.command).outcome == "failed"


def test_forgetting_everything(counted, cache):
    for subject in (SUBJECT, OTHER):
        verdict(subject, counted.command, limit_s=LIMIT_S)
    forget()
    assert recorded(SUBJECT) is recorded(OTHER) is None
    assert len(list(cache.glob("proofs/*.lock"))) == 1  # another process may wait for it


@pytest.mark.parametrize("subject", [SUBJECT, None])
def test_a_record_that_cannot_be_removed(counted, cache, subject):
    verdict(SUBJECT, counted.command, limit_s=LIMIT_S)
    (path,) = cache.glob("proofs/*.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(GNAError, match=f"rm -r {path}"):
        forget(subject)


# ---- switch, warning, log --------------------------------------------------------------------------------


def test_the_switch_trusts_without_a_check(counted, monkeypatch):
    monkeypatch.setenv("GNAFLEX_PROOF", "trust")
    found = verdict(SUBJECT, counted.command)
    assert found == Verdict("trusted", "GNAFLEX_PROOF=trust")
    assert found.passes
    assert counted.runs == 0
    assert recorded(SUBJECT) is None


def test_the_switch_never_trusts(counted, monkeypatch):
    assert verdict(SUBJECT, counted.command).passes
    monkeypatch.setenv("GNAFLEX_PROOF", "never")
    assert failure(counted.command) == "GNAFLEX_PROOF=never"
    assert counted.runs == 1
    assert recorded(SUBJECT).passes


def test_the_switch_runs_checks(counted, monkeypatch):
    monkeypatch.setenv("GNAFLEX_PROOF", "run")
    assert verdict(SUBJECT, counted.command).outcome == "proved"
    assert counted.runs == 1


@pytest.mark.parametrize("value", ["", "yes", "RUN"])
def test_the_switch_has_three_values(counted, monkeypatch, value):
    monkeypatch.setenv("GNAFLEX_PROOF", value)
    with pytest.raises(GNAError, match=f"must be run, trust or never: got '{value}'"):
        verdict(SUBJECT, counted.command)
    assert counted.runs == 0


def test_a_failure_is_warned_of_once_per_subject():
    command = python(answer("failed", "row 7 is off"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for subject in (SUBJECT, SUBJECT, OTHER, SUBJECT):
            verdict(subject, command, limit_s=LIMIT_S)
    assert [w.category for w in caught] == [RuntimeWarning] * 2
    assert [w.filename for w in caught] == [__file__] * 2
    text = str(caught[0].message)
    for words in ("c0ffee", "NVIDIA H200 (sm_90)", "row 7 is off", "FlexAttention", "gnaflex doctor"):
        assert words in text
    assert "decade" in str(caught[1].message)


def test_a_check_announces_itself(counted, caplog):
    caplog.set_level(logging.INFO, "gnaflex")
    verdict(SUBJECT, counted.command, limit_s=90)
    verdict(SUBJECT, counted.command, limit_s=90)
    (line,) = caplog.messages
    for words in ("c0ffee", "once on this machine", "NVIDIA H200 (sm_90)", "90 s"):
        assert words in line


# ---- many at once --------------------------------------------------------------------------------------


def test_four_processes_run_one_check(tmp_path):
    counted = Counted(tmp_path / "runs", seconds=1.0)
    children = [in_process(lambda: verdict(SUBJECT, counted.command)) for _ in range(4)]
    assert [result(child) for child in children] == [["proved", ""]] * 4
    assert counted.runs == 1


def in_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


@contextlib.contextmanager
def a_check_under_way(tmp_path):
    started, go = tmp_path / "started", tmp_path / "go"
    code = f"import os, time\nopen({str(started)!r}, 'w')\n"
    code += f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    (thread,) = in_threads(lambda: verdict(SUBJECT, python(code + answer("proved"))))
    wait_for(started)

    def end():
        go.touch()
        thread.join()

    try:
        yield end
    finally:
        end()


@pytest.mark.parametrize("locks", ["file locks", "none"])
def test_four_threads_run_one_check(tmp_path, monkeypatch, locks):
    if locks == "none":
        monkeypatch.setattr(proof, "fcntl", None)
    counted, found = Counted(tmp_path / "runs", "failed", seconds=0.3), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in in_threads(*[lambda: found.append(verdict(SUBJECT, counted.command))] * 4):
            thread.join()
    assert found == [Verdict("failed", "why")] * 4
    assert counted.runs == 1
    assert len(caught) == 1


def test_a_thread_that_waits_too_long_goes_on_without(tmp_path, counted, monkeypatch):
    subject = OTHER._replace(device="NVIDIA B200")  # whose lock file is free
    with a_check_under_way(tmp_path):
        monkeypatch.setattr(proof, "PATIENCE_S", -LIMIT_S)
        found = verdict(subject, counted.command, limit_s=LIMIT_S)
    assert found.outcome == "pending"
    assert not found.passes
    assert recorded(subject) is None
    assert counted.runs == 0


def test_one_check_at_a_time_on_a_device(counted, cache, monkeypatch):
    assert verdict(SUBJECT, counted.command).passes
    monkeypatch.setattr(proof, "PATIENCE_S", -LIMIT_S)
    (lock,) = cache.glob("proofs/*.lock")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert verdict(OTHER, counted.command, limit_s=LIMIT_S).outcome == "pending"
        assert recorded(OTHER) is None
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert verdict(OTHER, counted.command, limit_s=LIMIT_S).outcome == "proved"
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert verdict(OTHER._replace(device="NVIDIA B200"), counted.command, limit_s=LIMIT_S).passes
    forget(OTHER)
    assert verdict(OTHER, counted.command, limit_s=LIMIT_S).outcome == "proved"


def test_the_lock_file_is_closed(counted, cache):
    verdict(SUBJECT, counted.command)
    (lock,) = cache.glob("proofs/*.lock")
    for descriptor in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the listing had one itself
            assert not os.path.samestat(os.fstat(int(descriptor)), lock.stat())


def test_a_file_system_without_locks(counted, monkeypatch):
    def flock(file, how):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert verdict(SUBJECT, counted.command).outcome == "proved"


def test_a_platform_without_locks_and_forks(tmp_path):
    script = (
        "import os, sys, torch.utils.data\n"
        "import gnaflex\n"
        "del os.register_at_fork\n"
        "from gnaflex.cuda_backend import cache\n"
        "sys.modules['fcntl'] = None\n"
        "from gnaflex.cuda_backend.proof import Subject, verdict\n"
        f"print(verdict(Subject(*{tuple(SUBJECT)!r}), {python(answer('proved'))!r}).outcome)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "proved"


# ---- no time for a check ---------------------------------------------------------------------------------


def test_a_forked_process_waits_for_another_to_prove(counted, monkeypatch):
    assert now_is_no_time() == ""
    pending = ["pending", "this is a forked worker process"]
    assert in_fork(lambda: verdict(SUBJECT, counted.command)) == pending
    assert counted.runs == 0
    assert verdict(SUBJECT, counted.command).outcome == "proved"
    forget_memory(monkeypatch)
    assert in_fork(lambda: verdict(SUBJECT, counted.command)) == ["proved", ""]
    assert counted.runs == 1


def test_a_fork_during_a_check_leaves_no_lock_held_in_the_child(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(proof, "PATIENCE_S", -LIMIT_S)
    subject = OTHER._replace(device="NVIDIA B200")  # whose lock file is free

    def check():
        proof.now_is_no_time = str
        return verdict(subject, counted.command, limit_s=LIMIT_S)

    with a_check_under_way(tmp_path):
        assert in_fork(check) == ["proved", ""]


def test_a_fork_during_a_check_does_not_keep_the_device(tmp_path, counted, monkeypatch):
    with a_check_under_way(tmp_path) as end:
        pid, pipe = fork(lambda: time.sleep(60))
        end()
    try:
        monkeypatch.setattr(proof, "PATIENCE_S", -LIMIT_S)
        assert verdict(OTHER, counted.command, limit_s=LIMIT_S).outcome == "proved"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pipe.close()


def test_no_check_in_a_data_loader_worker(counted, monkeypatch):
    monkeypatch.setattr(proof, "get_worker_info", object)
    assert verdict(SUBJECT, counted.command) == Verdict("pending", "this is a forked worker process")
    assert counted.runs == 0


def test_no_check_while_tracing(counted):
    found = []

    @torch.library.custom_op("gnaflex_tests::checked", mutates_args=())
    def checked(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @checked.register_fake
    def _(x):
        found.append(verdict(SUBJECT, counted.command))
        return torch.empty_like(x)

    torch.compile(lambda x: checked(x) + 1, backend="eager", fullgraph=True)(torch.zeros(1))
    assert set(found) == {Verdict("pending", "torch.compile is tracing")}
    assert counted.runs == 0
    assert verdict(SUBJECT, counted.command).outcome == "proved"


def test_the_time_can_be_asked_for_in_what_is_traced():
    def reason(x):
        return x + len(now_is_no_time())

    traced = torch.compile(reason, backend="eager", fullgraph=True)
    assert traced(torch.zeros(1)).item() == len("torch.compile is tracing")


def test_no_check_while_a_graph_is_captured(counted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verdict(SUBJECT, counted.command) == Verdict("pending", "a CUDA graph is being captured")
    assert counted.runs == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert verdict(SUBJECT, counted.command).outcome == "proved"


def test_cuda_is_not_asked_before_it_is_in_use(monkeypatch):
    def asked():
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    assert now_is_no_time() == ""


def test_a_record_counts_at_any_time(counted, monkeypatch):
    verdict(SUBJECT, counted.command)
    forget_memory(monkeypatch)
    monkeypatch.setattr(proof, "now_is_no_time", lambda: "busy")
    assert verdict(SUBJECT, counted.command).outcome == "proved"
    assert verdict(OTHER, counted.command) == Verdict("pending", "busy")

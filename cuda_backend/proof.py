"""A compiled kernel passes a check once per machine before calls are trusted to it.

The check is a program that runs the kernel on a few small problems and compares: in a process of its own, so
that a crash or a hang costs a time limit and not the user's run. What it says is kept per device, driver,
version of gnaflex and variant, in memory and as a file of the kernel cache.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

import torch
from gnaflex.cuda_backend.cache import folder
from torch._guards import TracingContext
from torch.utils.data import get_worker_info

from gnaflex.spec import GNAError

try:
    import fcntl
except ImportError:  # Windows: no lock, so that several processes may run the same check
    fcntl = None  # type: ignore[assignment]

SWITCH = "GNAFLEX_PROOF"
PATIENCE_S = 30.0  # beyond the time limit of a check, for another process that runs one on the device
AGAIN_S = 600.0  # until a check that came to no conclusion is tried again
END_S = 10.0  # for a killed check to go: a wedged driver can keep it for ever
DRAIN_S = 1.0  # for the rest of its output, which a process that it detached may hold open
POLL_S = 0.05
KEPT_BYTES = 64 * 1024  # of each output, the last
QUOTE = 200  # characters
# The device is somebody else's for now, in the words of CUDA, torch and Python: nothing about the kernel.
CROWDED = re.compile(
    r"out[ _]?of[ _]?memory|MemoryError|cannot allocate memory|bad_alloc|busy or unavailable"
    r"|(?<!mutually )exclusive|no CUDA-capable device",
    re.IGNORECASE,
)

log = logging.getLogger("gnaflex")


class Subject(NamedTuple):
    """What is proved: ``device`` like "NVIDIA H200 (sm_90)", its driver, the version of gnaflex, and the
    hex key of the compiled kernel."""

    device: str
    driver: str
    version: str
    variant: str


class Verdict(NamedTuple):
    """What is known of a subject, and the reason in a sentence, empty if it is proved."""

    outcome: Literal["proved", "failed", "inconclusive", "pending", "trusted"]
    reason: str

    @property
    def passes(self) -> bool:
        """Whether calls may go to the kernel."""
        return self.outcome in ("proved", "trusted")


_known: dict[Subject, tuple[Verdict, float]] = {}  # and until when, on the monotonic clock
_warned: dict[Subject, object] = {}
_turn = threading.Lock()
_is_forked = False


def _after_fork() -> None:
    global _turn, _is_forked
    _turn, _is_forked = threading.Lock(), True  # the old one may be held by a thread that is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def verdict(subject: Subject, command: Sequence[str], *, limit_s: float = 120.0) -> Verdict:
    """What is known of a kernel; its first use runs ``command``, for at most ``limit_s`` seconds.

    The command exits with 0, and the last line that it prints is ``{"outcome": "proved" | "failed" |
    "inconclusive", "reason": str}``. Whatever else it does is a failure, but for a lack of memory or of a
    free device, which is inconclusive and tried again after ten minutes. "pending" is the answer where no
    check can run now (:func:`now_is_no_time`), or where another process takes too long over its own.

    The environment variable GNAFLEX_PROOF is "run" (default), "trust" (no check, calls are trusted) or
    "never" (no check, calls go elsewhere).

    Warns:
        RuntimeWarning: the outcome is "failed"; once per process and subject.

    Raises:
        GNAError: GNAFLEX_PROOF has another value.
    """
    found = decided(subject)
    if found is None:
        found = _first_use(subject, command, limit_s)
        if found.outcome == "failed":
            _warn_once(subject, found.reason)
    return found


def decided(subject: Subject) -> Verdict | None:
    """What the environment variable or a record says, None if a check must tell; warnings and errors are
    those of :func:`verdict`."""
    setting = os.environ.get(SWITCH, "run")
    if setting not in ("run", "trust", "never"):
        raise GNAError(f"{SWITCH} must be run, trust or never: got {setting!r}. Use export {SWITCH}=run.")
    if setting == "trust":
        return Verdict("trusted", f"{SWITCH}=trust")
    found = Verdict("failed", f"{SWITCH}=never") if setting == "never" else recorded(subject)
    if found is not None and found.outcome == "failed":
        _warn_once(subject, found.reason)
    return found


def recorded(subject: Subject) -> Verdict | None:
    """What is known without running anything: from memory, else from disk."""
    found, until = _known.get(subject, (None, 0.0))
    if found is not None and time.monotonic() < until:
        return found
    if (found := _read(subject)) is not None:
        _known[subject] = found, math.inf
    return found


def forget(subject: Subject | None = None) -> None:
    """Drop what is known of one subject, or of all: in this process, and the records on disk.

    Raises:
        GNAError: a record cannot be removed, or there is no folder to look in.
    """
    for memory in (_known, _warned):
        memory.clear() if subject is None else memory.pop(subject, None)
    everything = Path(folder(), "proofs").glob("*.json")
    for path in everything if subject is None else [_path(subject, ".json")]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise GNAError(f"a record must be removable: {error}. Use rm -r {path}") from error


def now_is_no_time() -> str:
    """Why no check can run right now, or an empty string."""
    # torch 2.9's is_compiling() is False in what dynamo calls while it traces, like fake kernels
    if torch.compiler.is_compiling() or TracingContext.try_get() is not None:
        return "torch.compile is tracing"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        return "a CUDA graph is being captured"
    if _is_forked or get_worker_info() is not None:
        return "this is a forked worker process"
    return ""


def _warn_once(subject: Subject, reason: str) -> None:
    mine = object()
    if _warned.setdefault(subject, mine) is mine:  # of two threads, one gets its own back
        warnings.warn(
            f"GPU kernel {subject.variant} is not used on {subject.device}: {reason}. Another backend "
            "(FlexAttention) serves its calls. For more, run: gnaflex doctor",
            RuntimeWarning,
            stacklevel=3,
        )


def _first_use(subject: Subject, command: Sequence[str], limit_s: float) -> Verdict:
    if why := now_is_no_time():
        return Verdict("pending", why)
    with _alone(subject.device, time.monotonic() + limit_s + PATIENCE_S) as is_alone:
        if not is_alone:
            return Verdict("pending", "another check on this device has not ended yet")
        return recorded(subject) or _checked(subject, command, limit_s)


def _checked(subject: Subject, command: Sequence[str], limit_s: float) -> Verdict:
    """What the command says, remembered."""
    kernel = f"GPU kernel {subject.variant}"
    log.info("checking %s once on this machine (%s), for at most %g s", kernel, subject.device, limit_s)
    start = time.monotonic()
    found = _answer(command, limit_s)
    end = time.monotonic()
    if found.outcome == "inconclusive":
        log.warning("%s could not be checked, and is not used for %g s: %s", kernel, AGAIN_S, found.reason)
        _known[subject] = found, end + AGAIN_S
        return found
    _known[subject] = found, math.inf
    with contextlib.suppress(OSError, GNAError):  # without a record, the next process runs the check again
        _write(subject, found, end - start)
    return found


# ---- the command -------------------------------------------------------------------------------------


def _answer(command: Sequence[str], limit_s: float) -> Verdict:
    try:
        status, out, err = _run(command, limit_s)
    except OSError as error:
        return Verdict("inconclusive", f"the check could not be started: {error}")
    if status is None:
        return Verdict("failed", f"no answer within {limit_s:g} s")
    if status == 0 and (said := _parsed(out.rstrip().rpartition("\n")[2])):
        return said
    if line := next((line for line in (err + "\n" + out).split("\n") if CROWDED.search(line)), None):
        return Verdict("inconclusive", f"no room for a check: {line.strip()[:QUOTE]}")
    how = f"ended with exit status {status}"
    if status < 0:
        how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
    if status in (-9, -15):  # SIGKILL, SIGTERM: no crash; memory ran out, or the job was ended
        return Verdict("inconclusive", f"the check {how}")
    last = err.rstrip().rpartition("\n")[2].strip()[:QUOTE]
    return Verdict("failed", f"the check {how} and no verdict" + (f": {last}" if last else ""))


def _run(command: Sequence[str], limit_s: float) -> tuple[int | None, str, str]:
    """Exit status (None: too late) and the ends of both outputs; what it started does not outlive it."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)),
    )
    try:
        tails = [_Tail(child.stdout), _Tail(child.stderr)]
        status = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:  # after Ctrl-C too, which a session of its own does not hear
        _end(child)
    return status, tails[0].text(), tails[1].text()


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_S)


class _Tail(threading.Thread):
    """Reads a pipe to its end, as a full one stops who writes, and keeps the last of it."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        assert pipe is not None
        self.pipe, self.kept = pipe, bytearray()
        self.start()

    def run(self) -> None:
        with self.pipe:
            while piece := os.read(self.pipe.fileno(), KEPT_BYTES):
                self.kept += piece
                del self.kept[:-KEPT_BYTES]

    def text(self) -> str:
        self.join(DRAIN_S)
        return bytes(self.kept).decode(errors="replace")


def _parsed(text: str) -> Verdict | None:
    """The verdict that a JSON object holds."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match answer:
        case {"outcome": "proved" | "failed" | "inconclusive" as outcome, "reason": str(reason)}:
            return Verdict(outcome, "" if outcome == "proved" else reason)
    return None


# ---- records and locks -------------------------------------------------------------------------------


def _path(words: Sequence[str], suffix: str) -> Path:
    name = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
    return Path(folder(), "proofs", name + suffix)


def _make_folder() -> None:
    for path in (folder(), folder() / "proofs"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _read(subject: Subject) -> Verdict | None:
    """The verdict on record; what is damaged, or about something else, is none."""
    try:
        text = _path(subject, ".json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = _parsed(text)
    if found is None or found.outcome == "inconclusive":
        return None
    return found if subject._asdict().items() <= json.loads(text).items() else None


def _write(subject: Subject, found: Verdict, seconds: float) -> None:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entry = {**subject._asdict(), **found._asdict(), "date": date, "seconds": round(seconds, 3)}
    _make_folder()
    path = _path(subject, ".json")
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _alone(device: str, deadline: float) -> Iterator[bool]:
    """Whether this is the only check, in this process and on the device; waits until the deadline."""
    turn, lock = _turn, None
    if not turn.acquire(timeout=max(deadline - time.monotonic(), 0)):
        yield False
        return
    try:
        lock = _lock_file(device)
        while not (is_alone := _locked(lock)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        yield is_alone
    finally:
        if lock is not None:
            # not left to close: a process forked meanwhile shares the lock
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)
        turn.release()


def _lock_file(device: str) -> int | None:
    """None where there are no locks, or nowhere to write."""
    if fcntl is None:
        return None
    try:
        _make_folder()
        path = _path((device, os.environ.get("CUDA_VISIBLE_DEVICES", "")), ".lock")
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except (OSError, GNAError):
        return None


def _locked(lock: int | None) -> bool:
    """Whether the lock is had, or cannot be."""
    if lock is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True

"""Compiled kernels on disk: a variant is compiled once for all processes of a user on a machine.

An entry is a header line (format, sha256 of the object), then the object. It is named after everything that
the object depends on, so no entry goes out of date. It is machine code that this process will run: it is
read only where nobody but the user can have written it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from gnaflex.cuda_backend.config import KernelConfig

from gnaflex import spec
from gnaflex.spec import GNAError

if sys.platform != "win32":
    import fcntl

VARIABLE = "GNAFLEX_CACHE_DIR"
ELSEWHERE = f"export {VARIABLE}=<a folder that only you can write to>"
FORMAT = 1
LOCK_SECONDS = 120.0  # a variant compiles in seconds: who waits longer waits for a process that hangs
POLL_SECONDS = 0.05
STALE_SECONDS = 86_400.0  # of a temporary file: its writer must have crashed
PREFIX, SUFFIX = "gnaflex-", ".tmp"  # of temporary files: the folder may hold other people's *.tmp too
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# a link is not followed, a named pipe does not block; Windows has neither flag
SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def folder() -> Path:
    """Where entries live: $GNAFLEX_CACHE_DIR, else gnaflex in $XDG_CACHE_HOME, else ~/.cache/gnaflex.

    A relative $XDG_CACHE_HOME does not count (XDG Base Directory Specification 0.8). Nothing is created.

    Raises:
        GNAError: a home directory is needed, and there is none.
    """
    chosen, caches = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "gnaflex"
    except RuntimeError as error:
        raise GNAError(
            f"compiled kernels are kept in a home directory, and there is none: {error}\n  {ELSEWHERE}"
        ) from error


def key(config: KernelConfig) -> str:
    """The name of an entry: 32 hexadecimal digits.

    A hash of every field of the variant, of the sources of this package, of the versions of gnaflex, CuTe DSL
    and Python (major, minor), and of the processor's architecture, as the object holds host code.
    """
    values = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return hashlib.sha256(f"{values} {_toolchain()}".encode()).hexdigest()[:32]


def stored(config: KernelConfig) -> bytes | None:
    """The object of a good entry, or None. An entry that is damaged, or not the user's alone, is none.

    Warns:
        UserWarning: the folder is not the user's alone, or there is no home directory; once per process.
    """
    try:
        where = folder()
        _refuse_shared(where)
        return _read(where / key(config))
    except OSError:
        return None
    except GNAError as error:
        _warn(str(error))
        return None


def get(config: KernelConfig, build: Callable[[KernelConfig], bytes]) -> bytes:
    """The stored object, or ``build(config)``, which is then stored.

    Of processes and threads that ask for the same variant at once, one builds and the others wait, at most
    ``LOCK_SECONDS``, after which they build as well (on Windows, and on file systems without locks, none
    waits). What ``build`` raises goes through, and nothing is stored.

    Warns:
        UserWarning: nothing can be stored; once per process and reason.
    """
    if (found := stored(config)) is not None:
        return found
    with contextlib.ExitStack() as held:
        entry = None
        with _warned():
            path = _prepared() / key(config)
            held.enter_context(_locked(path.with_suffix(".lock")))
            entry = path
        if entry is None:
            return build(config)
        if (found := stored(config)) is None:
            found = build(config)
            with _warned():
                _write(entry, found)
    return found


# ---- names -------------------------------------------------------------------------------------------


@functools.cache
def _toolchain() -> str:
    """What turns a variant into an object, besides the variant."""
    packages = [version_of(name) for name in ("gnaflex", "nvidia-cutlass-dsl")]
    return repr([sources(), *packages, *sys.version_info[:2], platform.machine()])


@functools.cache
def sources() -> str:
    """A hash of the sources of the kernels, and of the trial that proves them."""
    found = hashlib.sha256()
    here = Path(__file__).parent
    for path in (*sorted(here.glob("*.py")), _package() / "trial.py"):
        found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _package() -> Path:
    """The folder of gnaflex, which in a source tree is not the parent of this one."""
    return Path(spec.__file__).parent


def version_of(package: str) -> str:
    """Of an installed package; "none" where it is not, as in a source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# ---- whose folder ------------------------------------------------------------------------------------


def _alone(status: os.stat_result) -> bool:
    """Whether the user owns this and nobody else can write to it. Windows keeps profiles private itself."""
    if sys.platform == "win32":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & OTHERS_WRITE


def _refuse_shared(where: Path) -> None:
    status = where.stat()
    if not _alone(status):
        raise GNAError(
            f"a folder of compiled kernels must be its user's alone, as what is in it will be run: {where} "
            f"has mode {stat.S_IMODE(status.st_mode):04o} and belongs to uid {status.st_uid}.\n"
            f"  If it holds nothing else: chmod 700 {shlex.quote(str(where))}\n  If not: {ELSEWHERE}"
        )


def _prepared() -> Path:
    """The folder, created where it is missing, as are those above it; all for the user alone."""
    where = folder()
    for path in reversed([path for path in (where, *where.parents) if not path.exists()]):
        path.mkdir(0o700, exist_ok=True)
    _refuse_shared(where)
    return where


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """A fault of the folder becomes a warning, and what is left to do in the block is left undone."""
    try:
        yield
    except GNAError as error:
        _warn(str(error))
    except OSError as error:
        # without the name in the error, which is another each time: one reason, one warning
        _warn(f"{folder()}: {error.strerror or error}.\n  {ELSEWHERE}")


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(f"kernels compiled by this process are not kept for the next: {why}", stacklevel=2)


# ---- entries -----------------------------------------------------------------------------------------


def _header(payload: bytes) -> bytes:
    return f"gnaflex kernel {FORMAT} {hashlib.sha256(payload).hexdigest()}".encode()


def _read(entry: Path) -> bytes | None:
    with open(entry, "rb", opener=lambda path, flags: os.open(path, flags | SAFELY)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _alone(status):
            return None
        header, _, payload = file.read().partition(b"\n")
    return payload if header == _header(payload) else None


def _write(entry: Path, payload: bytes) -> None:
    """Whole or not at all, whatever stops this process or the machine."""
    _sweep(entry.parent)
    handle, name = tempfile.mkstemp(SUFFIX, PREFIX, entry.parent)  # mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(_header(payload) + b"\n" + payload)
            file.flush()
            os.fsync(handle)
        os.replace(name, entry)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _sweep(where: Path) -> None:
    """Remove what crashed writers have left."""
    for path in where.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):  # another process may have been faster
            if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry. The file stays: removing it would give two processes a lock each."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
    try:
        _wait(handle)
        yield
    finally:
        # not left to close: a child that the builder forked shares the lock
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _wait(handle: int) -> None:
    """Take the lock, or give up: after LOCK_SECONDS, or at once where the file system has no locks.

    Each holder opens the file itself, so this holds between threads as between processes (flock(2)).
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return
        except OSError:
            return
        time.sleep(POLL_SECONDS)

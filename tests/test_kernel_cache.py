"""Compiled kernels on disk: names, hits, damage, whose folder, many processes, crashes. Needs no GPU."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from gnaflex.cuda_backend import cache as installed
from gnaflex.cuda_backend import gate, machine
from gnaflex.cuda_backend.config import KernelConfig

from gnaflex.spec import GNAError

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a warning that a test does not expect
    pytest.mark.skipif(sys.platform == "win32", reason="modes, owners and locks of POSIX"),
]
CONFIG = KernelConfig("sm_90a", "bfloat16", 128, (2, 8, 8), (2, 8, 8))
OTHER = dataclasses.replace(CONFIG, head_dim=64)
OBJECT = b"\x7fELF\n\r\n" + bytes(range(256))  # line ends that text mode would change
DAY = 86_400


def loaded(path=Path(installed.__file__)):
    """The module as a new process has it: nothing hashed, nothing warned of."""
    spec = importlib.util.spec_from_file_location("loaded_cache", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of the cache; it does not exist yet."""
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def cache(home):
    return loaded()


class Builder:
    """A compiler that counts."""

    def __init__(self, payload=OBJECT):
        self.payload, self.configs = payload, []

    def __call__(self, config):
        self.configs.append(config)
        return self.payload


def never(config):
    pytest.fail("built what is stored")


def entry_of(cache, home, config=CONFIG):
    """The file of an entry that has been stored."""
    cache.get(config, Builder())
    return home / cache.key(config)


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def temporaries(home):
    return list(home.glob("*.tmp"))


# ---- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, caches, expected",
    [
        ("/a/b", "/c", "/a/b"),
        ("~/b", "/c", "/people/me/b"),
        ("", "/c", "/c/gnaflex"),
        (None, "/c", "/c/gnaflex"),
        (None, "relative", "/people/me/.cache/gnaflex"),
        (None, "", "/people/me/.cache/gnaflex"),
        (None, None, "/people/me/.cache/gnaflex"),
    ],
)
def test_folder(chosen, caches, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    for name, value in (("GNAFLEX_CACHE_DIR", chosen), ("XDG_CACHE_HOME", caches)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert installed.folder() == Path(expected)
    assert not Path("/people").exists()


def test_key_is_a_hash_of_every_field(cache):
    @dataclasses.dataclass(frozen=True)
    class Longer(KernelConfig):
        text: int = 0
        quiet: int = dataclasses.field(default=0, repr=False, compare=False)

    values = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    values |= {"text": 0, "quiet": 0}
    changed = [Longer(**values)] + [Longer(**values | {name: "another"}) for name in values]
    keys = [cache.key(config) for config in changed]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in keys)
    assert cache.key(Longer(**values)) == keys[0] == loaded().key(Longer(**values))


def test_key_depends_on_every_source(tmp_path):
    shutil.copy(installed.__file__, tmp_path / "cache.py")
    (tmp_path / "kernel.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("a\n")

    def fresh():
        return loaded(tmp_path / "cache.py").key(CONFIG)

    module = loaded(tmp_path / "cache.py")
    keys = [module.key(CONFIG)]
    (tmp_path / "notes.txt").write_text("b\n")
    assert fresh() == keys[0]
    (tmp_path / "kernel.py").write_text("x = 2\n")
    assert module.key(CONFIG) == keys[0], "hashed once per process"
    keys.append(fresh())
    (tmp_path / "kernel.py").rename(tmp_path / "renamed.py")
    keys.append(fresh())
    (tmp_path / "empty.py").write_text("")
    keys.append(fresh())
    assert len(set(keys)) == 4


def test_key_depends_on_versions_and_machine(monkeypatch):
    keys = [loaded().key(CONFIG)]

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for answer in (
        lambda name: "1",
        lambda name: "9" if name == "gnaflex" else "1",
        lambda name: "9" if name == "nvidia-cutlass-dsl" else "1",
        absent,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", answer)
            keys.append(loaded().key(CONFIG))
    major, minor, micro, *_ = sys.version_info
    for version in ((major, minor + 1, micro), (major + 1, minor, micro), (major, minor, micro + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "version_info", version)
            keys.append(loaded().key(CONFIG))
    assert keys.pop() == keys[0], "a bug-fix release of Python changes no object"
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "abacus")
        keys.append(loaded().key(CONFIG))
    assert len(set(keys)) == len(keys)


# ---- hits --------------------------------------------------------------------------------------------


def test_a_hit_does_not_build(cache, home):
    build = Builder()
    assert cache.stored(CONFIG) is None
    assert not home.exists(), "asking creates nothing"
    assert cache.get(CONFIG, build) == OBJECT
    assert build.configs == [CONFIG]
    assert cache.get(CONFIG, never) == cache.stored(CONFIG) == OBJECT
    assert loaded().get(CONFIG, never) == OBJECT
    assert cache.stored(OTHER) is None
    assert cache.get(OTHER, Builder(b"another")) == b"another"
    assert cache.stored(CONFIG) == OBJECT
    assert temporaries(home) == []


def damaged(data):
    half = len(data) // 2
    header, _, payload = data.partition(b"\n")
    return {
        "empty": b"",
        "header only": header,
        "header cut": header[:-1],
        "half": data[:half],
        "last byte gone": data[:-1],
        "longer": data + b"\0",
        "bit of the payload": data[:-1] + bytes([data[-1] ^ 1]),
        "bit of the sum": header[:-1] + bytes([header[-1] ^ 1]) + b"\n" + payload,
        "no header": payload,
        "later format": re.sub(rb" 1 ", b" 2 ", header, count=1) + b"\n" + payload,
        "zeros": bytes(len(data)),
    }


@pytest.mark.parametrize("kind", damaged(b"header\npayload"))
def test_damaged_entries_are_rebuilt(kind, cache, home):
    entry = entry_of(cache, home)
    good = entry.read_bytes()
    bad = damaged(good)[kind]
    assert bad != good
    entry.write_bytes(bad)
    assert cache.stored(CONFIG) is None
    build = Builder()
    assert cache.get(CONFIG, build) == OBJECT
    assert build.configs == [CONFIG]
    assert entry.read_bytes() == good


# ---- whose folder ------------------------------------------------------------------------------------


def test_only_the_user_can_read(tmp_path, monkeypatch):
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path / "above" / "kernels"))
    before = os.umask(0)
    try:
        loaded().get(CONFIG, Builder())
    finally:
        os.umask(before)
    home = tmp_path / "above" / "kernels"
    assert mode(home) == mode(home.parent) == 0o700
    files = list(home.iterdir())
    assert len(files) == 2, "the entry and its lock"
    assert {mode(path) for path in files} == {0o600}


def not_kept(cache, match, build=None):
    """One warning at the first of many calls; each builds."""
    build = build or Builder()
    with pytest.warns(UserWarning, match=match) as caught:
        assert cache.get(CONFIG, build) == OBJECT
    assert len(caught) == 1
    assert "kernels compiled by this process are not kept" in str(caught[0].message)
    assert "export GNAFLEX_CACHE_DIR=" in str(caught[0].message)
    assert cache.get(CONFIG, build) == OBJECT
    assert cache.get(OTHER, build) == OBJECT
    assert cache.stored(CONFIG) is None
    assert build.configs == [CONFIG, CONFIG, OTHER]


@pytest.mark.parametrize("open_to", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(open_to, cache, home):
    entry_of(cache, home)
    home.chmod(open_to)
    before = sorted(home.iterdir())
    not_kept(cache, rf"mode {open_to:04o}[\s\S]*chmod 700 .*kernels")
    assert sorted(home.iterdir()) == before
    with pytest.warns(UserWarning, match="its user's alone"):
        assert loaded().stored(CONFIG) is None
    home.chmod(0o755)  # others may read: it is no secret
    assert cache.get(CONFIG, never) == OBJECT


def test_a_folder_of_another_user_is_refused(cache, home, monkeypatch):
    entry_of(cache, home)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    not_kept(cache, f"belongs to uid {me}")


def as_link(entry, copy):
    entry.rename(copy)
    entry.symlink_to(copy)


def as_pipe(entry, copy):
    good = entry.read_bytes()
    entry.unlink()
    os.mkfifo(entry, 0o600)
    handle = os.open(entry, os.O_RDWR)
    os.write(handle, good)
    return lambda: os.close(handle)


def as_idle_pipe(entry, copy):
    entry.unlink()
    os.mkfifo(entry, 0o600)


def open_to_others(entry, copy):
    entry.chmod(0o622)


@pytest.mark.parametrize("change", [as_link, as_pipe, as_idle_pipe, open_to_others])
def test_entries_that_are_not_ours_are_replaced(change, cache, home, tmp_path):
    entry = entry_of(cache, home)
    done = change(entry, tmp_path / "copy")
    assert cache.stored(CONFIG) is None
    if done:
        done()
    build = Builder()
    assert cache.get(CONFIG, build) == OBJECT
    assert build.configs == [CONFIG]
    assert stat.S_ISREG(entry.lstat().st_mode)
    assert mode(entry) == 0o600
    assert cache.get(CONFIG, never) == OBJECT


def test_an_entry_of_another_user_is_not_read(cache, home, monkeypatch):
    entry_of(cache, home)
    true = os.fstat

    def foreign(handle):
        status = list(true(handle))
        status[4] += 1
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", foreign)
    assert cache.stored(CONFIG) is None


def test_an_entry_that_cannot_be_replaced(cache, home):
    entry = entry_of(cache, home)
    entry.unlink()
    entry.mkdir()
    build = Builder()
    with pytest.warns(UserWarning, match="not kept"):
        assert cache.get(CONFIG, build) == OBJECT
    assert temporaries(home) == []


def test_a_linked_folder_is_judged_by_where_it_leads(cache, home, tmp_path):
    (tmp_path / "scratch").mkdir(mode=0o700)
    home.symlink_to(tmp_path / "scratch")
    cache.get(CONFIG, Builder())
    assert cache.get(CONFIG, never) == OBJECT
    (tmp_path / "scratch").chmod(0o777)
    not_kept(cache, "mode 0777")


# ---- nowhere to write --------------------------------------------------------------------------------


def test_a_file_where_the_folder_should_be(cache, home):
    home.write_text("")
    not_kept(cache, rf"{home}: Not a directory")


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    not_kept(loaded(), "Not a directory")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk(step, cache, home, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a name that is another each time")

    monkeypatch.setattr(os, step, full)
    not_kept(cache, rf"{home}: {os.strerror(errno.ENOSPC)}")
    assert temporaries(home) == []


def test_no_home_directory(monkeypatch):
    import pwd

    def unknown(_):
        raise KeyError

    for name in ("GNAFLEX_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    not_kept(loaded(), "there is none")
    with pytest.raises(GNAError, match=r"home directory[\s\S]*export GNAFLEX_CACHE_DIR="):
        installed.folder()


def test_a_hit_in_a_read_only_folder(cache, home, monkeypatch):
    entry_of(cache, home)
    true = os.open

    def read_only(path, flags, *rest, **named):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return true(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert cache.get(CONFIG, never) == OBJECT
    with pytest.warns(UserWarning, match=rf"{home}: {os.strerror(errno.EROFS)}") as caught:
        assert cache.get(OTHER, Builder()) == OBJECT
    assert len(caught) == 1


def test_the_remedy_works_in_the_same_process(cache, home, tmp_path, monkeypatch):
    home.write_text("")
    not_kept(cache, "Not a directory")
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path / "better"))
    cache.get(CONFIG, Builder())
    assert cache.get(CONFIG, never) == OBJECT


def test_without_locks_and_owners(home, monkeypatch):
    """Windows: no fcntl, no uids, none of the flags."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("geteuid", "O_NOFOLLOW", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    cache = loaded()
    cache.get(CONFIG, Builder())
    home.chmod(0o777)  # what a mode means there, nobody knows
    assert cache.get(CONFIG, never) == OBJECT


def test_a_file_system_without_locks(cache, home, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    cache.get(CONFIG, Builder())
    assert cache.get(CONFIG, never) == OBJECT


# ---- many processes, and crashes ---------------------------------------------------------------------

SETUP = f"""
import os, sys, time
from gnaflex.cuda_backend import cache
from gnaflex.cuda_backend.config import KernelConfig
config = {CONFIG!r}
"""
SIX = """
def build(config):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    return b"object"

gate, opened = os.pipe()
children = []
for _ in range(6):
    children.append(os.fork())
    if not children[-1]:
        os.close(opened)
        os.read(gate, 1)  # until the parent closes its end
        os._exit(cache.get(config, build) != b"object")
os.close(opened)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
HANGS = """
def build(config):
    print("building", flush=True)
    time.sleep(600)

cache.get(config, build)
"""


def test_six_processes_build_once(home, tmp_path):
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", SETUP + SIX, log], check=True, timeout=100)
    assert log.read_text() == "built\n"


def test_killed_while_building(cache, home, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for a lock that nobody has"))
    process = subprocess.Popen([sys.executable, "-c", SETUP + HANGS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "building\n"
        assert cache.get(OTHER, Builder()) == OBJECT, "another variant has another lock"
        assert cache.stored(CONFIG) is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    build = Builder()
    assert cache.get(CONFIG, build) == OBJECT
    assert build.configs == [CONFIG]
    assert temporaries(home) == []


def test_threads_build_once(cache):
    at_once, build, results = threading.Barrier(6), Builder(), []

    def slowly(config):
        time.sleep(0.2)
        return build(config)

    def work():
        at_once.wait()
        results.append(cache.get(CONFIG, slowly))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [OBJECT] * 6
    assert build.configs == [CONFIG]


def test_who_waits_too_long_builds(cache, monkeypatch):
    entered, leave, results = threading.Event(), threading.Event(), []

    def hangs(config):
        entered.set()
        assert leave.wait(60)
        return b"late"

    thread = threading.Thread(target=lambda: results.append(cache.get(CONFIG, hangs)))
    thread.start()
    assert entered.wait(60)
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    naps, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (naps.append(seconds), sleep(seconds)))
    try:
        assert cache.get(CONFIG, Builder()) == OBJECT
        assert naps, "waits without spinning"
        assert cache.stored(CONFIG) == OBJECT
    finally:
        leave.set()
        thread.join()
    assert results == [b"late"]
    assert cache.stored(CONFIG) == b"late"


def test_a_builder_that_raises(cache, home, monkeypatch):
    def breaks(config):
        raise OSError(errno.ENOSPC, "no room for the compiler")

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the lock was kept"))
    for build, error in ((breaks, OSError), (interrupted, KeyboardInterrupt)):
        with pytest.raises(error) as caught:
            cache.get(CONFIG, build)
        assert caught.value.__context__ is None
        assert cache.stored(CONFIG) is None
        assert [path.suffix for path in home.iterdir()] == [".lock"]
    assert cache.get(CONFIG, Builder()) == OBJECT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home.chmod(0o777)
        with pytest.raises(OSError, match="compiler"):
            cache.get(OTHER, breaks)


def test_children_of_the_builder_do_not_keep_the_lock(cache, monkeypatch):
    """A fork has a copy of the lock's handle; letting go closes only one of them."""
    copies = []

    def forks(config):
        for handle in os.listdir("/dev/fd"):
            try:
                name = os.readlink(f"/dev/fd/{handle}")
            except OSError:
                continue
            if name.endswith(".lock"):
                copies.append(os.dup(int(handle)))
        return OBJECT

    cache.get(CONFIG, forks)
    if not copies:
        pytest.skip("handles have no names here")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the lock was kept"))
    (cache.folder() / cache.key(CONFIG)).unlink()
    cache.get(CONFIG, Builder())
    for handle in copies:
        os.close(handle)


def test_stale_temporary_files_are_removed(cache, home, monkeypatch):
    names, replace = [], os.replace

    def noted(source, target):
        names.append(Path(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    for config in (CONFIG, OTHER, dataclasses.replace(OTHER, dtype="float16")):
        cache.get(config, Builder())
    stale, young, stuck = names
    foreign = home / "letter.tmp"
    now = time.time()
    stuck.mkdir()
    for path, age in ((stale, DAY + 60), (young, DAY - 3600), (foreign, 2 * DAY), (stuck, 2 * DAY)):
        if path != stuck:
            path.write_text("half")
        os.utime(path, (now - age, now - age))
    cache.get(CONFIG, never)
    assert stale.exists(), "reading removes nothing"
    cache.get(dataclasses.replace(CONFIG, dtype="float16"), Builder())
    assert set(temporaries(home)) == {young, foreign, stuck}
    assert cache.stored(CONFIG) == OBJECT


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no list of open files")
def test_no_handle_stays_open(cache, home):
    def breaks(config):
        raise ValueError

    before = len(os.listdir("/dev/fd"))
    entry_of(cache, home).unlink()
    (home / cache.key(CONFIG)).mkdir()
    with pytest.warns(UserWarning, match="not kept"):
        cache.get(CONFIG, Builder())
    with pytest.raises(ValueError):
        cache.get(OTHER, breaks)
    assert len(os.listdir("/dev/fd")) == before


def test_nothing_is_written_in_place(cache, home, monkeypatch):
    """What readers find while an entry is being replaced is the old one or the new one."""
    entry = entry_of(cache, home)
    entry.write_bytes(b"damaged")
    seen, replace, fsync = [], os.replace, os.fsync

    def looked(source, target):
        seen.append(("replace", entry.read_bytes(), entry.parent == Path(source).parent))
        replace(source, target)

    def synced(handle):
        seen.append(("fsync", os.fstat(handle).st_size > len(OBJECT)))
        fsync(handle)

    monkeypatch.setattr(os, "replace", looked)
    monkeypatch.setattr(os, "fsync", synced)
    cache.get(CONFIG, Builder())
    assert seen == [("fsync", True), ("replace", b"damaged", True)]


def test_a_source_tree_that_is_not_installed_has_no_version(monkeypatch):
    def nothing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H200 (sm_90)")
    config = KernelConfig("sm_90a", "bfloat16", 128, (2, 8, 8), (2, 8, 8))
    monkeypatch.setattr(installed, "_toolchain", lambda: "")  # it is remembered for the process
    assert gate.subject_of(config, torch.device("cuda", 0)).version == "none"

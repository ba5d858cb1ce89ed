"""From a problem to a kernel that may be launched: compiled or read from the cache, proved, loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from gnaflex.cuda_backend import cache, machine, proof
from gnaflex.cuda_backend.abi import Launcher
from gnaflex.cuda_backend.compile import from_object, from_shared, to_object
from gnaflex.cuda_backend.config import KernelConfig
from gnaflex.cuda_backend.fast_path import Problem
from torch import Tensor

log = logging.getLogger("gnaflex")
_launchers: dict[tuple[KernelConfig, torch.device], Launcher] = {}
_broken: dict[tuple[KernelConfig, torch.device], str] = {}  # and why
_lock = threading.RLock()


def reasons(problem: Problem, query: Tensor) -> Iterator[str]:
    """Why the kernel for a problem may not run yet; it is compiled, proved and loaded by asking."""
    config = problem.config(machine.architecture(query.device), query.dtype, query.shape[-1])
    if (config, query.device) not in _launchers and (why := _opened(config, query.device)):
        yield why


def launcher(problem: Problem, query: Tensor) -> Launcher:
    """The kernel for a problem, after :func:`reasons` found none against it."""
    config = problem.config(machine.architecture(query.device), query.dtype, query.shape[-1])
    return _launchers[config, query.device]


def _opened(config: KernelConfig, device: torch.device) -> str:
    """Compile, prove, load; or the reason why not."""
    with _lock:
        if (config, device) in _launchers:
            return ""
        subject = subject_of(config, device)
        found = proof.decided(subject)
        if found is None or found.passes:
            if why := proof.now_is_no_time():
                return f"its kernel is not ready, and cannot be made ready now: {why}"
            if (config, device) in _broken:
                return _broken[config, device]
            try:
                found = _proved(config, device, subject)
                if found.passes:
                    _launchers[config, device] = load(config)
                    return ""
            except Exception as error:  # not of the call: another backend may serve it
                why = next(iter(str(error).strip().splitlines()), type(error).__name__)
                if isinstance(error, torch.OutOfMemoryError):
                    return f"its kernel could not be made ready: {why}"
                log.warning("gnaflex: the kernel %s could not be made ready: %s", config.name, why)
                _broken[config, device] = f"its kernel could not be made ready: {why}"
                return _broken[config, device]
        return f"its kernel has not proved itself on this machine: {found.reason}"


def _proved(config: KernelConfig, device: torch.device, subject: proof.Subject) -> proof.Verdict:
    if _ahead(config) is None:
        cache.get(config, _compiled)  # here, so that it does not count as time of the child
    return proof.verdict(subject, command(config, device))


def load(config: KernelConfig) -> Launcher:
    """A kernel, from $GNAFLEX_KERNELS, the cache, or compiled now; whether it is right is not asked."""
    if path := _ahead(config):
        return from_shared(path, config.rank, config.arch)
    return from_object(cache.get(config, _compiled), config.rank)


def linked_name(config: KernelConfig) -> str:
    """The file of a kernel that is linked ahead of time, from these sources."""
    return f"{config.name}-{cache.sources()[:12]}.so"


def _ahead(config: KernelConfig) -> Path | None:
    """The kernel among those linked ahead of time, for machines without CuTe DSL."""
    path = Path(os.environ.get(machine.KERNELS, "")) / linked_name(config)
    return path if machine.KERNELS in os.environ and path.is_file() else None


def _compiled(config: KernelConfig) -> bytes:
    log.info("gnaflex compiles the kernel %s, once on this machine", config.name)
    code: bytes = to_object(config)
    return code


def subject_of(config: KernelConfig, device: torch.device) -> proof.Subject:
    """What a proof is about."""
    version = cache.version_of("gnaflex")
    path = _ahead(config)
    variant = cache.key(config) if path is None else path.stem[-12:] + cache.key(config)[:20]
    return proof.Subject(machine.name(device), machine.driver(), version, variant)


def command(config: KernelConfig, device: torch.device) -> list[str]:
    """The child process that proves a kernel."""
    fields = json.dumps(dataclasses.asdict(config))
    return [sys.executable, "-m", "gnaflex.trial", fields, str(device.index or 0)]

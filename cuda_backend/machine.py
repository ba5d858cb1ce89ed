"""What the GPU and the packages at hand are; everything here that tests replace to do without a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")
KERNELS = "GNAFLEX_KERNELS"  # names a folder of kernels that were linked ahead of time
# By compute capability: H100, H200; B200, GB200; B300, GB300 (code of an "a" architecture runs on no other)
ARCHITECTURE = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
NEEDED = "a Hopper or Blackwell data-centre GPU (compute capability {})".format(
    ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURE)
)


@functools.lru_cache(maxsize=32)
def obstacle(device: torch.device) -> str:
    """Why no kernel runs on a device, or ""."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs {NEEDED}, the query is on {device}"
    found = torch.cuda.get_device_capability(device)
    if found not in ARCHITECTURE:
        return f"it needs {NEEDED}: {device} has {found[0]}.{found[1]}"
    if importlib.util.find_spec("cutlass") is None and KERNELS not in os.environ:
        return "CuTe DSL is not installed: pip install 'gnaflex[cuda]'"
    return ""


@functools.lru_cache(maxsize=32)
def architecture(device: torch.device) -> str:
    """What kernels for a device are compiled for."""
    return ARCHITECTURE[torch.cuda.get_device_capability(device)]


@functools.lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once: one on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream(device: torch.device) -> int:
    """The handle of the current stream."""
    return int(
        torch._C._cuda_getCurrentRawStream(device.index)
    )  # what Triton asks; current_stream takes 2 us


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A kernel is launched on the current device: make it this one."""
    return _AS_IT_IS if torch.cuda.current_device() == device.index else torch.cuda.device(device)


_AS_IT_IS = contextlib.nullcontext()


def aside(device: torch.device, make: Callable[..., T], *given: Any) -> T:
    """``make(*given)`` in a thread of its own, the device having finished it: what it allocates may be kept.
    torch's CUDA graph trees own what is allocated in the thread that runs a compiled function."""
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(make, *given).result()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # that thread has another stream
    return made


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(is_initialized and torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=32)
def name(device: torch.device) -> str:
    """The device as a proof records it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


@functools.lru_cache(maxsize=1)
def driver() -> str:
    """The version of NVIDIA's driver, by the CUDA version that it serves where it does not tell."""
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii", errors="replace") as file:
            return file.readline().split("  ")[1].strip()
    except (OSError, IndexError):
        return f"CUDA {torch.version.cuda}"

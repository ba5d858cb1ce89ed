"""Compile a variant, without tensors and without a GPU; cutlass is imported when that is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from gnaflex.cuda_backend.abi import PARTS, Launcher, counts
from gnaflex.cuda_backend.config import KernelConfig, obstacles

from gnaflex.spec import GNAError

INSTALL = "pip install 'gnaflex[cuda]'"
PREFIX = "gnaflex_attend"  # of the symbols in an object
_POINTERS = {"lse": "Float32", "work": "Int32", "valid": "Int32"}  # the others point to tokens
_NUMBERS = {"q": "Int64", "i": "Int32", "f": "Float32"}


def compiled(config: KernelConfig, *options: Any) -> Any:
    """The launch function of a variant as CuTe DSL compiles it; it takes what abi.py says.

    Raises:
        GNAError: the variant is not legal, or CuTe DSL is not installed.
    """
    if why := obstacles(config):
        raise GNAError("no kernel can be compiled for this: " + "; ".join(why) + ".")
    cute = _cutlass().cute
    from gnaflex.cuda_backend.sm90_attend import Attend

    kernel = Attend(config)
    with_arch = (cute.GPUArch(config.arch), *options)
    return cute.compile[with_arch](kernel.launch, *_arguments(config, kernel.dtype))


def _cutlass() -> Any:
    try:
        cutlass = importlib.import_module("cutlass")
        importlib.import_module("cutlass.cute")
    except ImportError as error:
        raise GNAError(f"compiling kernels needs CuTe DSL: {INSTALL}") from error
    return cutlass


def _arguments(config: KernelConfig, dtype: Any) -> Iterator[Any]:
    """An argument of every part: only its type counts, and the alignment of pointers."""
    cutlass = _cutlass()
    cute = cutlass.cute
    for part, count in zip(PARTS, counts(config.rank), strict=True):
        if part.name == "stream":
            yield cute.runtime.make_fake_stream()
        elif part.code == "Q":
            known = _POINTERS.get(part.name)
            kind, align = (getattr(cutlass, known), 4) if known else (dtype, 16)
            yield cute.runtime.make_ptr(kind, 16, cute.AddressSpace.gmem, assumed_align=align)
        else:
            number = getattr(cutlass, _NUMBERS[part.code])(1)
            yield number if part.numbers == 1 else (number,) * count


def machine_code(config: KernelConfig) -> bytes:
    """The cubin of a variant, for NVIDIA's disassembler."""
    cute = _cutlass().cute
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        return bytes(compiled(config, cute.KeepCUBIN(True)).__cubin__)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """CuTe DSL leaves what it keeps in the current folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def to_object(config: KernelConfig) -> bytes:
    """A variant as an ELF object: the kernel, and the host code that launches it."""
    function = compiled(config)
    for library in _cutlass().cute.runtime.find_runtime_libraries(enable_tvm_ffi=False):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # else the object's symbols are not found
    return bytes(function.dump_to_object(PREFIX))


def from_object(code: bytes, rank: int) -> Launcher:
    """The kernel in an object of :func:`to_object`, loaded on every GPU of this process.

    Raises:
        GNAError: CuTe DSL is not installed.
    """
    runtime = _cutlass().cute.runtime
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        file.write(code)
        file.flush()
        function = getattr(runtime.load_module(file.name), PREFIX)
    executor = function.to()
    return Launcher(executor.capi_func, rank, keep=(function, executor))

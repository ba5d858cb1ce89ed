"""Compile a variant, without tensors and without a GPU; cutlass is imported when that is asked for."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gnaflex.cuda_backend.abi import PARTS, Launcher, counts
from gnaflex.cuda_backend.config import KernelConfig, obstacles
from gnaflex.cuda_backend.machine import ARCHITECTURE

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
    kernel = kernel_of(config)
    with_arch = (cute.GPUArch(config.arch), *options)
    return cute.compile[with_arch](kernel.launch, *_arguments(config, kernel.dtype))


def kernel_of(config: KernelConfig) -> Any:
    """What is compiled for a variant: its ``launch``."""
    if config.loads_only:
        from gnaflex.cuda_backend.loads import loads_only

        return loads_only(config)
    if config.arch == "sm_90a":
        from gnaflex.cuda_backend.sm90_attend import Attend90

        return Attend90(config)
    from gnaflex.cuda_backend.sm100_attend import Attend100

    return Attend100(config)


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
    dump_dir = importlib.import_module("cutlass.base_dsl.compiler").DumpDir
    with tempfile.TemporaryDirectory() as folder:  # where CuTe DSL writes it too
        return bytes(compiled(config, cute.KeepCUBIN(True), dump_dir(folder)).__cubin__)


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


# ---- for machines without CuTe DSL -------------------------------------------------------------------


def to_shared(code: bytes, path: Path) -> None:
    """An object as a shared library that needs CUDA's runtime alone; linked by the C compiler.

    Raises:
        GNAError: there is no C compiler, or it fails.
    """
    (runtime,) = _cutlass().cute.runtime.find_runtime_libraries(enable_tvm_ffi=False)
    static = Path(runtime).with_name("libcuda_dialect_runtime_static.a")
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "kernel.o"
        given.write_bytes(code)
        words = [os.environ.get("CC", "cc"), "-shared", "-o", str(path), str(given), str(static)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            raise GNAError(f"linking a kernel needs a C compiler: {error}. Set CC.") from error
    if done.returncode:
        raise GNAError(f"{words[0]} could not link a kernel: {done.stderr.strip()[-500:]}")


def from_shared(path: Path, rank: int, arch: str) -> Launcher:
    """The kernel in a library of :func:`to_shared`, loaded on every GPU of its architecture; torch has CUDA's
    runtime loaded.

    Raises:
        RuntimeError: CUDA does not load it.
    """
    library = ctypes.CDLL(str(path))
    name = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, f"{PREFIX}_function_name")))
    handle, error, device = ctypes.c_void_p(), ctypes.c_int32(), ctypes.c_int32()
    to_handle = ctypes.pointer(handle)

    def call(symbol: str, *values: Any) -> None:
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        library[f"_mlir_{PREFIX}_{symbol}"](places)
        if error.value:
            raise RuntimeError(f"CUDA error {error.value} from {symbol} of {path.name}")

    call("cuda_init", to_handle, error)
    for number in range(torch.cuda.device_count()):
        if ARCHITECTURE.get(torch.cuda.get_device_capability(number)) != arch:
            continue  # it would not load there
        device.value = number
        call("cuda_load_to_device", to_handle, device, error)
    function = library[name.decode()]
    function.restype = None
    return Launcher(function, rank, keep=(library, handle, to_handle))

"""Compile a variant, without tensors and without a GPU; cutlass is imported when that is asked for."""

from __future__ import annotations

import functools
from typing import Any

from gnaflex.cuda_backend.config import KernelConfig, obstacles

from gnaflex.spec import GNAError

INSTALL = "pip install 'gnaflex[cuda]'"


def compiled(config: KernelConfig) -> Any:
    """The launch function of a variant, with its ``__ptx__`` (str) and ``__cubin__`` (bytes).

    Arguments are those of ``Attend.launch``; shapes and strides are open, the channels of a row contiguous,
    everything aligned to 16 bytes.

    Raises:
        GNAError: the variant is not legal, or CuTe DSL is not installed.
    """
    if why := obstacles(config):
        raise GNAError("no kernel can be compiled for this: " + "; ".join(why) + ".")
    try:
        import cutlass
        import cutlass.cute as cute
    except ImportError as error:
        raise GNAError(f"compiling kernels needs CuTe DSL: {INSTALL}") from error
    from gnaflex.cuda_backend.sm90_attend import Attend

    kernel = Attend(config)
    size: Any = cute.sym_int
    step: Any = functools.partial(cute.sym_int64, divisibility=8)
    tokens = [
        cute.runtime.make_fake_tensor(
            kernel.dtype,
            (size(), size(), size(), config.head_dim),
            (step(), step(), step(), 1),
            assumed_align=16,
        )
        for _ in range(4)
    ]
    any_step: Any = cute.sym_int64
    lse = cute.runtime.make_fake_tensor(
        cutlass.Float32, (size(), size(), size()), (any_step(), any_step(), 1), assumed_align=4
    )
    work = cute.runtime.make_fake_compact_tensor(
        cutlass.Int32, (size(), 3, config.rank), stride_order=(2, 1, 0), assumed_align=4
    )
    per_axis = [tuple(cutlass.Int32(1) for _ in range(config.rank)) for _ in range(4)]
    options = (cute.KeepPTX(True), cute.KeepCUBIN(True), cute.GPUArch(config.arch))
    return cute.compile[options](
        kernel.launch,
        *(*tokens, lse, work, *per_axis),
        *(cutlass.Int32(0), cutlass.Float32(1), cutlass.Int32(1), cute.runtime.make_fake_stream()),
    )

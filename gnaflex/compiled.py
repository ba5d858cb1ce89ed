"""FlexAttention compiled standalone: one graph per structure of a call, cached, safe among threads.

It is compiled alone because a pointwise operation in the same graph does not build on a CPU, and with
``fullgraph=True`` because dynamo would otherwise fall back silently to the eager path, which holds the
N x N scores, after eight recompilations.
"""

from __future__ import annotations

import itertools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

MOST_GRAPHS = 64  # each holds one compiled kernel; the least recently used goes first

_graphs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
_compiling = threading.RLock()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | None,
    scale: float | None,
    enable_gqa: bool,
    kernel_options: dict[str, Any] | None,
    aux: AuxRequest | None,
) -> Any:
    """torch's ``flex_attention`` through a cached compiled graph; returns what torch's does."""
    structure = (
        *map(_tensor_structure, (query, key, value)),
        None if score_mod is None else _structure_number(score_mod),
        _mask_structure(block_mask),
        scale,
        enable_gqa,
        repr(kernel_options) if kernel_options else None,
        aux and (aux.lse, aux.max_scores),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
    args = (query, key, value, score_mod, block_mask, scale, enable_gqa, kernel_options, aux)
    graph = _graphs.get(structure)
    if graph is not None:
        return graph(*args)
    # Tracing sets process-wide state, so that one thread's compilation disturbs another's.
    with _compiling:
        graph = _graphs.get(structure) or _new_graph()
        out = graph(*args)
        _graphs[structure] = graph
        while len(_graphs) > MOST_GRAPHS:
            _graphs.popitem(last=False)
    return out


def _tensor_structure(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def _mask_structure(bm: BlockMask | None) -> Hashable:
    if bm is None:
        return None
    return (
        bm.kv_indices.shape,
        None if bm.full_kv_indices is None else bm.full_kv_indices.shape,
        None if bm.q_indices is None else bm.q_indices.shape,
        None if bm.full_q_indices is None else bm.full_q_indices.shape,
        bm.BLOCK_SIZE,
        bm.seq_lengths,
        _structure_number(bm.mask_mod),
    )


_counter = itertools.count()
_number_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@lru_cache(maxsize=1024)
def _number(structure: Hashable) -> int:
    return next(_counter)


def _structure_number(mod: Any) -> int:
    """A number for :func:`structure_of`, which takes microseconds to hash."""
    number = _number_of.get(mod)
    if number is None:
        number = _number_of[mod] = _number(structure_of(mod))
    return number


def structure_of(mod: Any) -> Hashable:
    """What dynamo compiles a mod into: its code and, down the functions it closes over, their numbers and the
    kinds of their tensors. What it misses, dynamo's own guards find."""
    if not isinstance(mod, types.FunctionType):
        key: Hashable = mod
        return key
    return mod.__code__, tuple(_cell_structure(cell.cell_contents) for cell in mod.__closure__ or ())


def _cell_structure(value: Any) -> Hashable:
    if isinstance(value, types.FunctionType):
        return structure_of(value)
    if isinstance(value, Tensor):
        return _tensor_structure(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_cell_structure, value))
    number = isinstance(value, (bool, int, float, str, type(None)))
    return type(value).__qualname__, value if number else None


def captured_tensors(mod: Any) -> Iterator[Tensor]:
    """The tensors that a mod reads beside its arguments: those it closes over or names among its globals,
    down the functions and modules that it reaches that way."""
    yield from _tensors_in(mod, set())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one, seen)
    elif isinstance(value, types.MethodType):
        yield from _tensors_in((value.__self__, value.__func__), seen)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from _tensors_in(cell.cell_contents, seen)
        for name in value.__code__.co_names:
            one = value.__globals__.get(name)
            if not isinstance(one, types.FunctionType) or one.__module__ == value.__module__:
                yield from _tensors_in(one, seen)  # functions of libraries capture nothing of the user's


def _new_graph() -> Callable[..., Any]:
    """A compiled function with a code object of its own: dynamo keeps its graphs, and their limit of eight,
    per code object."""

    def call(q, k, v, score_mod, block_mask, scale, enable_gqa, kernel_options, aux):  # type: ignore[no-untyped-def]
        return torch_flex_attention(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=enable_gqa,
            kernel_options=kernel_options,
            return_aux=aux,
        )

    own = types.FunctionType(call.__code__.replace(co_name="gnaflex_flex_attention"), globals())
    # Shapes are part of the structure; dynamic ones fail to build on a CPU for many masks (torch <= 2.15).
    compiled: Callable[..., Any] = torch.compile(own, dynamic=False, fullgraph=True)
    return compiled


@lru_cache(maxsize=1)
def cpu_obstacle() -> str | None:
    """Why this machine cannot compile FlexAttention for its CPU, or None."""
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.kernel.flex.flex_cpu import check_cpu_supported

    if not torch._dynamo.eval_frame.is_dynamo_supported():
        return "torch.compile does not support this Python version"
    if not check_cpu_supported():  # type: ignore[no-untyped-call]
        return "FlexAttention compiles for x86 CPUs with AVX2 only"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "torch.compile finds no C++ compiler; install one, for example g++, or set CXX"
    return None

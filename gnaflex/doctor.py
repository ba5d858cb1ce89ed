"""The self-test of ``gnaflex doctor``: checks of masks, kernels and backends.

A check says "ok", "failed" or "not checked", and why in a line. Nothing here prints. Kernels come before the
backends, so that a kernel whose proof is repeated is known when a backend asks for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex.cuda_backend import cache, gate, machine, proof
from gnaflex.cuda_backend.compile import INSTALL, to_object
from gnaflex.cuda_backend.config import ARCHITECTURES, HEAD_DIMS, KernelConfig
from gnaflex.cuda_backend.fast_path import DTYPE_NAMES, Problem
from gnaflex.dispatch import BACKENDS
from gnaflex.door import explain, flex_attention
from gnaflex.flex import block_mask
from gnaflex.origin import permute
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA
from gnaflex.trial import BUDGET, rounded

OK, FAILED, NOT_CHECKED = RESULTS = ("ok", "failed", "not checked")
Result = tuple[str, str]
Problems = tuple[Problem, ...]
Tensors = tuple[Tensor, Tensor, Tensor]

SAME = ("sm_103a",)  # architectures whose kernels are another's, compiled anew: a few are enough

TEXT: dict[str, Any] = {"prefix": 5, "suffix": 2, "extra_kv": 3}
MASKS: tuple[tuple[GNA, dict[str, Any]], ...] = (
    (GNA(300, 33, 7, 2), {}),
    (GNA((19, 23), (8, 9), (3, 4), (2, 1)), {}),
    (GNA((7, 12, 10), (4, 6, 5), (2, 3, 1), 1, (True, False, False)), {}),
    (GNA((12, 18), (6, 8), (2, 4)), TEXT),
    (GNA((4, 16, 24), (2, 8, 16), (2, 8, 8)), {"q_tile": (2, 8, 8)}),
)
# By rank; the kernels' boxes of queries are of 128 tokens: (128,), (8, 16), (2, 8, 8).
SPECS = (GNA(512, 256, 128), GNA((20, 36), (16, 16), (8, 16)), GNA((6, 12, 20), (4, 8, 8), (2, 8, 8)))
PROBLEMS = (Problem(SPECS[2]), Problem(SPECS[1], **TEXT))  # that backends are tried on
HEADS, HEAD_DIM = 2, 64


class Check(NamedTuple):
    """One row of the table to be: its name, and the function that finds out."""

    name: str
    run: Callable[[], Result]


def rows(checks: Iterable[Check]) -> Iterator[tuple[str, str, str, float]]:
    """Name, result, detail and seconds of one check after another; one that raises has failed, with the last
    line of its message."""
    for check in checks:
        start = time.perf_counter()
        try:
            result, detail = check.run()
        except Exception as error:
            last = str(error).strip().rpartition("\n")[2].strip()
            result, detail = FAILED, f"{type(error).__name__}: {last}"
        yield check.name, result, detail, time.perf_counter() - start


def checks(device: torch.device, *, quick: bool = False, again: bool = False) -> Iterator[Check]:
    """What is checked on a device: of kernels, problems and dtypes a few if ``quick``; proofs on record anew
    if ``again``."""
    yield Check("masks", partial(masks_are_exact, device))
    yield from _kernel_checks(device, quick, again)
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    problems = PROBLEMS[:1] if quick else PROBLEMS
    for dtype in dtypes[:1] if quick else dtypes:
        for backend in BACKENDS:
            if backend != "reference":
                run = partial(backend_agrees, backend, problems, dtype, device)
                yield Check(f"{backend}, {_name(dtype)}", run)
    yield Check(f"backward, {_name(dtypes[0])}", partial(backward_agrees, dtypes[0], device))


# ---- masks -------------------------------------------------------------------------------------------


def masks_are_exact(device: torch.device) -> Result:
    """Whether the lists and mask_mods of MASKS allow exactly the pairs of the definition."""
    if wrong := [repr(spec) for spec, options in MASKS if not _is_exact(spec, options, device)]:
        return FAILED, f"not the pairs of the definition: {', '.join(wrong)}"
    return OK, f"{len(MASKS)} problems, bit for bit"


def _is_exact(spec: GNA, options: dict[str, Any], device: torch.device) -> bool:
    bm = block_mask(spec, device=device, **options)
    want = dense_mask(spec, **{name: n for name, n in options.items() if name in TEXT}).to(device)
    if "q_tile" in options:
        want = permute(permute(want, bm, 0), bm, 1)
    return torch.equal(_allowed(bm), want)


def _allowed(bm: BlockMask) -> Tensor:
    """Which pairs a mask allows, [queries, keys]: all of full blocks, of partial ones what mask_mod says."""
    device = bm.kv_indices.device
    q, k = (torch.arange(n, device=device) for n in bm.seq_lengths)
    rows, columns = (x // size for x, size in zip((q, k), bm.BLOCK_SIZE, strict=True))
    masked = _listed(bm.kv_num_blocks, bm.kv_indices)[rows][:, columns]
    full = _listed(bm.full_kv_num_blocks, bm.full_kv_indices)[rows][:, columns]
    zero = q.new_zeros(())
    return full | masked & bm.mask_mod(zero, zero, q[:, None], k)


def _listed(counts: Any, indices: Any) -> Tensor:
    """Lists of full width as bool [rows, columns]."""
    out = torch.zeros(indices.shape[2:], dtype=torch.bool, device=indices.device)
    for row, count, entries in zip(out, counts[0, 0].tolist(), indices[0, 0].long(), strict=True):
        row[entries[:count]] = True
    return out


# ---- backends ----------------------------------------------------------------------------------------


def backend_agrees(backend: str, problems: Problems, dtype: torch.dtype, device: torch.device) -> Result:
    """Whether a backend's error against float64 is at most twice that of plain attention in the dtype."""
    errors = []
    for problem in problems:
        tensors, bm = _inputs(problem, dtype), _mask(problem, device)
        there = _on(device, tensors)
        if why := explain(*there, bm).reasons[backend]:
            return NOT_CHECKED, why[0]
        got = flex_attention(*there, block_mask=bm, backend=backend)
        errors.append(_against(got, _exact(problem, tensors), _plain(problem, tensors)))
    return _judged(errors)


def backward_agrees(dtype: torch.dtype, device: torch.device) -> Result:
    """The same of the gradients of the backend that "auto" takes for training."""
    problem = PROBLEMS[0]
    tensors = _inputs(problem, dtype)
    upstream = tensors[2].flip(2)  # any numbers of its shape
    there, bm = _on(device, tensors, is_training=True), _mask(problem, device)
    explained = explain(*there, bm)
    if explained.backend is None:
        return NOT_CHECKED, "no backend has a backward here"
    out = flex_attention(*there, block_mask=bm, backend=explained.backend)
    got = torch.autograd.grad(out, there, upstream.to(device))
    here = _on(torch.device("cpu"), tensors, is_training=True)
    want, plain = (
        torch.autograd.grad(attend(problem, here), here, upstream.to(kind))
        for attend, kind in ((_exact, torch.float64), (_plain, dtype))
    )
    result, detail = _judged(list(map(_against, got, want, plain)))
    return result, f"{explained.backend}: {detail}"


def _against(got: Tensor, exact: Tensor, plain: Tensor) -> tuple[float, float]:
    """The largest error, and what it may be."""
    error, other = ((x.cpu().double() - exact).abs().max().item() for x in (got, plain))
    return error, BUDGET * other


def _judged(errors: list[tuple[float, float]]) -> Result:
    detail = "; ".join(f"error {error:.2g} of at most {budget:.2g}" for error, budget in errors)
    return (OK if all(error <= budget for error, budget in errors) else FAILED), detail


def _exact(problem: Problem, tensors: Tensors) -> Any:
    """Attention in float64, of tensors on the CPU."""
    q, k, v = (x.double() for x in tensors)
    return flex_attention(q, k, v, block_mask=_mask(problem, torch.device("cpu")), backend="reference")


def _plain(problem: Problem, tensors: Tensors) -> Tensor:
    return rounded(*tensors, dense_mask(problem.spec, **_texts(problem)), None)


def _inputs(problem: Problem, dtype: torch.dtype) -> Tensors:
    """Query, key and value [1, heads, tokens, head_dim] on the CPU, where chance is the same everywhere."""
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = problem.spec.num_tokens + problem.prefix + problem.suffix
    shape = 3, 1, HEADS, tokens + problem.extra_kv, HEAD_DIM
    q, k, v = torch.randn(shape, generator=generator).to(dtype).unbind()
    return q[:, :, :tokens].contiguous(), k, v


def _on(device: torch.device, tensors: Tensors, is_training: bool = False) -> Tensors:
    """Copies on a device."""
    q, k, v = (x.detach().to(device, copy=True).requires_grad_(is_training) for x in tensors)
    return q, k, v


def _mask(problem: Problem, device: torch.device) -> BlockMask:
    return block_mask(problem.spec, device=device, **_texts(problem))


def _texts(problem: Problem) -> dict[str, Any]:
    return dict(zip(TEXT, problem.texts, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- kernels -----------------------------------------------------------------------------------------


def variants(arch: str, quick: bool = False) -> list[KernelConfig]:
    """The kernels to try: every dtype, head_dim and rank, without text and with; or those of PROBLEMS."""
    if quick:
        return [problem.config(arch, torch.bfloat16, HEAD_DIM) for problem in PROBLEMS]
    problems = [Problem(spec, **text) for spec in SPECS for text in ({}, TEXT)]
    every = itertools.product(DTYPE_NAMES, HEAD_DIMS, problems)
    return [problem.config(arch, dtype, head_dim) for dtype, head_dim, problem in every]


def compiled(quick: bool) -> list[KernelConfig]:
    """The kernels to compile, whatever this machine runs."""
    archs = [arch for arch in ARCHITECTURES if not (quick and arch in SAME)]
    return [one for arch in archs for one in variants(arch, quick or arch in SAME)]


def _kernel_checks(device: torch.device, quick: bool, again: bool) -> Iterator[Check]:
    if importlib.util.find_spec("cutlass") is None:
        yield Check("kernels compile", lambda: (NOT_CHECKED, f"CuTe DSL is not installed: {INSTALL}"))
    else:
        for config in compiled(quick):
            yield Check(f"compile {config.name}", partial(kernel_compiles, config))
    if why := machine.obstacle(device):
        yield Check("kernels run", lambda: (NOT_CHECKED, why))
        return
    for config in variants(machine.architecture(device), quick):
        yield Check(f"run {config.name}", partial(kernel_runs, config, device, again))


def made(config: KernelConfig) -> tuple[str, int]:
    """A kernel brought into the cache: "compiled" or "already there", and its bytes.

    Raises:
        GNAError: CuTe DSL is not installed.
    """
    word = "compiled" if cache.stored(config) is None else "already there"
    return word, len(cache.get(config, _built))


def _built(config: KernelConfig) -> Any:
    with _ctrl_c_held():
        return to_object(config)


@contextlib.contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, a second one does not: CuTe DSL 4.8.1, interrupted in its C++,
    reports a failure or aborts the process."""
    before, pressed = signal.getsignal(signal.SIGINT), []
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hold(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def kernel_compiles(config: KernelConfig) -> Result:
    """Whether the cache holds a kernel, or CuTe DSL makes it."""
    word, size = made(config)
    return (OK if size else FAILED), f"{word}, {size:,} bytes"


def kernel_runs(config: KernelConfig, device: torch.device, again: bool) -> Result:
    """Whether a kernel proves itself on the device, in a process of its own, or is known to have done so."""
    subject = gate.subject_of(config, device)
    if again:
        proof.forget(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it asks to run this
        found = proof.verdict(subject, gate.command(config, device))
    said = f"{found.outcome}: {found.reason}" if found.reason else found.outcome
    if found.reason.startswith(proof.SWITCH):  # the user's choice, not the kernel's fault
        return NOT_CHECKED, said
    if found.outcome == "failed" and not again:
        said += "; gnaflex doctor --again tries once more"
    return {"proved": OK, "failed": FAILED}.get(found.outcome, NOT_CHECKED), said

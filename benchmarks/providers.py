"""Who can run a problem, and how a user of each would: every provider takes row-major q, k, v and gives the
output in the same order, whatever it permutes in between."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from gnaflex.cuda_backend import fast_path
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import gnaflex
from gnaflex import advice, flash, routes
from gnaflex.flex import listed_blocks
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord
from gnaflex.order import Document, Order
from gnaflex.planner import Plan

from .problems import BLOCK, Problem

EAGER_BYTES = 8 * 2**30  # of scores that an uncompiled FlexAttention may hold


class CannotRun(Exception):
    """Why a provider does not run a problem."""


class Ready(NamedTuple):
    """How a provider runs a problem.

    ``call`` maps q, k, v [1, heads, tokens, head_dim] to the output. ``mask`` makes the mask of it anew, if
    there is one. ``speedup`` is what the planner predicts over dense attention, where it counts the tiles.
    ``compiles`` says whether a first call takes longer than others.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: Callable[[], Any] | None = None
    speedup: float | None = None
    compiles: bool = True


Make = Callable[[Problem, torch.device], Ready]


# ---- dense attention ---------------------------------------------------------------------------------


def dense(backend: SDPBackend, problem: Problem, device: torch.device) -> Ready:
    """scaled_dot_product_attention over all pairs, by one backend."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return Ready(call, compiles=device.type == "cuda")  # libraries load their kernels in a first call


# ---- FlexAttention with torch's own mask ----------------------------------------------------------------


def torch_flex(problem: Problem, device: torch.device) -> Ready:
    """As torch's documentation shows it: a mask_mod by division and remainder, create_block_mask and
    flex_attention both compiled, tokens row-major."""
    mask = torch_mask(problem, device, torch.compile(create_block_mask, dynamic=False))
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    made: list[Any] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and device.type == "cpu":
            raise CannotRun("FlexAttention has no backward on a CPU")
        if not made:
            made.append(mask())
        out: Tensor = attend(q, k, v, block_mask=made[0])
        return out

    return Ready(call, mask, _by_blocks(problem, Layout(problem.spec), BLOCK))


def torch_mask(problem: Problem, device: torch.device, create: Callable[..., Any]) -> Callable[[], Any]:
    """What makes a mask by create_block_mask, compiled or not, from a mask_mod by division and remainder."""
    text: dict[str, Any] = {"prefix": problem.prefix, "suffix": problem.suffix}
    mod = gnaflex.block_mask(problem.spec, **text, form="arith", device=device, full_width=False).mask_mod
    return partial(create, mod, None, None, problem.tokens, problem.tokens, device)


# ---- NATTEN --------------------------------------------------------------------------------------------


def natten(problem: Problem, device: torch.device) -> Ready:
    """na1d, na2d, na3d; text keys as additional ones, text queries by dense attention."""
    try:
        import natten
    except ImportError:
        raise CannotRun("not installed: pip install --no-build-isolation --no-deps natten==0.21.7") from None
    spec, before = problem.spec, problem.prefix
    scores = problem.tokens**2 * problem.heads * 4 * 3
    if not natten.HAS_LIBNATTEN and scores > EAGER_BYTES:
        raise CannotRun(
            f"without its library it runs FlexAttention uncompiled, with {scores / 2**30:.0f} GiB of scores"
        )
    function = getattr(natten, f"na{spec.rank}d")
    form = {"kernel_size": spec.window, "stride": spec.stride, "dilation": spec.dilation}
    attend = partial(function, **form, is_causal=spec.is_causal)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and device.type == "cpu":
            raise CannotRun("without its library it runs FlexAttention, which has no backward on a CPU")
        grid = slice(before, before + spec.num_tokens)
        grids = [_as_grid(x[:, :, grid], problem).contiguous() for x in (q, k, v)]
        if not (before or problem.suffix):
            return _flat(attend(*grids))
        texts = [torch.cat([x[:, :, :before], x[:, :, grid.stop :]], 2) for x in (q, k, v)]
        keys, values = (x.transpose(1, 2) for x in texts[1:])
        out = _flat(attend(*grids, additional_keys=keys, additional_values=values))
        of_text = scaled_dot_product_attention(texts[0], k, v)
        return torch.cat([of_text[:, :, :before], out, of_text[:, :, before:]], 2)

    return Ready(call, compiles=natten.HAS_LIBNATTEN)


# ---- gnaflex -------------------------------------------------------------------------------------------


def ours(backend: str, problem: Problem, device: torch.device) -> Ready:
    """gnaflex.attention on grids; with text, flex_attention under a mask in the order that costs least."""
    if problem.prefix or problem.suffix:
        return _ours_with_text(backend, problem, device)
    spec = problem.spec
    form = (spec.window, spec.stride, spec.dilation, spec.is_causal)
    attend: Callable[..., Tensor] = partial(gnaflex.attention, backend=backend)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _reasons(backend):
            return _flat(attend(*(_as_grid(x, problem) for x in (q, k, v)), *form))

    mask = None
    if backend == "flash":
        rows = flash.q_rows(device)
        mask = lambda: routes.Problem(spec).for_flash(rows, True).mask(device)  # noqa: E731
    elif backend == "flex":
        mask = lambda: routes.Problem(spec).cheapest.mask(device)  # noqa: E731
    return Ready(call, mask, predicted(backend, problem, device))


@contextlib.contextmanager
def _reasons(backend: str) -> Iterator[None]:
    """Of a refusal those against this backend alone."""
    try:
        yield
    except NotImplementedError as error:
        found = re.search(rf"^  {backend}: (.*)$", str(error), re.MULTILINE)
        raise CannotRun(found.group(1) if found else str(error)) from None


def _ours_with_text(backend: str, problem: Problem, device: torch.device) -> Ready:
    def mask() -> Any:
        layout, rows = _layout(backend, problem, device)
        text: dict[str, Any] = {"prefix": problem.prefix, "suffix": problem.suffix}
        more: dict[str, Any] = {"q_tile": layout.q_tile, "kv_tile": layout.kv_tile} if layout.q_tile else {}
        if backend == "flash":
            form = flash.form_of((Order((Document(layout, **text),)),), rows)
            more |= {"form": form, "block_size": (rows, BLOCK)}
        return gnaflex.block_mask(problem.spec, **text, **more, device=device)

    bm = mask()
    is_tiled = _layout(backend, problem, device)[0].q_tile is not None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_tiled:
            q, k, v = (gnaflex.permute(x, bm) for x in (q, k, v))
        with _reasons(backend):
            out: Tensor = gnaflex.flex_attention(q, k, v, block_mask=bm, backend=backend)
        return gnaflex.unpermute(out, bm) if is_tiled else out

    return Ready(call, mask, predicted(backend, problem, device))


def _layout(backend: str, problem: Problem, device: torch.device) -> tuple[Layout, int]:
    """The token order that a backend gets, and the rows of its blocks."""
    if backend == "flash":
        rows = flash.q_rows(device)
        return flash.cheapest_layout(problem.spec, rows), rows
    if backend == "flex":
        return advice.cheapest_layout(problem.spec), BLOCK
    return Layout(problem.spec), BLOCK


def predicted(backend: str, problem: Problem, device: torch.device) -> float | None:
    """The planner's speed-up over dense attention: :func:`gnaflex.estimate` where it knows the device and
    the kernel, else the ratio of the pairs that are computed; None for a backend whose tiles it does not
    count."""
    if backend == "cuda":
        tiles = fast_path.Problem(problem.spec).boxes_on(device)
        return (
            None if tiles is None else _estimated("cuda", problem, tiles, device) or problem.by_pairs(tiles)
        )
    if backend not in ("flex", "flash"):
        return None
    layout, rows = _layout(backend, problem, device)
    if backend == "flex" and layout.q_tile and layout.kv_tile:
        tiles = Plan(problem.spec, layout.q_tile, layout.kv_tile, "static")
        return _estimated("flex", problem, tiles, device) or _by_blocks(problem, layout, rows)
    return _by_blocks(problem, layout, rows)


def _estimated(backend: Any, problem: Problem, tiles: Plan, device: torch.device) -> float | None:
    """None with text, or for a device whose rates are not known."""
    if device.type != "cuda" or problem.prefix or problem.suffix:
        return None
    name = torch.cuda.get_device_name(device)
    with contextlib.suppress(gnaflex.GNAError):
        return gnaflex.estimate(tiles, problem.heads, problem.head_dim, device=name, backend=backend).speedup
    return None


def _by_blocks(problem: Problem, layout: Layout, rows: int) -> float:
    """Dense pairs over those in the blocks that a mask lists."""
    document = Document(layout, prefix=problem.prefix, suffix=problem.suffix)
    listed = listed_blocks(MaskRecord((Order((document,)),), "table", (rows, BLOCK)))
    return problem.dense_pairs / (listed * rows * BLOCK)


def _as_grid(x: Tensor, problem: Problem) -> Tensor:
    """[1, heads, tokens, head_dim] as [1, *shape, heads, head_dim]."""
    return x.transpose(1, 2).reshape(len(x), *problem.spec.shape, problem.heads, problem.head_dim)


def _flat(x: Tensor) -> Tensor:
    """[1, *shape, heads, head_dim] as [1, heads, tokens, head_dim]."""
    return x.flatten(1, -3).transpose(1, 2)


PROVIDERS: dict[str, Make] = {
    "dense, cuDNN": partial(dense, SDPBackend.CUDNN_ATTENTION),
    "dense, flash": partial(dense, SDPBackend.FLASH_ATTENTION),
    "dense, efficient": partial(dense, SDPBackend.EFFICIENT_ATTENTION),
    'gnaflex, "cuda"': partial(ours, "cuda"),
    'gnaflex, "flash"': partial(ours, "flash"),
    'gnaflex, "flex"': partial(ours, "flex"),
    'gnaflex, "sdpa"': partial(ours, "sdpa"),
    "FlexAttention, create_block_mask": torch_flex,
    "NATTEN": natten,
}
DENSE = tuple(name for name in PROVIDERS if name.startswith("dense"))

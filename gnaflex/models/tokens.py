"""Attention over the tokens of a model, text and a grid in one sequence: [batch, tokens, heads, head_dim].

What a layer computes is a :class:`Tokens`, a value with a number. Compiled blocks pass the number as a
tensor, so that layers with different windows, and steps with different ones, share one graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex import door
from gnaflex.checks import autocast
from gnaflex.dispatch import Call
from gnaflex.layout import Layout
from gnaflex.operators import recomputed
from gnaflex.reorder import real_tensors
from gnaflex.routes import Problem, Route, attended
from gnaflex.spec import GNA, GNAError


@dataclass(frozen=True)
class Tokens:
    """``[prefix | grid | suffix]``, of which the text sees everything and is seen by everything (up to its
    effective length, where calls bring lengths). The grid is row-major, or in the order of ``layout``."""

    spec: GNA
    prefix: int = 0
    suffix: int = 0
    has_lengths: bool = False
    backend: str = "auto"
    layout: Layout | None = None

    @property
    def number(self) -> Tensor:
        """What stands for it in a compiled graph: an integer tensor on the CPU."""
        if self not in _numbers:
            with real_tensors():
                _numbers[self] = torch.tensor(len(_numbers))
            _numbered.append(self)
        return _numbers[self]

    @property
    def count(self) -> int:
        """All tokens."""
        return self.prefix + self.spec.num_tokens + self.suffix

    def way(self, device: torch.device) -> tuple[bool, str] | None:
        """Whether its last call on a device permuted tokens, and the backend that ran it; None before the
        first."""
        return _ways.get((self, device))


_numbers: dict[Tokens, Tensor] = {}
_numbered: list[Tokens] = []
_ways: dict[tuple[Tokens, torch.device], tuple[bool, str]] = {}


@lru_cache(maxsize=64)
def _problem(spec: GNA, prefix: int, suffix: int, has_lengths: bool) -> Problem:
    return Problem(spec, prefix, suffix, has_lengths=has_lengths)


@lru_cache(maxsize=64)
def _route(tokens: Tokens) -> Route:
    assert tokens.layout is not None
    problem = _problem(tokens.spec, tokens.prefix, tokens.suffix, tokens.has_lengths)
    return problem.in_order(replace(tokens.layout, spec=tokens.spec))


def attend(tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    """Attention of one layer.

    Args:
        tokens: what it computes.
        query, key, value: [batch, tokens, heads, head_dim].
        lengths: effective lengths of the text, integers [batch, runs of text], if it has lengths.

    Returns:
        [batch, tokens, heads, head_dim of the value].

    Raises:
        GNAError: the number of tokens is another.
    """
    if query.shape[1] != tokens.count:
        raise GNAError(
            f"a layer got {query.shape[1]} tokens: its model has {tokens.count}, "
            f"{'x'.join(map(str, tokens.spec.shape))} and {tokens.prefix + tokens.suffix} of text.\n"
            "  What cuts or merges tokens between blocks needs dense layers there: "
            "schedule=Schedule(layers={number: None})."
        )
    query, key, value = autocast(query, key, value)
    gqa = query.shape[2] != key.shape[2]
    if tokens.layout is not None:
        of = (tokens, query.device)
        bm = _kept_mask_in_order(*of) if lengths is None else _mask_in_order(*of, lengths)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        rows: Tensor = door.flex_attention(*(q, k, v), block_mask=bm, enable_gqa=gqa, backend=tokens.backend)
        return rows.transpose(1, 2)
    problem = _problem(tokens.spec, tokens.prefix, tokens.suffix, tokens.has_lengths)

    def call_in(route: Route) -> Call:
        q, k, v = route.heads_first(query, key, value)
        return Call(q, k, v, None, None, route.under(lengths), None, gqa, None, None)

    route, name, _, out = attended(problem, tokens.backend, None, query.device, call_in)
    _ways[tokens, query.device] = route.order.is_tiled, name
    return route.heads_last(out, query.shape)


@lru_cache(maxsize=64)
def _kept_mask_in_order(tokens: Tokens, device: torch.device) -> BlockMask:
    return _mask_in_order(tokens, device, None)


def _mask_in_order(tokens: Tokens, device: torch.device, lengths: Tensor | None) -> BlockMask:
    """The mask of tokens whose grid lies in an order of its own; text in front stays there."""
    bm = _route(tokens).mask(device, lengths)
    return _text_first(bm, tokens.spec.num_tokens, tokens.prefix) if tokens.prefix else bm


def _text_first(bm: BlockMask, grid: int, prefix: int) -> BlockMask:
    """A tile-major mask has its text behind the grid; this one has ``prefix`` tokens, whole blocks, in
    front."""

    def turned(at: Any, first: int, second: int) -> Any:
        """Places, or blocks, of two runs that lie the other way round."""
        return torch.where(at < first, at + second, torch.where(at < first + second, at - first, at))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        old: Tensor = mod(b, h, turned(q_idx, prefix, grid), turned(kv_idx, prefix, grid))
        return old

    mod, lists = bm.mask_mod, {}
    q_block, kv_block = bm.BLOCK_SIZE
    for name, rows_of, columns_of in (
        *(("kv", q_block, kv_block), ("full_kv", q_block, kv_block)),
        *(("q", kv_block, q_block), ("full_q", kv_block, q_block)),
    ):
        counts, indices = getattr(bm, f"{name}_num_blocks"), getattr(bm, f"{name}_indices")
        rows = torch.arange(counts.shape[-1], device=counts.device)
        old_row = turned(rows, prefix // rows_of, grid // rows_of)
        lists[f"{name}_num_blocks"] = counts[..., old_row]
        new = turned(indices, grid // columns_of, prefix // columns_of)
        lists[f"{name}_indices"] = new[..., old_row, :].to(indices.dtype)
    return BlockMask(seq_lengths=bm.seq_lengths, BLOCK_SIZE=bm.BLOCK_SIZE, mask_mod=mask_mod, **lists)


# ---- inside a user's torch.compile -------------------------------------------------------------------


@torch.library.custom_op("gnaflex::attend_tokens", mutates_args=())
def attend_tokens(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, number: Tensor) -> Tensor:
    """:func:`attend` of the tokens with a number, as one opaque operator."""
    return attend(_numbered[int(number)], q, k, v, lengths).contiguous()


@torch.library.custom_op("gnaflex::attend_tokens_backward", mutates_args=())
def attend_tokens_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, number: Tensor
) -> list[Tensor]:
    """Gradients of :func:`attend_tokens`; the forward runs again."""
    tokens = _numbered[int(number)]
    return recomputed(lambda a, b, c: attend(tokens, a, b, c, lengths), (q, k, v), (grad,), lse=False)


@attend_tokens.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, number: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@attend_tokens_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, number: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*attend_tokens_backward(grad, *ctx.saved_tensors), None, None)


attend_tokens.register_autograd(_differentiate, setup_context=_setup_context)

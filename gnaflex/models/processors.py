"""Attention processors of diffusers whose attention call is ours.

A processor is a subclass of the stock one. Its dense call is the stock code; its sparse call is the same code
with another ``dispatch_attention_fn`` among its globals, and it hands the layer's state over in place of the
attention mask, which no stock processor reads before that call. So projections, norms and rotary embeddings
stay diffusers' own, and nothing outside the layer changes.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gnaflex.checks import autocast
from gnaflex.models.tokens import Tokens, attend, attend_tokens
from gnaflex.spec import GNA, GNAError

_NOTHING = Tokens(GNA(1, 1))


class Layer:
    """What a layer is told before a forward of its model; compiled blocks read ``sparse``, ``lengths`` and
    ``number``."""

    def __init__(self) -> None:
        self.tell(None, None)

    def tell(self, tokens: Tokens | None, lengths: Tensor | None) -> None:
        """What the layer computes from now on: None is the stock attention."""
        self.sparse = tokens is not None
        self.tokens = tokens or _NOTHING
        self.number = self.tokens.number
        self.lengths = lengths if self.tokens.has_lengths else None

    def differs(self, tokens: Tokens | None) -> bool:
        """Whether it computes something else, or may: lengths of text are numbers that nothing compares."""
        return self.tokens != (tokens or _NOTHING) or self.tokens.has_lengths


def with_neighborhood(stock: Any, layer: Layer) -> Any:
    """A processor like ``stock``, an instance of one of :data:`CALLS`, that does what a layer is told."""
    kind: Any = type(stock)
    made: Any = object.__new__(_subclass(kind))
    made.__dict__.update(stock.__dict__)
    made.gnaflex = layer
    return made


def layer_of(processor: Any) -> Layer | None:
    """The layer of a processor of ours."""
    return getattr(processor, "gnaflex", None)


def _call_image(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Any:
    call, mask = _chosen(self, attention_mask, image_rotary_emb)
    return call(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def _call_wan(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: Any = None,
) -> Any:
    call, mask = _chosen(self, attention_mask, rotary_emb)
    return call(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


# By the name of the stock class. The parameters keep their names: diffusers passes on what it finds there.
CALLS = {
    "FluxAttnProcessor": _call_image,
    "HunyuanVideoAttnProcessor2_0": _call_image,
    "CosmosAttnProcessor2_0": _call_image,
    "WanAttnProcessor": _call_wan,
}


def mark(tables: tuple[Tensor, ...], layers: Iterable[Layer]) -> None:
    """Write what layers are told now on a forward's rotary tables, for blocks that run again later, when
    other forwards may have been told other things."""
    tables[0].gnaflex_told = {layer: copy.copy(layer) for layer in layers}  # type: ignore[attr-defined]


def _chosen(processor: Any, mask: Tensor | None, tables: Any) -> tuple[Any, Any]:
    layer = processor.gnaflex
    if not torch.compiler.is_compiling() and tables is not None:
        layer = getattr(tables[0], "gnaflex_told", {}).get(layer, layer)
    if not layer.sparse:
        return processor.dense_call, mask
    if mask is not None and layer.lengths is None:
        raise GNAError(
            "a sparse layer takes no attention mask of your own: it was given one.\n"
            "  Leave it out, or keep the layers dense while you need it: applied.remove()."
        )
    return processor.sparse_call, layer


@lru_cache(maxsize=16)
def _subclass(stock: Any) -> type:
    call: Any = stock.__call__
    names = {**call.__globals__, "dispatch_attention_fn": _dispatch}
    # torch.compile looks names up in the module of that name, where diffusers' own dispatch lies
    del names["__name__"]
    again = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    again.__kwdefaults__ = call.__kwdefaults__
    body = {"__call__": CALLS[stock.__name__], "dense_call": call, "sparse_call": again}
    return type(f"Neighborhood{stock.__name__}", (stock,), body)


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, parallel_config: Any = None, **rest: Any
) -> Tensor:
    """In place of diffusers' dispatch_attention_fn, of a sparse layer."""
    if parallel_config is not None:
        raise GNAError(
            "sparse layers do not run under diffusers' context parallelism.\n"
            "  Leave out enable_parallelism, or shard the mask: gnaflex.shard(spec, axis, rank, world)."
        )
    layer: Layer = attn_mask
    if torch.compiler.is_compiling():
        out: Tensor = attend_tokens(*autocast(query, key, value), layer.lengths, layer.number)
        return out
    return attend(layer.tokens, query, key, value, layer.lengths)

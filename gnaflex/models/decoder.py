"""The diffusion decoder of LTX-2.5, which is neighborhood attention already, without its N x N mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gnaflex.door import attention
from gnaflex.models.recipes import Recipe
from gnaflex.spec import GNAError

_STOCK = "LTX2VideoVaeNeighborhoodAttnProcessor"


class NeighborhoodProcessor:
    """Runs a layer's own window by gnaflex. It is no subclass of the stock processor: the decoder builds the
    mask (167 GiB at 69x64x96) for those."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        """hidden_states: [batch, frames, height, width, channels]."""
        query, key, value = attn.project_qkv(hidden_states)
        out: Tensor = attention(
            *(query, key, value, attn.kernel_size),
            scale=1.0,  # project_qkv has scaled the query
            backend=self._backend,
        )
        projected: Tensor = attn.to_out[0](out.flatten(-2))
        return projected


class AttachedDecoder:
    """A decoder whose layers have our processors, until :meth:`remove`."""

    def __init__(self, model: Any, recipe: Recipe, backend: str) -> None:
        if recipe.neighborhood is not None or recipe.schedule.layers or recipe.schedule.watches_steps:
            raise GNAError(
                f"{type(model).__name__} has windows of its own, which were trained: it takes no other.\n"
                "  Write gnaflex.models.apply(decoder), without a window or a schedule."
            )
        self.model = model
        layers = [one for one in model.modules() if type(getattr(one, "processor", None)).__name__ == _STOCK]
        if not layers:
            raise GNAError(
                f"no layer of {type(model).__name__} has diffusers' own {_STOCK}: another was set, or apply "
                "is in force already.\n  Call .remove() on what the first apply returned."
            )
        self._stock = [(layer, layer.processor) for layer in layers]
        ours = NeighborhoodProcessor(backend)
        for layer in layers:
            layer.processor = ours

    def remove(self) -> None:
        """Put the stock processors back, the same objects."""
        for layer, stock in self._stock:
            layer.processor = stock
        self._stock = []

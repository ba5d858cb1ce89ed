"""The models that gnaflex knows: where their self-attention is, and what a call tells of its tokens.

Facts of diffusers 0.42: tests/test_models_*.py hold them against the library that is installed.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gnaflex.order import Order
from gnaflex.reorder import from_order, to_order
from gnaflex.spec import GNAError

T = TypeVar("T")


class Seen(NamedTuple):
    """What a call of a model tells: the grid of its tokens, the text before and behind it, the effective
    lengths of the text, its timestep, or why its tokens are no grid."""

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    lengths: Tensor | None = None
    timestep: Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Attention:
    """A self-attention layer of a model: its module, and the module's name."""

    name: str
    module: Any


class Family:
    """A class of models. ``blocks`` are its lists of blocks, in the order they run, ``attention`` the name of
    the self-attention in a block, ``axes`` the rank of its grids, ``latents`` the argument that holds them,
    ``rotary`` the submodule of the rotary tables, which every block gets,
    ``tables`` the submodules whose output has a row per token, and in which dimension."""

    blocks: tuple[str, ...] = ("transformer_blocks",)
    attention = "attn1"
    axes = 3
    latents = "hidden_states"
    rotary = "rope"
    tables: Mapping[str, int] = MappingProxyType({"rope": 0})

    def layers(self, model: Any) -> list[Attention]:
        """Its self-attention layers in the order they run; cross attention and text refiners are none."""
        return [
            Attention(f"{name}.{number}.{self.attention}", getattr(block, self.attention))
            for name in self.blocks
            for number, block in enumerate(getattr(model, name))
        ]

    def patch(self, model: Any) -> tuple[int, int, int]:
        """Latent positions of a token per axis."""
        t, h, w = model.config.patch_size
        return t, h, w

    def see(self, model: Any, given: dict[str, Any]) -> Seen:
        """What a call with these arguments tells."""
        latents = given[self.latents].shape[2:]
        grid = tuple(n // p for n, p in zip(latents, self.patch(model), strict=True))
        return Seen(grid, timestep=given["timestep"])

    def fixed_order(self, model: Any, given: dict[str, Any]) -> str:
        """Why the tokens of a call cannot be permuted before its first block; "" if they can."""
        latents = given["hidden_states"].shape[2:]
        uneven = [n for n, p in zip(latents, self.patch(model), strict=True) if n % p]
        return f"{uneven[0]} latent positions are no whole number of patches" if uneven else ""

    def into_order(self, model: Any, given: dict[str, Any], order: Order) -> dict[str, Any]:
        """The arguments of a call with its tokens in an order: patches of latents change places."""
        return {"hidden_states": _patches(to_order, given["hidden_states"], self.patch(model), order)}

    def out_of_order(self, model: Any, sample: Tensor, order: Order) -> Tensor:
        """The sample of such a call with its tokens row-major."""
        return _patches(from_order, sample, self.patch(model), order)


def _patches(
    change: Callable[[Tensor, Order, int], Tensor], x: Tensor, patch: tuple[int, ...], order: Order
) -> Tensor:
    """Latents [batch, channels, frames, height, width] with their patches, the tokens, in other places."""
    batch, channels, *extents = x.shape
    parts = ((n // p, p) for n, p in zip(extents, patch, strict=True))
    cut = x.reshape(batch, channels, *itertools.chain(*parts))
    inner = cut.permute(0, 1, 3, 5, 7, 2, 4, 6)
    moved = change(inner.flatten(5), order, -1).reshape(inner.shape)
    return moved.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(x.shape)


class Flux(Family):
    """FLUX.1: text comes first, the grid of an image is told by position ids."""

    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    axes = 2
    rotary = "pos_embed"
    tables = MappingProxyType({})

    def see(self, model: Any, given: dict[str, Any]) -> Seen:
        tokens, text = given["hidden_states"].shape[1], given["encoder_hidden_states"].shape[1]
        grid = _grid_of_ids(given["img_ids"])
        seen = Seen(grid, prefix=text, timestep=given["timestep"])
        if not grid or math.prod(grid) != tokens:
            return seen._replace(problem=f"its {tokens} tokens are no single grid by their img_ids")
        return seen

    def fixed_order(self, model: Any, given: dict[str, Any]) -> str:
        return ""

    def into_order(self, model: Any, given: dict[str, Any], order: Order) -> dict[str, Any]:
        residuals = {
            name: [to_order(x, order, 1) for x in given[name]]
            for name in ("controlnet_block_samples", "controlnet_single_block_samples")
            if given.get(name) is not None
        }
        latents, ids = to_order(given["hidden_states"], order, 1), to_order(given["img_ids"], order, -2)
        return {"hidden_states": latents, "img_ids": ids, **residuals}

    def out_of_order(self, model: Any, sample: Tensor, order: Order) -> Tensor:
        return from_order(sample, order, 1)


class Hunyuan(Family):
    """HunyuanVideo: text comes last, padded to one length, with a mask of what is real."""

    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"

    def patch(self, model: Any) -> tuple[int, int, int]:
        config = model.config
        return config.patch_size_t, config.patch_size, config.patch_size

    def see(self, model: Any, given: dict[str, Any]) -> Seen:
        mask = given["encoder_attention_mask"]
        lengths = mask.sum(1, keepdim=True, dtype=torch.int32)
        text = given["encoder_hidden_states"].shape[1]
        return super().see(model, given)._replace(suffix=text, lengths=lengths)

    def fixed_order(self, model: Any, given: dict[str, Any]) -> str:
        if model.config.image_condition_type == "token_replace":
            return "its blocks tell the first frame's tokens by their place"
        return super().fixed_order(model, given)


class Cosmos(Family):
    """Cosmos 1, 2 and 2.5."""

    tables = MappingProxyType({"rope": 0, "learnable_pos_embed": 1})

    def fixed_order(self, model: Any, given: dict[str, Any]) -> str:
        if given["timestep"].dim() != 1:
            return "every frame has a timestep of its own, which its blocks spread over tokens"
        if model.config.concat_padding_mask and not _is_constant(given["padding_mask"]):
            return "its padding mask is no single value"
        return super().fixed_order(model, given)

    def into_order(self, model: Any, given: dict[str, Any], order: Order) -> dict[str, Any]:
        moved = super().into_order(model, given, order)
        if (mask := given.get("condition_mask")) is not None:
            moved["condition_mask"] = _patches(to_order, mask, self.patch(model), order)
        if (residuals := given.get("block_controlnet_hidden_states")) is not None:
            moved["block_controlnet_hidden_states"] = [to_order(x, order, 1) for x in residuals]
        return moved


class CosmosControl(Family):
    """The control blocks of Cosmos-Transfer 2.5."""

    blocks = ("control_blocks",)
    latents = "controls_latents"

    def fixed_order(self, model: Any, given: dict[str, Any]) -> str:
        return "what its blocks return goes to another model"


class Wan(Family):
    """Wan 2.1 and 2.2."""

    blocks = ("blocks",)
    tables = MappingProxyType({"rope": 1})

    def into_order(self, model: Any, given: dict[str, Any], order: Order) -> dict[str, Any]:
        moved = super().into_order(model, given, order)
        if given["timestep"].dim() == 2:  # one per token, as TI2V has it
            moved["timestep"] = to_order(given["timestep"], order, 1)
        return moved


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": Flux(),
    "HunyuanVideoTransformer3DModel": Hunyuan(),
    "CosmosTransformer3DModel": Cosmos(),
    "CosmosControlNetModel": CosmosControl(),
    "WanTransformer3DModel": Wan(),
}
# A decoder that is neighborhood attention already: gnaflex/models/decoder.py
DECODER = "LTX2VideoDiffusionDecoderModel"


def arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a model by name."""
    return dict(_signature(type(model).forward).bind(model, *args, **kwargs).arguments)


@lru_cache(maxsize=32)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _once_per_tensor(look: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """What was found in the last tensor is remembered: a run has one, and looking waits for the GPU."""
    last: list[Any] = [lambda: None, 0, None]

    def remembered(x: Tensor) -> T:
        version = 0 if x.is_inference() else x._version  # it counts writes; inference_mode does not
        if last[0]() is not x or last[1] != version:
            last[:] = weakref.ref(x), version, look(x)
        found: T = last[2]
        return found

    return remembered


@_once_per_tensor
def _grid_of_ids(ids: Tensor) -> tuple[int, ...]:
    """Rows and columns of position ids [tokens, 3] (or with a batch) of one row-major grid; () if they are of
    something else."""
    there = (ids if ids.dim() == 2 else ids[0]).detach().to("cpu", torch.int64)
    height, width = (int(n) + 1 for n in there[:, 1:].amax(0)) if len(there) else (0, 0)
    if height * width != len(there):
        return ()
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    same = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return (height, width) if torch.equal(there, same) else ()


@_once_per_tensor
def _is_constant(mask: Tensor) -> bool:
    return bool((mask == mask.flatten()[0]).all())


def found_in(target: Any) -> list[tuple[str, Any]]:
    """The models that gnaflex knows in a pipeline, with their names; or the one that was given."""
    if hasattr(target, "components") and not isinstance(target, torch.nn.Module):
        parts = [(name, _unwrapped(part)) for name, part in target.components.items()]
    else:
        parts = [(type(_unwrapped(target)).__name__, _unwrapped(target))]
    known = [(name, part) for name, part in parts if name_of(part)]
    if not known:
        raise GNAError(
            f"no model in it is one that gnaflex knows: got {type(target).__name__}.\n"
            f"  Known are {', '.join(sorted([*FAMILIES, DECODER]))}, of diffusers. For your own model use "
            "gnaflex.nn.NeighborhoodAttention, for NVIDIA's original Cosmos code "
            "gnaflex.models.replace_attention."
        )
    return known


def name_of(model: Any) -> str:
    """The name of a known class that a model is, or ""."""
    classes = (one.__name__ for one in type(model).__mro__ if one.__module__.startswith("diffusers."))
    return next((name for name in classes if name in FAMILIES or name == DECODER), "")


def _unwrapped(model: Any) -> Any:
    """A model without what torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)


def keeps_tokens(model: Any) -> str:
    """Why tokens of a model must stay as they are from call to call: hooks of diffusers that remember them,
    as its feature caches do; "" if there are none."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            return "a cache of diffusers holds tokens of earlier calls"
    return ""


def replaced(output: Any, sample: Tensor) -> Any:
    """A model's output with another sample."""
    if isinstance(output, tuple) and not hasattr(output, "sample"):
        return (sample, *output[1:])
    output.sample = sample
    return output

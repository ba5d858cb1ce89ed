"""One transformer with neighborhood attention in place: what its layers are told before every forward."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gnaflex.advice import common_tile
from gnaflex.layout import Layout
from gnaflex.models.families import Attention, Family, Seen, arguments, keeps_tokens, replaced
from gnaflex.models.processors import CALLS, Layer, layer_of, mark, with_neighborhood
from gnaflex.models.recipes import Recipe, problem_on
from gnaflex.models.steps import Clock
from gnaflex.models.tokens import Tokens
from gnaflex.models.waiting import is_waiting, runs_compiled_again, watch
from gnaflex.order import Document, Order
from gnaflex.reorder import to_order
from gnaflex.spec import GNA, GNAError

logger = logging.getLogger("gnaflex")
PERMUTE = ("auto", "once", "layer")


class Attached:
    """A model whose self-attention layers have our processors, until :meth:`remove`."""

    def __init__(
        self, model: Any, family: Family, recipe: Recipe, clock: Clock, backend: str, permute: str
    ) -> None:
        self.model, self.family, self.recipe, self.clock = model, family, recipe, clock
        self.backend, self.permute = backend, permute
        self.attentions = family.layers(model)
        recipe.check(len(self.attentions), family.axes)
        self.numbers = sparse_numbers(recipe, len(self.attentions))
        for number in self.numbers:
            check_processor(self.attentions[number], number)
        self.layers = {number: Layer() for number in self.numbers}
        self._stock = {number: self.attentions[number].module.processor for number in self.numbers}
        for number, stock in self._stock.items():
            self.attentions[number].module.processor = with_neighborhood(stock, self.layers[number])
        self._order: Order | None = None  # of the call under way, if its tokens were permuted before
        self._waiting: Any = None  # for a backward pass in which compiled blocks run again
        self._known: dict[Any, list[Tokens | None]] = {}
        self._all_dense: list[Tokens | None] = [None] * len(self.layers)
        self._said: set[str] = set()
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
            *self._hooks_of_tables(),
        ]

    def remove(self) -> None:
        """Put the stock processors back, the same objects."""
        for hook in self._hooks:
            hook.remove()
        for number, stock in self._stock.items():
            self.attentions[number].module.set_processor(stock)  # pops modules that took its place
        self._hooks, self._stock = [], {}

    # ---- before and after a forward ------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = arguments(module, args, kwargs)
        del given["self"]
        seen = self.family.see(module, given)
        tokens = self._all_dense if self._is_dense(seen) else self._tokens(seen)
        self._order = self._order_of(seen, given, tokens)
        if self._order is not None:
            layout = self._order.documents[0].layout
            tokens = [one and replace(one, layout=layout) for one in tokens]
            given |= self.family.into_order(module, given, self._order)
        if is_waiting(self._waiting) and any(map(Layer.differs, self.layers.values(), tokens)):
            raise GNAError(
                "compiled blocks run again under gradient checkpointing, and would take what this call tells "
                "its layers for what an earlier one did: other windows, steps or grids.\n"
                "  Call backward() between the two, or leave out the compilation or the checkpointing."
            )
        for layer, one in zip(self.layers.values(), tokens, strict=True):
            layer.tell(one, seen.lengths)
        return None if self._order is None else ((), given)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        order, self._order = self._order, None
        sample: Any = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
        # what a control net returns is a list, which is not watched
        watched = isinstance(sample, Tensor) and runs_compiled_again(module, self.attentions)
        if order is None and not watched:
            return None
        if order is not None:
            sample = self.family.out_of_order(module, sample, order)
        if watched:
            sample, self._waiting = watch(sample)
        return replaced(output, sample)

    def _hooks_of_tables(self) -> list[Any]:
        """Rotary tables, and whatever else has a row per token, follow the tokens. (What is hooked can be
        copied with the model.)"""
        follow = [
            getattr(self.model, name).register_forward_hook(partial(self._follow, dim))
            for name, dim in self.family.tables.items()
            if getattr(self.model, name, None) is not None
        ]
        return [*follow, getattr(self.model, self.family.rotary).register_forward_hook(self._mark)]

    def _follow(self, dim: int, module: Any, args: Any, output: Any) -> Any:
        if self._order is None:
            return None
        if isinstance(output, Tensor):
            return to_order(output, self._order, dim)
        return tuple(to_order(x, self._order, dim) for x in output)

    def _mark(self, module: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        """Blocks that run again in a backward pass find there what they were told in their own forward."""
        if torch.is_grad_enabled():
            mark(output, self.layers.values())

    # ---- what the layers compute ---------------------------------------------------------------------

    def _is_dense(self, seen: Seen) -> bool:
        schedule = self.recipe.schedule
        if schedule.watches_steps and seen.timestep is not None:
            step = self.clock.tick(seen.timestep)
            if schedule.is_dense(step, self.clock.steps):
                return True
        if seen.problem:
            self._say(seen.problem)
        return bool(seen.problem)

    def _tokens(self, seen: Seen) -> list[Tokens | None]:
        """What every layer of ours computes, None for dense."""
        key = seen.grid, seen.prefix, seen.suffix, seen.lengths is not None
        if key not in self._known:
            problems = problems_on(self.recipe, len(self.attentions), seen.grid)
            self._known[key] = [self._tokens_of(problems[number], key) for number in self.numbers]
        return self._known[key]

    def _tokens_of(self, problem: GNA | str, key: tuple[Any, ...]) -> Tokens | None:
        if isinstance(problem, str):
            self._say(f"{problem} (grid {'x'.join(map(str, key[0]))})")
            return None
        _, prefix, suffix, has_lengths = key
        return Tokens(problem, prefix, suffix, has_lengths, self.backend)

    def _say(self, reason: str) -> None:
        """Why something stays dense that was to be sparse, once."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("%s stays dense: %s", type(self.model).__name__, reason)

    # ---- tokens permuted once ------------------------------------------------------------------------

    def _order_of(self, seen: Seen, given: dict[str, Any], tokens: list[Tokens | None]) -> Order | None:
        """The order that the tokens take before the first block; None leaves them row-major."""
        active = Counter(one for one in tokens if one is not None)
        if self.permute == "layer" or not active:
            return None
        device = given[self.family.latents].device
        if self.permute == "auto" and not all(one.way(device) == (True, "flex") for one in active):
            return None  # the first call of each tells what its backend needs
        why = self.family.fixed_order(self.model, given) or keeps_tokens(self.model)
        found = why or self._common_order(active, seen, device)
        if isinstance(found, Order):
            return found
        if self.permute == "once":
            raise GNAError(f'permute="once" is not possible here: {found}.\n  Write permute="auto".')
        return None

    def _common_order(self, active: Counter[Tokens], seen: Seen, device: torch.device) -> Order | str:
        if torch.is_grad_enabled() and device.type == "cpu":
            return "FlexAttention has no backward on a CPU"
        tile = _tile({tokens.spec: calls for tokens, calls in active.items()})
        if isinstance(tile, str):
            return tile
        block = math.prod(tile)
        if seen.prefix % block or seen.suffix % block:
            return f"{seen.prefix + seen.suffix} text tokens are no whole blocks of {block}"
        return Order((Document(Layout(next(iter(active)).spec, tile, tile)),))


_tiles: dict[frozenset[tuple[GNA, int]], tuple[int, ...] | str] = {}


def _tile(specs: dict[GNA, int]) -> tuple[int, ...] | str:
    key = frozenset(specs.items())
    if key not in _tiles:
        _tiles[key] = common_tile(specs)
    return _tiles[key]


def sparse_numbers(recipe: Recipe, count: int) -> list[int]:
    """The layers that are not dense whatever the grid."""
    of_layer, default = recipe.schedule.of_layer, recipe.neighborhood
    return [number for number in range(count) if of_layer(number, count, default) is not None]


def problems_on(recipe: Recipe, count: int, grid: tuple[int, ...]) -> list[GNA | str]:
    """What every layer computes on a grid in a sparse step, or why it stays dense."""
    schedule = recipe.schedule
    return [
        problem_on(schedule.of_layer(number, count, recipe.neighborhood), grid) for number in range(count)
    ]


def check_processor(attention: Attention, number: int) -> None:
    """Refuse layers whose processor is none of those that we know how to call."""
    processor = attention.module.processor
    if layer_of(processor) is not None:
        raise GNAError(
            f"apply is in force on this model already: {attention.name}.\n"
            "  Call .remove() on what the first apply returned, or leave its with block."
        )
    name = type(processor).__name__
    if name not in CALLS or isinstance(processor, torch.nn.Module):
        raise GNAError(
            f"{attention.name} has a processor that gnaflex does not know: {name}.\n"
            f"  Known are {', '.join(sorted(CALLS))}. Put the stock one back, or keep the layer dense: "
            f"schedule=Schedule(layers={{{number}: None}})."
        )

"""Layers, tiles and estimated seconds of a forward pass of a model, dense and sparse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gnaflex.models.attached import check_processor, problems_on, sparse_numbers
from gnaflex.models.calls import Call, Grid
from gnaflex.models.families import FAMILIES
from gnaflex.models.processors import layer_of
from gnaflex.models.recipes import Recipe
from gnaflex.planner import ROWS, Plan, plan
from gnaflex.spec import GNA
from gnaflex.timing import Estimate, end_to_end, estimate

# Fitted: FLOP/s of all but self-attention as a share of the peak, such that the largest miss of the shares of
# attention that arXiv 2504.16922 prints (gnaflex/paper.py, B200) is least. Each alone would take 0.16, 0.39
# and 0.13. It is far below what products reach, as norms, rotary tables and copies count no FLOPs.
PRODUCT_SHARE = 0.236
SHARE_ERROR = 0.13  # that miss


@dataclass(frozen=True)
class Layers:
    """Layers of a model that compute the same in a sparse step, by number: ``plan`` of their problem with its
    best tiles, ``sparsity`` the share of all pairs, those of text too, that they leave out; or ``why`` they
    stay dense."""

    numbers: tuple[int, ...]
    plan: Plan | None = None
    sparsity: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds of a step on a device: self-attention dense and sparse, and all the ``rest``.

    ``sparse_share`` is the share of the steps that are sparse, None if the number of steps is not known.
    """

    device: str
    attention: float
    sparse_attention: float
    rest: float
    sparse_share: float | None = 1.0

    @property
    def dense(self) -> float:
        """A step as it is."""
        return self.attention + self.rest

    @property
    def sparse(self) -> float:
        """A sparse step."""
        return self.sparse_attention + self.rest

    @property
    def attention_share(self) -> float:
        """The share of self-attention in a dense step, 0 to 1."""
        return self.attention / self.dense

    @property
    def speedup(self) -> float:
        """A dense step over a sparse one."""
        return self.dense / self.sparse

    @property
    def run_speedup(self) -> float | None:
        """Of all steps, those that the schedule keeps dense too."""
        if self.sparse_share is None:
            return None
        return end_to_end(self.attention / self.sparse_attention, self.attention_share, self.sparse_share)


@dataclass(frozen=True)
class ModelReport:
    """A model of a pipeline: ``text`` counts the text tokens in its self-attention, the FLOPs are those of a
    dense step, all its passes."""

    name: str
    kind: str
    grid: Grid
    text: int
    heads: int
    head_dim: int
    layers: tuple[Layers, ...]
    attention_flops: int
    other_flops: int
    seconds: tuple[Seconds, ...]


def model_report(
    name: str, call: Call, recipe: Recipe, passes: int, share: float | None, gpus: Iterable[Any], dtype: Any
) -> ModelReport:
    """Layers, FLOPs and seconds of a model; ``share`` of the steps is sparse."""
    layers, attention = _layers(call, recipe), call.attention_flops()
    flops = passes * attention, passes * (call.flops() - attention)
    tokens, seconds = call.tokens, []
    for gpu in gpus:
        of = *call.heads, dtype, gpu
        dense = estimate(plan(GNA(tokens, tokens), (ROWS,), (ROWS,)), *of, batch=call.batch)
        each = sum(len(one.numbers) * _attention(call, one, dense, of) for one in layers)
        all_dense = sum(len(one.numbers) for one in layers) * dense.dense_seconds
        rest = flops[1] / (1e12 * PRODUCT_SHARE * dense.device.peak_tflops)
        seconds.append(Seconds(dense.device.name, passes * all_dense, passes * each, rest, share))
    return ModelReport(name, call.kind, call.grid, call.text, *call.heads, layers, *flops, tuple(seconds))


def _layers(call: Call, recipe: Recipe) -> tuple[Layers, ...]:
    """Grouped by what they compute."""
    attentions = FAMILIES[call.kind].layers(call.model)
    recipe.schedule.check_layers(len(attentions))
    for number in sparse_numbers(recipe, len(attentions)):
        if layer_of(attentions[number].module.processor) is None:  # where apply is in force it was checked
            check_processor(attentions[number], number)
    groups: dict[GNA | str, list[int]] = {}
    for number, problem in enumerate(problems_on(recipe, len(attentions), call.grid)):
        groups.setdefault(problem, []).append(number)
    return tuple(_group(problem, tuple(numbers), call) for problem, numbers in groups.items())


def _group(problem: GNA | str, numbers: tuple[int, ...], call: Call) -> Layers:
    if isinstance(problem, str):
        return Layers(numbers, why=problem)
    tiles = plan(problem, kv_tiling="dynamic")
    masked = problem.num_tokens**2 - tiles.allowed_pairs  # text masks nothing
    return Layers(numbers, tiles, masked / call.tokens**2)


def _attention(call: Call, layers: Layers, dense: Estimate, of: tuple[Any, ...]) -> float:
    """Seconds of self-attention of a layer in a sparse step."""
    if layers.plan is None:
        return dense.dense_seconds
    exact = layers.plan.is_block_sparse
    tiles = layers.plan if exact else plan(layers.plan.spec)
    one = estimate(tiles, *of, batch=call.batch, backend="cuda" if exact else "flex")
    return one.seconds + one.kernel_seconds * _text_tiles(tiles, call.text) / tiles.touched_tiles


def _text_tiles(tiles: Plan, text: int) -> int:
    """Pairs of tiles that text adds, which sees everything and which everything sees."""
    rows, columns = tiles.q_rows or ROWS, tiles.kv_rows or ROWS
    lines = -(-text // columns)
    return tiles.query_tiles * lines + -(-text // rows) * (-(-tiles.spec.num_tokens // columns) + lines)


def together(models: Sequence[ModelReport]) -> tuple[Seconds, ...]:
    """A step of all models; Wan 2.2 has two that take turns."""
    turns = [one.name in ("transformer", "transformer_2") for one in models]
    weights = [1 / sum(turns) if takes else 1.0 for takes in turns]
    steps = []
    for each in zip(*(one.seconds for one in models), strict=True):
        names = ("attention", "sparse_attention", "rest")
        attention, sparse, rest = (
            sum(w * getattr(s, name) for w, s in zip(weights, each, strict=True)) for name in names
        )
        steps.append(Seconds(each[0].device, attention, sparse, rest, each[0].sparse_share))
    return tuple(steps)

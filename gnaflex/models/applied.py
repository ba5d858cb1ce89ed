"""``apply``: neighborhood attention in a stock pipeline or model, and out again."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from gnaflex.dispatch import known
from gnaflex.models.attached import PERMUTE, Attached
from gnaflex.models.decoder import AttachedDecoder
from gnaflex.models.families import DECODER, FAMILIES, found_in, name_of
from gnaflex.models.recipes import Neighborhood, Recipe, Schedule, as_recipe
from gnaflex.models.steps import Clock
from gnaflex.spec import GNAError


class Applied:
    """Neighborhood attention in force, until :meth:`remove` or the end of a ``with`` block.

    ``models`` are the models it is in, by their names in the pipeline.
    """

    def __init__(self, parts: dict[str, Attached | AttachedDecoder]) -> None:
        self._parts = parts

    @property
    def models(self) -> dict[str, Any]:
        """The models it is in, by name."""
        return {name: part.model for name, part in self._parts.items()}

    def remove(self) -> None:
        """Put every stock processor back, the same objects; what runs then is what ran before, bit for
        bit."""
        for part in self._parts.values():
            part.remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    target: Any,
    window: int | Sequence[int] | Neighborhood | Recipe | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    *,
    base: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    backend: str = "auto",
    permute: str = "auto",
) -> Applied:
    """Turn the self-attention of a stock diffusers model into Generalized Neighborhood Attention.

    Text tokens stay in the same softmax: they see everything, and everything sees them. Cross attention and
    text refiners are not touched. Inputs whose tokens are no grid, images in video models, and grids smaller
    than the window stay dense; the logger "gnaflex" says so once.

    Args:
        target: a pipeline (all its models that are known, Wan's two and Cosmos-Transfer's control net too),
            or a FluxTransformer2DModel, HunyuanVideoTransformer3DModel, CosmosTransformer3DModel,
            CosmosControlNetModel, WanTransformer3DModel, or an LTX2VideoDiffusionDecoderModel, which takes
            no window: it has its own.
        window, stride, dilation: the problem in tokens (after patches), as in :class:`gnaflex.GNA`, one entry
            per axis: (frames, height, width), or (height, width) for FLUX. Or a :class:`Neighborhood`, or a
            recipe: ``apply(pipe, gnaflex.models.recipe("hunyuanvideo-91"))``.
        base: the grid the numbers are meant for; on other grids they are scaled.
        schedule: the steps and layers that stay dense, and windows of single layers. A step is a change of
            the timestep; reading it waits for the step before, where the schedule depends on steps.
        backend: as in :func:`gnaflex.attention`.
        permute: where the backend needs tile-major order, "auto" permutes the tokens once at the model's
            input and output if the model and the grid allow it, else in every layer; "once" raises where it
            cannot; "layer" always permutes in every layer.

    Under gradient checkpointing blocks run again as their own forward was told; compiled ones cannot, so that
    a second forward which tells them something else must wait for the backward pass of the first.

    Raises:
        GNAError: no known model, a processor that is not stock, a recipe that does not fit, or apply is in
            force already.

    Example:
        >>> import gnaflex
        >>> from diffusers import WanTransformer3DModel
        >>> small = dict(num_attention_heads=2, attention_head_dim=24, num_layers=1, ffn_dim=48, freq_dim=32)
        >>> model = WanTransformer3DModel(**small, text_dim=32)
        >>> with gnaflex.models.apply(model, window=(3, 8, 8)) as applied:
        ...     list(applied.models)
        ['WanTransformer3DModel']
    """
    recipe = as_recipe(window, stride, dilation, base, schedule)
    known(backend)
    if permute not in PERMUTE:
        raise GNAError(f'permute must be one of {PERMUTE}: got {permute!r}. Write permute="auto".')
    models = found_in(target)
    is_pipeline = not any(model is target for _, model in models) and hasattr(target, "scheduler")
    clock = Clock(target if is_pipeline else None, recipe.schedule.steps)
    parts: dict[str, Attached | AttachedDecoder] = {}
    try:
        for name, model in models:
            parts[name] = _attached(model, recipe, clock, backend, permute)
    except BaseException:
        Applied(parts).remove()
        raise
    return Applied(parts)


def _attached(
    model: Any, recipe: Recipe, clock: Clock, backend: str, permute: str
) -> Attached | AttachedDecoder:
    name = name_of(model)
    if name == DECODER:
        return AttachedDecoder(model, recipe, backend)
    if recipe.neighborhood is None and not recipe.schedule.layers:
        raise GNAError(
            f"{name} needs a window: got none. Write apply(..., window=(18, 24, 24)), or "
            'apply(..., gnaflex.models.recipe("hunyuanvideo-91")).'
        )
    return Attached(model, FAMILIES[name], recipe, clock, backend, permute)

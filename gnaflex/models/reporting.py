"""What neighborhood attention would bring in a model, before anything runs: layers, tiles, estimated seconds.

FLOPs are counted exactly, on a twin of the model without weights (the meta device). Seconds are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gnaflex.models.calls import Given, call_of, dense_steps_of
from gnaflex.models.families import DECODER, found_in, name_of
from gnaflex.models.forecast import (
    SHARE_ERROR,
    Layers,
    ModelReport,
    Seconds,
    model_report,
    together,
)
from gnaflex.models.recipes import Neighborhood, Recipe, Schedule, as_recipe
from gnaflex.plan_verbs import by, plan_fields
from gnaflex.planner import Plan
from gnaflex.spec import GNAError, whole
from gnaflex.timing import Device

DEVICES = ("H100", "H200", "B200")


@dataclass(frozen=True)
class Report:
    """What :func:`report` found. ``seconds`` are those of a step of the whole pipeline, one entry per device;
    ``dense_steps`` is how many the schedule keeps dense, None if that depends on the number of steps, which
    is not known; ``assumed`` is what was not given. ``str`` of it is for people."""

    models: tuple[ModelReport, ...]
    seconds: tuple[Seconds, ...]
    batch: int
    passes: int
    steps: int | None
    dense_steps: int | None
    assumed: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        fields: dict[str, Any] = _plain(self)
        return fields

    def __str__(self) -> str:
        lines = ["Estimates, before anything ran: no kernel of gnaflex has been timed yet."]
        if self.assumed:
            lines.append(f"Not given, so taken: {', '.join(f'{k}={v}' for k, v in self.assumed.items())}.")
        for model in self.models:
            lines += ["", *_model_lines(model)]
        lines += ["", *_table(self.seconds), "", self._run_line()]
        caution = f"Attention's share may be off by {SHARE_ERROR}, as for models whose share is published."
        return "\n".join([*lines, caution])

    def _run_line(self) -> str:
        if self.dense_steps is None:
            return "Whole run: the number of steps is not known. Write steps=50."
        if self.steps is None:
            return "Whole run: every step is sparse."
        return f"Whole run: {self.steps} steps, of which {self.dense_steps} stay dense by the schedule."


def report(
    target: Any,
    window: int | Sequence[int] | Neighborhood | Recipe | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    *,
    base: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    grid: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    text: int | None = None,
    batch: int = 1,
    passes: int | None = None,
    steps: int | None = None,
    device: str | Device | Sequence[str | Device] = DEVICES,
    dtype: Any = "bfloat16",
) -> Report:
    """What :func:`apply` would do with the same arguments, and what to expect of it; the model never runs.

    Self-attention is timed by :func:`gnaflex.estimate`: perfectly block-sparse layers by a CUTLASS kernel on
    their best boxes, others by FlexAttention on blocks of 128 at the dense rate, which it need not reach;
    tiles of text count too. The rest is its FLOPs (products and convolutions) at ``PRODUCT_SHARE`` of the
    device's peak, one number for all models. Shares of attention in a dense step on B200:

    =============  =====================  ===============
    model          arXiv 2504.16922       predicted here
    =============  =====================  ===============
    FLUX.1-dev 4K  0.518                  0.612
    Cosmos-7B      0.587                  0.460
    HunyuanVideo   0.607                  0.734
    =============  =====================  ===============

    Models that :func:`apply` does not know, text encoders and the VAE are not counted; LoRAs count as merged.
    Wan 2.2's two transformers take turns: a step has the mean of both.

    Args:
        target, window, stride, dilation, base, schedule: as in :func:`apply`; no LTX-2.5 decoder.
        grid: of the tokens, (frames, height, width), or (height, width) for FLUX.
        height, width, num_frames: of the output, in pixels and frames, instead of ``grid``; a pipeline is
            needed, which also knows what is not given.
        text: tokens of the prompt, padding included; the pipeline's own unless given, 256 for HunyuanVideo
            and 512 for others (always for Wan's models of images to video).
        batch: outputs at a time.
        passes: of the model in a step: 2 with classifier-free guidance; the pipeline's habit unless given.
        steps: of a run, unless the schedule says it or the pipeline has a default.
        device: names as in :func:`gnaflex.estimate`, or :class:`gnaflex.timing.Device`; one or several.
        dtype: "bfloat16" or "float16".

    Raises:
        GNAError: what :func:`apply` refuses, a size that is not known or does not fit the model, a device.

    Example:
        >>> import gnaflex
        >>> from diffusers import WanTransformer3DModel
        >>> small = dict(num_attention_heads=2, attention_head_dim=24, num_layers=1, ffn_dim=48, freq_dim=32)
        >>> model = WanTransformer3DModel(**small, text_dim=32)
        >>> found = report(model, window=(3, 8, 8), stride=(1, 8, 8), grid=(3, 16, 16), device="H100")
        >>> found.models[0].layers[0].sparsity, found.models[0].layers[0].plan.is_block_sparse
        (0.75, True)
    """
    models = found_in(target)
    recipe = as_recipe(window, stride, dilation, base, schedule)
    if recipe.neighborhood is None and not recipe.schedule.layers and name_of(models[0][1]) != DECODER:
        raise GNAError("report needs a window: got none. Write report(..., window=(18, 24, 24)).")
    size = {"grid": grid, "height": height, "width": width, "num_frames": num_frames}
    given = Given(target, {**size, "text": text, "passes": passes, "steps": steps})
    calls = {name: call_of(model, given, whole("batch", batch)) for name, model in models}
    passes, count = given.passes(), given.steps(recipe.schedule)
    dense = dense_steps_of(recipe.schedule, count)
    share = None if dense is None else 1 - dense / (count or 1)
    gpus = (device,) if isinstance(device, (str, Device)) else tuple(device)
    found = tuple(
        model_report(name, call, recipe, passes, share, gpus, dtype) for name, call in calls.items()
    )
    return Report(found, together(found), batch, passes, count, dense, given.assumed)


def _plain(value: Any) -> Any:
    """For JSON; seconds with what follows from them."""
    if isinstance(value, Plan):
        return plan_fields(value)
    if isinstance(value, (Report, ModelReport, Layers, Seconds)):
        return {name: _plain(one) for name, one in vars(value).items()} | _derived(value)
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value


def _derived(value: Any) -> dict[str, float | None]:
    names = ("dense", "sparse", "attention_share", "speedup", "run_speedup")
    return {name: getattr(value, name) for name in names} if isinstance(value, Seconds) else {}


def _model_lines(model: ModelReport) -> list[str]:
    count, text = math.prod(model.grid), f" and {model.text:,} of text" if model.text else ""
    title = model.kind if model.name == model.kind else f"{model.name}, a {model.kind}"
    lines = [
        f"{title}: grid {by(model.grid)}, {count:,} tokens{text}, {model.heads} heads of {model.head_dim}",
        f"  a dense step: {_tera(model.attention_flops)} TFLOP of self-attention, "
        f"{_tera(model.other_flops)} of the rest",
    ]
    for layers in model.layers:
        named = f"  {'layer' if len(layers.numbers) == 1 else 'layers'} {_ranges(layers.numbers)}:"
        if layers.plan is None:
            lines.append(f"{named} dense: {layers.why}")
            continue
        tiles, kernel = layers.plan, "not block-sparse: FlexAttention runs it, with a mask"
        if tiles.is_block_sparse:
            kernel = "perfectly block-sparse: a CUTLASS kernel may run it"
        boxes = f"query tiles {by(tiles.q_tile)}, key tiles {by(tiles.kv_tile)}"
        figures = f"sparsity {layers.sparsity:.1%}; {boxes}, work speed-up {tiles.work_speedup:.2f}"
        lines += [f"{named} {tiles.spec!r}", f"    {figures}", f"    {kernel}"]
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` as 0-2, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _table(seconds: Iterable[Seconds]) -> list[str]:
    rows = [("device", "dense step", "attention", "sparse step", "speed-up", "whole run")]
    for one in seconds:
        run = "" if one.run_speedup is None else f"{one.run_speedup:.2f}"
        share = f"{one.attention_share:.0%}"
        rows.append((one.device, _time(one.dense), share, _time(one.sparse), f"{one.speedup:.2f}", run))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _tera(flops: int) -> str:
    return f"{1e-12 * flops:,.0f}" if flops >= 1e14 else f"{1e-12 * flops:.3g}"

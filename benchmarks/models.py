"""Steps of whole models with random weights: dense, sparse with tokens permuted in every layer, sparse with
tokens permuted once, and the same with compiled blocks.

On a GPU the models have their real layers and widths, in bfloat16; on a CPU a few narrow layers, on the
likenesses of the problems. Every step is one call of the transformer at batch 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gnaflex import models
from gnaflex.spec import GNA, GNAError

from .measure import Row, Timed, milliseconds, row
from .problems import SETS

ROUNDS = {"cpu": 9, "cuda": 5}
WARM = 2  # calls of each before: "auto" goes over to tokens permuted once after the first
SPARSE = {  # "flex" is what permutes: a CPU's "auto" may take "sdpa", and a kernel reads tokens as they lie
    "permuted in every layer": {"permute": "layer", "backend": "flex"},
    "permuted once": {"permute": "once", "backend": "flex"},
    "auto": {"permute": "auto", "backend": "auto"},
}


@dataclass(frozen=True)
class Model:
    """A stock transformer: its class, the problem its tokens are, how its inputs are made from ``(model,
    grid, text, draw)``, its configuration, what makes it narrow for a CPU, and its text tokens in
    self-attention, in whole blocks (others keep tokens from being permuted once), real and narrow."""

    cls: str
    problem: str
    inputs: Callable[[Any, tuple[int, ...], int, Callable[..., Tensor]], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    narrow: dict[str, Any] = field(default_factory=dict)
    text: tuple[int, int] = (0, 0)


def _flux_inputs(model: Any, grid: tuple[int, ...], text: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    config, (height, width) = model.config, grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(draw(1))
    return {
        "hidden_states": draw(1, height * width, config.in_channels),
        "encoder_hidden_states": draw(1, text, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "timestep": torch.full_like(draw(1), 0.5),
        "guidance": torch.full_like(draw(1), 3.5),
        "img_ids": ids,
        "txt_ids": draw(text, 3) * 0,
    }


def _hunyuan_inputs(
    model: Any, grid: tuple[int, ...], text: int, draw: Callable[..., Tensor]
) -> dict[str, Any]:
    config, (frames, height, width) = model.config, grid
    mask = torch.ones_like(draw(1, text), dtype=torch.bool)
    mask[:, text // 2 :] = False  # a prompt of half the greatest length
    return {
        "hidden_states": draw(1, config.in_channels, frames, 2 * height, 2 * width),
        "timestep": torch.full_like(draw(1), 500.0),
        "encoder_hidden_states": draw(1, text, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.full_like(draw(1), 6000.0),
    }


def _video_inputs(
    model: Any, grid: tuple[int, ...], text: int, draw: Callable[..., Tensor]
) -> dict[str, Any]:
    """Of Wan and Cosmos, whose text is in cross attention."""
    config, (frames, height, width) = model.config, grid
    channels = config.text_dim if "text_dim" in config else config.text_embed_dim
    return {
        "hidden_states": draw(1, config.in_channels, frames, 2 * height, 2 * width),
        "timestep": torch.full_like(draw(1), 500.0),
        "encoder_hidden_states": draw(1, 512, channels),
    }


_FEW: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 64}
_JOINT: dict[str, Any] = {**_FEW, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 32}
_AXES: dict[str, Any] = {"rope_axes_dim": (16, 24, 24), "text_embed_dim": 32, "num_refiner_layers": 1}
MODELS = {
    "FLUX.1-dev 4K": Model(
        *("FluxTransformer2DModel", "FLUX.1-dev 4K", _flux_inputs),
        {"guidance_embeds": True},
        {**_JOINT, "axes_dims_rope": (16, 24, 24), "joint_attention_dim": 32, "in_channels": 16},
        (512, 128),
    ),
    "HunyuanVideo": Model(
        *("HunyuanVideoTransformer3DModel", "HunyuanVideo, 256 text tokens", _hunyuan_inputs),
        {},
        {**_JOINT, **_AXES},
        (256, 128),
    ),
    "Cosmos-7B": Model(
        *("CosmosTransformer3DModel", "Cosmos-7B", _video_inputs),
        {"concat_padding_mask": False},  # torchvision resizes it
        {**_FEW, "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 16},
    ),
    "Wan 14B, 720p": Model(
        *("WanTransformer3DModel", "Wan 720p", _video_inputs),
        {},
        {**_FEW, "num_layers": 2, "text_dim": 32, "freq_dim": 32, "ffn_dim": 512},
    ),
    "HunyuanVideo, default grid": Model(
        *("HunyuanVideoTransformer3DModel", "HunyuanVideo, default grid", _hunyuan_inputs),
        {},
        {**_JOINT, **_AXES},
        (256, 128),
    ),
}


def steps(name: str, which: str, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Milliseconds of a step of one model, dense and sparse, in turn."""
    chosen, problem = MODELS[name], SETS[which][MODELS[name].problem]
    narrow = which != "full"
    model, text = built(chosen, device, dtype, narrow), chosen.text[narrow]
    inputs = chosen.inputs(model, problem.spec.shape, text, drawn(device, dtype))
    yield from _compared(name, model, inputs, problem.spec, text, device)
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True)
        yield from _compared(f"{name}, blocks compiled", model, inputs, problem.spec, text, device)


def _compared(
    name: str, model: Any, inputs: dict[str, Any], spec: GNA, text: int, device: torch.device
) -> Iterator[Row]:
    switch = _Switch(model, spec)
    calls, refused = {"dense": Timed(lambda state: _call(model, inputs), switch.off)}, {}
    for what, options in SPARSE.items():
        timed = Timed(lambda state: _call(model, inputs), partial(switch.on, **options))
        try:
            for _ in range(WARM):
                timed.call(timed.before())
            calls[f"sparse, {what}"] = timed
        except GNAError as error:
            refused[f"sparse, {what}"] = str(error).splitlines()[0]
    switch.off()
    calls["dense"].call(None)
    taken = milliseconds(calls, dict.fromkeys(calls, ROUNDS[device.type]), device)
    switch.off()
    predicted = _predicted(model, spec, text, device)
    for what, values in taken.items():
        yield row(f"{name}: {what}", values, "ms", note=predicted["dense" if what == "dense" else "sparse"])
    for what, why in refused.items():
        print(f"{name}: {what} does not run: {why}")


def _predicted(model: Any, spec: GNA, text: int, device: torch.device) -> dict[str, str]:
    """What gnaflex.models.report says of a step, dense and sparse, for GPUs whose rates are known."""
    if device.type == "cpu":
        return {"dense": "", "sparse": ""}
    try:
        (seconds,) = models.report(
            *(model, spec.window, spec.stride, spec.dilation),
            grid=spec.shape,
            text=text or 512,
            device=torch.cuda.get_device_name(device),
        ).seconds
    except GNAError as error:
        return dict.fromkeys(("dense", "sparse"), f"no prediction: {error}")
    return {
        "dense": f"predicted {1e3 * seconds.dense:.0f} ms, {seconds.attention_share:.0%} of it attention",
        "sparse": f"predicted {1e3 * seconds.sparse:.0f} ms",
    }


class _Switch:
    """Neighborhood attention in a model, in one way at a time."""

    def __init__(self, model: Any, spec: GNA) -> None:
        self._model = model
        self._applied: models.Applied | None = None
        self._window = models.Neighborhood(spec.window, spec.stride, spec.dilation)

    def off(self) -> None:
        """Stock attention."""
        if self._applied is not None:
            self._applied.remove()
        self._applied = None

    def on(self, **options: Any) -> None:
        """Sparse attention, in this way."""
        self.off()
        self._applied = models.apply(self._model, self._window, **options)


def _call(model: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs, return_dict=False)


def built(chosen: Model, device: torch.device, dtype: torch.dtype, narrow: bool) -> Any:
    """With random weights, and no copy of them elsewhere."""
    import diffusers

    config = chosen.config | (chosen.narrow if narrow else {})
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = getattr(diffusers, chosen.cls)(**config)
        finally:
            torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 1 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.02)
    return model.eval()


def drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)

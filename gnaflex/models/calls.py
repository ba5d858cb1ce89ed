"""Calls of models that never run: the size of their tokens, and their FLOPs, on a twin without weights."""

from __future__ import annotations

import inspect
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gnaflex.models.families import DECODER, FAMILIES, Family, name_of
from gnaflex.models.recipes import Schedule
from gnaflex.plan_verbs import by
from gnaflex.spec import GNAError, whole

Grid = tuple[int, ...]
_FLUX, _HUNYUAN = "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"
_CALL = {"steps": "num_inference_steps", "text": "max_sequence_length"}  # as diffusers' pipelines have it
_IMAGE_TOKENS = 257  # of the image encoders of Wan


class Given:
    """What was given, and what the pipeline would take otherwise; ``assumed`` collects that."""

    def __init__(self, target: Any, given: dict[str, Any]) -> None:
        self.target, self.given, self.assumed = target, given, dict[str, Any]()
        parameters = inspect.signature(type(target).__call__).parameters
        self.defaults = {
            name: one.default for name, one in parameters.items() if one.default is not one.empty
        }
        if side := getattr(target, "default_sample_size", None):  # FLUX
            side *= target.vae_scale_factor
            self.defaults |= {"height": side, "width": side}
        if chunk := self.defaults.get("num_frames_per_chunk"):  # Cosmos-Transfer
            self.defaults["num_frames"] = chunk

    def take(self, name: str, otherwise: int | None = None) -> int | None:
        """An argument, or the pipeline's default, or ``otherwise``."""
        if self.given[name] is not None:
            return whole(name, self.given[name])
        value = self.defaults.get(_CALL.get(name, name))
        value = otherwise if value is None else value
        if value is not None:
            self.assumed[name] = value
        return value

    def passes(self) -> int:
        """Wan and Cosmos call twice with guidance; the others have it built in (``true_cfg_scale`` is 1)."""
        guided = (self.defaults.get("guidance_scale") or 0) > 1 and "true_cfg_scale" not in self.defaults
        return self.take("passes", 2 if guided else 1) or 1

    def steps(self, schedule: Schedule) -> int | None:
        """Of a run, or None."""
        if schedule.steps is None:
            return self.take("steps")
        if self.given["steps"] not in (None, schedule.steps):
            raise GNAError(
                f"steps are said twice: got steps={self.given['steps']}, the schedule has {schedule.steps}.\n"
                "  Leave one of them out."
            )
        return schedule.steps

    def grid(self, kind: str, family: Family, patch: Grid) -> Grid:
        """Of the tokens, as given or by the pixels of the output."""
        pixels = {name: self.given[name] for name in ("height", "width", "num_frames")}
        there = [name for name, value in pixels.items() if value is not None]
        if (grid := self.given["grid"]) is None:
            return self._of_pixels(kind, family.axes, patch, there)
        entries = tuple(grid) if hasattr(grid, "__len__") else (grid,)
        if there or len(entries) != family.axes:
            wrong = f"{there[0]} too" if there else f"grid={grid}"
            raise GNAError(
                f"grid must have {family.axes} axes for {kind}, and stand alone: got {wrong}.\n"
                f"  Write grid={(33, 45, 80)[-family.axes :]}."
            )
        return tuple(whole("grid", extent) for extent in entries)

    def _of_pixels(self, kind: str, axes: int, patch: Grid, there: list[str]) -> Grid:
        spatial = getattr(self.target, "vae_scale_factor_spatial", None)
        spatial = spatial or getattr(self.target, "vae_scale_factor", None)
        sides = [self.take(name) for name in ("height", "width")] if spatial else []
        if None in sides or not sides or (axes == 2 and "num_frames" in there):
            example = (33, 45, 80)[-axes:]
            raise GNAError(
                f"{kind} needs the size of what it runs on: got {', '.join(there) or 'none'}, "
                f"{'which only a pipeline can translate' if not sides else 'which is not what it takes'}.\n"
                f"  Write grid={example}, in tokens, or report(pipe, ..., height=704, width=1280)."
            )
        pixels: list[int] = [side // spatial for side in sides if side and spatial]
        if axes == 3:
            frames = self.take("num_frames") or 1  # pipelines of images have none
            pixels = [(frames - 1) // getattr(self.target, "vae_scale_factor_temporal", 1) + 1, *pixels]
        return tuple(whole("grid", n // p) for n, p in zip(pixels, patch, strict=True))


def dense_steps_of(schedule: Schedule, steps: int | None) -> int | None:
    """How many steps a schedule keeps dense, None if their number must be known and is not."""
    if steps is None:
        return None if schedule.watches_steps else 0
    return sum(schedule.is_dense(step, steps) for step in range(steps))


@dataclass(frozen=True)
class Call:
    """A forward pass of a model; ``prompt`` counts its text tokens, wherever they go."""

    model: Any
    kind: str
    grid: Grid
    patch: Grid
    prompt: int
    batch: int

    @property
    def text(self) -> int:
        """Tokens of text in self-attention."""
        return self.prompt if self.kind in (_FLUX, _HUNYUAN) else 0  # of the others in cross attention

    @property
    def heads(self) -> tuple[int, int]:
        """Heads and head_dim."""
        return self.model.config.num_attention_heads, self.model.config.attention_head_dim

    @property
    def tokens(self) -> int:
        """In self-attention."""
        return math.prod(self.grid) + self.text

    def attention_flops(self) -> int:
        """Of self-attention, dense: 4 * head_dim per pair."""
        layers = len(FAMILIES[self.kind].layers(self.model))
        return 4 * layers * self.batch * math.prod(self.heads) * self.tokens**2

    def flops(self) -> int:
        """Of all products and convolutions, counted on a twin on the meta device."""
        from diffusers.models.attention_dispatch import attention_backend

        with torch.device("meta"):
            twin = type(self.model).from_config(self.model.config)
        forward = type(twin).forward
        if "transforms" in forward.__code__.co_names:  # torchvision, which has no meta device, or is missing
            names = {**forward.__globals__, "transforms": _Transforms}
            code = forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
            twin.forward = types.MethodType(types.FunctionType(*code), twin)
        try:
            with attention_backend("native"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                twin(**self._inputs())
        except (RuntimeError, ValueError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise GNAError(
                f"{self.kind} does not run on a grid of {by(self.grid)}: {why}.\n"
                "  Write another grid, or size, that it takes."
            ) from error
        return int(counter.get_total_flops())

    def _inputs(self) -> dict[str, Any]:
        """Arguments of the right shapes, those that the model takes."""

        def of(*shape: int | None, batch: int = self.batch) -> torch.Tensor | None:
            return None if None in shape else torch.empty(batch, *shape, device="meta")  # type: ignore[arg-type]

        config, tokens = self.model.config, math.prod(self.grid)
        latents = [n * p for n, p in zip(self.grid, self.patch, strict=True)]
        projected = config.get("crossattn_proj_in_channels") if config.get("use_crossattn_projection") else 0
        names = ("joint_attention_dim", "text_dim", "text_embed_dim")
        words = of(self.prompt, projected or next(config[name] for name in names if name in config))
        control = config.get("latent_channels")  # of Cosmos's control net, whose forward adds two channels
        seen = of(config.get("img_context_num_tokens", _IMAGE_TOKENS - 1), config.get("img_context_dim_in"))
        packed = tokens, config.in_channels
        images = self.batch * (2 if config.get("pos_embed_seq_len") else 1)  # Wan's first and last frame
        possible = {
            "timestep": of(),
            "encoder_hidden_states": words if seen is None else (words, seen),
            "encoder_hidden_states_image": of(_IMAGE_TOKENS, config.get("image_dim"), batch=images),
            "pooled_projections": of(config.get("pooled_projection_dim")),
            "guidance": of() if config.get("guidance_embeds") else None,
            "img_ids": of(3, batch=tokens),
            "txt_ids": of(3, batch=self.prompt),
            "encoder_attention_mask": torch.ones(self.batch, self.prompt, dtype=torch.long, device="meta"),
            "padding_mask": of(1, *latents[1:], batch=1),
            "fps": 30,
            "condition_mask": control and of(1, *latents),
            "controls_latents": control and of(config.in_channels - 2, *latents),
            "latents": control and of(control - 2, *latents),
            "hidden_states": of(*packed if self.kind == _FLUX else (config.in_channels, *latents)),
        }
        taken = inspect.signature(type(self.model).forward).parameters
        return {name: value for name, value in possible.items() if value is not None and name in taken}


class _Transforms:
    """In the place of torchvision's transforms, which Cosmos resizes its padding mask by: shapes only."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            return image.new_empty(*image.shape[:-2], *size)


def call_of(model: Any, given: Given, batch: int) -> Call:
    """The call of a model that what was given leads to."""
    kind = name_of(model)
    if kind == DECODER:
        raise GNAError(
            f"report knows no {DECODER}, which has windows of its own: got one.\n"
            '  Ask about one window: gnaflex.plan(gnaflex.GNA((69, 64, 96), window=11), kv_tiling="dynamic").'
        )
    family = FAMILIES[kind]
    patch = (2, 2) if kind == _FLUX else family.patch(model)  # its pipeline packs latents
    grid = given.grid(kind, family, patch)
    prompt = given.take("text", 256 if kind == _HUNYUAN else 512)
    if model.config.get("image_dim"):
        prompt = 512  # which is what Wan's processors split images off by
    return Call(model, kind, grid, patch, prompt or 0, batch)

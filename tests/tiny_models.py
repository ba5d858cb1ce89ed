"""Stock diffusers models and pipelines, tiny, with random weights, and what they compute when their
self-attention is neighborhood attention: the same model, each self-attention under a dense boolean mask.

Every parameter is drawn, those that start at zero too, so that attention reaches the output. diffusers is
imported inside the functions only.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gnaflex import GNA
from gnaflex.reference import dense_mask

Grid = tuple[int, ...]
Extents = int | Sequence[int]
Pipeline = tuple[Any, dict[str, Any]]  # with what it is called with, but for the steps and the generator
Dtype = torch.dtype
F32 = torch.float32

VIDEO, IMAGE = (3, 6, 10), (9, 14)  # no tile divides them
HEADS, HEAD_DIM = 3, 16
WIDTH = HEADS * HEAD_DIM
TEXT_DIM = 24
LATENT = 4  # channels
ROPE = (4, 6, 6)  # channels of a head per axis

_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
_LATENTS = {"in_channels": LATENT, "out_channels": LATENT}
_TWO_STREAMS = {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": TEXT_DIM, **_HEADS}
_FLUX = {
    **{"in_channels": 4 * LATENT, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": ROPE},
    **{"guidance_embeds": True, **_TWO_STREAMS},
}
_HUNYUAN = {"text_embed_dim": TEXT_DIM, "rope_axes_dim": ROPE, **_TWO_STREAMS, **_LATENTS}
_WAN = {"num_layers": 4, "text_dim": TEXT_DIM, "ffn_dim": 2 * WIDTH, **_HEADS, **_LATENTS}
_COSMOS_BLOCK = {"text_embed_dim": TEXT_DIM, "adaln_lora_dim": 16, **_HEADS}
_COSMOS = {"num_layers": 4, "concat_padding_mask": False, **_COSMOS_BLOCK, **_LATENTS}
_COSMOS_IMAGE = {"img_context_dim_in": TEXT_DIM, "img_context_dim_out": WIDTH}
_CONTROLS = {
    **{"n_controlnet_blocks": 2, "extra_pos_embed_type": "learnable", "model_channels": WIDTH},
    **{"in_channels": LATENT + 4, "latent_channels": LATENT + 2, **_COSMOS_BLOCK, **_COSMOS_IMAGE},
}
_LTX = {
    **{"latent_channels": LATENT, "patch_size": 2, "decoder_head_dim": HEAD_DIM, "decoder_t_emb_dim": 24},
    **{"decoder_stage_channels": (64, 32, 32), "decoder_upsample_channel_reductions": (2, 1)},
    **{"decoder_stage_depths": (2, 2, 2), "decoder_stage_kernels": ((3, 3, 3), (3, 3, 5))},
    **{"decoder_stage5_kernel": (3, 5, 7), "decoder_upsample_strides": ((2, 1, 1), (1, 2, 2))},
    **{"spatial_compression_ratio": 4, "temporal_compression_ratio": 2},
}


@dataclass(frozen=True)
class Tiny:
    """A stock model with the arguments of one forward pass.

    ``grid`` holds the axes of the tokens in its self-attention, ``prefix`` and ``suffix`` count the text
    tokens around it there. ``attentions`` counts these calls; 0 if they have windows of their own.
    """

    name: str
    model: nn.Module
    given: Mapping[str, Any]
    grid: Grid
    prefix: int = 0
    suffix: int = 0
    attentions: int = 4
    noise_seed: int | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a forward pass; a model that draws noise gets a new generator each time."""
        if self.noise_seed is None:
            return dict(self.given)
        return {**self.given, "generator": torch.Generator().manual_seed(self.noise_seed)}


def run(tiny: Tiny) -> Tensor:
    """The output of the model as it is now."""
    output: Tensor = tiny.model(**tiny.inputs, return_dict=False)[0]
    return output


def flux(grid: Grid = IMAGE, batch: int = 2, text: int = 7, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """FluxTransformer2DModel, two blocks of each kind; text first."""
    draw = _draw(seed, dtype)
    axes = torch.meshgrid(*map(torch.arange, (1, *grid)), indexing="ij")
    given = {
        "hidden_states": draw(batch, math.prod(grid), 4 * LATENT),
        "encoder_hidden_states": draw(batch, text, TEXT_DIM),
        "pooled_projections": draw(batch, TEXT_DIM),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),  # like the guidance, times 1000 exact in bfloat16
        "guidance": torch.full((batch,), 4.0, dtype=dtype),
        "img_ids": torch.stack(axes, -1).flatten(0, -2).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
    }
    return Tiny("flux", _flux(seed, dtype), given, grid, prefix=text)


def hunyuan(grid: Grid = VIDEO, batch: int = 2, text: int = 7, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """HunyuanVideoTransformer3DModel, two blocks of each kind and a text refiner; text last, then padding."""
    given = {
        **_video(seed, dtype, grid, batch, text),
        "encoder_attention_mask": _text_mask(batch, text),
        "pooled_projections": _draw(seed + 1, dtype)(batch, TEXT_DIM),
        "guidance": torch.full((batch,), 4000.0, dtype=dtype),
    }
    return Tiny("hunyuan", _hunyuan(seed, dtype), given, grid, suffix=text)


def wan(grid: Grid = VIDEO, batch: int = 2, text: int = 7, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """WanTransformer3DModel for text to video, four blocks; text by cross attention."""
    return Tiny("wan", _wan(seed, dtype), _video(seed, dtype, grid, batch, text), grid)


def wan_i2v(grid: Grid = VIDEO, batch: int = 2, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """WanTransformer3DModel for image to video: cross attention sees image tokens before those of the text,
    whose number, 512, the stock processor fixes."""
    model = _wan(seed, dtype, in_channels=2 * LATENT, image_dim=TEXT_DIM, added_kv_proj_dim=WIDTH)
    given = _video(seed, dtype, grid, batch, text=512, channels=2 * LATENT)
    given["encoder_hidden_states_image"] = _draw(seed + 1, dtype)(batch, 5, TEXT_DIM)
    return Tiny("wan_i2v", model, given, grid)


def cosmos(grid: Grid = VIDEO, batch: int = 2, text: int = 7, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """CosmosTransformer3DModel, four blocks with learned positions; text by cross attention."""
    given = {**_video(seed, dtype, grid, batch, text), "fps": 30}
    return Tiny("cosmos", _cosmos(seed, dtype), given, grid)


class Controlled(nn.Module):
    """A Cosmos transformer that adds the residuals of its control net, as in the pipeline of Transfer 2.5."""

    def __init__(self, transformer: nn.Module, controlnet: nn.Module) -> None:
        super().__init__()
        self.transformer, self.controlnet = transformer, controlnet

    def forward(self, latents: Tensor, controls: Tensor, padding_mask: Tensor, **both: Any) -> tuple[Tensor]:
        with resizing():
            residuals = self.controlnet(controls, latents, padding_mask=padding_mask, **both)[0]
        return self.transformer(latents, block_controlnet_hidden_states=residuals, **both)


def cosmos_controlnet(
    grid: Grid = VIDEO, batch: int = 2, text: int = 7, seed: int = 0, dtype: Dtype = F32
) -> Tiny:
    """CosmosControlNetModel, two blocks, and a transformer of four that adds a residual in every other one.

    As in Cosmos 2.5, each frame has its own time, and there are image tokens beside the text. ``model`` is a
    :class:`Controlled`; its control net alone runs while :func:`resizing` is open.
    """
    draw, (frames, height, width) = _draw(seed, dtype), _patched(grid)
    controlnet = _stock("CosmosControlNetModel", seed + 1, dtype, _CONTROLS)
    image = {"in_channels": LATENT + 1, "controlnet_block_every_n": 2, **_COSMOS_IMAGE}
    first, padding = torch.zeros(batch, 1, frames, height, width), torch.zeros(1, 1, 8 * height, 8 * width)
    first[:, :, 0], padding[..., -8 * width // 4 :] = 1, 1
    given = {
        "latents": draw(batch, LATENT, frames, height, width),
        "controls": draw(batch, LATENT, frames, height, width),
        "padding_mask": padding.to(dtype),
        "condition_mask": first.to(dtype),
        "timestep": torch.linspace(0.1, 0.7, frames).view(1, 1, -1, 1, 1).repeat(batch, 1, 1, 1, 1),
        "encoder_hidden_states": (draw(batch, text, TEXT_DIM), draw(batch, 5, TEXT_DIM)),
        "fps": 30,
    }
    model = Controlled(_cosmos(seed, dtype, **image), controlnet)
    return Tiny("cosmos_controlnet", model, given, grid, attentions=6)


def ltx_decoder(grid: Grid = (3, 4, 5), batch: int = 1, seed: int = 0, dtype: Dtype = F32) -> Tiny:
    """LTX2VideoDiffusionDecoderModel, three stages of two blocks, of which the last denoises.

    ``grid`` is that of the latents; the result's is that of the last stage, twice as fine on every axis, less
    one frame.
    """
    model = _stock("LTX2VideoDiffusionDecoderModel", seed, dtype, _LTX)
    given = {"z": _draw(seed, dtype)(batch, LATENT, *grid)}
    tokens = (2 * grid[0] - 1, 2 * grid[1], 2 * grid[2])
    return Tiny("ltx_decoder", model, given, tokens, attentions=0, noise_seed=seed)


def _flux(seed: int, dtype: Dtype) -> nn.Module:
    return _stock("FluxTransformer2DModel", seed, dtype, _FLUX)


def _hunyuan(seed: int, dtype: Dtype) -> nn.Module:
    return _stock("HunyuanVideoTransformer3DModel", seed, dtype, _HUNYUAN)


def _wan(seed: int, dtype: Dtype, **config: Any) -> nn.Module:
    return _stock("WanTransformer3DModel", seed, dtype, {**_WAN, **config})


def _cosmos(seed: int, dtype: Dtype, **config: Any) -> nn.Module:
    return _stock("CosmosTransformer3DModel", seed, dtype, {**_COSMOS, **config})


def _stock(name: str, seed: int, dtype: Dtype, config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers without gradients, all parameters drawn; from_pretrained too keeps some in fp32.

    The scales of norms, of queries and keys too, are near 1.5: sharp attention, that a window changes a lot.
    """
    import diffusers

    model, generator = getattr(diffusers, name)(**config), torch.Generator().manual_seed(seed)
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for path, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if not path.endswith("weight"):
            drawn *= 0.5
        elif parameter.ndim == 1:
            drawn = 1.5 + 0.2 * drawn
        else:
            drawn *= parameter[0].numel() ** -0.5
        parameter.data = drawn.to(dtype if kept.isdisjoint(path.split(".")) else F32)
    return model.eval().requires_grad_(False)


def _draw(seed: int, dtype: Dtype) -> Callable[..., Tensor]:
    """Normal numbers of a stream of their own, as a function of the shape."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def _video(
    seed: int, dtype: Dtype, grid: Grid, batch: int, text: int, channels: int = LATENT
) -> dict[str, Any]:
    """What every transformer of videos is called with."""
    draw = _draw(seed, dtype)
    return {
        "hidden_states": draw(batch, channels, *_patched(grid)),
        "timestep": torch.full((batch,), 700),
        "encoder_hidden_states": draw(batch, text, TEXT_DIM),
    }


def _patched(grid: Grid) -> Grid:
    """The latent whose patches of 1x2x2 are the tokens of ``grid``."""
    return grid[0], 2 * grid[1], 2 * grid[2]


def _text_mask(batch: int, text: int) -> Tensor:
    """1 for text, 0 for padding [batch, text]: two tokens of padding, and three more in each next entry."""
    valid = torch.tensor([[max(text - 2 - 3 * entry, 1)] for entry in range(batch)])
    return (torch.arange(text) < valid).long()


@contextlib.contextmanager
def resizing() -> Iterator[None]:
    """Cosmos's control net resizes its padding mask by torchvision; where that is missing, by torch's own."""
    module = importlib.import_module("diffusers.models.controlnets.controlnet_cosmos")
    if hasattr(module, "transforms"):
        yield
        return

    def resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
        return nn.functional.interpolate(image, size, mode=interpolation)

    modes, functional = SimpleNamespace(NEAREST="nearest"), SimpleNamespace(resize=resize)
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=modes)
    with mock.patch.object(module, "transforms", stand_in, create=True):
        yield


@contextlib.contextmanager
def masked(tiny: Tiny, window: Extents, stride: Extents = 1, dilation: Extents = 1) -> Iterator[list[int]]:
    """While open, self-attention runs under the dense mask of the window; each call extends the yielded list.

    Text queries see all, grid queries their neighborhood and the text; the model's own mask holds too. A call
    is self-attention of a main block if its queries and its keys are as many as the tokens of grid and text.
    It holds for every model of the same class, so for those in a pipeline too.
    """
    mask = dense_mask(GNA(tiny.grid, window, stride, dilation), prefix=tiny.prefix, suffix=tiny.suffix)
    calls: list[int] = []

    def under_mask(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, *rest: Any, attn_mask: Any = None, **options: Any) -> Tensor:
            if query.shape[1] == key.shape[1] == len(mask):
                calls.append(len(calls))
                near = mask.to(query.device)
                attn_mask = near if attn_mask is None else near & attn_mask
            return stock(query, key, *rest, attn_mask=attn_mask, **options)

        return attend

    with contextlib.ExitStack() as stack:
        for module in _modules(tiny.model):
            attend = under_mask(module.dispatch_attention_fn)
            stack.enter_context(mock.patch.object(module, "dispatch_attention_fn", attend))
        yield calls


def _modules(model: nn.Module) -> list[ModuleType]:
    """The modules of diffusers in which the attention of ``model`` looks up its kernel."""
    modules = map(importlib.import_module, {type(part).__module__ for part in model.modules()})
    return [module for module in modules if hasattr(module, "dispatch_attention_fn")]


def oracle(tiny: Tiny, window: Extents, stride: Extents = 1, dilation: Extents = 1) -> Tensor:
    """The output of the stock model with its self-attention under the mask of the window."""
    assert tiny.attentions, f"{tiny.name} has windows of its own: its oracle is run(tiny)"
    with masked(tiny, window, stride, dilation) as calls:
        output = run(tiny)
    assert len(calls) == tiny.attentions, f"{tiny.name}: {len(calls)} self-attentions, not {tiny.attentions}"
    return output


def flux_pipeline(grid: Grid = IMAGE, batch: int = 1, text: int = 7, seed: int = 0) -> Pipeline:
    """FluxPipeline and its call; FLUX.1-dev has its guidance distilled."""
    call = {**_prompt(seed, batch, text, pooled=True), **_pixels((1, *grid)), "guidance_scale": 3.5}
    del call["num_frames"]
    return _pipeline("FluxPipeline", _flow(use_dynamic_shifting=True), transformer=_flux(seed, F32)), call


def hunyuan_pipeline(grid: Grid = VIDEO, batch: int = 1, text: int = 7, seed: int = 0) -> Pipeline:
    """HunyuanVideoPipeline and its call, with true guidance: ``true_cfg_scale=1`` turns that off."""
    call = {
        **_prompt(seed, batch, text, pooled=True),
        **_prompt(seed + 1, batch, text, "negative_", pooled=True),
    }
    call["prompt_attention_mask"] = _text_mask(batch, text)
    call["negative_prompt_attention_mask"] = _text_mask(batch + 1, text)[1:]
    pipe = _pipeline("HunyuanVideoPipeline", _flow(shift=7.0), transformer=_hunyuan(seed, F32))
    return pipe, {**call, **_pixels(grid), "true_cfg_scale": 3.0}


def wan_pipeline(grid: Grid = VIDEO, batch: int = 1, text: int = 7, seed: int = 0) -> Pipeline:
    """WanPipeline of Wan 2.1 and its call, with classifier-free guidance."""
    pipe = _pipeline("WanPipeline", _flow(shift=3.0), transformer=_wan(seed, F32))
    return pipe, {**_guided(seed, batch, text), **_pixels(grid)}


def wan22_pipeline(grid: Grid = VIDEO, batch: int = 1, text: int = 7, seed: int = 0) -> Pipeline:
    """WanPipeline of Wan 2.2 and its call: the second transformer takes over at time 875 of 1000."""
    both = {"transformer": _wan(seed, F32), "transformer_2": _wan(seed + 1, F32)}
    pipe = _pipeline("WanPipeline", _flow(shift=3.0), **both, boundary_ratio=0.875)
    return pipe, {**_guided(seed, batch, text), **_pixels(grid)}


def cosmos_pipeline(grid: Grid = VIDEO, batch: int = 1, text: int = 7, seed: int = 0) -> Pipeline:
    """CosmosTextToWorldPipeline and its call, with classifier-free guidance."""
    from diffusers import EDMEulerScheduler

    parts = {"transformer": _cosmos(seed, F32), "safety_checker": Unchecked()}
    pipe = _pipeline("CosmosTextToWorldPipeline", EDMEulerScheduler(final_sigmas_type="sigma_min"), **parts)
    return pipe, {**_guided(seed, batch, text), **_pixels(grid, frames=8)}


def cosmos_video_pipeline(grid: Grid = VIDEO, text: int = 7, seed: int = 0) -> Pipeline:
    """Cosmos2_5_PredictBasePipeline and its call: a first frame is given, so each frame has its own time."""
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True}
    scheduler = UniPCMultistepScheduler(**flow, sigma_max=200.0, sigma_min=0.01)
    vae = {"base_dim": 4, "z_dim": LATENT, "num_res_blocks": 1, "dim_mult": [1, 1, 1, 1]}
    vae |= {"latents_mean": [0.0] * LATENT, "latents_std": [1.0] * LATENT}
    parts = {"transformer": _cosmos(seed, F32, in_channels=LATENT + 1), "safety_checker": Unchecked()}
    parts["vae"] = _stock("AutoencoderKLWan", seed, F32, vae)
    call = {**_guided(seed, 1, text), **_pixels(grid), "num_latent_conditional_frames": 1}
    call["video"] = _draw(seed + 2, F32)(1, 3, 1, call["height"], call["width"]).clamp(-1, 1)
    return _pipeline("Cosmos2_5_PredictBasePipeline", scheduler, **parts), call


class Unchecked:
    """In the place of Cosmos's safety checker: it says nothing about safety and must never be asked."""

    def to(self, device: Any) -> None:
        """It holds nothing that could move."""


def _pipeline(name: str, scheduler: Any, **parts: Any) -> Any:
    """A pipeline of diffusers; the parts that it demands and does not get are None."""
    import diffusers

    build = getattr(diffusers, name)
    demanded = [key for key, given in signature(build).parameters.items() if given.default is given.empty]
    pipe = build(**{**dict.fromkeys(demanded), "scheduler": scheduler, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _prompt(seed: int, batch: int, text: int, sign: str = "", pooled: bool = False) -> dict[str, Any]:
    draw = _draw(seed, F32)
    prompt = {f"{sign}prompt_embeds": draw(batch, text, TEXT_DIM)}
    return {**prompt, f"{sign}pooled_prompt_embeds": draw(batch, TEXT_DIM)} if pooled else prompt


def _guided(seed: int, batch: int, text: int) -> dict[str, Any]:
    """A prompt and the one to stay away from."""
    prompts = {**_prompt(seed, batch, text), **_prompt(seed + 1, batch, text, "negative_")}
    return {**prompts, "guidance_scale": 3.0}


def _pixels(grid: Grid, frames: int = 4) -> dict[str, Any]:
    """The video of a grid: a token is a patch of 2x2 latents, each 8x8 pixels and ``frames`` frames."""
    size = {"num_frames": frames * (grid[0] - 1) + 1, "height": 16 * grid[1], "width": 16 * grid[2]}
    return {**size, "output_type": "latent"}

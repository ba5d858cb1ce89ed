"""The tiny stock models and their oracle: the test bench of neighborhood attention in diffusers."""

from __future__ import annotations

import importlib
import itertools
import math
from unittest import mock

import pytest
import tiny_models as tiny
import torch
from torch import nn

from gnaflex import GNA
from gnaflex.reference import dense_mask

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

MODELS = [tiny.flux, tiny.hunyuan, tiny.wan, tiny.wan_i2v, tiny.cosmos, tiny.cosmos_controlnet]
PIPELINES = [
    (tiny.flux_pipeline, tiny.flux, 1),
    (tiny.hunyuan_pipeline, tiny.hunyuan, 2),
    (tiny.wan_pipeline, tiny.wan, 2),
    (tiny.wan22_pipeline, tiny.wan, 2),
    (tiny.cosmos_pipeline, tiny.cosmos, 2),
    (tiny.cosmos_video_pipeline, tiny.cosmos, 2),
]
CONTROLS = "diffusers.models.controlnets.controlnet_cosmos"
LTX = "diffusers.models.autoencoders.ltx2_diffusion_decoder"

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' UniPC
]
every_model = pytest.mark.parametrize("build", [*MODELS, tiny.ltx_decoder], ids=lambda f: f.__name__)
stock_model = pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
every_pipeline = pytest.mark.parametrize(
    "build, model, passes", PIPELINES, ids=lambda f: getattr(f, "__name__", "")
)


def distance(got, want):
    """The distance of two tensors as a part of the second."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def per_token(differs):
    """Which tokens differ [frames, height, width]; latents are [batch, channels, frames, rows, columns]."""
    frames, height, width = differs.shape[2:]
    return differs.any(1).any(0).view(frames, height // 2, 2, width // 2, 2).any(4).any(2)


@every_model
def test_a_model_is_the_same_each_time(build):
    first = build()
    output = tiny.run(first)
    assert torch.equal(tiny.run(first), output)
    assert torch.equal(tiny.run(build()), output)
    assert distance(tiny.run(build(seed=1)), output) > 0.1


@every_model
def test_an_output_is_finite_and_not_constant(build):
    output = tiny.run(build(batch=2))
    assert output.isfinite().all()
    assert 0.1 < output.std() < 10
    assert distance(output[0], output[1]) > 0.1


@every_model
def test_no_parameter_is_constant(build):
    for name, parameter in build().model.named_parameters():
        assert parameter.unique().numel() > parameter.numel() // 2
        assert (parameter > 0).all() == (name.endswith("weight") and parameter.ndim == 1)


@every_model
def test_a_model_computes_in_its_dtype(build):
    model = build(dtype=torch.bfloat16)
    kept = {parameter.dtype for parameter in model.model.parameters()} - {torch.bfloat16}
    assert kept == ({torch.float32} if build not in (tiny.flux, tiny.hunyuan, tiny.ltx_decoder) else set())
    output = tiny.run(model)
    assert output.dtype == torch.bfloat16
    assert 0 < distance(output, tiny.run(build())) < 0.05


@stock_model
def test_a_grid_and_its_text_may_have_any_size(build):
    grid = (5, 3) if build is tiny.flux else (2, 5, 3)
    text = {} if build is tiny.wan_i2v else {"text": 11}
    model = build(grid=grid, batch=1, **text)
    assert model.grid == grid
    assert model.prefix + model.suffix == (11 if build in (tiny.flux, tiny.hunyuan) else 0)
    assert distance(tiny.oracle(model, 2), tiny.run(model)) > 0.01


@stock_model
def test_a_window_changes_the_output_and_a_whole_grid_does_not(build):
    model = build()
    dense = tiny.run(model)
    assert distance(tiny.oracle(model, model.grid), dense) < 1e-5
    apart = tiny.oracle(model, 3, dilation=(1, 2, 3)[-len(model.grid) :])
    outputs = [dense, tiny.oracle(model, 3), tiny.oracle(model, 3, stride=2), apart]
    assert all(distance(one, other) > 0.01 for one, other in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("build", [tiny.wan, tiny.cosmos], ids=lambda f: f.__name__)
def test_a_token_reaches_one_window_further_per_block(build):
    model = build()
    window = (1, 1, 3)
    before = tiny.oracle(model, window)
    model.given["hidden_states"][..., 2, 4:6, 0:2] += 1
    reached = torch.zeros(model.grid, dtype=torch.bool)
    reached[2, 2, : 1 + model.attentions] = True
    assert torch.equal(per_token(tiny.oracle(model, window) != before), reached)


@pytest.mark.parametrize("build", [tiny.flux, tiny.hunyuan], ids=lambda f: f.__name__)
def test_text_sees_the_grid_and_is_seen_by_it(build):
    model = build(batch=1)
    before = tiny.oracle(model, 1)
    token = (0, 0) if build is tiny.flux else (..., 0, slice(0, 2), slice(0, 2))
    model.given["hidden_states"][token] += 1
    differs = tiny.oracle(model, 1) != before
    assert (differs.any(-1) if build is tiny.flux else per_token(differs)).all()


@pytest.mark.parametrize("build, axes", [(tiny.flux, 2), (tiny.hunyuan, 3)], ids=["flux", "hunyuan"])
def test_the_mask_lies_on_the_grid(build, axes):
    model, masks = build(batch=1), []
    module = importlib.import_module(type(model.model).__module__)
    stock = module.dispatch_attention_fn

    def watch(*operands, attn_mask, **options):
        masks.append(attn_mask)
        return stock(*operands, attn_mask=attn_mask, **options)

    with mock.patch.object(module, "dispatch_attention_fn", watch):
        tiny.oracle(model, 3, stride=2)
    text = torch.ones(len(masks[0].squeeze()), dtype=torch.bool)
    text[model.prefix : len(text) - model.suffix] = False
    for mask in (mask.squeeze() for mask in masks):
        seen = mask.any(0)  # the padding is not
        assert seen.sum() == len(text) - (2 if build is tiny.hunyuan else 0)
        assert mask[text][:, seen].all()
        assert mask[:, text & seen].all()
        assert (mask[~text][:, ~text].sum(1) == 3**axes).all()


def test_the_padding_of_a_text_stays_unseen():
    model = tiny.hunyuan(batch=3)
    before = tiny.oracle(model, 3)
    padding = model.given["encoder_attention_mask"] == 0
    assert padding.sum(1).tolist() == [2, 5, 6]
    model.given["encoder_hidden_states"][padding] += 1
    assert torch.equal(tiny.oracle(model, 3), before)
    model.given["encoder_hidden_states"][~padding] += 1
    assert distance(tiny.oracle(model, 3), before) > 0.01


def test_an_oracle_leaves_the_stock_model_behind():
    model = tiny.flux()
    before = tiny.run(model)
    with pytest.raises(ZeroDivisionError), tiny.masked(model, 3):
        raise ZeroDivisionError
    tiny.oracle(model, 3)
    assert torch.equal(tiny.run(model), before)


def test_an_oracle_counts_the_self_attentions():
    with pytest.raises(AssertionError, match="wan: 8 self-attentions, not 4"):
        tiny.oracle(tiny.wan(grid=(2, 2, 2), text=8), 1)  # cross attention looks the same
    with pytest.raises(AssertionError, match="ltx_decoder has windows of its own"):
        tiny.oracle(tiny.ltx_decoder(), 3)


def test_a_control_net_steers_its_transformer():
    model = tiny.cosmos_controlnet()
    before = tiny.run(model)
    model.given["controls"].neg_()
    assert distance(tiny.run(model), before) > 0.01


def test_a_padding_mask_is_resized_to_the_nearest():
    model, module = tiny.cosmos_controlnet(), importlib.import_module(CONTROLS)
    before, had_transforms = tiny.run(model), hasattr(module, "transforms")
    mask = model.given["padding_mask"]
    mask.bernoulli_(generator=torch.Generator().manual_seed(0))
    fine = tiny.run(model)
    assert distance(fine, before) > 0.001
    mask.set_(mask[..., ::8, ::8].contiguous())
    assert torch.equal(tiny.run(model), fine)
    assert hasattr(module, "transforms") == had_transforms


def test_a_resizing_that_is_there_stays():
    module, own = importlib.import_module(CONTROLS), object()
    with mock.patch.object(module, "transforms", own, create=True):
        with tiny.resizing():
            assert module.transforms is own
        assert module.transforms is own


def test_the_decoder_has_the_windows_of_the_reference():
    decoder, module = tiny.ltx_decoder(), importlib.import_module(LTX)
    before, grids = tiny.run(decoder), []

    def mask(frames, height, width, kernel, device):
        grids.append((frames, height, width))
        return dense_mask(GNA(grids[-1], kernel))

    def attend(query, key, value, attn_mask, scale, backend, parallel_config):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale).transpose(1, 2)

    with mock.patch.multiple(module, _neighborhood_block_mask=mask, dispatch_attention_fn=attend):
        assert distance(tiny.run(decoder), before) < 1e-5
    assert grids == [(5, 4, 5), (9, 4, 5), decoder.grid]


def steps(pipe, call, seed=0):
    """The latents after two steps."""
    return pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(seed))[0]


@every_pipeline
def test_a_pipeline_runs(build, model, passes):
    pipe, call = build()
    dense = steps(pipe, call)
    channels = dense.shape[-1] if model is tiny.flux else dense.shape[1]
    assert dense.numel() == channels * math.prod(model().grid) * (1 if model is tiny.flux else 4)
    assert dense.isfinite().all()
    assert dense.std() > 0.1
    if passes == 2:
        assert distance(call["negative_prompt_embeds"], call["prompt_embeds"]) > 0.1
    assert torch.equal(steps(*build()), dense)
    assert distance(steps(pipe, call, seed=1), dense) > 0.1


@every_pipeline
def test_a_pipeline_meets_the_oracle(build, model, passes):
    pipe, call = build()
    dense, like = steps(pipe, call), model()
    with tiny.masked(like, 3) as calls:
        assert distance(steps(pipe, call), dense) > 0.01
    assert len(calls) == 2 * passes * like.attentions


def test_two_transformers_share_the_steps():
    pipe, call = tiny.wan22_pipeline()
    first, second = (next(part.parameters()) for part in (pipe.transformer, pipe.transformer_2))
    assert distance(first, second) > 1
    times = {"transformer": [], "transformer_2": []}
    for name, seen in times.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(float(given["timestep"])), with_kwargs=True
        )
    pipe(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
    assert len(times["transformer"]) == 2 * 3
    assert len(times["transformer_2"]) == 2 * 5
    assert min(times["transformer"]) > 875 > max(times["transformer_2"])


def test_the_frames_of_a_continued_video_have_times_of_their_own():
    pipe, call = tiny.cosmos_video_pipeline()
    times = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: times.append(given["timestep"]), with_kwargs=True
    )
    steps(pipe, call)
    assert {time.shape for time in times} == {(1, 1, 3, 1, 1)}
    assert all(
        first < second == third for first, second, third in (time.flatten().tolist() for time in times)
    )


def test_hunyuan_guides_by_a_text_of_another_length():
    pipe, call = tiny.hunyuan_pipeline()
    masks = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: masks.append(given["encoder_attention_mask"].sum(1).tolist()),
        with_kwargs=True,
    )
    steps(pipe, call)
    assert masks == [[5.0], [2.0]] * 2

"""Tokens permuted once at a model's input and output compute what tokens permuted in every layer do."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

from gnaflex import GNAError, routes
from gnaflex.models import Neighborhood, Schedule, apply, attached, tokens

GRID, IMAGE = (2, 16, 16), (8, 64)  # four blocks of 128 tokens, of which none is whole rows
WINDOW = (2, 6, 6)


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    """What ran before tells "auto" what a backend needs; gradients would keep every order as it is."""
    monkeypatch.setattr(tokens, "_ways", {})
    with torch.no_grad():
        yield


@pytest.fixture
def counts(monkeypatch):
    """How often tokens were permuted: calls by the model, tensors in its layers."""
    seen, order_of, to_order = (
        SimpleNamespace(model=0, layers=0),
        attached.Attached._order_of,
        routes.to_order,
    )

    def of_model(self, *given):
        order = order_of(self, *given)
        seen.model += order is not None
        return order

    def of_layer(*given):
        seen.layers += 1
        return to_order(*given)

    monkeypatch.setattr(attached.Attached, "_order_of", of_model)
    monkeypatch.setattr(routes, "to_order", of_layer)
    return seen


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def with_given(model, **given):
    return replace(model, given={**model.given, **given})


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


# ---- the models that allow it ------------------------------------------------------------------------


def flux():
    return tiny.flux(IMAGE, text=128)


def flux_with_ids_in_a_batch():
    model = flux()
    return with_given(model, img_ids=model.given["img_ids"].expand(2, -1, -1))


def flux_with_controls():
    double, single = [[noise(2, 512, tiny.WIDTH) for _ in range(2)] for _ in range(2)]
    return with_given(flux(), controlnet_block_samples=double, controlnet_single_block_samples=single[:1])


def hunyuan(text=128):
    return tiny.hunyuan(GRID, text=text)


def wan():
    return tiny.wan(GRID)


def wan_with_a_time_per_token():
    return with_given(tiny.wan(GRID), timestep=torch.arange(2 * 512).view(2, 512) % 1000)


def cosmos(**config):
    return replace(
        tiny.cosmos(GRID), model=tiny._cosmos(0, torch.float32, **config)
    )  # with learned positions


def cosmos_with_a_condition():
    model = cosmos(in_channels=tiny.LATENT + 1, controlnet_block_every_n=2)
    residuals = [noise(2, 512, tiny.WIDTH) for _ in range(2)]
    mask = (noise(2, 1, 2, 32, 32) > 0).float()
    return with_given(model, condition_mask=mask, block_controlnet_hidden_states=residuals)


ALLOWED = [
    *(flux, flux_with_ids_in_a_batch, flux_with_controls, hunyuan, wan, lambda: tiny.wan_i2v(GRID)),
    *(wan_with_a_time_per_token, cosmos, cosmos_with_a_condition),
]


@pytest.mark.parametrize("build", ALLOWED, ids=lambda f: f.__name__.replace("<lambda>", "wan_i2v"))
def test_once_is_every_layer(build, counts):
    model = build()
    window = WINDOW[-len(model.grid) :]
    with apply(model.model, window, permute="layer", backend="sdpa"):
        want = tiny.run(model)
    assert (counts.model, counts.layers) == (0, 0)
    with apply(model.model, window, permute="once"):
        got = tiny.run(model)
    assert (counts.model, counts.layers) == (1, 0)
    assert distance(got, want) < 1e-6 < 0.01 < distance(tiny.run(model), want)


def test_arguments_and_outputs_of_any_kind():
    model = wan()
    with apply(model.model, WINDOW, permute="once"):
        plain = model.model(**model.inputs, return_dict=False)
        full = model.model(*(model.given[name] for name in model.given))  # by place
    assert list(model.given) == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert distance(plain[0], tiny.oracle(model, WINDOW)) < 1e-6
    assert torch.equal(full.sample, plain[0])
    assert torch.equal(full[0], plain[0])


def test_windows_and_dense_layers_share_one_order(counts):
    model = wan()
    layers = {0: None, 2: Neighborhood((1, 8, 4), (1, 2, 2)), 3: Neighborhood((2, 4, 4), 2)}
    outputs = []
    for permute in ("layer", "once"):
        with apply(model.model, WINDOW, schedule=Schedule(layers=layers), permute=permute, backend="flex"):
            outputs.append(tiny.run(model))
    assert counts.model == 1
    assert distance(*outputs) < 1e-6


def test_dense_steps_are_not_permuted(counts):
    model = wan()
    stock = tiny.run(model)
    with apply(model.model, WINDOW, schedule=Schedule(dense_first=1), permute="once"):
        assert torch.equal(tiny.run(model), stock)
    assert counts.model == 0


def test_the_arguments_of_a_call_stay_as_they_are():
    model = flux_with_controls()
    before = copy.deepcopy(model.given)
    with apply(model.model, WINDOW[1:], permute="once"):
        tiny.run(model)
    for name, value in before.items():
        assert all(torch.equal(*two) for two in zip(value, model.given[name], strict=True))


# ---- "auto" ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [hunyuan, wan], ids=lambda f: f.__name__)
def test_auto_goes_over_to_it_after_the_first_call(build, counts):
    model = build()
    with apply(model.model, WINDOW, backend="flex"):
        outputs = [(tiny.run(model), counts.model, counts.layers) for _ in range(3)]
    first = 3 * model.attentions  # queries, keys and values
    assert [seen for _, *seen in outputs] == [[0, first], [1, first], [2, first]]
    want = tiny.oracle(model, WINDOW)
    assert all(distance(output, want) < 1e-6 for output, *_ in outputs)


@pytest.mark.parametrize("permute, backend", [("layer", "flex"), ("auto", "sdpa")])
def test_auto_and_layer_stay_where_they_are(permute, backend, counts):
    model = wan()
    with apply(model.model, WINDOW, permute=permute, backend=backend):
        for _ in range(2):
            tiny.run(model)
    assert counts.model == 0


# ---- where it is not possible ------------------------------------------------------------------------


def token_replace():
    config = {**tiny._HUNYUAN, "image_condition_type": "token_replace"}
    model = tiny._stock("HunyuanVideoTransformer3DModel", 0, torch.float32, config)
    return replace(hunyuan(), model=model)


def time_per_frame():
    return with_given(cosmos(), timestep=torch.tensor([[0.1, 0.5]] * 2).view(2, 1, 2, 1, 1))


def padded_latents():
    return with_given(wan(), hidden_states=noise(2, tiny.LATENT, 2, 32, 33))


def control_net():
    whole = tiny.cosmos_controlnet(GRID, batch=1)
    names = ("latents", "padding_mask", "condition_mask", "timestep", "encoder_hidden_states", "fps")
    given = {name: whole.given[name] for name in names}
    given["controls_latents"] = whole.given["controls"]
    return replace(whole, model=whole.model.controlnet, given=given)


DILATED = Schedule(layers={1: Neighborhood(2, 1, (1, 2, 2))})
IMPOSSIBLE = [
    (token_replace, {}, "its blocks tell the first frame's tokens by their place"),
    (time_per_frame, {}, "every frame has a timestep of its own"),
    (padded_latents, {}, "33 latent positions are no whole number of patches"),
    (lambda: hunyuan(text=40), {}, "40 text tokens are no whole blocks of 128"),
    (lambda: tiny.flux(IMAGE, text=7), {}, "7 text tokens are no whole blocks of 128"),
    (tiny.wan, {}, "no box of 128 tokens divides 3x6x10"),
    (wan, {"schedule": DILATED}, "its layers differ in dilation"),
    (control_net, {}, "what its blocks return goes to another model"),
]
IDS = ["first frame", "times", "latents", "text behind", "text in front", "grid", "dilation", "control net"]


@pytest.mark.parametrize("build, options, reason", IMPOSSIBLE, ids=IDS)
def test_once_says_why_it_is_not_possible(build, options, reason, counts):
    model = build()
    window = WINDOW[-len(model.grid) :]
    refused = pytest.raises(GNAError, match=f'permute="once" is not possible here: {reason}')
    with tiny.resizing(), apply(model.model, window, permute="once", **options), refused:
        model.model(**model.given, return_dict=False)
    with tiny.resizing(), apply(model.model, window, backend="flex", **options):
        outputs = [model.model(**model.given, return_dict=False)[0] for _ in range(2)]
    assert counts.model == 0
    assert all(torch.equal(*two) for two in zip(*outputs, strict=True))  # entries, or residuals


def test_a_padding_mask_must_be_a_single_value(monkeypatch):
    module = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    functional = SimpleNamespace(
        resize=lambda image, size, interpolation: image
    )  # torchvision may be missing
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST=None))
    monkeypatch.setattr(module, "transforms", transforms, raising=False)
    one = torch.ones(1, 1, 32, 32)
    model = with_given(cosmos(concat_padding_mask=True), padding_mask=one)
    with apply(model.model, WINDOW, permute="once"):
        got = tiny.run(model)
        with pytest.raises(GNAError, match="its padding mask is no single value"):
            tiny.run(with_given(model, padding_mask=one.tril()))
    assert distance(got, tiny.oracle(model, WINDOW)) < 1e-6


def test_gradients_on_a_cpu_keep_the_order():
    model, refused = wan(), pytest.raises(GNAError, match="FlexAttention has no backward on a CPU")
    with torch.enable_grad(), apply(model.model, WINDOW, permute="once"), refused:
        tiny.run(model)


# ---- what else keeps tokens --------------------------------------------------------------------------


def test_a_copy_of_a_model_computes_the_same():
    model = wan()
    with apply(model.model, WINDOW, permute="once"):
        want = tiny.run(model)
        again = replace(model, model=copy.deepcopy(model.model))
        assert torch.equal(tiny.run(again), want)


@pytest.mark.parametrize("kind", ["FirstBlockCache", "PyramidAttentionBroadcast"])
def test_a_cache_of_earlier_steps_holds_tokens_in_the_order_of_now(kind, monkeypatch):
    def outputs(permute):
        monkeypatch.setattr(tokens, "_ways", {})
        model = tiny.wan(GRID, batch=1)
        model.model.enable_cache(cache(kind))
        with apply(model.model, WINDOW, backend="flex", permute=permute), model.model.cache_context("one"):
            return [tiny.run(with_given(model, timestep=torch.tensor([700 - n]))) for n in range(4)]

    for got, want in zip(outputs("auto"), outputs("layer"), strict=True):
        assert distance(got, want) < 1e-6


def cache(kind):
    import diffusers

    if kind == "FirstBlockCache":
        return diffusers.FirstBlockCacheConfig(threshold=5.0)
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )

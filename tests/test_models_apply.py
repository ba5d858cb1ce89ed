"""Neighborhood attention put into stock models: it is the stock model under the window's mask, and when it is
taken out again nothing is left of it."""

from __future__ import annotations

import contextlib
import copy
from functools import lru_cache
from unittest import mock

import pytest
import tiny_models as tiny
import torch
from torch.nn.functional import scaled_dot_product_attention as attended

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

from gnaflex import GNA, GNAError
from gnaflex.models import Neighborhood, Schedule, apply, processors, recipes
from gnaflex.reference import allowed_keys

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.usefixtures("without_gradients"),
]
MODELS = [tiny.flux, tiny.hunyuan, tiny.wan, tiny.wan_i2v, tiny.cosmos, tiny.cosmos_controlnet]
PROBLEMS = {  # window, stride and dilation; images take the last two axes
    "plain": (3, 1, 1),
    "strided": ((2, 4, 5), (2, 2, 4), 1),
    "dilated": ((3, 2, 3), 1, (1, 3, 2)),
    "strided, dilated": ((2, 3, 4), (1, 2, 3), (1, 2, 2)),
    "a whole axis": ((2, -1, 3), (1, 1, 2), 1),
}
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def distance(got, want):
    """The distance of two tensors as a part of the second."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@lru_cache
def budget(build):
    """Twice the error that the stock model makes in float32."""
    return 2 * distance(tiny.run(build()), tiny.run(build(dtype=torch.float64)))


def parts(model):
    """What apply takes: a transformer, or a control net and its transformer."""
    return [model.transformer, model.controlnet] if isinstance(model, tiny.Controlled) else [model]


@contextlib.contextmanager
def applied(model, *problem, backend="sdpa", **options):
    with contextlib.ExitStack() as stack:
        for part in parts(model):
            stack.enter_context(apply(part, *problem, backend=backend, **options))
        yield


def processors_of(model):
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}


def hooks_of(model):
    return [
        hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks
    ]


# ---- it is the stock model under a mask --------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@every_model
def test_it_is_the_stock_model_under_the_mask(build, problem):
    model = build()
    problem = [x if isinstance(x, int) else x[-len(model.grid) :] for x in problem]
    with applied(model.model, *problem):
        got = tiny.run(model)
    assert distance(got, tiny.oracle(build(dtype=torch.float64), *problem)) < budget(build)


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_any_backend_does(backend):
    model = tiny.hunyuan()
    with applied(model.model, (2, 4, 5), 2, backend=backend):
        got = tiny.run(model)
    assert distance(got, tiny.oracle(tiny.hunyuan(dtype=torch.float64), (2, 4, 5), 2)) < budget(tiny.hunyuan)


@pytest.mark.parametrize("text", [1, 16, 40])
@pytest.mark.parametrize("build", [tiny.flux, tiny.hunyuan], ids=lambda f: f.__name__)
def test_text_of_any_length(build, text):
    model = build(text=text, batch=3)  # with Hunyuan padding of another length in every entry
    with applied(model.model, 3):
        got = tiny.run(model)
    assert distance(got, tiny.oracle(build(text=text, batch=3, dtype=torch.float64), 3)) < budget(build)


def test_padding_is_told_anew_by_every_call():
    model = tiny.hunyuan()
    with applied(model.model, 3):
        tiny.run(model)
        model.given["encoder_attention_mask"] = model.given["encoder_attention_mask"].flip(0)
        got = tiny.run(model)
    assert distance(got, tiny.oracle(model, 3)) < budget(tiny.hunyuan)


def test_hunyuan_for_image_to_video():
    with mock.patch.object(tiny, "_HUNYUAN", {**tiny._HUNYUAN, "image_condition_type": "token_replace"}):
        model = tiny.hunyuan()
    with applied(model.model, 3):
        got = tiny.run(model)
    assert distance(got, tiny.oracle(model, 3)) < budget(tiny.hunyuan)


@every_model
def test_one_apply_takes_any_grid(build):
    small, other = build(), build(grid=(7, 5) if build is tiny.flux else (3, 7, 5), batch=1)
    with applied(small.model, 3):
        tiny.run(small)
        other.model.load_state_dict(small.model.state_dict())
        got = small.model(**other.inputs, return_dict=False)[0]
    assert distance(got, tiny.oracle(other, 3)) < budget(build)


@pytest.mark.parametrize("build, text", [(tiny.wan, 0), (tiny.hunyuan, 5)], ids=["wan", "hunyuan"])
def test_the_default_grid_of_720p(build, text, monkeypatch):
    small = {"num_layers": 1, "num_single_layers": 0, "num_attention_heads": 1}
    monkeypatch.setattr(tiny, "_HUNYUAN", {**tiny._HUNYUAN, **small})
    monkeypatch.setattr(tiny, "_WAN", {**tiny._WAN, "num_layers": 1, "num_attention_heads": 1})
    model, calls, spec = build((33, 45, 80), batch=1), [], GNA((33, 45, 80), (5, 7, 9))
    stock = processors.attend

    def watch(tokens, *given):
        calls.append((given, stock(tokens, *given)))
        return calls[0][1]

    monkeypatch.setattr(processors, "attend", watch)
    with apply(model.model, (5, 7, 9)):
        assert tiny.run(model).isfinite().all()
    [((query, key, value, lengths), out)] = calls
    assert text == (0 if lengths is None else int(lengths))
    rows = []
    for token in (0, 79, 3599, 54321, 70000, spec.num_tokens - 1, out.shape[1] - 1):
        near = allowed_keys(spec, token) if token < spec.num_tokens else range(spec.num_tokens)
        keys = torch.tensor([*near, *range(spec.num_tokens, spec.num_tokens + text)])
        row = [x[:, at].transpose(1, 2) for x, at in ((query, [token]), (key, keys), (value, keys))]
        rows.append((out[:, token], attended(*row), attended(*(x.double() for x in row))))
    got, plain, want = (torch.stack(column).flatten() for column in zip(*rows, strict=True))
    assert distance(got, want) < 2 * distance(plain, want)


@every_model
def test_a_window_over_the_whole_grid_is_the_stock_model(build, monkeypatch):
    model = build()
    stock, ran = tiny.run(model), []
    with applied(model.model, model.grid):
        assert torch.equal(tiny.run(model), stock)
    attend = processors.attend
    monkeypatch.setattr(recipes, "covers_all", lambda spec: False)
    monkeypatch.setattr(processors, "attend", lambda *given: ran.append(1) or attend(*given))
    with applied(model.model, model.grid):
        assert distance(tiny.run(model), stock) < budget(build)
    assert len(ran) == model.attentions


def test_a_causal_window_over_the_whole_grid_is_not_dense():
    model = tiny.wan()
    with applied(model.model, Neighborhood(model.grid, is_causal=(True, False, False))):
        got = tiny.run(model)
    assert distance(got, tiny.run(model)) > 0.01


def test_the_decoder_of_ltx_keeps_its_windows():
    def with_same_noise(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    decoder, exact = tiny.ltx_decoder(), tiny.ltx_decoder(dtype=torch.float64)
    with mock.patch("diffusers.models.autoencoders.ltx2_diffusion_decoder.randn_tensor", with_same_noise):
        stock, want = tiny.run(decoder), tiny.run(exact)
        no_mask = mock.patch.object(torch.nn.attention.flex_attention, "create_block_mask", None)
        with no_mask, apply(decoder.model, backend="sdpa"):
            got = tiny.run(decoder)
        assert torch.equal(tiny.run(decoder), stock)
    assert distance(got, want) < 2 * distance(stock, want)


# ---- what stays as it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*MODELS, tiny.ltx_decoder], ids=lambda f: f.__name__)
def test_taking_it_out_leaves_nothing_behind(build):
    model = build()
    window = () if build is tiny.ltx_decoder else (3,)
    stock, before, earlier = tiny.run(model), processors_of(model.model), []
    for leave in ("with", "remove"):
        inside = [apply(part, *window, backend="sdpa") for part in parts(model.model)]
        _ = [one.remove() for one in earlier]  # once more does no harm
        assert sum(one is not before[name] for name, one in processors_of(model.model).items()) >= 4
        tiny.run(model)
        for one in inside:
            one.remove() if leave == "remove" else one.__exit__(None, None, None)
        assert all(processors_of(model.model)[name] is before[name] for name in before)
        assert not hooks_of(model.model)
        assert torch.equal(tiny.run(model), stock)
        earlier = inside


@pytest.mark.parametrize("permute", ["layer", "once"])
def test_an_exception_inside_the_model_leaves_nothing_behind(permute):
    model = tiny.wan((2, 16, 16), batch=1)
    stock, before = tiny.run(model), processors_of(model.model)
    fails = mock.patch.object(model.model.blocks[2].ffn, "forward", side_effect=ZeroDivisionError)
    with apply(model.model, (2, 6, 6), permute=permute):
        want = tiny.run(model)
        with fails, pytest.raises(ZeroDivisionError):
            tiny.run(model)
        assert torch.equal(tiny.run(model), want)
        with fails, pytest.raises(ZeroDivisionError):
            tiny.run(model)
    assert all(processors_of(model.model)[name] is before[name] for name in before)
    assert not hooks_of(model.model)
    assert torch.equal(tiny.run(model), stock)


@every_model
def test_weights_and_other_attention_are_not_touched(build):
    model = build()
    before, weights = processors_of(model.model), copy.deepcopy(model.model.state_dict())
    with applied(model.model, 3):
        changed = {name for name, one in processors_of(model.model).items() if one is not before[name]}
        is_own = [name.split(".")[-1] in ("attn", "attn1") and "refiner" not in name for name in before]
        assert changed == {name for name, own in zip(before, is_own, strict=True) if own}
        assert len(changed) == model.attentions
        now = model.model.state_dict()
        assert list(now) == list(weights)
        assert all(torch.equal(now[name], weights[name]) for name in now)
        model.model.load_state_dict(weights, strict=True)


def test_two_models_have_windows_of_their_own():
    one, other = tiny.wan(seed=0), tiny.wan(seed=1)
    with apply(one.model, 2, backend="sdpa"), apply(other.model, (3, 4, 4), 2, backend="sdpa"):
        got = tiny.run(one), tiny.run(other), tiny.run(one)
    want = tiny.oracle(one, 2), tiny.oracle(other, (3, 4, 4), 2), tiny.oracle(one, 2)
    assert all(distance(a, b) < budget(tiny.wan) for a, b in zip(got, want, strict=True))


# ---- what is refused ---------------------------------------------------------------------------------


def test_a_mask_of_the_users_own_is_refused():
    model = tiny.flux()
    model.given["joint_attention_kwargs"] = {"attention_mask": torch.ones(1, 1, 1, 133, dtype=torch.bool)}
    stock = tiny.run(model)
    with apply(model.model, 3), pytest.raises(GNAError, match="no attention mask of your own"):
        tiny.run(model)
    with apply(model.model, 3, schedule=Schedule(dense_first=1)):
        assert torch.equal(tiny.run(model), stock)


@pytest.mark.parametrize("build", [tiny.wan, tiny.ltx_decoder], ids=lambda f: f.__name__)
def test_twice_is_refused(build):
    model = build().model
    window = () if build is tiny.ltx_decoder else (3,)
    with apply(model, *window):
        before = processors_of(model)
        with pytest.raises(GNAError, match=r"in\s+force"):
            apply(model, *window)
        assert processors_of(model) == before


def test_a_strange_processor_is_refused_and_nothing_is_half_done():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Other(WanAttnProcessor):
        pass

    pipe, _ = tiny.wan22_pipeline()
    last = pipe.transformer_2.blocks[-1].attn1
    last.processor = Other()
    models = pipe.transformer, pipe.transformer_2
    before = [processors_of(model) for model in models]
    with pytest.raises(GNAError, match=r"blocks\.3\.attn1 has a processor that gnaflex does not know: Other"):
        apply(pipe, 3)
    assert [processors_of(model) for model in models] == before
    assert not [hook for model in models for hook in hooks_of(model)]
    with apply(pipe, 3, schedule=Schedule(layers={3: None})):  # as the message says
        assert type(last.processor) is Other

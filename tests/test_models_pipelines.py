"""Whole pipelines with neighborhood attention: the steps that are sparse, and that nothing else changes."""

from __future__ import annotations

import contextlib
import logging
import math
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

from gnaflex import GNAError
from gnaflex.models import Neighborhood, Schedule, apply, processors, recipe

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' UniPC
STEPS, DENSE = 8, 3
SMALL, IMAGE = (2, 5, 6), (5, 9)
PIPELINES = {  # with the model that is like theirs, and the calls of a step
    "flux": (tiny.flux_pipeline, tiny.flux, 1),
    "hunyuan": (tiny.hunyuan_pipeline, tiny.hunyuan, 2),
    "wan": (tiny.wan_pipeline, tiny.wan, 2),
    "wan 2.2": (tiny.wan22_pipeline, tiny.wan, 2),
    "cosmos": (tiny.cosmos_pipeline, tiny.cosmos, 2),
    "cosmos 2.5": (tiny.cosmos_video_pipeline, tiny.cosmos, 2),
}
every_pipeline = pytest.mark.parametrize("kind", PIPELINES)


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


class Run:
    """A pipeline; a run gives the latents after every step."""

    def __init__(self, kind):
        build, model, self.calls = PIPELINES[kind]
        self.grid = IMAGE if kind == "flux" else SMALL
        self.pipe, self.call = build(self.grid)
        self.like, self.taken = model(self.grid), None

    def __call__(self, steps=STEPS, at_step=lambda step: None):
        latents = []

        def step_end(pipe, step, time, seen):
            latents.append(seen["latents"].clone())
            at_step(step + 1)
            return {}

        at_step(0)
        self.pipe(
            **self.call,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=step_end,
        )
        assert len(latents) == (self.taken or steps)
        return latents


def schedule(**options):
    return Schedule(**{"dense_first": DENSE, **options})


@pytest.fixture
def attended(monkeypatch):
    """The step of every call of attention, as a run tells the steps."""
    seen, stock = SimpleNamespace(step=0, steps=[]), processors.attend

    def attend(*given):
        seen.steps.append(seen.step)
        return stock(*given)

    monkeypatch.setattr(processors, "attend", attend)
    return seen


@every_pipeline
def test_a_pipeline_is_dense_sparse_and_dense_again(kind, attended):
    run = Run(kind)
    stock = run()
    with apply(run.pipe, 2, schedule=schedule(), backend="sdpa"):
        got = run(at_step=lambda step: setattr(attended, "step", step))
        again = run()
    count = run.calls * run.like.attentions
    assert attended.steps[: len(attended.steps) // 2] == [
        n for n in range(DENSE, STEPS) for _ in range(count)
    ]
    assert [torch.equal(*two) for two in zip(got, stock, strict=True)] == [n < DENSE for n in range(STEPS)]
    assert distance(got[-1], stock[-1]) > 0.001
    assert all(torch.equal(*two) for two in zip(got, again, strict=True))
    assert all(torch.equal(*two) for two in zip(run(), stock, strict=True))


@every_pipeline
def test_sparse_steps_are_the_stock_pipelines_under_the_mask(kind):
    run = Run(kind)
    stride = (1, 2, 2)[-len(run.grid) :]
    with contextlib.ExitStack() as stack:
        mask = tiny.masked(run.like, 2, stride)
        want = run(at_step=lambda step: step == DENSE and stack.enter_context(mask))
    with apply(run.pipe, 2, stride, schedule=schedule(), backend="sdpa"):
        got = run()
    assert max(distance(*two) for two in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize(
    "options, dense",
    [
        ({"dense_first": 3 / 8}, {0, 1, 2}),
        ({"dense_first": 0.3, "dense_last": 1}, {0, 1, 2, 7}),
        ({"dense_first": 0, "dense_last": 0.25}, {6, 7}),
    ],
    ids=["share", "last", "share of last"],
)
@pytest.mark.parametrize("kind", ["flux", "wan 2.2", "cosmos 2.5"])
def test_the_pipeline_knows_how_many_steps_there_are(kind, options, dense, attended):
    run = Run(kind)
    with apply(run.pipe, 2, schedule=Schedule(**options), backend="sdpa"):
        for steps in (8, 4):
            attended.steps.clear()
            run(steps, at_step=lambda step: setattr(attended, "step", step))
            is_dense = [Schedule(**options).is_dense(step, steps) for step in range(steps)]
            assert {*range(steps)} - {*attended.steps} == {n for n in range(steps) if is_dense[n]}
    assert {n for n in range(8) if Schedule(**options).is_dense(n, 8)} == dense


def test_a_published_recipe_runs_in_its_pipeline(attended):
    run = Run("hunyuan")
    with apply(run.pipe, recipe("hunyuanvideo-91"), backend="sdpa"):
        run(at_step=lambda step: setattr(attended, "step", step))
    assert {*attended.steps} == {3, 4, 5, 6, 7}


def test_timesteps_that_bfloat16_cannot_tell_apart_are_steps(attended):
    """At 4096 pixels FluxPipeline shifts by exp(11.6), and most of its times are 1000 in bfloat16."""
    run = Run("flux")
    run.pipe.scheduler = tiny._flow(shift=math.exp(11.6))
    run.pipe.transformer.to(torch.bfloat16)
    half = {name: x.bfloat16() for name, x in run.call.items() if isinstance(x, torch.Tensor)}
    run.call = {**run.call, **half}
    with apply(run.pipe, 2, schedule=schedule(), backend="sdpa"):
        run(at_step=lambda step: setattr(attended, "step", step))
    assert {*attended.steps} == {3, 4, 5, 6, 7}


def test_video_to_video_counts_the_steps_it_takes(attended):
    run = Run("wan")
    del run.call["num_frames"]
    run.pipe = tiny._pipeline(
        "WanVideoToVideoPipeline", tiny._flow(shift=3.0), transformer=run.pipe.transformer
    )
    run.call["latents"] = torch.randn(
        1, tiny.LATENT, *tiny._patched(SMALL), generator=torch.Generator().manual_seed(1)
    )
    run.call["strength"], run.taken = 0.5, 4
    options = Schedule(dense_first=0.25, dense_last=1)
    with apply(run.pipe, 2, schedule=options, backend="sdpa"):
        run(at_step=lambda step: setattr(attended, "step", step))
    assert {*attended.steps} == {1, 2}


@torch.no_grad()
def test_a_loop_of_ones_own_counts_its_own_steps(attended):
    run, latents = Run("wan"), torch.zeros(1, tiny.LATENT, *tiny._patched(SMALL))
    with apply(run.pipe, 2, schedule=schedule(dense_last=1), backend="sdpa"):
        run(4)  # the pipeline remembers how many steps it took
        attended.steps.clear()
        run.pipe.scheduler.set_timesteps(STEPS)
        for attended.step, time in enumerate(run.pipe.scheduler.timesteps):
            noise = run.pipe.transformer(latents, time.expand(1), run.call["prompt_embeds"])[0]
            latents = run.pipe.scheduler.step(noise, time, latents)[0]
    assert {*attended.steps} == {3, 4, 5, 6}


def test_a_schedule_without_steps_does_not_wait_for_timesteps(monkeypatch):
    monkeypatch.setattr("gnaflex.models.steps.Clock.tick", None)
    run = Run("wan")
    with apply(run.pipe, 2, schedule=Schedule(layers={0: None}), backend="sdpa"):
        run()


def test_a_pipeline_that_was_aborted_begins_anew(attended):
    run = Run("wan")

    def stop(step):
        if step == 5:
            raise ZeroDivisionError

    with apply(run.pipe, 2, schedule=schedule(), backend="sdpa"):
        want = run()
        with pytest.raises(ZeroDivisionError):
            run(at_step=stop)
        assert all(torch.equal(*two) for two in zip(run(), want, strict=True))


# ---- what stays dense, and says so -------------------------------------------------------------------


def two_images():
    """FLUX as Kontext calls it: the tokens of a second image behind those of the first."""
    model = tiny.flux()
    ids, latents = (model.given[name] for name in ("img_ids", "hidden_states"))
    model.given["img_ids"] = torch.cat([ids, ids + torch.tensor([1, 0, 0])])
    model.given["hidden_states"] = torch.cat([latents, latents.flip(1)], 1)
    return model


@pytest.mark.parametrize(
    "build, window, reason",
    [
        (lambda: tiny.wan((1, 6, 10)), (1, 3, 3), "an image, one frame"),
        (lambda: tiny.hunyuan((1, 6, 10)), 1, "an image, one frame"),
        (lambda: tiny.cosmos((2, 4, 5)), 3, "its window reaches over 3 tokens of axis 0, which has 2"),
        (lambda: tiny.flux((4, 9)), (5, 5), "its window reaches over 5 tokens of axis 0, which has 4"),
        (tiny.wan, (3, 6, 10), "its window is the whole grid"),
        (two_images, (3, 3), "its 252 tokens are no single grid by their img_ids"),
        (two_images, 3, "its 252 tokens are no single grid by their img_ids"),
    ],
    ids=["wan image", "hunyuan image", "small video", "small image", "whole grid", "two", "two, scalar"],
)
@torch.no_grad()
def test_what_cannot_be_sparse_stays_dense_and_says_so_once(build, window, reason, caplog):
    model = build()
    stock = tiny.run(model)
    with caplog.at_level(logging.WARNING, "gnaflex"), apply(model.model, window):
        assert torch.equal(tiny.run(model), stock)
        assert torch.equal(tiny.run(model), stock)
    [record] = [one for one in caplog.records if one.name == "gnaflex"]
    assert record.getMessage().startswith(f"{type(model.model).__name__} stays dense: {reason}")


@torch.no_grad()
def test_ids_that_change_in_place_are_read_again():
    model, turned = tiny.flux((9, 14)), tiny.flux((14, 9))
    with apply(model.model, (3, 5), backend="sdpa"):
        tiny.run(model)
        model.given["img_ids"].copy_(turned.given["img_ids"])
        got = tiny.run(model)
    assert math.prod(turned.grid) == math.prod(model.grid)
    assert distance(got, tiny.oracle(tiny.Tiny("", model.model, model.given, (14, 9), 7), (3, 5))) < 1e-5


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem, options, match",
    [
        (((3, 3, 3),), {}, "one entry per axis"),
        ((), {}, "needs a window"),
        ((3,), {"backend": "none"}, "unknown backend"),
        ((3,), {"permute": "never"}, "permute must be one of"),
        ((3,), {"schedule": 3}, "schedule must be a Schedule"),
        ((Neighborhood(3), 2), {}, "is the whole problem"),
        ((Neighborhood(3),), {"base": (64, 64)}, "is the whole problem"),
        ((3,), {"schedule": Schedule(layers={4: None})}, "it has 4"),
        ((3,), {"schedule": Schedule(layers={-5: None})}, "it has 4"),
        ((3,), {"schedule": Schedule(layers={0: 3})}, "layers must hold a Neighborhood"),
    ],
)
def test_what_makes_no_sense_is_refused(problem, options, match):
    model = tiny.flux().model
    with pytest.raises(GNAError, match=match):
        apply(model, *problem, **options)
    assert not [one for one in model.attn_processors.values() if hasattr(one, "gnaflex")]
    assert not model._forward_pre_hooks


def test_other_names_are_refused():
    with pytest.raises(GNAError, match="no recipe is called 'hunyuan'"):
        recipe("hunyuan")
    with pytest.raises(GNAError, match="no model in it is one that gnaflex knows: got Linear"):
        apply(torch.nn.Linear(2, 2), 3)
    with pytest.raises(GNAError, match="windows of its own"):
        apply(tiny.ltx_decoder().model, recipe("cosmos-89"))


def test_context_parallelism_is_refused():
    model = tiny.flux()
    with apply(model.model, 3):
        for processor in model.model.attn_processors.values():
            processor._parallel_config = object()  # as enable_parallelism does
        with pytest.raises(GNAError, match="do not run under diffusers' context parallelism"):
            tiny.run(model)

"""Which steps and layers of a model are sparse: schedules, the clock that tells the steps, and recipes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

from gnaflex import GNA, GNAError
from gnaflex.models import RECIPES, Neighborhood, Schedule, apply, processors, recipe

GRID = (3, 4, 5)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Watch:
    """The windows that every call of a model attended with, layer by layer."""

    def __init__(self, model, monkeypatch):
        self.calls, stock = [], processors.attend
        model.register_forward_pre_hook(lambda *_: self.calls.append([]))

        def attend(tokens, *given):
            self.calls[-1].append(tokens.spec.window)
            return stock(tokens, *given)

        monkeypatch.setattr(processors, "attend", attend)

    def __str__(self):
        """A letter per call: d for dense, s for sparse."""
        return "".join("s" if windows else "d" for windows in self.calls)


class Pipe:
    """A pipeline as far as the clock is concerned: a model, and a scheduler that is given timesteps."""

    def __init__(self, model):
        self.components, self.scheduler = {"transformer": model.model}, SimpleNamespace(timesteps=None)
        self.model = model

    def run(self, times, begin=None, stop=None, calls=1):
        """The calls of a run with these timesteps that begins late, or is aborted."""
        self.scheduler.timesteps, self.scheduler.begin_index = torch.tensor(times), begin
        for time in times[begin or 0 : stop]:
            for _ in range(calls):
                call(self.model, time)


def call(model, *times):
    model.model(**{**model.inputs, "timestep": torch.tensor(times)}, return_dict=False)


def watched(monkeypatch, build=tiny.wan, grid=GRID):
    model = build(grid, batch=1)
    return model, Watch(model.model, monkeypatch)


EIGHT = [1000.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0]


# ---- steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, steps",
    [
        (Schedule(), "ssssssss"),
        (Schedule(dense_first=3), "dddsssss"),
        (Schedule(dense_first=0.25), "ddssssss"),
        (Schedule(dense_first=0.26), "dddsssss"),
        (Schedule(dense_last=2), "ssssssdd"),
        (Schedule(dense_last=0.3), "sssssddd"),
        (Schedule(dense_first=1, dense_last=0.125), "dssssssd"),
        (Schedule(dense_first=6, dense_last=6), "dddddddd"),
        (Schedule(dense_first=1.0), "dddddddd"),
        (Schedule(dense_first=1), "dsssssss"),
    ],
    ids=lambda x: f"first {x.dense_first}, last {x.dense_last}" if isinstance(x, Schedule) else x,
)
@pytest.mark.parametrize("calls", [1, 2], ids=["one call a step", "guidance calls twice"])
def test_dense_steps_of_a_pipeline(schedule, steps, calls, monkeypatch):
    model, watch = watched(monkeypatch)
    pipe = Pipe(model)
    with apply(pipe, 2, schedule=schedule, backend="sdpa"):
        pipe.run(EIGHT, calls=calls)
        pipe.run(EIGHT, calls=calls)
    assert str(watch) == 2 * "".join(calls * letter for letter in steps)


@pytest.mark.parametrize(
    "schedule", [Schedule(dense_first=0.25), Schedule(dense_first=2, dense_last=1)], ids=str
)
def test_runs_of_other_lengths_are_counted_anew(schedule, monkeypatch):
    model, watch = watched(monkeypatch)
    pipe = Pipe(model)
    with apply(pipe, 2, schedule=schedule, backend="sdpa"):
        for times in (EIGHT, EIGHT[::2], EIGHT):
            pipe.run(times)
    eight, four = ("ddssssss", "dsss") if schedule.dense_last == 0 else ("ddsssssd", "ddsd")
    assert str(watch) == eight + four + eight


def test_a_run_after_an_aborted_one_begins_anew(monkeypatch):
    model, watch = watched(monkeypatch)
    pipe = Pipe(model)
    with apply(pipe, 2, schedule=Schedule(dense_first=2), backend="sdpa"):
        for stop in (1, 5, None):
            pipe.run(EIGHT, stop=stop)
    assert str(watch) == "d" + "ddsss" + "ddssssss"


def test_image_to_image_begins_late(monkeypatch):
    model, watch = watched(monkeypatch)
    pipe = Pipe(model)
    with apply(pipe, 2, schedule=Schedule(dense_first=0.5, dense_last=1), backend="sdpa"):
        pipe.run(EIGHT, begin=4)
        pipe.run(EIGHT)
    assert str(watch) == "ddsd" + "ddddsssd"


def test_heuns_second_calls_are_no_steps(monkeypatch):
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    times = scheduler.timesteps.tolist()
    assert len(times) == 7
    model, watch = watched(monkeypatch)
    pipe = Pipe(model)
    with apply(pipe, 2, schedule=Schedule(dense_first=0.5, dense_last=1), backend="sdpa"):
        pipe.run(times)
    assert str(watch) == "ddd" + "ss" + "dd"


def test_a_bare_transformer_counts_by_its_timesteps(monkeypatch):
    model, watch = watched(monkeypatch)
    with apply(model.model, 2, schedule=Schedule(dense_first=2, dense_last=1, steps=4), backend="sdpa"):
        for times in (EIGHT[:4], EIGHT[:4], EIGHT[1:4], EIGHT[:1], EIGHT[:4]):
            for time in times:
                call(model, time)
    assert str(watch) == "ddsd" + "ddsd" + "dds" + "d" + "ddsd"


def test_each_token_or_frame_may_have_its_own_time(monkeypatch):
    model, watch = watched(monkeypatch)
    with apply(model.model, 2, schedule=Schedule(dense_first=2), backend="sdpa"):
        for time in EIGHT[:4]:
            per_token = torch.full((1, math.prod(GRID)), time)
            per_token[:, : 4 * 5] = 0  # the first frame is given
            model.model(**{**model.inputs, "timestep": per_token})
    assert str(watch) == "ddss"
    model, watch = watched(monkeypatch, tiny.cosmos)
    with apply(model.model, 2, schedule=Schedule(dense_first=2), backend="sdpa"):
        for time in EIGHT[:4]:
            per_frame = torch.tensor([0.0, time, time]).view(1, 1, 3, 1, 1)
            model.model(**{**model.inputs, "timestep": per_frame})
    assert str(watch) == "ddss"


def test_two_transformers_share_the_clock(monkeypatch):
    first, second = tiny.wan(GRID, batch=1), tiny.wan(GRID, batch=1, seed=1)
    watch, pipe = Watch(first.model, monkeypatch), Pipe(first)
    second.model.register_forward_pre_hook(lambda *_: watch.calls.append([]))
    pipe.components["transformer_2"] = second.model
    pipe.scheduler.timesteps = torch.tensor(EIGHT)
    with apply(pipe, 2, schedule=Schedule(dense_first=3, dense_last=1), backend="sdpa") as applied:
        for time in EIGHT:
            call(first if time > 875 else second, time)
    assert list(applied.models) == ["transformer", "transformer_2"]
    assert str(watch) == "dddssssd"


# ---- layers ------------------------------------------------------------------------------------------

W, X = (2, 2, 2), (3, 1, 4)


@pytest.mark.parametrize(
    "window, layers, windows",
    [
        (W, {}, [W, W, W, W]),
        (W, {0: None, -1: None}, [W, W]),
        (W, {1: Neighborhood(X), -1: None}, [W, X, W]),
        (None, {2: Neighborhood(X), -4: Neighborhood(W)}, [W, X]),
        (W, {0: None, 1: None, 2: None, 3: None}, []),
    ],
    ids=["all", "two dense", "one other", "two others", "none"],
)
@pytest.mark.parametrize("build", [tiny.wan, tiny.hunyuan], ids=lambda f: f.__name__)
def test_layers_have_windows_of_their_own(build, window, layers, windows, monkeypatch):
    model, watch = watched(monkeypatch, build)
    schedule = Schedule(layers=layers, dense_first=1)
    with apply(model.model, window, schedule=schedule, backend="sdpa"):
        call(model, 900)
        call(model, 800)
    assert watch.calls == [[], windows]


def test_steps_and_layers_in_diffusers_own_names():
    model = tiny.hunyuan().model
    with apply(model, 3, schedule=Schedule(layers={0: None, -1: None})):
        sparse = [
            name for name, m in model.named_modules() if hasattr(getattr(m, "processor", None), "gnaflex")
        ]
    assert sparse == ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]


# ---- recipes -----------------------------------------------------------------------------------------

GRIDS = {2: [(64, 64), (256, 256)], 3: [(33, 45, 80), (16, 44, 80), (21, 45, 80), (30, 48, 80)]}
PAPER = {"flux-4k-90": (9, 28), "cosmos-56": (12, 35), "cosmos-89": (12, 35)}
PAPER |= {"hunyuanvideo-58": (15, 50), "hunyuanvideo-91": (15, 50)}


@pytest.mark.parametrize("name, numbers", PAPER.items(), ids=PAPER)
def test_the_papers_first_steps_are_dense(name, numbers):
    dense, steps = numbers
    is_dense = [recipe(name).schedule.is_dense(step, steps) for step in range(steps)]
    assert is_dense == [step < dense for step in range(steps)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_the_default_grids(name):
    one = recipe(name)
    assert one is RECIPES[one.name]
    assert one.source
    for neighborhood in {id(n): n for n in (one.neighborhood, *one.schedule.layers.values())}.values():
        base = neighborhood.base
        for grid in GRIDS[len(base)]:
            spec = neighborhood.on(grid)  # raises where it breaks a rule
            for n, whole, window, wanted in zip(grid, base, spec.window, neighborhood.window, strict=True):
                assert window == n if wanted == -1 else abs(window - n * wanted / whole) <= 0.5
        full = tuple(n if n > 0 else 16 for n in base)
        given = neighborhood.window, neighborhood.stride, neighborhood.dilation
        assert neighborhood.on(full) == GNA(full, *given)


@pytest.mark.parametrize(
    "neighborhood, grid, want",
    [
        (RECIPES["hunyuanvideo-91"].neighborhood, (33, 45, 80), ((20, 22, 24), (18, 8, 8), 1)),
        (RECIPES["flux-4k-90"].neighborhood, (64, 64), ((20, 20), (4, 4), 1)),
        (RECIPES["cosmos-predict2-2b"].schedule.layers[0], (9, 22, 40), ((9, 2, 8), 1, (1, 6, 2))),
        (RECIPES["cosmos-predict2-2b"].schedule.layers[23], (7, 44, 80), ((7, 28, 56), (1, 4, 8), 1)),
        (Neighborhood((3, 4), (2, 4), base=(32, 32)), (8, 128), ((2, 16), (1, 16), (1, 4))),
        (Neighborhood(4, 2, 8, base=(32, -1)), (8, 64), ((2, 4), (1, 2), (2, 8))),
        (Neighborhood(4, 1, 8, base=(32, 32)), (6, 64), ((2, 8), (1, 2), (2, 8))),
        (Neighborhood((-1, 4), 1, (1, "max"), base=(32, 32)), (8, 16), ((8, 2), 1, (1, 8))),
    ],
)
def test_numbers_for_a_base_grid_are_scaled(neighborhood, grid, want):
    assert neighborhood.on(grid) == GNA(grid, *want)


def test_a_recipe_is_what_its_numbers_are():
    model, one = tiny.hunyuan(), recipe("hunyuanvideo-91")
    spec = one.neighborhood.on(model.grid)
    assert spec.window != model.grid
    with apply(model.model, one, schedule=Schedule(), backend="sdpa"):
        got = tiny.run(model)
    want = tiny.oracle(model, spec.window, spec.stride)
    assert (got - want).norm() < 1e-6 * want.norm() < 1e-3 * (tiny.run(model) - want).norm()


def test_each_layer_of_cosmos_predict2_has_its_own_window():
    specs = [one.on((9, 44, 80)) for _, one in sorted(recipe("cosmos-predict2-2b").schedule.layers.items())]
    widths = [16, 16, 16, 24, 24, 16, *[24] * 4, 16, *[40] * 12, 56, 40, 40, 40, 24]
    assert [spec.window[2] for spec in specs] == widths
    assert [n for n, spec in enumerate(specs) if max(spec.dilation) > 1] == [0, 1, 2, 5, 10]


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-1, 1.5, True, "3", float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["dense_first", "dense_last"])
def test_shares_that_are_none_are_refused(name, share):
    with pytest.raises(GNAError, match=f"^{name} "):
        Schedule(**{name: share})


@pytest.mark.parametrize(
    "schedule", [Schedule(dense_first=0.5), Schedule(dense_last=1)], ids=["share", "last"]
)
def test_a_bare_transformer_must_be_told_the_steps(schedule):
    model = tiny.wan(GRID, batch=1)
    with apply(model.model, 2, schedule=schedule), pytest.raises(GNAError, match="steps=50"):
        tiny.run(model)

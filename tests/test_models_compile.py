"""What users do to models that have neighborhood attention: compile their blocks, train them, run them in
bfloat16, fuse their projections, choose another attention backend for what stays dense."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from dataclasses import replace
from functools import partial

import pytest
import tiny_models as tiny
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

from gnaflex.models import Neighborhood, Schedule, apply
from gnaflex.spec import GNAError

COMPILED = [tiny.flux, tiny.hunyuan, tiny.wan, tiny.cosmos]
every_compiled = pytest.mark.parametrize("build", COMPILED, ids=lambda f: f.__name__)
every_model = pytest.mark.parametrize("build", [*COMPILED, tiny.wan_i2v], ids=lambda f: f.__name__)


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


class Graphs:
    """A backend of torch.compile that counts the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def compile_blocks(model, backend):
    """compile_repeated_blocks; CosmosTransformer3DModel does not say what its repeated blocks are."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)


def at(model, time):
    """The output at a timestep of the same shape and dtype."""
    return tiny.run(
        replace(model, given={**model.given, "timestep": torch.full_like(model.given["timestep"], time)})
    )


# ---- compiled blocks ---------------------------------------------------------------------------------

TIMES = (900, 600, 300)  # of which the first is dense


@pytest.mark.usefixtures("without_gradients")
@every_compiled
def test_windows_of_layers_and_steps_share_the_graphs_of_compiled_blocks(build):
    stock, model, graphs = build(), build(), (Graphs(), Graphs())
    other = Schedule(dense_first=1, layers={1: Neighborhood((2, 3, 5)[-len(model.grid) :])})
    problems = [((3,), other), ((2, 2), Schedule(dense_first=1))]
    want = [outputs(model, *problem) for problem in problems]
    compile_blocks(stock.model, graphs[0])
    dense = [at(stock, time) for time in TIMES]
    torch.compiler.reset()
    compile_blocks(model.model, graphs[1])
    got, counts = [], []
    for problem in problems:
        got.append(outputs(model, *problem))
        counts.append(graphs[1].count)
    assert graphs[0].count < counts[0] <= 2 * graphs[0].count  # some of dense steps, some of sparse ones
    assert counts[1] == counts[0]
    for one, two in zip(got, want, strict=True):
        assert all(distance(a, b) < 1e-6 for a, b in zip(one, two, strict=True))
        assert distance(one[0], dense[0]) < 1e-6 < 0.01 < distance(one[1], dense[1])
    assert distance(got[0][1], got[1][1]) > 0.01


def outputs(model, problem, schedule):
    with apply(model.model, *problem, schedule=schedule, backend="sdpa"):
        return [at(model, time) for time in TIMES]


@pytest.mark.usefixtures("without_gradients")
def test_blocks_that_were_compiled_before():
    model = tiny.wan()
    want, dense = outputs(model, (3,), Schedule()), tiny.run(model)
    compile_blocks(model.model, "eager")
    assert distance(tiny.run(model), dense) < 1e-6
    got = outputs(model, (3,), Schedule())
    assert all(distance(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    assert distance(tiny.run(model), dense) < 1e-6


@pytest.mark.usefixtures("without_gradients")
def test_a_whole_model_may_be_compiled(monkeypatch):
    monkeypatch.setattr(tiny, "_WAN", {**tiny._WAN, "num_layers": 1})
    model = replace(tiny.wan(), attentions=1)
    whole = replace(model, model=torch.compile(model.model, backend="eager"))
    dense, want = tiny.run(whole), tiny.oracle(model, 3)
    with apply(whole.model, 3, backend="sdpa"):
        assert distance(tiny.run(whole), want) < 1e-6
    assert distance(tiny.run(whole), dense) < 1e-6


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("build", [tiny.cosmos, tiny.wan], ids=lambda f: f.__name__)
def test_compiled_blocks_under_autocast(build):
    model = build()
    with apply(model.model, 3, backend="sdpa"), torch.autocast("cpu", torch.bfloat16):
        want = tiny.run(model)
        compile_blocks(model.model, "aot_eager")
        got = tiny.run(model)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)


# ---- training ----------------------------------------------------------------------------------------


def gradients(model, *times):
    """Of all parameters, for a loss over the outputs at some timesteps, in one row."""
    model.model.zero_grad()
    sum(at(model, time).square().mean() for time in times).backward()
    return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])


def trained(build, **options):
    model = build(**options)
    model.model.requires_grad_(True).train()
    return model


TRAINED = [*itertools.product(COMPILED, ("plain", "checkpointed"))]
TRAINED += [(tiny.hunyuan, "compiled"), (tiny.wan, "compiled")]


@pytest.mark.parametrize("build, way", TRAINED, ids=lambda x: getattr(x, "__name__", x))
def test_gradients_are_those_of_the_stock_model_under_the_mask(build, way):
    model = trained(build)
    with tiny.masked(model, 3):
        want = gradients(model, 900, 600)
    dense = gradients(model, 900, 600)
    if way == "checkpointed":
        model.model.enable_gradient_checkpointing()
    if way == "compiled":
        compile_blocks(model.model, "aot_eager")
    with apply(model.model, 3, backend="sdpa"):
        got = gradients(model, 900, 600)
    assert distance(got, want) < 1e-5 < 0.01 < distance(dense, want)


def two_texts():
    """Hunyuan with a longer text in the second half of its inputs."""
    first = trained(tiny.hunyuan, batch=1)
    mask = torch.ones_like(first.given["encoder_attention_mask"])
    return first, replace(first, given={**first.given, "encoder_attention_mask": mask})


def two_grids():
    first, second = trained(tiny.wan, batch=1), tiny.wan((6, 3, 10), batch=1)
    return first, replace(first, given=second.given)


def two_steps():
    first = trained(tiny.wan, batch=1)
    return first, replace(first, given={**first.given, "timestep": first.given["timestep"] - 100})


def checkpoint_blocks(model):
    """Checkpoints that the model does not know of, as those for FSDP."""
    for block in getattr(model, "blocks", None) or [
        *model.transformer_blocks,
        *model.single_transformer_blocks,
    ]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


CALLS = [*itertools.product((two_texts, two_grids, two_steps), ("by the model", "by others"))]


@pytest.mark.parametrize("build, way", CALLS, ids=lambda x: getattr(x, "__name__", x))
def test_checkpoints_of_two_calls_keep_what_each_was_told(build, way):
    first, second = build()
    grads = []
    for checkpointed in (False, True):
        if checkpointed and way == "by others":
            checkpoint_blocks(first.model)
        elif checkpointed:
            first.model.enable_gradient_checkpointing()
        first.model.zero_grad()
        dense = Schedule(dense_first=1 if build is two_steps else 0)
        with apply(first.model, 3, schedule=dense, backend="sdpa"):
            (tiny.run(first).square().mean() + tiny.run(second).square().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in first.model.parameters() if p.grad is not None]))
    assert distance(*grads) < 1e-5


@pytest.mark.parametrize("build", [two_texts, two_grids, two_steps])
def test_compiled_checkpoints_take_one_call_at_a_time(build):
    """They would read what the second call told its layers; eager ones find what their own did."""
    first, second = build()
    first.model.enable_gradient_checkpointing()
    compile_blocks(first.model, "aot_eager")
    dense = Schedule(dense_first=1 if build is two_steps else 0)
    with apply(first.model, 3, schedule=dense, backend="sdpa"):
        loss = tiny.run(first).square().mean()
        with pytest.raises(GNAError, match=r"Call backward\(\) between the two"):
            tiny.run(second)
        with torch.no_grad(), pytest.raises(GNAError, match="compiled blocks run again"):
            tiny.run(second)
        loss.backward()
        tiny.run(second).square().mean().backward()
        del loss
        tiny.run(first)
        tiny.run(second)  # nothing holds the graph of the call before


# ---- other dtypes, fused projections, another backend ------------------------------------------------


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("way", ["weights", "autocast"])
@every_model
def test_in_bfloat16(build, way):
    exact, model = (
        build(dtype=torch.float64),
        build(dtype=torch.bfloat16 if way == "weights" else torch.float32),
    )
    cast = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    with cast:
        stock = tiny.run(model)
        with apply(model.model, 3, backend="sdpa"):
            got = tiny.run(model)
    assert got.dtype == stock.dtype == torch.bfloat16
    assert distance(got, tiny.oracle(exact, 3)) < 2 * distance(stock, tiny.run(exact))


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("build", [tiny.flux, tiny.wan, tiny.wan_i2v], ids=lambda f: f.__name__)
def test_projections_may_be_fused_meanwhile(build):
    model = build()
    stock, want = tiny.run(model), tiny.oracle(model, 3)
    with apply(model.model, 3, backend="sdpa"):
        model.model.fuse_qkv_projections()
        assert distance(tiny.run(model), want) < 1e-6
    assert distance(tiny.run(model), stock) < 1e-6
    with apply(model.model, 3, backend="sdpa"):
        model.model.unfuse_qkv_projections()
        assert distance(tiny.run(model), want) < 1e-6


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("build", [tiny.flux, tiny.hunyuan, tiny.wan], ids=lambda f: f.__name__)
def test_dense_steps_take_the_attention_backend_that_was_set(build, when, monkeypatch):
    model, taken = build(), []
    want, module = tiny.oracle(model, 3), importlib.import_module(type(model.model).__module__)
    stock = module.dispatch_attention_fn

    def watch(*given, backend=None, **rest):
        taken.append(backend)
        return stock(*given, backend=backend, **rest)

    monkeypatch.setattr(module, "dispatch_attention_fn", watch)
    if when == "before":
        model.model.set_attention_backend("_native_math")
    with apply(model.model, 3, schedule=Schedule(dense_first=1), backend="sdpa"):
        if when == "meanwhile":
            model.model.set_attention_backend("_native_math")
        at(model, 1000)
        assert len(taken) >= model.attentions
        assert set(taken) == {"_native_math"}
        assert distance(tiny.run(model), want) < 1e-6


def test_image_adapters_that_were_loaded_meanwhile_do_not_stay():
    """load_ip_adapter puts modules where our processors are."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny.flux().model
    stock = model.attn_processors
    with apply(model, 3):
        model.set_attn_processor({name: FluxIPAdapterAttnProcessor(tiny.WIDTH, 24) for name in stock})
    assert all(model.attn_processors[name] is stock[name] for name in stock)


@pytest.mark.usefixtures("without_gradients")
def test_low_rank_adapters_may_be_loaded_meanwhile():
    peft = pytest.importorskip("peft", reason="adapters are those of peft")
    model, plain = tiny.wan(), tiny.wan()
    with apply(model.model, 3, backend="sdpa"):
        for one in (model, plain):
            torch.manual_seed(0)
            one.model.add_adapter(
                peft.LoraConfig(4, target_modules=["to_q", "to_v"], init_lora_weights=False)
            )
        assert distance(tiny.run(model), tiny.oracle(plain, 3)) < 1e-6

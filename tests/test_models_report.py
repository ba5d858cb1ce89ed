"""What ``report`` says of models before they run: sizes, layers, FLOPs, seconds, words."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from unittest import mock

import pytest
import tiny_models as tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gnaflex import GNA, GNAError, estimate, paper, plan
from gnaflex.models import Neighborhood, Schedule, apply, recipe
from gnaflex.models.forecast import PRODUCT_SHARE, SHARE_ERROR
from gnaflex.models.reporting import report
from gnaflex.timing import DEVICES

diffusers = pytest.importorskip("diffusers", reason="the stock models are those of diffusers")
pytest.importorskip("transformers", reason="the pipelines of diffusers import transformers")

FLUX, HUNYUAN = "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"
WAN, COSMOS = "WanTransformer3DModel", "CosmosTransformer3DModel"
WIDTH, TEXT = tiny.WIDTH, tiny.TEXT_DIM
ONE_LAYER = {
    FLUX: {"num_layers": 1, "num_single_layers": 0},
    WAN: {"num_layers": 1},
    COSMOS: {"num_layers": 1},
}
ONE_LAYER[HUNYUAN] = ONE_LAYER[FLUX]


def real(kind, **config):
    """A model of the released size, without weights."""
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


def pipeline(name, kind, **parts):
    model = real(kind, **ONE_LAYER[kind])
    if kind == COSMOS:
        parts["safety_checker"] = tiny.Unchecked()
    scheduler = diffusers.EDMEulerScheduler() if kind == COSMOS else tiny._flow()
    return tiny._pipeline(name, scheduler, transformer=model, **parts)


def only(found):
    (model,) = found.models
    return model


# ---- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, grid, text, steps, passes",
    [
        ("FluxPipeline", FLUX, (64, 64), 512, 28, 1),
        ("HunyuanVideoPipeline", HUNYUAN, (33, 45, 80), 256, 50, 1),
        ("WanPipeline", WAN, (21, 30, 52), 0, 50, 2),
        ("CosmosTextToWorldPipeline", COSMOS, (16, 44, 80), 0, 36, 2),
    ],
)
def test_a_pipeline_knows_its_default_size(name, kind, grid, text, steps, passes):
    found = report(pipeline(name, kind), window=16, stride=8, device="H200")
    assert (only(found).grid, only(found).text) == (grid, text)
    assert (found.steps, found.passes) == (steps, passes)
    assert {"height", "width", "text", "passes", "steps"} <= found.assumed.keys()
    for taken, value in found.assumed.items():
        assert f"{taken}={value}" in str(found)


def test_a_size_in_pixels_and_frames_becomes_a_grid():
    pipe = pipeline("HunyuanVideoPipeline", HUNYUAN)
    size = {"height": 320, "width": 512, "num_frames": 64, "text": 77, "steps": 9, "passes": 3}
    found = report(pipe, window=8, **size)
    assert only(found).grid == (16, 20, 32)  # 63 // 4 + 1, by 8 pixels and 2 latents
    assert only(found).text == 77
    assert (found.steps, found.passes, found.assumed) == (9, 3, {})
    assert "taken" not in str(found)
    assert report(pipe, window=8, height=320).assumed.keys() == {
        "width",
        "num_frames",
        "text",
        "passes",
        "steps",
    }


def test_text_of_a_bare_model_is_what_its_pipeline_would_take():
    assert only(report(real(FLUX, **ONE_LAYER[FLUX]), 8, grid=(16, 16))).text == 512
    found = report(real(HUNYUAN, **ONE_LAYER[HUNYUAN]), 8, grid=(8, 16, 16))
    assert (only(found).text, found.assumed) == (256, {"text": 256, "passes": 1})


def test_a_size_is_cut_to_whole_tokens():
    assert only(report(pipeline("FluxPipeline", FLUX), window=8, height=350, width=512)).grid == (21, 32)


def test_pipelines_of_images_and_of_chunks():
    class Images:
        vae_scale_factor_spatial, vae_scale_factor_temporal = 8, 4

        def __init__(self, model):
            self.components = {"transformer": model}

        def __call__(self, height=64, width=96, guidance_scale=7.0):
            raise AssertionError("nothing runs")

    class Chunks(Images):
        def __call__(
            self, height=64, width=None, num_frames=None, num_frames_per_chunk=13, guidance_scale=1.0
        ):
            raise AssertionError("nothing runs")

    model = tiny.cosmos().model
    found = report(Images(model), window=(1, 2, 2))
    assert only(found).grid == (1, 4, 6)
    assert only(found).layers[0].why == "an image, one frame"
    assert only(found).layers[0].plan is None
    assert (found.passes, found.steps) == (2, None)
    assert all(one.speedup == one.run_speedup == 1 for one in found.seconds)
    chunks = report(Chunks(model), window=(1, 2, 2), width=96)
    assert (only(chunks).grid, chunks.passes) == ((4, 4, 6), 1)
    with pytest.raises(GNAError, match=r"needs the size of what it runs on: got none, which is not what"):
        report(Chunks(model), window=(1, 2, 2))


# ---- layers ------------------------------------------------------------------------------------------


def test_layers_that_compute_the_same_are_one_group():
    small = Neighborhood((2, 8, 8), (2, 8, 8))
    schedule = Schedule(dense_first=3, dense_last=0.1, layers={1: None, -1: small}, steps=20)
    found = report(tiny.wan().model, (3, 3, 4), schedule=schedule, grid=(4, 16, 16))
    main, dense, last = only(found).layers
    assert [one.numbers for one in (main, dense, last)] == [(0, 2), (1,), (3,)]
    assert (main.plan.spec, last.plan.spec) == (
        GNA((4, 16, 16), (3, 3, 4)),
        GNA((4, 16, 16), (2, 8, 8), (2, 8, 8)),
    )
    assert (dense.plan, dense.why, dense.sparsity) == (None, "its schedule has it dense", 0)
    assert (found.steps, found.dense_steps) == (20, 5)
    assert main.plan == plan(main.plan.spec, kv_tiling="dynamic")
    assert last.plan.is_block_sparse
    assert not main.plan.is_block_sparse
    text = str(found)
    assert "  layers 0, 2: GNA(shape=(4, 16, 16), window=(3, 3, 4))\n" in text
    assert "  layer 1: dense: its schedule has it dense\n" in text
    assert "20 steps, of which 5 stay dense" in text


def test_sparsity_counts_text_which_sees_and_is_seen():
    found = report(tiny.flux().model, (4, 4), (4, 4), grid=(8, 8), text=16)
    (layers,) = only(found).layers
    allowed = 64 * 16 + 2 * 64 * 16 + 16 * 16  # 4x4 blocks, text both ways, text itself
    assert layers.sparsity == pytest.approx(1 - allowed / 80**2)
    (video,) = only(report(tiny.wan().model, (3, 4, 4), (3, 4, 4), grid=(3, 8, 8), text=16)).layers
    assert video.sparsity == pytest.approx(0.75)


def test_a_base_is_scaled_and_small_grids_stay_dense():
    small = report(tiny.wan().model, (2, 4, 4), base=(2, 8, 8), grid=(4, 16, 16))
    assert only(small).layers[0].plan.spec == GNA((4, 16, 16), (4, 8, 8), (2, 2, 2), (1, 2, 2))
    tight = report(tiny.wan().model, (2, 8, 8), grid=(2, 4, 8))
    assert only(tight).layers[0].why == "its window reaches over 8 tokens of axis 1, which has 4"
    assert "Whole run: every step is sparse." in str(small)


def test_where_apply_is_in_force_it_says_the_same():
    model = tiny.hunyuan().model
    want = report(model, (2, 3, 3), grid=tiny.VIDEO)
    with apply(model, (2, 3, 3)):
        assert report(model, (2, 3, 3), grid=tiny.VIDEO) == want


# ---- FLOPs -------------------------------------------------------------------------------------------


def test_flops_of_a_model_counted_by_hand():
    tokens, text, batch, layers, ffn, frequencies = 180, 7, 2, 4, 2 * WIDTH, 256
    found = report(tiny.wan().model, (3, 3, 3), grid=(3, 6, 10), text=text, batch=batch, passes=2)
    embedded = tokens * 16 * WIDTH + text * (TEXT * WIDTH + WIDTH**2)
    timed = frequencies * WIDTH + WIDTH**2 + WIDTH * 6 * WIDTH
    block = (
        4 * tokens * WIDTH**2  # query, key, value, output
        + 2 * tokens * WIDTH**2 + 2 * text * WIDTH**2 + 2 * tokens * text * WIDTH  # cross attention
        + 2 * tokens * WIDTH * ffn
    )  # fmt: skip
    assert only(found).other_flops == 2 * 2 * batch * (
        embedded + timed + layers * block + tokens * WIDTH * 16
    )
    assert only(found).attention_flops == 2 * batch * layers * 4 * WIDTH * tokens**2


@contextlib.contextmanager
def counted(model, tokens):
    """FLOPs of a real run but for attention among ``tokens``; yields a function that returns them."""
    cross = []

    def attend(query, key, value, *rest, **options):
        if not query.shape[1] == key.shape[1] == tokens:
            cross.append(4 * query.numel() * key.shape[1])
        return torch.zeros_like(query)

    with contextlib.ExitStack() as stack:
        for module in tiny._modules(model):
            stack.enter_context(mock.patch.object(module, "dispatch_attention_fn", attend))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others are not counted on a CPU
        counter = stack.enter_context(FlopCounterMode(display=False))
        yield lambda: counter.get_total_flops() + sum(cross)


def with_images(one, count):
    image = torch.randn(2, count, TEXT)
    return dataclasses.replace(one, given={**one.given, "encoder_hidden_states_image": image})


def control_net():
    one = tiny.cosmos_controlnet()
    given = {name: one.given[name] for name in ("latents", "padding_mask", "condition_mask", "fps")}
    given |= {"controls_latents": one.given["controls"], "timestep": torch.full((2,), 0.5)}
    given["encoder_hidden_states"] = (torch.randn(2, 7, TEXT), torch.randn(2, 256, TEXT))
    return dataclasses.replace(one, model=one.model.controlnet, given=given)


def between_frames():
    """Wan from a first to a last frame: two images per video."""
    images = {"image_dim": TEXT, "added_kv_proj_dim": WIDTH, "pos_embed_seq_len": 514}
    model = tiny._wan(0, torch.float32, in_channels=2 * tiny.LATENT, **images)
    given = {**tiny.wan_i2v().given, "encoder_hidden_states_image": torch.randn(4, 257, TEXT)}
    return dataclasses.replace(tiny.wan_i2v(), model=model, given=given)


def projected():
    """Cosmos with a projection of its text, as in 2.5."""
    channels = {"crossattn_proj_in_channels": 40, "encoder_hidden_states_channels": TEXT}
    model = tiny._cosmos(0, torch.float32, use_crossattn_projection=True, **channels)
    given = {**tiny.cosmos().given, "encoder_hidden_states": torch.randn(2, 7, 40)}
    return dataclasses.replace(tiny.cosmos(), model=model, given=given)


BUILDS = {
    "flux": tiny.flux,
    "hunyuan": tiny.hunyuan,
    "wan_i2v": lambda: with_images(tiny.wan_i2v(), 257),  # it has 512 of text whatever is said
    "wan_flf": between_frames,
    "cosmos": tiny.cosmos,
    "cosmos_projected": projected,
    "controlnet": control_net,
}


@pytest.mark.parametrize("name", BUILDS)
def test_flops_are_those_of_a_real_run(name):
    one = BUILDS[name]()
    tokens = math.prod(one.grid) + one.prefix + one.suffix
    with tiny.resizing(), counted(one.model, tokens) as flops:
        tiny.run(one)
        want = flops()
    found = report(one.model, 3, grid=one.grid, text=7, batch=2)
    assert only(found).other_flops == want


def test_the_attention_backend_of_diffusers_does_not_matter():
    from diffusers.models.attention_dispatch import attention_backend

    model = tiny.wan().model
    want = report(model, 3, grid=tiny.VIDEO)
    with attention_backend("flex"):
        assert report(model, 3, grid=tiny.VIDEO) == want


def test_a_padding_mask_is_a_channel():
    """torchvision, which may be missing and knows no meta device, is not asked."""
    tokens, channels = 48, 4
    plain, padded = (
        only(report(tiny._cosmos(0, torch.float32, concat_padding_mask=flag), 2, grid=(3, 4, 4))).other_flops
        for flag in (False, True)
    )
    assert padded - plain == 2 * tokens * WIDTH * channels  # a patch of 1x2x2
    assert plain > 0


# ---- seconds -----------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_time_model():
    found = report(real(WAN, num_layers=2), (12, 16, 16), grid=(24, 32, 48), device="H100", batch=2, passes=3)
    (one,) = found.seconds
    tokens = 24 * 32 * 48
    of = (40, 128, "bfloat16", "H100")
    dense = estimate(plan(GNA(tokens, tokens), (128,), (128,)), *of, batch=2).dense_seconds
    masked = estimate(plan(GNA((24, 32, 48), (12, 16, 16))), *of, batch=2, backend="flex").seconds
    assert one.device == "H100"
    assert (
        report(real(WAN, num_layers=2), 12, grid=(24, 32, 48), device=DEVICES["B200"]).seconds[0].device
        == "B200"
    )
    assert one.attention == pytest.approx(3 * 2 * dense)
    assert one.sparse_attention == pytest.approx(3 * 2 * masked)
    assert one.rest == pytest.approx(
        only(found).other_flops / (PRODUCT_SHARE * DEVICES["H100"].peak_tflops * 1e12)
    )
    assert one.dense == one.attention + one.rest
    assert one.sparse == one.sparse_attention + one.rest
    assert one.attention_share == one.attention / one.dense
    assert one.speedup == pytest.approx(one.run_speedup) == one.dense / one.sparse


def test_tiles_of_text_are_counted():
    found = report(real(FLUX, **ONE_LAYER[FLUX]), (32, 32), (32, 32), grid=(64, 64), text=500, device="B200")
    (layers,), (one,) = only(found).layers, found.seconds
    tiles = layers.plan
    assert tiles.is_block_sparse
    assert (tiles.query_tiles, tiles.touched_tiles) == (32, 32 * 8)
    bare = estimate(tiles, 24, 128, "bfloat16", "B200")
    text = 32 * 4 + 4 * (32 + 4)  # every row of tiles sees 4 of text, 4 rows of text see all
    assert one.sparse_attention == pytest.approx(bare.seconds + bare.kernel_seconds * text / 256)
    dense = estimate(plan(GNA(4596, 4596), (128,), (128,)), 24, 128, "bfloat16", "B200").dense_seconds
    assert one.attention == pytest.approx(dense)


def test_a_layer_that_stays_dense_takes_as_long():
    model = real(WAN, num_layers=2)
    given = {"grid": (24, 32, 48), "device": "H100"}
    both = report(model, (12, 16, 16), **given).seconds[0]
    half = report(model, (12, 16, 16), schedule=Schedule(layers={0: None}), **given).seconds[0]
    assert half.sparse_attention == pytest.approx((both.attention + both.sparse_attention) / 2)


def test_a_run_has_dense_steps_too():
    pipe = pipeline("WanPipeline", WAN)
    one = report(pipe, (12, 16, 16), schedule=Schedule(dense_first=0.3), steps=10).seconds[0]
    assert one.sparse_share == 0.7
    assert one.run_speedup == pytest.approx(10 * one.dense / (3 * one.dense + 7 * one.sparse))
    bare = report(
        real(WAN, num_layers=1), (12, 16, 16), schedule=Schedule(dense_first=0.3), grid=(21, 30, 52)
    )
    assert (bare.steps, bare.dense_steps, bare.seconds[0].run_speedup) == (None, None, None)
    assert "the number of steps is not known. Write steps=50." in str(bare)


def test_models_run_after_each_other_or_take_turns():
    one = report(pipeline("WanPipeline", WAN), 8, device="H100")
    pipe = pipeline("WanPipeline", WAN, transformer_2=real(WAN, num_layers=3), boundary_ratio=0.875)
    two = report(pipe, 8, device="H100")
    first, second = two.models
    assert [first.name, second.name] == ["transformer", "transformer_2"]
    assert first.seconds == one.seconds
    assert two.seconds[0].dense == pytest.approx((first.seconds[0].dense + second.seconds[0].dense) / 2)

    class Controlled:
        def __init__(self, **components):
            self.components = components

        def __call__(self):
            raise AssertionError("nothing runs")

    both = tiny.cosmos_controlnet().model
    found = report(Controlled(transformer=both.transformer, controlnet=both.controlnet), 3, grid=tiny.VIDEO)
    for total, *each in zip(found.seconds, *(model.seconds for model in found.models), strict=True):
        assert total.dense == pytest.approx(sum(part.dense for part in each))
        assert total.sparse_attention == pytest.approx(sum(part.sparse_attention for part in each))
    assert [len(model.layers[0].numbers) for model in found.models] == [4, 2]
    parts = {
        "transformer": both.transformer,
        "transformer_2": both.transformer,
        "controlnet": both.controlnet,
    }
    assert report(Controlled(**parts), 3, grid=tiny.VIDEO).seconds[0].dense == pytest.approx(
        found.seconds[0].dense
    )


# ---- against the paper -------------------------------------------------------------------------------

PUBLISHED = {
    "FLUX.1-dev 4K": (FLUX, {"guidance_embeds": True}, paper.FLUX),
    "Cosmos-7B": (COSMOS, {}, paper.COSMOS),
    "HunyuanVideo": (HUNYUAN, {}, paper.HUNYUAN),
}


@pytest.fixture(scope="module")
def predicted():
    """On B200, all three models with their own grids; windows of one token."""
    reports = {
        name: report(real(kind, **config), 1, grid=of.shape, device="B200")
        for name, (kind, config, of) in PUBLISHED.items()
    }
    return {name: found.seconds[0] for name, found in reports.items()}


def worst(predicted, scale=1.0):
    """The largest miss of the published shares, the rest ``scale`` times as long."""
    scaled = {name: dataclasses.replace(one, rest=one.rest * scale) for name, one in predicted.items()}
    return max(abs(one.attention_share - PUBLISHED[name][2].attention_share) for name, one in scaled.items())


def test_shares_of_attention_are_near_the_published(predicted):
    assert worst(predicted) <= SHARE_ERROR
    assert worst(predicted, 1.05) > worst(predicted)  # so it is the best constant
    assert worst(predicted, 0.95) > worst(predicted)
    for name, one in predicted.items():
        row = next(line for line in report.__doc__.splitlines() if line.strip().startswith(name))
        published, here = row.split()[-2:]
        assert float(published) == PUBLISHED[name][2].attention_share
        assert float(here) == pytest.approx(one.attention_share, abs=5e-4)


# ---- words -------------------------------------------------------------------------------------------


GOLDEN = """\
Estimates, before anything ran: no kernel of gnaflex has been timed yet.
Not given, so taken: passes=1.

HunyuanVideoTransformer3DModel: grid 4x16x16, 1,024 tokens and 128 of text, 3 heads of 16
  a dense step: 0.00102 TFLOP of self-attention, 0.000279 of the rest
  layers 0, 2-3: GNA(shape=(4, 16, 16), window=(4, 8, 8), stride=(4, 8, 8))
    sparsity 59.3%; query tiles 2x8x8, key tiles 2x8x8, work speed-up 4.00
    perfectly block-sparse: a CUTLASS kernel may run it
  layer 1: GNA(shape=(4, 16, 16), window=(3, 5, 5))
    sparsity 73.2%; query tiles 4x4x8, key tiles 4x3x10, work speed-up 3.20
    not block-sparse: FlexAttention runs it, with a mask

device  dense step  attention  sparse step  speed-up  whole run
H100     0.0412 ms        97%    0.0425 ms      0.97       0.98
B200     0.0404 ms        99%    0.0445 ms      0.91       0.93

Whole run: 8 steps, of which 2 stay dense by the schedule.
Attention's share may be off by 0.13, as for models whose share is published."""


def test_words_for_people():
    schedule = Schedule(dense_first=2, layers={1: Neighborhood((3, 5, 5))}, steps=8)
    given = {"grid": (4, 16, 16), "text": 128, "device": ["H100", DEVICES["B200"]]}
    text = str(report(tiny.hunyuan().model, (4, 8, 8), (4, 8, 8), schedule=schedule, **given))
    assert text == GOLDEN


def test_json_for_programs():
    found = report(tiny.wan().model, (3, 6, 4), 2, grid=(3, 6, 8), schedule=Schedule(layers={1: None}))
    fields = json.loads(json.dumps(found.as_dict()))
    (model,) = fields["models"]
    sparse, dense = model["layers"]
    assert sparse["numbers"] == [0, 2, 3]
    assert sparse["plan"]["window"] == [3, 6, 4]
    assert sparse["plan"]["work_speedup"] == only(found).layers[0].plan.work_speedup
    assert dense["why"] == "its schedule has it dense"
    assert model["other_flops"] == only(found).other_flops
    assert [one["device"] for one in fields["seconds"]] == ["H100", "H200", "B200"]
    assert fields["seconds"][0]["run_speedup"] == found.seconds[0].run_speedup
    assert model["seconds"][2]["attention_share"] == only(found).seconds[2].attention_share
    assert fields["dense_steps"] == 0


# ---- refused -----------------------------------------------------------------------------------------


def odd_processor():
    model = tiny.wan().model
    model.blocks[2].attn1.processor = torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    "build, given, words",
    [
        (tiny.wan, {"grid": (3, 6, 8)}, "needs a window: got none"),
        (tiny.wan, {"window": 3}, r"got none, which only a pipeline can translate.*\n.*grid=\(33, 45, 80\)"),
        (tiny.wan, {"window": 3, "height": 96, "width": 64}, "got height, width, which only a pipeline"),
        (tiny.wan, {"window": 3, "grid": (6, 8)}, r"must have 3 axes.*got grid=\(6, 8\)"),
        (tiny.wan, {"window": 3, "grid": 6}, r"must have 3 axes.*got grid=6"),
        (tiny.flux, {"window": 3, "grid": (1, 6, 8)}, r"must have 2 axes.*\n.*grid=\(45, 80\)"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 8), "width": 64}, "stand alone: got width too"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 0)}, "grid must be an integer of at least 1: got grid=0"),
        (tiny.wan, {"window": (3, 3), "grid": (3, 6, 8)}, "window must have one entry per axis"),
        (tiny.wan, {"window": 3, "stride": 4, "grid": (3, 6, 8)}, "stride must not exceed window"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 8), "device": "TPU"}, "device must be one whose rates"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 8), "dtype": "float32"}, "dtype must be one whose rates"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 8), "batch": 0}, "batch must be an integer"),
        (tiny.wan, {"window": 3, "grid": (3, 6, 8), "passes": 0}, "passes must be an integer"),
        (
            tiny.wan,
            {"window": 3, "grid": (3, 6, 8), "steps": 9, "schedule": Schedule(steps=8)},
            "said twice: got steps=9, the schedule has 8",
        ),
        (
            tiny.wan,
            {"window": 3, "grid": (3, 6, 8), "schedule": Schedule(layers={4: None})},
            "must name layers of the model: got 4",
        ),
        (tiny.cosmos, {"window": 3, "grid": (3, 6, 130)}, "does not run on a grid of 3x6x130: "),
        (tiny.ltx_decoder, {}, "knows no LTX2VideoDiffusionDecoderModel"),
        (tiny.ltx_decoder, {"window": 3}, "knows no LTX2VideoDiffusionDecoderModel"),
    ],
)
def test_refused(build, given, words):
    with pytest.raises(GNAError, match=words):
        report(build().model, **given)


def test_refused_targets():
    with pytest.raises(GNAError, match="no model in it is one that gnaflex knows: got str"):
        report("a model", 3)
    with pytest.raises(
        GNAError, match=r"blocks\.2\.attn1 has a processor that gnaflex does not know: Identity"
    ):
        report(odd_processor(), 3, grid=(3, 6, 8))
    dense = report(odd_processor(), 3, grid=(3, 6, 8), schedule=Schedule(layers={2: None}))
    assert only(dense).layers[1].numbers == (2,)
    with pytest.raises(GNAError, match="got num_frames, which is not what it takes"):
        report(pipeline("FluxPipeline", FLUX), 3, num_frames=9)


def test_a_recipe_is_taken_whole():
    found = report(pipeline("HunyuanVideoPipeline", HUNYUAN), recipe("hunyuanvideo-91"), grid=(30, 48, 80))
    assert (found.steps, found.dense_steps) == (50, 15)
    assert only(found).layers[0].plan.work_speedup == pytest.approx(100 / 9)

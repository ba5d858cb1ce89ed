"""What the trial of a kernel covers, counted."""

from __future__ import annotations

import math

import pytest
import torch
from gnaflex.cuda_backend.config import KernelConfig
from gnaflex.cuda_backend.fast_path import Problem
from gnaflex.cuda_backend.tile_walk import Q_ROWS, chosen, launches, tile_counts

from gnaflex.planner import Plan
from gnaflex.spec import GNA
from gnaflex.trial import cases

BOXES = (
    ((2, 8, 8), (2, 8, 8)),
    ((8, 16), (8, 16)),
    ((2, 4, 16), (1, 8, 16)),
    ((128,), (128,)),
    ((8,), (48,)),
)
CONFIGS = [
    KernelConfig("sm_90a", "bfloat16", dim, *boxes, text)
    for boxes in BOXES
    for dim in (64, 128)
    for text in (False, True)
]


def tiles_of_blocks(config, case):
    """Per launch and block: the key tiles of its items, one after another."""
    plan = Plan(case.spec, config.q_box, config.kv_box, "dynamic", math.prod(config.q_box))
    for number, launch in enumerate(launches(plan)):
        line = sum(-(-n // config.kv_rows) for n in case.texts)
        boxes = [int(n) + line for n in tile_counts(launch.work[:, 2], config.kv_box).prod(1)]
        items = boxes * math.prod(launch.groups) * case.heads * case.batch
        if number == 0:
            whole = -(-case.spec.num_tokens // config.kv_rows) + line
            count = sum(-(-n // Q_ROWS) for n in case.texts[:2]) * case.heads * case.batch
            items = [whole] * count + items
        blocks = min(case.blocks or 132, len(items))
        yield from (items[block::blocks] for block in range(blocks))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.name)
def test_items_start_at_every_stage_and_phase(config):
    starts = set()
    for case in cases(config):
        for mine in tiles_of_blocks(config, case):
            at = 0
            for tiles in mine:
                starts.add((at % config.stages, at // config.stages % 2))
                at += tiles
    assert starts == {(stage, phase) for stage in range(config.stages) for phase in range(2)}


@pytest.mark.parametrize("config", [one for one in CONFIGS if one.text], ids=lambda one: one.name)
def test_some_blocks_have_a_text_query_more_than_others_and_boxes_after(config):
    found = 0
    for case in cases(config):
        queries = sum(-(-n // Q_ROWS) for n in case.texts[:2]) * case.heads * case.batch
        if case.blocks and queries % case.blocks and queries > case.blocks:
            found += 1
    assert found


def test_a_trial_is_small_for_every_boxes_that_problems_take():
    """Tokens of the largest case: boxes that lie along different axes make it large."""
    seen = set()
    for shape in (
        (30, 48, 80),
        (33, 45, 80),
        (16, 44, 80),
        (30, 80, 30),
        (24, 24, 96),
        (12, 100, 60),
        (256, 256),
    ):
        for window in ((8, 8, 30), (18, 24, 24), (12, 6, 48), (80, 80)):
            if len(window) != len(shape) or any(w > n for w, n in zip(window, shape, strict=True)):
                continue
            for stride in ((8, 4, 8), (16, 8, 8), (1, 8, 16), (12, 6, 4), (16, 16), (4, 64)):
                if len(stride) == len(shape) and all(s <= w for s, w in zip(stride, window, strict=True)):
                    plan = chosen(GNA(shape, window, stride))
                    if plan is not None:
                        seen.add(Problem(plan.spec).config("sm_90a", torch.bfloat16, 128))
    assert len(seen) > 10
    sizes = {config.name: max(case.spec.num_tokens for case in cases(config)) for config in seen}
    assert max(sizes.values()) < 60_000, max(sizes.items(), key=lambda one: one[1])

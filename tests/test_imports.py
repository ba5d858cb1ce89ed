"""The import law, and what a fresh process loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gnaflex

ROOT = Path(__file__).parent.parent / "gnaflex"
# what each module may import from gnaflex at its top level
LAW = {
    "spec": set(),
    "window": {"spec"},
    "tiles": {"spec", "window"},
    "layout": {"spec", "window", "tiles"},
    "order": {"spec", "window", "layout"},
    "blocks": {"window"},
    "row_blocks": {"spec", "window", "tiles", "layout", "order", "blocks"},
    "tile_blocks": {"spec", "window", "tiles", "order", "blocks"},
    "reorder": {"spec", "order"},
    "tables": {"window", "order"},
    "packed": {"window", "layout", "order", "tables"},
    "forms": {"spec", "window", "layout", "order", "tables", "packed"},
    "cuts": {"spec", "order", "reorder", "blocks", "tables"},
    "mask": {"spec", "layout", "order", "reorder", "tables", "forms", "cuts"},
    "flex": {
        *("spec", "blocks", "row_blocks", "tile_blocks", "layout", "order"),
        *("reorder", "tables", "cuts", "mask"),
    },
    "origin": {"spec", "reorder", "mask"},
    "derive": {"spec", "tiles", "layout", "order", "tables", "forms", "cuts", "mask", "origin", "flex"},
    "bias": {"spec", "window", "layout", "order", "reorder", "tables", "cuts", "mask", "origin", "flex"},
    "advice": {"spec", "tiles", "layout", "order", "blocks", "mask", "flex"},
    "reference": {"spec"},
    "gather_tiles": {"window", "tiles", "layout", "order", "reorder"},
    "gather": {"spec", "order", "tables", "mask", "gather_tiles"},
    "gather_cost": {"gather", "flex", "mask"},
    "compiled": set(),
    "lanes": set(),
    "flash": {
        *("spec", "tiles", "planner", "layout", "order", "forms", "mask", "flex", "advice", "compiled"),
        "cuts",
    },
    "dispatch": {
        "flash",
        "gather_cost",
        "lanes",
        "spec",
        "order",
        "tables",
        "cuts",
        "mask",
        "flex",
        "compiled",
        "gather",
        "reference",
    },
    "operators": {"spec", "cuts", "mask", "origin", "flex"},
    "checks": {"spec", "order", "mask", "dispatch"},
    "nn": {"spec", "bias", "dispatch", "door"},
    "planner": {"spec", "window", "tiles"},
    "paper": {"spec", "planner", "timing"},
    "words": {"spec"},
    "plan_verbs": {"spec", "tiles", "planner", "searching", "words"},
    "kernel_verbs": {"spec", "plan_verbs", "words"},
    "doctor": {
        *("cuda_backend", "spec", "origin", "flex", "reference", "dispatch", "door", "trial"),
    },
    "roofline": set(),
    "timing": {"spec", "planner", "roofline"},
    "drawn": {"spec", "window", "tiles", "planner", "searching"},
    "figures": {"spec", "window", "planner", "searching", "drawn"},
    "drawing": {"spec", "tiles", "planner", "searching", "drawn"},
    "axis_tables": {"spec", "window", "tiles", "planner"},
    "nearby": {"spec", "window", "tiles", "planner", "axis_tables"},
    "fewest": {"spec", "window", "axis_tables"},
    "searching": {"spec", "window", "tiles", "planner", "axis_tables", "fewest"},
    "reasons": {"spec", "planner", "axis_tables", "nearby"},
    "trial": {"spec", "tiles", "mask", "planner"},
    "routes": {
        *("spec", "layout", "order", "reorder", "cuts", "mask", "flex", "advice", "flash", "dispatch"),
    },
    "door": {
        *("spec", "mask", "origin", "advice", "flash", "dispatch", "checks", "lanes", "routes"),
    },
}
# the same for gnaflex/models; nothing outside imports from it
MODELS_LAW = {
    "recipes": {"spec", "paper"},
    "steps": set(),
    "tokens": {"spec", "layout", "reorder", "checks", "dispatch", "routes", "operators", "door"},
    "processors": {"spec", "checks", "models.tokens"},
    "families": {"spec", "order", "reorder"},
    "waiting": {"models.families"},
    "attached": {
        "models.waiting",
        *("spec", "layout", "order", "reorder", "advice"),
        *("models.recipes", "models.steps", "models.tokens", "models.processors", "models.families"),
    },
    "decoder": {"spec", "door", "models.recipes"},
    "applied": {
        *("spec", "dispatch", "models.attached", "models.decoder", "models.families", "models.recipes"),
        "models.steps",
    },
    "cosmos_original": {"spec", "door", "models.recipes"},
    "calls": {"spec", "plan_verbs", "models.families", "models.recipes"},
    "forecast": {
        *("spec", "planner", "timing", "models.attached", "models.calls", "models.families"),
        *("models.processors", "models.recipes"),
    },
    "reporting": {
        *("spec", "planner", "plan_verbs", "timing", "models.calls", "models.families"),
        *("models.forecast", "models.recipes"),
    },
}
NO_TORCH = {"spec", "window", "tiles", "layout", "order", "blocks", "row_blocks", "tile_blocks"}
NO_TORCH |= {"planner", "paper", "plan_verbs", "kernel_verbs", "timing", "drawn", "figures", "drawing"}
NO_TORCH |= {"roofline", "axis_tables", "nearby", "fewest", "searching", "reasons"}


def top_level_imports(path: Path) -> set[str]:
    out = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "gnaflex"
                else [node.module]
            )
            out.update(names)
        elif isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
    return out


@pytest.mark.parametrize("module", sorted(LAW))
def test_import_law(module):
    found = top_level_imports(ROOT / f"{module}.py")
    ours = {name.split(".")[1] for name in found if name.startswith("gnaflex.")}
    assert ours <= LAW[module], f"{module} may not import {ours - LAW[module]}"
    if module in NO_TORCH:
        assert not any(name.split(".")[0] == "torch" for name in found)


@pytest.mark.parametrize("module", sorted(MODELS_LAW))
def test_import_law_of_models(module):
    found = top_level_imports(ROOT / "models" / f"{module}.py")
    ours = {name.removeprefix("gnaflex.") for name in found if name.startswith("gnaflex.")}
    assert ours <= MODELS_LAW[module], f"{module} may not import {ours - MODELS_LAW[module]}"
    assert not any(name.split(".")[0] in ("diffusers", "transformers") for name in found)


def test_the_law_knows_every_module():
    commands = {"__init__", "__main__", "cli", "demo", "pictures"}
    assert {path.stem for path in ROOT.glob("*.py")} - commands == set(LAW)
    assert {path.stem for path in (ROOT / "models").glob("*.py")} - {"__init__"} == set(MODELS_LAW)


def fresh(code: str) -> list[str]:
    """What a fresh process has loaded after ``code``."""
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# torch's own FlexAttention loads sympy from torch 2.15 on.
TORCH = "import torch.nn.attention.flex_attention\n"


def test_import_loads_nothing_heavy():
    loaded = set(fresh("import gnaflex")) - set(fresh(TORCH))
    assert not loaded & {"sympy", "cutlass", "triton", "matplotlib", "diffusers", "rich", "torch._inductor"}


def test_sympy_waits_until_a_window_is_needed():
    problem = "import gnaflex\ngnaflex.GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))"
    assert "sympy" not in set(fresh(problem)) - set(fresh(TORCH))
    assert "sympy" in fresh("import gnaflex\ngnaflex.block_mask((8, 8), 3, device='cpu')")


def test_models_wait_until_they_are_needed():
    assert not {"gnaflex.models", "gnaflex.nn"} & set(fresh("import gnaflex"))
    used = fresh("import gnaflex\ngnaflex.models.apply, gnaflex.nn.NeighborhoodAttention")
    assert {"gnaflex.models", "gnaflex.nn"} <= set(used)
    assert not {"diffusers", "transformers"} & set(used)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gnaflex.nothing  # noqa: B018


def test_public_names():
    assert gnaflex.__all__ == sorted(gnaflex.__all__)
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert not modules & set(gnaflex.__all__)
    for name in gnaflex.__all__:
        assert getattr(gnaflex, name).__doc__, name

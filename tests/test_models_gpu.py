"""Stock models on a GPU: by the kernels where their problem qualifies, by FlexAttention where not."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from benchmarks.models import MODELS, built, drawn
from benchmarks.problems import SETS
from gnaflex import models

pytestmark = pytest.mark.gpu
NARROW = [name for name in MODELS if "default" not in name]


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda", 0)


@pytest.mark.parametrize("permute", ["auto", "layer"])
@pytest.mark.parametrize("name", NARROW)
def test_sparse_equals_masked(name, permute, device):
    """The output in bfloat16 is off by at most twice what the stock model in bfloat16 is under the mask."""
    pytest.importorskip("diffusers", reason="pip install 'gnaflex[diffusers]'")
    exact, rounded = (_tiny(name, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    spec = SETS["small"][MODELS[name].problem].spec
    form = spec.window, spec.stride
    with torch.no_grad():
        wanted = tiny_models.oracle(exact, *form).double()
        budget = 2 * (tiny_models.oracle(rounded, *form) - wanted).abs().max()
        with models.apply(rounded.model, *form, permute=permute):
            for _ in range(2):  # from the second call on tokens may be permuted once
                found = tiny_models.run(rounded)
    assert (found - wanted).abs().max() <= budget


def _tiny(name: str, device: torch.device, dtype: torch.dtype) -> tiny_models.Tiny:
    chosen, problem = MODELS[name], SETS["small"][MODELS[name].problem]
    model, text = built(chosen, device, dtype, narrow=True), chosen.text[1]
    given = chosen.inputs(model, problem.spec.shape, text, drawn(device, dtype))
    layers = model.config.num_layers + getattr(model.config, "num_single_layers", 0)
    return tiny_models.Tiny(
        *(name, model.requires_grad_(False), given, problem.spec.shape),
        prefix=text if "Flux" in chosen.cls else 0,
        suffix=text if "Hunyuan" in chosen.cls else 0,
        attentions=layers,
    )

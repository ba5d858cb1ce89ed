"""The configurations of Hassani et al. (arXiv 2504.16922, tables 1-6) with the B200 figures printed there.

HunyuanVideo's tiles are printed; FLUX's come from NATTEN's documentation; Cosmos's are inferred (they
reproduce every printed row). Where nothing is printed the figures are None.
"""

from __future__ import annotations

from typing import NamedTuple

from gnaflex.planner import Plan, plan
from gnaflex.spec import GNA
from gnaflex.timing import end_to_end, estimate, sparse_share


class Model(NamedTuple):
    """A model of the paper: its grid, its tiles, the share of its time that is attention, its steps."""

    name: str
    shape: tuple[int, ...]
    heads: int
    head_dim: int
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    attention_share: float
    steps: int
    dense_steps: int

    @property
    def sparse_share(self) -> float:
        """The share of the steps that is sparse when the first ones stay dense."""
        return sparse_share(self.steps, self.dense_steps)


class EndToEnd(NamedTuple):
    """Printed speed-ups of whole models: by FLOPs, by the simulator, measured on B200."""

    flop: float
    simulated: float
    measured: float


class Configuration(NamedTuple):
    """A row of the paper: window, stride, and what it prints with every step sparse and with dense ones."""

    model: Model
    window: tuple[int, ...]
    stride: tuple[int, ...]
    all_steps: EndToEnd | None = None
    with_dense_steps: EndToEnd | None = None

    @property
    def plan(self) -> Plan:
        """The row under the paper's tiles, static key tiles as in its simulator."""
        spec = GNA(self.model.shape, self.window, self.stride)
        return plan(spec, self.model.q_tile, self.model.kv_tile)

    def simulated(self, share: float = 1.0) -> float:
        """The whole model's speed-up as the paper's simulator has it, by the busiest query tile; ``share`` of
        the steps sparse."""
        return end_to_end(self.plan.tile_speedup_worst, self.model.attention_share, share)

    def estimated(self, share: float = 1.0) -> float:
        """That on B200 with NATTEN's kernel by :func:`gnaflex.estimate`, tokens permuted once per model."""
        model = self.model
        call = estimate(
            *(self.plan, model.heads, model.head_dim, "float16", "B200"), backend="natten", permute=False
        )
        return end_to_end(call.speedup, model.attention_share, share)


FLUX = Model("FLUX.1-dev 4K", (256, 256), 24, 128, (16, 16), (16, 8), 0.518, 28, 9)
COSMOS = Model("Cosmos-7B", (16, 44, 80), 32, 128, (8, 4, 8), (4, 4, 8), 0.587, 35, 12)
HUNYUAN = Model("HunyuanVideo", (30, 48, 80), 24, 128, (4, 8, 8), (2, 8, 8), 0.607, 50, 15)


def _row(
    model: Model,
    window: tuple[int, ...],
    stride: tuple[int, ...],
    all_steps: tuple[float, float, float] | None = None,
    with_dense: tuple[float, float, float] | None = None,
) -> Configuration:
    return Configuration(
        model, window, stride, all_steps and EndToEnd(*all_steps), with_dense and EndToEnd(*with_dense)
    )


CONFIGURATIONS = (
    _row(FLUX, (80, 80), (1, 1), (1.88, 1.76, 1.65), (1.46, 1.42, 1.37)),
    _row(FLUX, (80, 80), (16, 1), (1.88, 1.84, 1.72), (1.46, 1.45, 1.40)),
    _row(FLUX, (80, 80), (16, 16), (1.88, 1.88, 1.82), (1.46, 1.46, 1.45)),
    _row(COSMOS, (16, 32, 48), (1, 1, 1)),
    _row(COSMOS, (16, 32, 48), (1, 8, 1)),
    _row(COSMOS, (16, 32, 48), (1, 1, 16)),
    _row(COSMOS, (16, 32, 48), (1, 8, 16)),
    _row(COSMOS, (16, 24, 16), (1, 1, 1)),
    _row(COSMOS, (16, 24, 16), (1, 8, 1)),
    _row(COSMOS, (16, 24, 16), (1, 1, 16)),
    _row(COSMOS, (16, 24, 16), (1, 8, 16)),
    _row(HUNYUAN, (30, 40, 40), (1, 1, 1)),
    _row(HUNYUAN, (30, 40, 40), (1, 1, 8)),
    _row(HUNYUAN, (30, 40, 40), (1, 32, 8)),
    _row(HUNYUAN, (18, 24, 24), (1, 1, 1), (2.23, 1.73, 1.73), (1.63, 1.42, 1.42)),
    _row(HUNYUAN, (18, 24, 24), (2, 1, 1), (2.23, 1.78, 1.77), (1.63, 1.44, 1.44)),
    _row(HUNYUAN, (18, 24, 24), (1, 1, 8), (2.23, 1.99, 1.95), (1.63, 1.53, 1.51)),
    _row(HUNYUAN, (18, 24, 24), (2, 1, 8), (2.23, 2.02, 1.98), (1.63, 1.55, 1.54)),
    _row(HUNYUAN, (18, 24, 24), (1, 8, 8), (2.23, 2.17, 2.09), (1.63, 1.61, 1.58)),
    _row(HUNYUAN, (18, 24, 24), (2, 8, 8), (2.23, 2.20, 2.11), (1.63, 1.62, 1.59)),
    _row(HUNYUAN, (18, 24, 24), (16, 8, 8), (2.23, 2.23, 2.23), (1.63, 1.63, 1.63)),
    _row(HUNYUAN, (18, 24, 24), (18, 24, 24), (2.23, 2.06, 2.00)),
)

"""``gnaflex demo``: a photograph denoised by neighborhood attention, and one video head timed.

Both check rows of every output against float64 before they time anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from gnaflex.door import explain, flex_attention
from gnaflex.flex import block_mask
from gnaflex.mask import resolve_device
from gnaflex.origin import permute, unpermute
from gnaflex.pictures import PATCH, count_blocks, denoising, non_local_means, photograph
from gnaflex.reference import allowed_keys
from gnaflex.spec import GNA, GNAError

T = TypeVar("T")
Inputs = tuple[Tensor, Tensor, Tensor]
Extents = int | tuple[int, ...]

PHOTO_TILE = (8, 16)
STRIDED = ((24, 48), (8, 16))  # window and stride; with PHOTO_TILE every visited block is full
VIDEO_TILE = (2, 8, 8)
BANDWIDTH = 0.75  # in standard deviations of the noise; the best of 0.35 to 0.9 on this photograph
ROUNDS, ENOUGH_SECONDS = 5, 15.0
TOLERATED = 16  # times the error of the same dtype done plainly: orders of summation differ


class Run(NamedTuple):
    """One problem, run once. The output is row-major; the seconds of the mask are (first, median)."""

    spec: GNA
    mask: BlockMask
    attend: Callable[[], Tensor]
    output: Tensor
    backend: str
    mask_seconds: tuple[float, float]
    first_seconds: float
    error: float


class Dense(NamedTuple):
    """Attention over all keys for ``length`` queries from ``start`` on."""

    attend: Callable[[], Tensor]
    start: int
    length: int


class Race(NamedTuple):
    """Median seconds of runs, and of dense attention for all queries; and the output of the latter."""

    runs: list[Run]
    seconds: list[float]
    dense: Dense
    dense_seconds: float
    dense_output: Tensor

    def fractions_of_ideal(self) -> list[float]:
        """Per run, dense time times the share of visited blocks, over the measured time."""
        shares = [blocks.visited / blocks.total for blocks in (count_blocks(run.mask) for run in self.runs)]
        return [self.dense_seconds * share / s for share, s in zip(shares, self.seconds, strict=True)]


def run_once(spec: GNA, tile: tuple[int, ...] | None, inputs: Inputs, scale: float, console: Console) -> Run:
    """Compile the mask, run attention on row-major inputs [1, 1, tokens, head_dim], and check rows."""
    device, name = inputs[0].device, f"GNA {title(spec)}"

    def compiled() -> BlockMask:
        return block_mask(spec, q_tile=tile, device=device)

    def attend() -> Tensor:
        q, k, v = (permute(x, bm) for x in inputs)
        return unpermute(flex_attention(q, k, v, block_mask=bm, scale=scale), bm)

    bm, first = timed(compiled, device)
    again = statistics.median(timed(compiled, device)[1] for _ in range(ROUNDS))
    q, k, v = (permute(x, bm) for x in inputs)
    backend = str(explain(q, k, v, bm).backend)
    with stage(f"{name}: first call, backend {backend}", console):
        output, seconds = timed(attend, device)
    with stage(f"{name}: some rows against float64", console):
        error = largest_error(spec, inputs, output, scale)
    return Run(spec, bm, attend, output, backend, (first, again), seconds, error)


def largest_error(spec: GNA, inputs: Inputs, output: Tensor, scale: float) -> float:
    """The largest error of nine rows against float64; refuses one that rounding does not explain."""
    errors = []
    last = spec.num_tokens - 1
    picked = torch.randint(0, last + 1, (6,), generator=torch.Generator().manual_seed(1)).tolist()
    for row in (0, last // 2, last, *picked):
        keys = torch.tensor(sorted(allowed_keys(spec, row)), device=output.device)
        q, k, v = inputs[0][0, 0, row], inputs[1][0, 0, keys], inputs[2][0, 0, keys]
        exact = _row(q.cpu().double(), k.cpu().double(), v.cpu().double(), scale)
        both = torch.stack([output[0, 0, row], _row(q, k, v, scale)]).cpu().double()
        errors.append((both - exact).abs().amax(1))
    error, plain = torch.stack(errors).amax(0).tolist()
    if not error <= TOLERATED * plain + 1e-7:
        raise RuntimeError(f"rows differ from float64 by {error:.1e}; done plainly by only {plain:.1e}")
    return float(error)


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(k @ q * scale, 0) @ v


def dense(inputs: Inputs, scale: float, most_seconds: float) -> Dense:
    """SDPA over all keys for as many middle queries as fit the time."""
    query, key, value = inputs
    tokens = query.shape[2]

    def some(count: int) -> Dense:
        start = (tokens - count) // 2
        q = query.narrow(2, start, count)
        return Dense(partial(scaled_dot_product_attention, q, key, value, scale=scale), start, count)

    few = some(min(512, tokens))
    few.attend()
    seconds = timed(few.attend, query.device)[1]
    return some(min(tokens, max(few.length, int(few.length * most_seconds / seconds))))


def race(runs: list[Run], plain: Dense, console: Console) -> Race:
    """Time every run and dense attention by turns."""
    calls = [*(run.attend for run in runs), plain.attend]
    rounds: list[list[tuple[Tensor, float]]] = []
    start = time.perf_counter()
    # The CPU kernel keeps the interpreter: the spinner and Ctrl-C wait until a call returns.
    with stage("timing, by turns with dense attention", console):
        while len(rounds) < ROUNDS and time.perf_counter() - start < ENOUGH_SECONDS:
            rounds.append([timed(call, runs[0].output.device) for call in calls])
    *seconds, part = (statistics.median(s for _, s in column) for column in zip(*rounds, strict=True))
    part *= runs[0].spec.num_tokens / plain.length
    return Race(runs, seconds, plain, part, rounds[-1][-1][0])


def timed(function: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a function returns, and the seconds it took on the device."""
    _synchronize(device)
    start = time.perf_counter()
    out = function()
    _synchronize(device)
    return out, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def stage(text: str, console: Console) -> Iterator[None]:
    """A spinner while something runs, a line with its time after it."""
    start = time.perf_counter()
    with console.status(text):
        yield
    console.print(f"[green]✓[/] {text} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)


def title(spec: GNA) -> str:
    """Window and stride in a few words."""
    window, stride = ("x".join(map(str, extents)) for extents in (spec.window, spec.stride))
    return f"{window}, stride {1 if set(spec.stride) == {1} else stride}"


def report(name: str, race: Race, console: Console, ratios: list[float]) -> None:
    """Print the timings: a column per problem, and one for dense attention."""
    runs = race.runs
    table = Table("", *(f"GNA {title(run.spec)}" for run in runs), "dense", title=name, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    blocks = [count_blocks(run.mask) for run in runs]
    rows = {
        "backend": [*(run.backend for run in runs), "SDPA"],
        "mask, first": [_time(run.mask_seconds[0]) for run in runs],
        "mask, median": [_time(run.mask_seconds[1]) for run in runs],
        "attention, first": [_time(run.first_seconds) for run in runs],
        "attention, median": [_time(seconds) for seconds in (*race.seconds, race.dense_seconds)],
        "speed-up": [f"{race.dense_seconds / seconds:.1f}x" for seconds in race.seconds],
        "visited blocks": [f"{b.visited:,}" for b in blocks] + [f"{blocks[0].total:,}"],
        "full blocks": [f"{b.full:,}" for b in blocks],
        "sparsity": [f"{100 * (1 - b.visited / b.total):.1f} %" for b in blocks],
        "of the ideal": [f"{fraction:.0%}" for fraction in race.fractions_of_ideal()],
        "largest error": [f"{run.error:.0e}" for run in runs],
    } | ({"PSNR": [f"{ratio:.2f} dB" for ratio in ratios]} if ratios else {})
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    some, tokens = race.dense.length, runs[0].spec.num_tokens
    on = "all queries" if some == tokens else f"{some:,} of {tokens:,} queries, then scaled up"
    console.print(f"Dense attention was timed on {on}.\nThe ideal is dense time x visited / all blocks.")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _device(name: str | None) -> torch.device:
    try:
        device = resolve_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GNAError(f"there is no device {name!r} here. Write --device cpu.") from error
    return device


# ---- the photograph ----------------------------------------------------------------------------------


def photo(
    out: Path = Path("demo-out"),
    *,
    size: Extents = (256, 208),
    noise: float = 0.1,
    window: Extents = 21,
    stride: Extents = 1,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """Denoise a photograph with GNA as non-local means, print the timings and draw the result.

    Args:
        out: the folder of the picture ``demo.png``; made if it is missing.
        size: pixels, height and width.
        noise: standard deviation of the noise that is added, by ``seed``; white is 1.
        window, stride: the problem. A perfectly block-sparse one is run beside it, and dense attention.
        device: None is the current accelerator, or the CPU.

    Returns:
        PSNR in dB: of "noisy", of the two problems by title, of "dense" (where it was run).
    """
    if not isinstance(size, tuple) or len(size) != 2 or min(size) < 48 or not noise > 0:
        raise GNAError(f"the demo needs 48x48 pixels or more, and noise: got size={size}, noise={noise}.")
    console, on = Console(), _device(device)
    asked, strided = (GNA(size, *problem) for problem in ((window, stride), STRIDED))
    specs = [asked, strided if asked != strided else GNA(size, 21)]
    out.mkdir(parents=True, exist_ok=True)
    clean = photograph(*size)
    noisy = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    inputs = non_local_means(noisy.to(on), BANDWIDTH * noise)
    runs = [run_once(spec, PHOTO_TILE, inputs, 1.0, console) for spec in specs]
    times = race(runs, dense(inputs, 1.0, most_seconds=0.8 * ENOUGH_SECONDS), console)
    outputs = {title(run.spec): (0, run.output) for run in runs}
    outputs["dense"] = (times.dense.start, times.dense_output)
    path, masks = out / "demo.png", {title(run.spec): run.mask for run in runs}
    ratios = denoising(path, clean, noisy, outputs, masks)
    name = f"{size[0]}x{size[1]} pixels, patches {PATCH}x{PATCH}x3, head_dim {inputs[0].shape[-1]}, {on}"
    report(name, times, console, list(ratios.values())[1:])
    console.print(f"The noisy picture has {ratios['noisy']:.2f} dB. All pictures: {path}", soft_wrap=True)
    return ratios


# ---- the video ---------------------------------------------------------------------------------------


def video(
    shape: Extents = (30, 48, 80),
    *,
    window: Extents = (18, 24, 24),
    stride: Extents = (16, 8, 8),
    head_dim: int = 128,
    dtype: str = "float32",
    tile_major: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> float:
    """Time one attention head of a video against dense attention, on random inputs, and print a table.

    Args:
        shape, window, stride: the problem.
        head_dim, dtype, seed, device: of the inputs; the dtype by its name in torch.
        tile_major: order the tokens by tiles of 2x8x8; permuting is then part of the time.

    Returns:
        The fraction of the ideal, :meth:`Race.fractions_of_ideal`.
    """
    spec = GNA(shape, window, stride)
    if tile_major and spec.rank != len(VIDEO_TILE):
        raise GNAError(f"tiles of 2x8x8 need three axes: got shape={spec.shape}. Leave --tile-major out.")
    console, on, generator = Console(), _device(device), torch.Generator().manual_seed(seed)
    size, scale = (1, 1, spec.num_tokens, head_dim), head_dim**-0.5
    q, k, v = (torch.randn(size, generator=generator).to(on, getattr(torch, dtype)) for _ in range(3))
    if on.type == "cpu":
        console.print("[dim]Ctrl-C waits for the kernel that runs: seconds on a CPU.[/]")
    run = run_once(spec, VIDEO_TILE if tile_major else None, (q, k, v), scale, console)
    times = race([run], dense((q, k, v), scale, most_seconds=2.0), console)
    order = "tile-major 2x8x8 (permuting is timed too)" if tile_major else "row-major"
    name = f"{spec.num_tokens:,} tokens {order}, head_dim {head_dim}, {dtype}, {on}"
    report(name, times, console, [])
    return times.fractions_of_ideal()[0]

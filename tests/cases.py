"""Problems that several test files share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from hypothesis import strategies as st

from gnaflex.spec import GNA

# The problems of the test-suite of NATTEN 0.21.7 (parameters only): shape, window, stride, dilation.
_NATTEN_TABLE = """
17        12        1        1
32        32        1        1
64        3         1        1
64        8         1        1
67        8         1        1
69        12        1        1
125       3         1        1
128       8         1        1
128       61        33       1
256       3         2        10
256       128       1        1
256       128       128      1
256       136       136      1
256       150       1        1
512       8         1        1
2048      2048      1        1
32768     63        1        8
32768     2048      1        1
32768     2048      256      1
5x25      5x16      1x16     1x1
5x25      5x16      4x16     1x1
16x16     3x3       1x1      1x1
16x16     3x3       2x2      1x1
16x16     15x15     1x1      1x1
16x16     16x16     1x1      1x1
16x16     16x16     4x5      1x1
16x16     16x16     4x8      1x1
17x16     3x8       1x2      1x1
28x40     17x31     1x1      1x1
32x64     25x31     10x20    1x2
33x33     24x16     1x1      1x1
36x40     36x40     12x13    1x1
44x80     9x10      1x1      1x1
44x80     24x24     1x1      1x1
44x80     32x32     22x16    1x1
48x17     24x16     1x1      2x1
48x48     24x24     1x1      1x2
56x56     17x4      2x1      1x2
64x64     32x32     1x1      2x2
64x128    21x29     10x12    3x4
64x128    55x101    1x1      1x1
67x80     12x7      8x4      5x11
84x19     7x3       1x1      1x1
84x69     7x20      1x6      1x1
84x69     7x68      1x1      1x1
84x69     7x68      1x1      5x1
128x128   4x4       1x1      1x1
128x128   4x4       1x1      2x2
128x128   8x8       1x1      1x1
128x128   19x24     2x3      2x2
5x45x73   2x7x32    1x4x32   2x2x2
8x4x8     7x3x7     1x1x1    1x1x1
8x8x4     3x4x3     1x1x1    1x1x1
8x8x12    5x8x11    2x3x4    1x1x1
8x8x16    3x3x3     2x1x2    2x2x4
13x11x9   3x4x3     1x1x1    3x2x2
13x11x9   3x4x3     2x3x3    3x2x2
14x8x8    7x5x5     2x1x3    2x1x1
16x16x16  3x3x3     1x1x1    1x1x1
16x16x16  14x14x14  1x1x1    1x1x1
16x16x16  15x15x15  1x1x1    1x1x1
16x16x16  16x16x16  1x1x1    1x1x1
16x16x16  16x16x16  2x4x5    1x1x1
16x16x16  16x16x16  8x4x8    1x1x1
16x44x80  8x9x10    1x1x1    1x1x1
16x44x80  12x32x32  8x22x16  1x1x1
16x44x80  16x44x80  1x1x1    1x1x1
24x28x40  11x17x31  1x1x1    1x1x1
24x36x40  24x36x40  1x1x1    1x1x1
24x44x80  24x12x24  1x4x8    1x1x1
30x32x32  10x32x32  1x1x1    1x1x1
30x44x80  18x24x24  1x1x1    1x1x1
30x48x80  18x24x24  16x8x8   1x1x1
32x10x10  7x3x3     5x1x1    1x2x3
32x64x64  16x16x16  1x1x2    1x1x1
32x64x64  16x16x16  2x1x1    1x1x1
48x64x64  7x15x11   1x2x2    5x3x2
57x20x88  19x4x6    13x1x6   2x2x7
57x20x88  20x4x6    1x1x1    2x1x1
57x20x88  20x8x16   1x1x1    2x1x1
61x32x32  10x32x32  1x1x1    2x1x1
68x64x8   14x32x2   3x4x1    1x2x3
"""


def _parse(row: str) -> GNA:
    shape, window, stride, dilation = (tuple(map(int, field.split("x"))) for field in row.split())
    return GNA(shape, window, stride, dilation)


NATTEN_CASES: tuple[GNA, ...] = tuple(map(_parse, _NATTEN_TABLE.strip().splitlines()))


def with_causal(spec: GNA, is_causal: tuple[bool, ...]) -> GNA:
    return GNA(spec.shape, spec.window, spec.stride, spec.dilation, is_causal)


def causal_variants(spec: GNA) -> list[GNA]:
    """The problem with every combination of causal flags."""
    return [with_causal(spec, flags) for flags in itertools.product((False, True), repeat=spec.rank)]


def all_1d(max_length: int) -> Iterator[GNA]:
    """Every valid problem of one axis of at most ``max_length`` tokens."""
    for length in range(1, max_length + 1):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                for dilation in range(1, length // window + 1):
                    for is_causal in (False, True):
                        yield GNA(length, window, stride, dilation, is_causal)


def random_spec(rng: random.Random, rank: int, max_tokens: int) -> GNA:
    """A valid problem of ``rank`` axes and at most ``max_tokens`` tokens; every feature turns up often."""
    shape, room = [1] * rank, max_tokens
    order = rng.sample(range(rank), rank)
    for left, axis in zip(range(rank, 0, -1), order, strict=True):
        if rng.random() > 0.1:
            most = min(room, max(round(2 * room ** (1 / left)), 1))
            shape[axis] = rng.randint(1, most)
        room //= shape[axis]
    axes = [_random_axis(rng, length) for length in shape]
    window, stride, dilation, is_causal = zip(*axes, strict=True)
    return GNA(tuple(shape), window, stride, dilation, is_causal)


def _random_axis(rng: random.Random, length: int) -> tuple[int, int, int, bool]:
    dilation = rng.choice([1, rng.randint(1, min(length, 4)), rng.randint(1, max(length // 2, 1))])
    longest = length // dilation
    window = rng.choice([longest, 1, *(rng.randint(min(2, longest), longest) for _ in range(6))])
    stride = rng.choice([window, 1, *(rng.randint(1, window) for _ in range(3))])
    return window, stride, dilation, rng.random() < 0.4


@st.composite
def specs(draw: st.DrawFn, max_rank: int = 4, max_tokens: int = 256) -> GNA:
    """Valid problems; they shrink towards one axis, few tokens, window 1."""
    room, columns = max_tokens, []
    for left in range(draw(st.integers(1, max_rank)), 0, -1):
        length = draw(st.integers(1, min(room, max(round(2 * room ** (1 / left)), 1))))
        dilation = draw(st.integers(1, min(length, 4)) | st.integers(1, length))
        window = draw(st.integers(1, length // dilation))
        columns.append((length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
        room //= length
    return GNA(*zip(*columns, strict=True))

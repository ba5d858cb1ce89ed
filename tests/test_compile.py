"""The kernels compiled, not run: what stands in the machine code of every variant.

Needs CuTe DSL (pip install 'gnaflex[cuda]') and NVIDIA's disassembler, no GPU.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from gnaflex.cuda_backend.compile import compiled
from gnaflex.cuda_backend.config import HEAD_DIMS, SHARED_MEMORY, KernelConfig, obstacles
from gnaflex.cuda_backend.tile_walk import KV_ROWS
from sass import Sass, counted, registers

from gnaflex import roofline
from gnaflex.spec import GNAError

VIDEO = ((2, 8, 8), (2, 8, 8))


def variants(arch):
    return [
        KernelConfig(arch, dtype, head_dim, q_box, kv_box, text)
        for dtype in ("bfloat16", "float16")
        for head_dim in (64, 128)
        for q_box, kv_box in (VIDEO, ((8, 16), (8, 16)), ((128,), (128,)))
        for text in (False, True)
    ] + [
        KernelConfig(arch, "bfloat16", 128, (1, 5, 24), (3, 4, 8)),
        KernelConfig(arch, "bfloat16", 128, (3, 5, 8), (3, 2, 8)),
        KernelConfig(arch, "bfloat16", 128, (3, 5, 8), (3, 2, 8), True),
        KernelConfig(arch, "bfloat16", 64, (8,), (16,)),
    ]


ULTRA = [
    KernelConfig("sm_103a", dtype, 128, *VIDEO, text)
    for dtype in ("bfloat16", "float16")
    for text in (False, True)
]


# ---- Hopper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", variants("sm_90a"), ids=str)
def test_hopper(config, tmp_path):
    sass = Sass(config, tmp_path)
    # tokens come by boxes of the grid's rank, one per 64 channels: Q, K and V once each in the code; text
    # comes by lines of the sequence
    pieces = config.head_dim // 64
    loads = Counter(re.findall(r"UTMALDG\.(\d)D", sass.text))
    assert loads == Counter({str(config.rank + 2): 3 * pieces}) + Counter({"3": 3 * pieces * config.text})
    # Q K^T for the first tile and in the loop, P V in the loop and behind it
    assert sass.count("HGMMA") == 2 * config.head_dim // 16 + 2 * config.kv_rows // 16
    # one wait each: else ptxas has serialised the matrix instructions
    assert sass.count(r"WARPGROUP\.DEPBAR") == 4
    assert sass.count(r"\b(?:LDL|STL)\b") == 0
    assert re.search(r"REG:168 STACK:0 .*LOCAL:0", sass.used)
    roles = sass.roles()
    assert {given: registers(code) <= given for given, code in roles.items()} == {24: True, 240: True}


@pytest.mark.parametrize("text", [False, True])
def test_overlap_on_hopper(text, tmp_path):
    sass = Sass(KernelConfig("sm_90a", "bfloat16", 128, *VIDEO, text), tmp_path)
    # the loop: S of the next tile and P V issued, wait for S, exponentials while P V runs, wait for P V
    order = re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2", sass.text)
    loop = order.index("DEPBAR.LE gsb0, 0x1")
    assert order[loop - 16 : loop] == ["HGMMA"] * 16
    assert order[loop + 1 : loop + 2 + 128 // 2 + 2] == ["MUFU.EX2"] * 66 + ["DEPBAR.LE gsb0, 0x0"]


# ---- Blackwell ---------------------------------------------------------------------------------------

DEGREE = {"bfloat16": 3, "float16": 4}  # of the polynomial that every fourth pair of weights takes


@pytest.mark.parametrize("config", [*variants("sm_100a"), *ULTRA], ids=str)
def test_blackwell(config, tmp_path):
    sass = Sass(config, tmp_path)
    from gnaflex.cuda_backend.sm100_attend import REGISTERS

    transfers(sass, config)
    resources(sass, config, REGISTERS)
    roles = sass.roles()
    products(roles[REGISTERS["others"]], config)
    weights(roles[REGISTERS["weigh"]], config)
    instructions = sass.shortest_round(r"LDTM\.x")
    assert 8 * instructions / 4 <= roofline.clocks(2, config.kv_rows, config.head_dim).issue  # of 8 warps


def transfers(sass, config):
    """Boxes of Q for either half, of K and of V; output of either half: grid, or text before or behind it."""
    pieces, rank = config.head_dim // 64, str(config.rank + 2)
    loads = Counter(re.findall(r"UTMALDG\.(\d)D", sass.text))
    assert loads == Counter({rank: 4 * pieces}) + Counter({"3": 4 * pieces * config.text})
    stores = Counter(re.findall(r"UTMASTG\.(\d)D", sass.text))
    assert stores == Counter({rank: 2 * pieces}) + Counter({"3": 4 * pieces * config.text})


def resources(sass, config, given):
    """Registers of a block at 512 threads, and what each role has. No spills but where rows of text are no
    power of two and uniform registers do not suffice: there the address of shared memory, one word, is kept
    on the stack; softmax reads it once, before its loop."""
    roles, is_uneven = sass.roles(), config.text and config.kv_rows & (config.kv_rows - 1)
    assert re.search(rf"REG:128 STACK:{8 if is_uneven else 0} .*LOCAL:0", sass.used)
    assert sass.count(r"\bSTL\b") == bool(is_uneven)
    assert counted(roles[given["weigh"]], r"\bLDL\b") == bool(is_uneven)
    assert is_uneven or not sass.count(r"\bLDL\b")
    assert set(roles) == set(given.values())
    assert all(registers(code) <= most for most, code in roles.items())
    assert 128 * (2 * given["weigh"] + given["correct"] + given["others"]) <= 65_536  # of a multiprocessor


def products(code, config):
    """Both of either half, in the loop, and Q K^T once before it."""
    assert counted(code, "UTCHMMA") == 2 * (2 * config.head_dim // 16 + config.kv_rows // 16)
    assert counted(code, "UTCHMMA tmem") == 2 * config.kv_rows // 16
    # S of either half, K and Q before the loop; S and O of either half, V, K and Q in it; O of absent halves
    assert counted(code, "UTCBAR") == (2 + 2) + (2 * 2 + 3) + 2


def weights(code, config):
    """Scores read, weighed and written, once in the code: the numbers of the roofline in NOTES.md."""
    rows, chunk = config.kv_rows, 32 if config.kv_rows % 32 == 0 else 16
    fourth = rows // 8 if config.arch == "sm_100a" else 0  # pairs of weights that are polynomials
    assert counted(code, rf"LDTM\.x{chunk}\b") == counted(code, rf"STTM\.x{chunk // 2}\b") == rows // chunk
    assert counted(code, r"MUFU\.EX2") == rows - 2 * fourth + 1
    assert counted(code, r"FMNMX3") == rows // 2
    assert counted(code, r"FFMA2") == rows // 2 + fourth * DEGREE[config.dtype]
    assert counted(code, r"FADD2") == rows // 2 + 3 + fourth * 3
    assert counted(code, r"F2FP") == rows // 2
    # what the output changes by is said before the exponentials, all but a few
    order = [one for one in code if re.search(r"MUFU\.EX2|SYNCS\.ARRIVE|STTM", one)]
    kinds = [re.search(r"EX2|ARRIVE|STTM", one)[0] for one in order]
    assert kinds.index("ARRIVE") <= 8
    last = len(kinds) - 1 - kinds[::-1].index("STTM")
    assert kinds[last + 1] == "ARRIVE"
    assert kinds.count("ARRIVE") == 3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tensor_memory_holds_scores_and_outputs(head_dim):
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    from gnaflex.cuda_backend.sm100_attend import COLUMNS, O_AT, S_AT

    taken = [*((at, KV_ROWS) for at in S_AT), *((at, head_dim) for at in O_AT), (COLUMNS, 0)]
    assert all(at + wide <= then for (at, wide), (then, _) in itertools.pairwise(taken))
    assert COLUMNS <= 512  # of a multiprocessor


@pytest.mark.parametrize("config", [*variants("sm_90a"), *variants("sm_100a")], ids=str)
def test_shared_memory_fits(config):
    row = 2 * config.head_dim
    assert config.stages >= 2
    if config.arch == "sm_90a":
        assert 1024 + (2 * 128 + 2 * config.stages * config.kv_rows) * row <= SHARED_MEMORY
    else:  # two boxes of queries, one of output, a ring of keys and values
        assert config.stages >= 4
        assert 3072 + (3 * 128 + config.stages * config.kv_rows) * row <= SHARED_MEMORY


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"arch": "sm_80"}, "architecture must be sm_90a or sm_100a or sm_103a: got sm_80"),
        ({"dtype": "float32"}, "dtype must be bfloat16 or float16"),
        ({"head_dim": 96}, "head_dim must be 64 or 128: got 96"),
        ({"q_box": (3, 5, 7)}, "a query box must hold a multiple of 8 tokens, at most 128"),
        ({"q_box": (4, 8, 8)}, "a query box must hold"),
        ({"kv_box": (1, 1, 8)}, "a key box must hold a multiple of 16 tokens"),
        ({"kv_box": (8, 16)}, "1 to 3 axes"),
        ({"q_box": (1, 1, 2, 8), "kv_box": (1, 1, 2, 8)}, "1 to 3 axes"),
    ],
)
def test_illegal_variants(change, reason):
    config = KernelConfig(
        **(
            {"arch": "sm_90a", "dtype": "bfloat16", "head_dim": 128, "q_box": VIDEO[0], "kv_box": VIDEO[1]}
            | change
        )
    )
    assert any(reason in one for one in obstacles(config))
    with pytest.raises(GNAError, match="no kernel can be compiled"):
        compiled(config)

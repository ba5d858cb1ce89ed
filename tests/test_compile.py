"""The kernels compiled, not run: what stands in the machine code of every variant.

Needs CuTe DSL (pip install 'gnaflex[cuda]') and NVIDIA's disassembler, no GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from gnaflex.cuda_backend.compile import compiled, machine_code
from gnaflex.cuda_backend.config import SHARED_MEMORY, KernelConfig, obstacles

from gnaflex.spec import GNAError

VIDEO = ((2, 8, 8), (2, 8, 8))
VARIANTS = [
    KernelConfig("sm_90a", dtype, head_dim, q_box, kv_box, text)
    for dtype in ("bfloat16", "float16")
    for head_dim in (64, 128)
    for q_box, kv_box in (VIDEO, ((8, 16), (8, 16)), ((128,), (128,)))
    for text in (False, True)
] + [
    KernelConfig("sm_90a", "bfloat16", 128, (1, 5, 24), (3, 4, 8)),
    KernelConfig("sm_90a", "bfloat16", 128, (3, 5, 8), (3, 2, 8)),
    KernelConfig("sm_90a", "bfloat16", 64, (8,), (16,)),
]


def tool(name):
    nvidia = pytest.importorskip("nvidia", reason=f"needs {name}: pip install nvidia-cuda-{name}")
    found = [path for root in nvidia.__path__ for path in Path(root).glob(f"*/bin/{name}")]
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
    return found[0]


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_machine_code(config, tmp_path):
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    disassembler, facts = tool("nvdisasm"), tool("cuobjdump")
    code = tmp_path / "kernel.cubin"
    code.write_bytes(machine_code(config))
    sass = output(disassembler, "-c", code)
    used = output(facts, "-res-usage", code)

    # tokens come by boxes of the grid's rank, one per 64 channels: Q, K and V once each in the code; text
    # comes by lines of the sequence
    halves = config.head_dim // 64
    loads = Counter(re.findall(r"UTMALDG\.(\d)D", sass))
    assert loads == Counter({str(config.rank + 2): 3 * halves}) + Counter({"3": 3 * halves * config.text})
    # Q K^T for the first tile and in the loop, P V in the loop and behind it
    assert len(re.findall("HGMMA", sass)) == 2 * config.head_dim // 16 + 2 * config.kv_rows // 16
    # one wait each: else ptxas has serialised the matrix instructions
    assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) == 4
    assert not re.findall(r"\b(?:LDL|STL)\b", sass)
    assert re.search(r"REG:168 STACK:0 .*LOCAL:0", used)


def registers(sass):
    """The highest register behind every change of a warp group's share: producer, then consumers."""
    parts = re.split(r"USETMAXREG\.(\w+)", sass)
    return {
        kind: max(int(number) for number in re.findall(r"\bR(\d+)\b", part))
        for kind, part in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("text", [False, True])
def test_registers_and_overlap(text, tmp_path):
    pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
    code = tmp_path / "kernel.cubin"
    code.write_bytes(machine_code(KernelConfig("sm_90a", "bfloat16", 128, *VIDEO, text)))
    sass = output(tool("nvdisasm"), "-c", code)
    used = registers(sass)
    assert used["DEALLOC"] < 24
    assert used["TRY_ALLOC"] < 240
    # the loop: S of the next tile and P V issued, wait for S, exponentials while P V runs, wait for P V
    order = re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2", sass)
    loop = order.index("DEPBAR.LE gsb0, 0x1")
    assert order[loop - 16 : loop] == ["HGMMA"] * 16
    assert order[loop + 1 : loop + 2 + 128 // 2 + 2] == ["MUFU.EX2"] * 66 + ["DEPBAR.LE gsb0, 0x0"]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_shared_memory_fits(config):
    row = 2 * config.head_dim
    assert config.stages >= 2
    assert 1024 + (2 * 128 + 2 * config.stages * config.kv_rows) * row <= SHARED_MEMORY


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"arch": "sm_80"}, "architecture must be sm_90a: got sm_80"),
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

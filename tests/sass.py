"""Facts of a kernel's machine code: what NVIDIA's disassembler prints, and which code a role can reach."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from gnaflex.cuda_backend.compile import machine_code


def tool(name):
    nvidia = pytest.importorskip("nvidia", reason=f"needs {name}: pip install nvidia-cuda-{name}")
    found = [path for root in nvidia.__path__ for path in Path(root).glob(f"*/bin/{name}")]
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
    return found[0]


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Sass:
    """The machine code of a variant: ``text``, its instructions in order, and ``used``, its resources."""

    def __init__(self, config, folder):
        pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
        disassembler, facts = tool("nvdisasm"), tool("cuobjdump")
        code = folder / "kernel.cubin"
        code.write_bytes(machine_code(config))
        self.text, self.used = output(disassembler, "-c", code), output(facts, "-res-usage", code)
        self.code, self.labels = [], {}
        for line in self.text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+|\$[\w$]+):", line):
                self.labels[label[1]] = len(self.code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
                self.code.append(instruction[1])

    def count(self, pattern):
        return sum(len(re.findall(pattern, one)) for one in self.code)

    def roles(self):
        """Per change of a warp group's registers: how many it gets, and the code that is reached from there
        up to the barrier at the end."""
        changes = [i for i, one in enumerate(self.code) if "USETMAXREG" in one]
        out = {}
        for at in changes:
            seen, todo = set(), [at + 1]
            while todo:
                i = todo.pop()
                if i not in seen and i not in changes and "BAR.SYNC" not in self.code[i]:
                    seen.add(i)
                    todo += self.after(i)
            given = int(re.search(r"0x([0-9a-f]+)", self.code[at])[1], 16)
            out[given] = [self.code[i] for i in sorted(seen)]
        return out

    def shortest_round(self, pattern):
        """How many instructions it takes from the first that matches back to it, at least."""
        start = next(i for i, one in enumerate(self.code) if re.search(pattern, one))
        reached, steps = {start}, 0
        while start not in (reached := {j for i in reached for j in self.after(i)}):
            steps += 1
        return steps + 1

    def after(self, i):
        """Where execution may go on behind an instruction."""
        one = self.code[i]
        target = re.search(r"(?:BRA|CALL).*`\((\.L_x_\d+|\$[\w$]+)\)", one)
        jumps = re.match(r"(BRA|EXIT|RET)\b(?!\.)", one)
        there = [self.labels[target[1]]] if target else []
        return there + ([] if jumps or i + 1 == len(self.code) else [i + 1])


def registers(code):
    """The highest one that is named, and one more."""
    return 1 + max(int(number) for one in code for number in re.findall(r"\bR(\d+)\b", one))


def counted(code, pattern):
    return sum(len(re.findall(pattern, one)) for one in code)

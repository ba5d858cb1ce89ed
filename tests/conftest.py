"""One thread per test process: pytest runs two of them, and threads that wait for each other spin."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
# For `benchmarks`, which a plain pytest does not find; behind an installed gnaflex, which is what is tested
sys.path.append(str(Path(__file__).parent.parent))

"""One thread per test process: pytest runs two of them, and threads that wait for each other spin."""

import torch

torch.set_num_threads(1)

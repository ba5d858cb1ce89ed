"""A machine that looks as if it had a Hopper GPU: kernels are those of stand_in.py, tensors lie on the CPU."""

from __future__ import annotations

import pytest
from gnaflex.cuda_backend import gate, machine
from stand_in import StandIn


@pytest.fixture
def hopper(monkeypatch):
    """The kernels that were opened, by (config, device)."""
    opened = {}

    def open_one(config, device):
        opened[config, device] = StandIn(config)
        return ""

    monkeypatch.setattr(machine, "obstacle", lambda device: "")
    monkeypatch.setattr(machine, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(machine, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(machine, "stream", lambda device: 0)
    monkeypatch.setattr(gate, "_launchers", opened)
    monkeypatch.setattr(gate, "_opened", open_one)
    return opened

"""Machines that look as if they had a GPU: stand_in.py gives the kernels, tensors lie on the CPU."""

from __future__ import annotations

import contextlib

import pytest
from gnaflex.cuda_backend import fast_path, gate, machine
from stand_in import StandIn

from gnaflex import door, lanes, operators


@pytest.fixture
def hopper(monkeypatch):
    """The kernels that were opened, by (config, device)."""
    yield from looks_like(monkeypatch, "sm_90a")


@pytest.fixture
def blackwell(monkeypatch):
    """Likewise."""
    yield from looks_like(monkeypatch, "sm_100a")


def looks_like(monkeypatch, arch):
    """The machine of a fixture."""
    opened = {}

    def open_one(config, device):
        opened[config, device] = StandIn(config)
        return ""

    def forget():  # what holds kernels that ran
        door._problem.cache_clear()
        lanes._of_owner.clear()
        operators._mask.cache_clear()

    monkeypatch.setattr(machine, "obstacle", lambda device: "")
    monkeypatch.setattr(machine, "architecture", lambda device: arch)
    monkeypatch.setattr(machine, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(machine, "stream", lambda device: 0)
    monkeypatch.setattr(machine, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(fast_path, "_prepared", {})  # by device, which is another one here
    monkeypatch.setattr(gate, "_launchers", opened)
    monkeypatch.setattr(gate, "_opened", open_one)
    forget()
    yield opened
    forget()

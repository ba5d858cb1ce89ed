"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import gnaflex

MODULES = ["gnaflex", *(f"gnaflex.{module.name}" for module in pkgutil.iter_modules(gnaflex.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_public_functions_have_examples():
    public = [getattr(gnaflex, name) for name in gnaflex.__all__]
    functions = [one for one in public if inspect.isfunction(one)]
    without = [one.__name__ for one in functions if ">>>" not in (one.__doc__ or "")]
    assert without == []

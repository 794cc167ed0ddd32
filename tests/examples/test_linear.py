"""The examples of linear attentions agree with the definition beside them."""

from __future__ import annotations

import importlib

import pytest

NAMES = ("mamba2", "mamba2_one_group", "retention", "simple_gla")


@pytest.mark.parametrize("name", NAMES)
def test_small(name: str) -> None:
    assert importlib.import_module(f"examples.linear.{name}").main(["--small"]) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_written(name: str) -> None:
    assert importlib.import_module(f"examples.linear.{name}").main([]) < 1e-2

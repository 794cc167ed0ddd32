"""A layer of native sparse attention learns, and decodes as it was trained."""

from __future__ import annotations

import pytest

from examples.native_sparse_attention import main


@pytest.mark.slow
def test_it_learns_to_look_up() -> None:
    numbers = main([])
    assert numbers["last"] < 0.5 * numbers["first"] and numbers["apart"] < 1e-5


@pytest.mark.slow
def test_small() -> None:
    assert main(["--small"])["apart"] < 1e-5

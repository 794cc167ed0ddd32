"""A gate learns from pooled weights, and its blocks are the ones that matter."""

from __future__ import annotations

import pytest

from examples.gate_distillation import main


def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = main(["--small"])
    printed = capsys.readouterr().out
    assert "KL divergence" in printed and "relative error of the output" in printed
    assert numbers["last loss"] < 0.5 * numbers["first loss"]
    assert numbers["visited"] < 0.75
    assert numbers["error"] < 0.5 * numbers["error by chance"]

"""An indexer learns from dense attention on real text, and finds more of it than before and than the latest tokens."""

from __future__ import annotations

import pytest

from examples.indexer_training import main


def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--small"])
    assert "KL, chosen tokens" in capsys.readouterr().out
    before, after = found["before"], found["sparse stage"]
    assert found["warm-up"]["KL"] < 0.7 * before["KL"]
    assert after["recall, indexer"] > before["recall, indexer"] + 0.1
    assert after["attention, indexer"] > max(before["attention, indexer"], after["attention, latest tokens"])
    assert after["error of the output"] < before["error of the output"]

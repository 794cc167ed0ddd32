"""The example of block patterns runs."""

from __future__ import annotations

import pytest

from examples.block_patterns import main


def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--small"])
    assert capsys.readouterr().out.count("output (2, 512, 4, 128)") == 2

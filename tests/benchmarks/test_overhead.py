"""The benchmark of small calls runs, and its contenders compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    specification = importlib.util.spec_from_file_location("benchmark_overhead", PATH)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["benchmark_overhead"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("direction", ["forward", "forward, recorded", "forward+backward"])
@pytest.mark.parametrize("name", ["plain", "causal", "alibi", "learned bias"])
def test_contenders_agree(overhead, name: str, direction: str):
    runs = overhead.runs_of(name, direction)
    torch.testing.assert_close(runs["ours"](), runs["sdpa"](), atol=2e-5, rtol=1e-4)


def test_kernels_are_a_part_of_the_call(overhead, tmp_path: Path):
    path = tmp_path / "result.json"
    options = ["--only", "causal forward$", "--rounds", "2", "--no-first-call", "--output", str(path)]
    assert overhead.main(options) == 0
    ((case, found),) = json.loads(path.read_text())["microseconds"].items()
    assert case == "causal forward"
    assert 0 < found["kernel"] and found["ratio"] > 0

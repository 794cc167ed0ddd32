"""`python -m attn_engine`, and the stages that ATTN_ENGINE_DUMP writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.__main__ import main
from attn_engine.library.catalogue import ATTENTIONS, MASKS

OWN = """
import torch
from attn_engine import AttentionEngine, meta_tensor

mine = AttentionEngine(
    [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3,
    score_mod=lambda score, b, h, q_idx, kv_idx: torch.tanh(score),
)
other = 3
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "list")
    assert all(name in text for name in (*ATTENTIONS, *MASKS))
    assert "triton" in text


@pytest.mark.parametrize("name", [*ATTENTIONS, *MASKS])
def test_show_every_attention(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "multiply_add" in run(capsys, "show", name)
    assert "@triton.jit" in run(
        capsys, "show", name, "--backend", "triton", "--kernel", "backward", "--dtype", "bfloat16"
    )


def test_show_with_a_mask_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(
        capsys, "show", "soft_cap", "--mask", "dilated_window", "--set", "dilation=3", "--set", "cap=20.0"
    )
    assert "dilation" in text and "tanh" in text
    with pytest.raises(SystemExit, match="write --set window=512"):
        main(["show", "sliding_window", "--set", "window"])
    assert main(["show", "sliding_window", "--set", "widow=3"]) == 1


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "explain", "sliding_window", "--dim", "128")
    for word in ("window", "kv tiles visited", "head dimensions 128", "lse"):
        assert word in text


def test_an_engine_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    text = run(capsys, "show", f"{path}:mine", "--backend", "triton")
    assert "tanh" in text
    with pytest.raises(SystemExit, match="no AttentionEngine named 'other'"):
        main(["show", f"{path}:other"])


def test_unknown_attention() -> None:
    with pytest.raises(SystemExit, match="SlidingWindow"):
        main(["show", "nothing_like_it"])


def test_stages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_ENGINE_DUMP", str(tmp_path))
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)
    engine(*torch.randn(3, 1, 9, 2, 16).unbind(0))
    (folder,) = tmp_path.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "00_program.txt", "10_explanation.txt", "40_tile_backward.txt", "40_tile_delta.txt", "40_tile_forward.txt",
        "50_source_backward.cpp", "50_source_delta.cpp", "50_source_forward.cpp",
    ]  # fmt: skip
    assert "kv_idx <= q_idx" in (folder / "00_program.txt").read_text()

"""The checks of selections and of attention over chosen tokens: in small, and kernels compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from attn_engine.gpu_check import chosen, selection
from attn_engine.gpu_check.checks import Failed, Place
from attn_engine.gpu_check.jobs import Comparison

INTERPRETER = Place("triton-interpreter", "cpu", small=True)
SMALL = [
    *selection.checks("triton-interpreter", "cpu", True),
    *chosen.checks("triton-interpreter", "cpu", True),
]


@pytest.mark.slow
@pytest.mark.parametrize("check", SMALL, ids=lambda c: c.name)
def test_in_small(check: Comparison) -> None:
    outcome = check.run()
    assert outcome.verdict == "passed", outcome.detail


def test_what_is_taken_is_judged() -> None:
    """Only the best of equals, all of them, ascending; by the margin where numbers are rounded."""
    whole = selection.Kind("", 1, 1, 16, 1, (6,), 3)
    rounded = selection.Kind("", 1, 1, 16, 1, (6,), 3, whole=False)
    importance = torch.tensor([[[2.0, 1.0, 2.0, -torch.inf, 1.0, 1.0]]], dtype=torch.float64)

    def judged(kind: selection.Kind, *found: int) -> int:
        return selection._compared(kind, torch.tensor([[found]]), importance, None)

    assert judged(whole, 0, 1, 2) == 1 and judged(rounded, 0, 2, 5) == 0
    for wrong in ((0, 2, 4), (2, 0, 1), (0, 1, 4), (0, 2, 3), (0, 2, -1)):
        with pytest.raises(Failed):
            judged(whole, *wrong)
    with pytest.raises(Failed):
        judged(rounded, 0, 1, 4)
    forced = torch.arange(6)[None, None] == 5
    assert selection._compared(whole, torch.tensor([[[0, 2, 5]]]), importance, forced) == 1
    with pytest.raises(Failed):
        selection._compared(whole, torch.tensor([[[0, 1, 2]]]), importance, forced)


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check = chosen.TokensCheck(chosen.TOKENS[0], Place("cpu", "cpu", small=True))
    results = check.results(torch.float32)
    found = {**results[0], "d_k": results[0]["d_k"] * (1 + 1e-4)}
    monkeypatch.setattr(chosen.TokensCheck, "results", lambda self, dtype: (found, results[1]))
    assert check.run().verdict == "failed"
    monkeypatch.setattr(chosen.TokensCheck, "results", lambda self, dtype: results)
    assert check.run().verdict == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("of", [selection, chosen], ids=["selections", "token lists"])
def test_ahead_of_time(of, target: str) -> None:
    for job in of.ahead_jobs((target,)):
        outcome = job.run()
        assert outcome.verdict == "passed", f"{job.name}: {outcome.detail}"

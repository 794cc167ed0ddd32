"""The checks of linear attentions: in small through the interpreter, and kernels compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_engine.gpu_check import linear

pytest.importorskip("triton")


def test_numbers_through_the_interpreter():
    check = next(c for c in linear.checks("triton-interpreter", "cpu", True) if "gated" in c.name)
    outcome = check.run()
    assert outcome.verdict == "passed", outcome.detail


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(linear.MOST_DIFFERENCE, torch.float32, 1e-12)
    check = linear.checks("triton-interpreter", "cpu", True)[-1]
    assert check.run().verdict == "failed"


def compiled(
    kind: str, dim: int, target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict]:
    """Facts of every kernel by name; the default schedule fits the target and nothing spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    outcome = linear.LinearAhead(kind, dim, target).run()
    assert outcome.verdict == "passed", outcome.detail
    return outcome.numbers["kernels"]


def test_kernels_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernels = compiled("no decay", 64, "sm_90", tmp_path, monkeypatch)
    assert set(kernels) == {
        "forward: linear_states", "forward: linear_output",
        "backward: linear_states", "backward: linear_state_gradients", "backward: linear_gradients",
    }  # fmt: skip
    assert kernels["forward: linear_output"]["HGMMA"] > 0
    assert all(facts["products"] for facts in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("job", linear.ahead_jobs(), ids=lambda j: f"{j.kind} {j.dim} {j.target}")
def test_every_kernel_fits_every_target(
    job: linear.LinearAhead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled(job.kind, job.dim, job.target, tmp_path, monkeypatch)

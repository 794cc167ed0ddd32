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


def kernels_of(kind: str, dim: int, target: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    outcome = linear.LinearAhead(kind, dim, target).run()
    return outcome, outcome.numbers["kernels"]


def test_kernels_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outcome, kernels = kernels_of("no decay", 64, "sm_90", tmp_path, monkeypatch)
    assert outcome.verdict == "passed", outcome.detail
    assert set(kernels) == {
        "forward: linear_states", "forward: linear_output",
        "backward: linear_states", "backward: linear_state_gradients", "backward: linear_gradients",
    }  # fmt: skip
    assert kernels["forward: linear_output"]["HGMMA"] > 0
    assert all(facts["products"] for facts in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["no decay", "a decay for each head", "a decay for each token"])
def test_default_schedules_keep_kernels_in_registers(
    kind: str, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of an H100. Kernels of vector decays and of the delta rule: see the page of gpu_check."""
    outcome, _ = kernels_of(kind, dim, "sm_90", tmp_path, monkeypatch)
    assert outcome.verdict == "passed", outcome.detail


def test_which_checks_tilelang_takes_part_in(monkeypatch: pytest.MonkeyPatch):
    """16-bit numbers on a GPU, float32 on its CPU target; ahead of time for one target, where nvcc is."""
    assert {c.dtype for c in linear.checks("tilelang", "cuda", False)} == {"bfloat16"}
    assert {c.dtype for c in linear.checks("tilelang-cpu", "cpu", True)} == {"float32"}
    monkeypatch.setattr(linear, "find_nvcc", lambda: Path("nvcc"))
    jobs = linear.ahead_jobs(("triton", "tilelang"), ("sm_80", "sm_90"))
    assert {j.target for j in jobs if j.backend == "tilelang"} == {"sm_90"}
    assert {j.kind for j in jobs if j.backend == "tilelang"} == set(linear.KINDS)
    monkeypatch.setattr(linear, "find_nvcc", lambda: None)
    assert {j.backend for j in linear.ahead_jobs(("triton", "tilelang"), ("sm_90",))} == {"triton"}


@pytest.mark.slow
def test_tilelang_through_its_cpu_target():
    pytest.importorskip("tilelang")
    check = next(c for c in linear.checks("tilelang-cpu", "cpu", True) if "gated" in c.name)
    outcome = check.run()
    assert outcome.verdict == "passed", outcome.detail


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a decay for each token"])
def test_tilelang_compiled_ahead_of_time(kind: str):
    pytest.importorskip("tilelang")
    if linear.find_nvcc() is None:
        pytest.skip("no nvcc")
    outcome = linear.LinearAhead(kind, 64, "sm_90", "tilelang").run()
    assert outcome.verdict == "passed", outcome.detail
    assert all(facts["products"] for facts in outcome.numbers["kernels"].values())

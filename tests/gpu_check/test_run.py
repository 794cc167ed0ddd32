"""The command as a whole: jobs in processes that may die, a time limit that is kept, files and an exit status."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attn_engine.errors import UnsupportedOnBackend
from attn_engine.gpu_check import __main__ as command
from attn_engine.gpu_check import ahead, linear, run, serving
from attn_engine.gpu_check.ahead import SHOWCASE, AheadJob, faults_of
from attn_engine.gpu_check.catalogue import CHECKS
from attn_engine.gpu_check.checks import Failed
from attn_engine.gpu_check.jobs import timed
from attn_engine.gpu_check.machine import machine
from attn_engine.gpu_check.outcome import Done, Job, Outcome
from attn_engine.gpu_check.pool import NO_TIME, run_jobs
from attn_engine.gpu_check.report import Report
from attn_engine.runtime.aot_report import AotReport


@dataclass(frozen=True)
class Pretend:
    """A job that behaves as its name says."""

    name: str
    heavy: bool = False

    def run(self) -> Outcome:
        match self.name:
            case "dies":
                os._exit(3)
            case "hangs":
                time.sleep(60)
            case "crashes":
                return timed(lambda: str(1 / 0))
        return Outcome("passed", f"process {os.getpid()}")


def outcomes(names: Sequence[str], seconds: float = 20, limit: float = 60) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    jobs = [Pretend(name) for name in names]
    run_jobs(jobs, 1, time.monotonic() + limit, seconds, lambda job, o: found.update({job.name: o}))
    return found


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_takes_its_own_check_only() -> None:
    found = outcomes(["first", "dies", "second", "third", "crashes", "fourth"])
    assert {n: o.verdict for n, o in found.items() if o.verdict == "failed"} == {
        "dies": "failed",
        "crashes": "failed",
    }
    assert "exit code 3" in found["dies"].detail
    assert "ZeroDivisionError" in found["crashes"].detail
    assert found["second"].detail == found["third"].detail != found["first"].detail
    assert found["fourth"].detail != found["third"].detail, "a crash may have broken the device's context"


@pytest.mark.slow
def test_a_check_that_hangs_is_stopped() -> None:
    found = outcomes(["hangs", "next"], seconds=8)
    assert found["hangs"].verdict == "failed"
    assert "stopped after 8 seconds" in found["hangs"].detail
    assert found["next"].verdict == "passed"


def test_what_time_leaves_out_is_listed() -> None:
    begin = time.monotonic()
    found = outcomes(["hangs", "next", "last"], seconds=300, limit=2)
    assert time.monotonic() - begin < 15
    assert list(found.values()) == [NO_TIME] * 3


def test_errors_of_the_machine_are_no_failures() -> None:
    import torch

    def without_memory() -> str:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    def failing() -> str:
        raise Failed("dq: too far")

    def refusing() -> str:
        raise UnsupportedOnBackend(backend="tilelang", feature="float32", instead="Use bfloat16.")

    assert timed(without_memory).verdict == "not run"
    assert timed(refusing).verdict == "not run"
    assert "float32" in timed(refusing).detail
    assert timed(failing) == Outcome("failed", "dq: too far", timed(failing).seconds)
    assert timed(lambda: "fine").verdict == "passed"


# -- the command


@pytest.fixture(autouse=True)
def without_linear_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They, and those of serving, are in files of their own."""
    monkeypatch.setattr(linear, "ahead_jobs", lambda compilers, targets: [])
    monkeypatch.setattr(linear, "checks", lambda backend, device, small: [])
    for name in ("ahead_jobs", "checks"):
        monkeypatch.setattr(serving, name, lambda *_: [])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs are carried out here, one after the other; returns those that were."""
    carried: list[Job] = []

    def run_here(
        jobs: Sequence[Any], workers: int, until: float, seconds: float, report: Callable[..., None]
    ) -> None:
        for job in jobs:
            carried.append(job)
            report(job, job.run() if time.monotonic() < until else NO_TIME)

    monkeypatch.setattr(run, "run_jobs", run_here)
    return carried


def result(folder: Path) -> tuple[dict[str, Any], str]:
    (path,) = folder.glob("gpu-check-*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.parametrize("spilled", [0, 200])
def test_without_a_gpu(
    spilled: int,
    tmp_path: Path,
    in_this_process: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says so, compiles ahead of time for every target, and exits with 0 unless a kernel is at fault."""

    def compiler(case: object, target: str) -> list[AotReport]:
        lost = spilled if target == "sm_90" else 0
        return [AotReport("forward", target, 128, lost, 1024, 2048, (("wgmma", 12),), 1.0)]

    monkeypatch.setattr(ahead, "COMPILERS", {"triton": compiler})
    status = command.main(["--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "no GPU" in shown
    assert status == (1 if spilled else 0)
    assert ("forward on sm_90: 200 bytes of registers spilled" in shown) == bool(spilled)
    _, page = result(tmp_path)
    assert {job.target for job in in_this_process if isinstance(job, AheadJob)} == set(ahead.TARGETS)
    assert "| triton, sm_80 | softmax, causal, D=128 | forward | passed | registers 128, " in page
    assert "none was run on a device" in page


def test_kernels_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (job,) = (j for j in ahead.jobs(("triton",), ("sm_90",)) if j.case.normaliser == "retention")
    kernels = job.run().numbers["kernels"]
    assert {"forward", "dq", "dkdv"} <= set(kernels)
    assert kernels["forward"]["HGMMA"] > 0
    assert 0 < kernels["forward"]["trip"] <= kernels["forward"]["loop"]


def test_a_failing_check_is_named_and_exits_with_1(
    tmp_path: Path,
    in_this_process: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(case: object, place: object) -> str:
        raise Failed("dq: mean error 3 of 2 allowed")

    monkeypatch.setitem(run.CheckJob.run.__globals__["KINDS"], "refused", failing)
    arguments = ["--backend", "triton-interpreter", "--only", "^devices", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "FAILED: triton-interpreter: devices" in capsys.readouterr().out
    content, page = result(tmp_path)
    assert [d["outcome"]["verdict"] for d in content["done"]] == ["failed"]
    assert "- devices: softmax, causal" in page
    assert "mean error 3 of 2 allowed" in page


def test_checks_in_small_sizes_here(tmp_path: Path, in_this_process: list[Job]) -> None:
    arguments = ["--backend", "triton-interpreter", "--only", "^devices", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (job,) = in_this_process
    assert isinstance(job, run.CheckJob)
    assert (job.place.device, job.place.small, job.heavy) == ("cpu", True, False)


def test_the_time_is_kept(tmp_path: Path, in_this_process: list[Job]) -> None:
    arguments = ["--backend", "triton-interpreter", "--minutes", "0", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    content, page = result(tmp_path)
    assert {d["outcome"]["verdict"] for d in content["done"]} == {"not run"}
    assert f"0 passed, 0 failed, {len(in_this_process)} not run" in page
    assert len(in_this_process) > len(CHECKS)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) > len(CHECKS) and len(set(listed)) == len(listed)


def test_names_are_unique() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert len({(job.name, job.target) for job in ahead.jobs(("triton",))}) == 4 * len(SHOWCASE)


def test_what_is_missing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(machine(), "")
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.installed_backends(report) == ()
    assert any("triton: not tried, the package is not installed" in note for note in report.notes)


def test_faults_of_a_kernel() -> None:
    def faults(name: str, spilled: int, shared: int, products: int) -> list[str]:
        report = AotReport(name, "sm_90", 255, spilled, shared, 1000, (("wgmma", products),), 1.0)
        return faults_of(report, {"products": products})

    assert faults("forward", 0, 1000, 4) == []
    assert faults("delta", 16, 0, 0) == []
    assert faults("dq", 17, 0, 4) == ["dq on sm_90: 17 bytes of registers spilled"]
    assert faults("dq", 0, 1001, 4) == ["dq on sm_90: 1001 bytes shared, 1000 are there"]
    assert faults("dq", 0, 0, 0) == ["dq on sm_90: no instruction of the matrix unit"]


def test_a_report_with_everything(tmp_path: Path) -> None:
    report = Report({"date": "2026-11-21T00:00:00", "device": "some GPU"}, "command")
    report.done += [
        Done("checks", "causal | x", "triton", Outcome("passed", "o 0.5", 1.0)),
        Done("checks", "causal | x", "tilelang", Outcome("failed", "dq:\n too far", 2.0)),
        Done("ahead", "causal", "triton, sm_90", Outcome("not run", "the time was over")),
    ]
    report.benchmark = "## Speed\n"
    report.save(tmp_path / "x.json")
    page = (tmp_path / "x.md").read_text()
    assert "1 passed, 1 failed, 1 not run" in page
    assert "- causal | x (tilelang): dq: too far" in page
    assert "| causal \\| x | passed (o 0.5; 1.0 s) | **FAILED** (see above; 2.0 s) |" in page
    assert "| triton, sm_90 | causal | - | not run | the time was over |" in page
    assert page.endswith("## Speed\n")

"""Measuring, with contenders whose speed is known."""

from __future__ import annotations

import gc
import json
import os
import time

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks.cases import Case
from benchmarks.measure import Contender, measure, quartiles, sits_in
from benchmarks.memory import grown
from benchmarks.peak import against_peak, peak


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only contenders move, so that ratios are exact on any machine."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], *seconds: float, log: list[str] | None = None, name: str = "") -> Contender:
    """A contender whose calls take these times, in turns."""
    calls = [0]

    def run() -> None:
        clock[0] += seconds[calls[0] % len(seconds)]
        calls[0] += 1
        if log is not None:
            log.append(name)

    return Contender(run)


def test_ratios_are_the_others_times_over_the_bases(clock: list[float]):
    contenders = {"ours": taking(clock, 0.1), "slow": taking(clock, 0.3), "quick": taking(clock, 0.05)}
    outcome = measure(contenders)
    assert outcome.ratios == {"slow": [3, 3, 3], "quick": [0.5, 0.5, 0.5]}
    assert outcome.seconds == {"ours": 0.1, "slow": 0.3, "quick": 0.05}
    assert measure(contenders, base="slow").ratios["ours"][1] == pytest.approx(1 / 3, rel=1e-3)


def test_a_weight_scales_the_ratio(clock: list[float]):
    contenders = {"ours": taking(clock, 0.1), "peak": Contender(taking(clock, 0.2).run, weight=0.25)}
    assert measure(contenders).ratios == {"peak": [0.5, 0.5, 0.5]}


def test_rounds_are_interleaved_and_short_calls_repeated(clock: list[float]):
    log: list[str] = []
    contenders = {
        "ours": taking(clock, 0.06, log=log, name="a"),
        "b": taking(clock, 0.011, log=log, name="b"),
    }
    measure(contenders, rounds=4)
    warm = log.index("b") + 4  # four calls of each to warm up
    assert "".join(log[warm:]) == ("a" + "b" * 5) * 4  # 5 * 11 ms is the first above 50 ms


def test_a_slow_contender_sits_out_rounds_but_not_too_many(clock: list[float]):
    log: list[str] = []
    contenders = {
        "ours": taking(clock, 0.1),
        "quick": taking(clock, 0.1, log=log, name="q"),
        "slow": taking(clock, 60.0, log=log, name="s"),
    }
    measure(contenders, rounds=7)
    assert log.count("s") == 2 + 3
    assert log.count("q") == 4 + 7


@pytest.mark.parametrize("wanted, count", [(3, 7), (7, 7), (1, 5), (3, 3)])
def test_rounds_are_spread(wanted: int, count: int):
    assert sum(sits_in(turn, wanted, count) for turn in range(count)) == wanted


def test_quartiles():
    assert quartiles([1, 2, 3, 4, 5]) == [2, 3, 4]
    assert quartiles([2]) == [2, 2, 2]


def test_the_collector_runs_again_afterwards_also_after_an_error(clock: list[float]):
    seen: list[bool] = []
    calls = [0]

    def breaks() -> None:
        clock[0] += 1
        calls[0] += 1
        seen.append(gc.isenabled())
        if calls[0] > 4:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure({"ours": Contender(breaks), "other": taking(clock, 1.0)})
    assert seen[-1] is False
    assert gc.isenabled()


def test_prepare_and_one_call_come_before_each_stretch(clock: list[float]):
    log: list[str] = []
    run = taking(clock, 0.1, log=log, name="r").run
    measure({"ours": Contender(run, lambda: log.append("p")), "other": taking(clock, 0.1)}, rounds=2)
    assert "".join(log).endswith("prrprr")


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell what others use")  # noqa: PTH110
def test_own_work_is_not_others_work():
    others = measuring.OtherWork()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    used = others.cores()
    assert used is not None
    assert 0 <= used <= (os.cpu_count() or 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_weighted_by_operations(dtype: str):
    loop = peak(dtype)
    if loop is None:
        pytest.skip(f"no loop of multiply-adds for {dtype} here")
    case = Case("share", "full", dtype, "forward", 128, 128, threads=1)
    contender = against_peak(case, torch.get_num_threads())["peak"]
    assert contender.weight == case.flops / loop.operations(1)
    assert loop.operations(2) == 2 * loop.operations(1)
    assert loop.operations(1) == pytest.approx(20e9, rel=1e-3)
    start = time.perf_counter()
    contender.run()
    assert loop.operations(1) / (time.perf_counter() - start) < 2e12, "the compiler removed the loop"


def test_memory_is_counted():
    case = Case("memory", "causal", "float32", "forward+backward", 1024, 1024)
    counted = grown(case, "ours")
    inputs = 4 * 1024 * 8 * 64 * 4
    assert counted["input bytes"] == inputs
    assert counted["growth"] >= 0
    assert json.loads(json.dumps(counted)) == counted

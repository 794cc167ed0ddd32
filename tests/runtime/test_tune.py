"""Tuning: the search, the store on disk, and an engine that tunes itself on the CPU."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, errors, meta_tensor
from attn_engine.codegen.gpu_schedule import kernels_of, launches_worth_trying
from attn_engine.codegen.schedule import Edges, Gradients, Launch, Schedule, cpu_schedule
from attn_engine.codegen.targets import TARGETS
from attn_engine.library import causal
from attn_engine.runtime import schedule_choice
from attn_engine.runtime.backends import backend_named
from attn_engine.runtime.schedule_choice import candidates
from attn_engine.runtime.schedule_store import PARTS, Place, Stored, fields_of, load, path_of, save
from attn_engine.runtime.search import Progress, search
from attn_engine.runtime.tune import ProgressLine, Sample, of_part, tune

PLACE = Place("cpu", "a processor", "a compiler")
GPU = Schedule(128, 64, 32, 64, Edges.BRANCH, Gradients.TWO_KERNELS, d_query=Launch(64, 32, 4, 3))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def own_cache(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are shared by these tests; no schedule is."""
    for file in kernels.glob("schedule_*"):
        file.unlink()
    monkeypatch.setenv("ATTN_ENGINE_CACHE", str(kernels))


def engine(backend: str = "cpu", **options: Any) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3
    return AttentionEngine(metas, mask_mod=causal(), backend=backend, **options)


def qkv(*, grad: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    return tuple(torch.randn(1, 70, 2, 32).requires_grad_(grad) for _ in range(3))


class Machine:
    """A clock that only measurements move, and what each candidate takes."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.now, self.seconds, self.asked = 0.0, seconds, list[str]()

    def measure(self, candidate: str) -> float:
        self.asked.append(candidate)
        times = self.seconds[candidate]
        taken = times[min(self.asked.count(candidate), len(times)) - 1]
        if taken < 0:
            raise RuntimeError("out of resources")
        self.now += taken
        return taken

    def clock(self) -> float:
        return self.now


# -- the search


def test_the_best_median_wins_not_the_best_time() -> None:
    machine = Machine({"default": [3.0, 2.0], "lucky": [3.0, 0.5, 2.2], "good": [3.0, 1.0]})
    found = search(["default", "lucky", "good"], machine.measure, 200.0, clock=machine.clock)
    assert (found.best, found.place) == ("good", 2)
    assert found.medians[1] > 2.0
    assert found.seconds == 1.0
    assert found.default_seconds == 2.0


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    machine = Machine({"default": [1.0], "same": [0.99]})
    assert search(["default", "same"], machine.measure, 100.0, clock=machine.clock).best == "default"


def test_the_budget_ends_the_trying_and_the_comparing() -> None:
    machine = Machine({name: [1.0] for name in "abcdefgh"})
    found = search(list("abcdefgh"), machine.measure, 8.0, clock=machine.clock)
    assert found.untried > 0
    assert machine.now <= 8.0 + len(found.medians)  # one round that had begun
    reports = list[Progress]()
    found = search(["a"], machine.measure, 1e-9, clock=machine.clock, report=reports.append)
    assert found.best == "a"  # the default is measured whatever the budget is
    assert (reports[-1].tried, reports[-1].candidates, reports[-1].seconds_left) == (1, 1, 0.0)


def test_measurements_take_turns_and_slow_candidates_drop_out() -> None:
    machine = Machine({"default": [1.0], "fast": [0.5], "slow": [3.0]})
    search(["default", "fast", "slow"], machine.measure, 60.0, clock=machine.clock)
    rounds = machine.asked[6:]  # two each at first
    assert rounds[:6] == ["default", "fast", "slow"] * 2
    assert "slow" not in rounds[6:]
    assert rounds[6:10] == ["default", "fast"] * 2


def test_a_candidate_that_fails_is_out_and_the_default_must_not() -> None:
    machine = Machine({"default": [1.0], "too large": [-1.0], "good": [0.5]})
    found = search(["default", "too large", "good"], machine.measure, 50.0, clock=machine.clock)
    assert found.best == "good"
    assert "out of resources" in found.failed[1]
    with pytest.raises(RuntimeError, match="out of resources"):
        search(["too large"], machine.measure, 50.0, clock=machine.clock)


# -- progress


def test_progress_is_one_line_and_is_wiped() -> None:
    stream = io.StringIO()
    line = ProgressLine("forward", stream)
    line.show(Progress(3, 12, 1.2e-3, 1.5e-3, 12.0))
    assert "tuning forward: 3 of 12 schedules, best 1.2 ms, default 1.5 ms, 12 s left" in stream.getvalue()
    line.close()
    assert stream.getvalue().endswith("\r")
    ProgressLine("forward", None).show(Progress(0, 0, 0.0, 0.0, 0.0))


# -- candidates


def test_candidates_differ_from_the_default_in_one_direction() -> None:
    program, default = engine().program, cpu_schedule(32)
    for part, other in zip(PARTS, PARTS[::-1], strict=True):
        tried = of_part(default, candidates(program, backend_named("cpu"), default, part), part)
        assert tried[0] == default
        assert len(tried) == len(set(tried)) > 3
        assert all(fields_of(s, other) == fields_of(default, other) for s in tried)


def test_gpu_candidates_are_pruned_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    program = engine("triton").program
    for target in TARGETS.values():
        monkeypatch.setattr(schedule_choice, "current_target", lambda target=target: target)
        default = engine("triton").schedule
        for part in PARTS:
            tried = of_part(default, candidates(program, backend_named("triton"), default, part), part)
            assert 1 < len(tried) <= 40
        assert all(len(launches_worth_trying(k, target)) > 2 for k in kernels_of(program))


def test_a_gpu_search_with_an_injected_timer() -> None:
    """The whole path of a search but for the device: tiles of 32 keys are made to be the fastest."""
    program = engine("triton").program
    default = engine("triton").schedule
    tried = of_part(default, candidates(program, backend_named("triton"), default, "forward"), "forward")

    def timer(s: Schedule) -> float:
        return 1e-3 + 1e-6 * abs(s.block_kv - 32) + 1e-6 * abs(s.block_q - 64)

    q = torch.zeros(1, 1, 8, 32)
    stored = tune("forward", tried, timer, 1.0, Sample(q, q, q, {}, {}))
    best = min(tried, key=timer)
    assert timer(stored.applied(default)) == timer(best)
    assert fields_of(stored.applied(default), "backward") == fields_of(default, "backward")


# -- the store


def stored(part: str = "backward") -> Stored:
    fields = fields_of(replace(GPU, backward_q=64), part)
    return Stored(part, fields, 1e-3, 2e-3, "q (1, 2, 70, 32)", "a GPU")


def test_what_was_saved_is_loaded_for_the_same_key_only() -> None:
    program = engine().program
    save(program, PLACE, stored())
    assert load(program, PLACE, "backward") == stored()
    assert stored().applied(GPU) == replace(GPU, backward_q=64)
    assert load(program, PLACE, "forward") is None
    assert load(program, replace(PLACE, target="another"), "backward") is None
    assert load(program, replace(PLACE, toolchain="newer"), "backward") is None
    assert load(replace(program, dim_v=64), PLACE, "backward") is None


@pytest.mark.parametrize("change", [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: json.dumps({**json.loads(text), "format": 99}),
    lambda text: json.dumps({**json.loads(text), "part": "forward"}),
    lambda text: json.dumps({**json.loads(text), "fields": {"backward_q": 64}}),
    lambda text: text.replace('"backward_q": 64', '"backward_q": -64'),
    lambda text: text.replace('"backward_q": 64', '"backward_q": "rm"'),
    lambda text: text.replace('"num_stages": 3', '"stages": 3'),
])  # fmt: skip
def test_a_file_that_makes_no_sense_is_moved_aside(change: Any) -> None:
    program = engine().program
    path = save(program, PLACE, stored())
    damaged = change(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.warns(errors.StoreIgnored, match=path.name):
        assert load(program, PLACE, "backward") is None
    assert not path.exists()
    (kept,) = path.parent.glob("*.broken")
    assert kept.read_text() == damaged
    assert load(program, PLACE, "backward") is None  # without a second warning
    save(program, PLACE, stored())
    assert load(program, PLACE, "backward") == stored()


def test_nothing_half_written_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    program = engine().program
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(errors.CacheNotWritten, match="no space"):
        save(program, PLACE, stored())
    assert not path_of(program, PLACE, "backward").exists()


# -- an engine that tunes itself


def test_an_engine_tunes_on_the_cpu_and_later_ones_take_it() -> None:
    q, k, v = qkv(grad=True)
    tuned = engine(tune=True, tune_seconds=0.5)
    out = tuned(q, k, v)
    out.sum().backward()
    torch.testing.assert_close(out.double(), tuned.reference(q, k, v), rtol=1e-5, atol=1e-5)
    text = tuned.explain().sections["Tiles"]
    for part in PARTS:
        assert f"{part} tuned on cpu" in text, text
        assert "schedule_" in text
    later = engine()
    assert later.schedule == tuned.schedule
    assert "forward tuned on cpu" in later.explain().sections["Tiles"]
    assert torch.equal(later(q, k, v), out)
    other = AttentionEngine([meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3, backend="cpu")
    assert other.explain().sections["Tiles"].endswith("the default")


def test_directions_are_tuned_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, seen = engine(tune=True, tune_seconds=0.2), list[str]()

    def quick(part: str, tried: list[Schedule], *rest: Any) -> Stored:
        seen.append(part)
        return Stored(part, fields_of(tried[1], part), 1.0, 2.0, "", "cpu")

    monkeypatch.setattr("attn_engine.schedules.tune", quick)
    q, k, v = qkv()
    out = tuned(q, k, v)
    assert seen == ["forward"]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    again = tuned(*inputs)
    assert seen == ["forward", "backward"]
    torch.testing.assert_close(again, out)
    again.sum().backward()
    tuned(*inputs).sum().backward()
    assert seen == ["forward", "backward"]
    assert engine(tune=True)(q, k, v).shape == out.shape  # stored: nothing to search
    assert seen == ["forward", "backward"]


def test_gradients_of_a_call_before_tuning_went_on() -> None:
    """A forward pass whose kernels were replaced since keeps them for its gradients."""
    q, k, v = qkv(grad=True)
    tuned = engine(tune=True, tune_seconds=0.2)
    with torch.no_grad():
        tuned(q, k, v)
    plain = engine()(q, k, v)
    first = tuned(q, k, v)
    (mine,) = torch.autograd.grad(first.sum(), q)
    (theirs,) = torch.autograd.grad(plain.sum(), q)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -- schedules that a user gives


@pytest.mark.parametrize("backend", ["cpu", "triton-interpreter", "torch"])
def test_a_given_schedule_is_honoured(backend: str) -> None:
    given = replace(engine(backend).schedule, block_kv=16)
    mine = engine(backend, schedule=given)
    assert mine.schedule == given
    assert "given by the caller" in mine.explain().sections["Tiles"]
    q, k, v = qkv()
    torch.testing.assert_close(mine(q, k, v).double(), mine.reference(q, k, v), rtol=1e-5, atol=1e-5)
    copied = pickle.loads(pickle.dumps(AttentionEngine([meta_tensor(1, 2, 70, 32)] * 3, schedule=given)))
    assert copied._schedules.given == given


def refused(error: type[Exception], *words: str, backend: str = "triton", **changes: Any) -> None:
    default = engine(backend).schedule
    with pytest.raises(error) as caught:
        engine(backend, schedule=replace(default, **changes)).source()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_schedule_that_cannot_run_is_refused_before_any_launch() -> None:
    refused(errors.OutOfSharedMemory, "forward", "sm_90", "bytes", block_q=256, block_kv=256, num_stages=8)
    refused(errors.OutOfSharedMemory, "dq", d_query=Launch(256, 256, 8, 8))
    refused(errors.OutOfSharedMemory, "dkdv", backward_q=256, backward_kv=256, backward_stages=6)
    refused(errors.IllegalSchedule, "block_q=48", "power of two", block_q=48)
    refused(errors.IllegalSchedule, "d_query.kv=8", d_query=Launch(64, 8))
    refused(errors.IllegalSchedule, "warps=3", "forward", num_warps=3)
    refused(errors.IllegalSchedule, "stages=0", "dkdv", backward_stages=0)
    refused(errors.IllegalSchedule, "gradients", gradients=Gradients.ONE_KERNEL)
    refused(errors.IllegalSchedule, "block_kv=24", backend="cpu", block_kv=24)
    refused(errors.IllegalSchedule, "edges", backend="cpu", edges=Edges.BRANCH)
    with pytest.raises(errors.WrongArgument, match="a Schedule"):
        engine("cpu", schedule={"block_q": 64}).source()


def test_bad_options() -> None:
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "30"):
        with pytest.raises(errors.WrongArgument, match="tune_seconds"):
            engine(tune_seconds=wrong)
    with pytest.raises(errors.WrongArgument, match="tune='yes'"):
        engine(tune="yes")
    with pytest.raises(errors.WrongArgument, match="schedule"):
        engine(tune=True, schedule=cpu_schedule(32))
    for backend in ("triton", "torch", "reference", "triton-interpreter"):
        if backend == "triton" and torch.cuda.is_available():
            continue
        with pytest.raises(errors.NothingToTune, match=backend):
            engine(backend, tune=True)
    for ask in (engine().source, engine().explain):
        with pytest.raises(errors.UnknownTarget, match="sm_90"):
            ask(target="sm_1")
    with pytest.raises(errors.UnknownOption, match="q_length"):
        engine().explain(q_length=5)

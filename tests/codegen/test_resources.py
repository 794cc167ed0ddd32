"""The resource model against what compilers reported, and the schedules that are chosen by it.

tests/codegen/compiled_kernels.csv has one compiled kernel a line: the showcase (soft-cap, learned ALiBi, causal) in
bfloat16, or float32. `pytest -m slow tests/codegen/test_resources.py` compiles all of it again.
"""

from __future__ import annotations

import csv
import dataclasses
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from attn_engine import AttentionEngine, errors, meta_tensor
from attn_engine.codegen import gpu_schedule
from attn_engine.codegen.footprint import Footprint, footprint
from attn_engine.codegen.gpu_schedule import (
    default_schedule,
    kernels_of,
    launches_worth_trying,
    legal_launches,
    ranked_launches,
)
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.resources import Resources, predict, resources
from attn_engine.codegen.schedule import Launch, Schedule
from attn_engine.codegen.targets import DEVICES, TARGETS, Target, devices_of, target_named
from attn_engine.ir.program import Attention
from attn_engine.library import causal, sliding_window
from attn_engine.runtime.aot_report import SHARED_LIMITS
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.gpu_target import target_of
from attn_engine.runtime.schedule_choice import with_d_key_value, with_forward
from attn_engine.runtime.triton_aot import compile_ahead

NOISE = 16  # bytes that compilers keep on the stack of some kernels, outside their loops
# What may be predicted above what is taken: this factor, or so many bytes; twice the factor where the rule is coarse,
# without a pipeline and for AMD, whose weights need not pass through shared memory.
MARGIN, MORE = 1.3, 20 * 1024
BACKEND = TritonBackend("triton", interpret=False)
DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (576, 512))


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel, how it was cut, launched and for what; what its compiler said."""

    kernel: str
    dim_qk: int
    dim_v: int
    element: str
    launch: Launch
    target: str
    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        shape = f"{self.kernel}-{self.dim_qk}-{self.dim_v}-{self.element}"
        x = self.launch
        return f"{shape}-{x.q}x{x.kv}-{x.num_warps}-{x.num_stages}-{self.target}"


def table() -> list[Row]:
    with Path(__file__).with_name("compiled_kernels.csv").open() as file:
        return [
            Row(
                r["kernel"], int(r["dim_qk"]), int(r["dim_v"]), r["element"],
                Launch(int(r["q"]), int(r["kv"]), int(r["warps"]), int(r["stages"])),
                r["target"], int(r["registers"]), int(r["spilled"]), int(r["shared"]),
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


@cache
def showcase(dim_qk: int, dim_v: int, element: str = "bfloat16") -> Attention:
    slopes = torch.zeros(8, requires_grad=True)
    metas = [meta_tensor(None, None, None, d, dtype=getattr(torch, element)) for d in (dim_qk, dim_qk, dim_v)]
    return AttentionEngine(
        metas,
        score_mod=lambda s, b, h, q_idx, kv_idx: 30 * torch.tanh(s / 30) - slopes[h] * (q_idx - kv_idx),
        mask_mod=causal(),
        backend="triton",
    ).program


@cache
def facts(kernel: str, dim_qk: int, dim_v: int, element: str) -> Footprint:
    found = kernels_of(showcase(dim_qk, dim_v, element))
    return footprint(next(k for k in found if k.name == kernel))


def predicted(row: Row) -> Resources:
    sized = facts(row.kernel, row.dim_qk, row.dim_v, row.element).sized(row.launch.q, row.launch.kv)
    return resources(sized, row.launch, TARGETS[row.target])


def put(schedule: Schedule, kernel: str, launch: Launch) -> Schedule:
    if kernel == "dq":
        return dataclasses.replace(schedule, d_query=launch)
    return (with_forward if kernel == "forward" else with_d_key_value)(schedule, launch)


def compiled(row: Row) -> Row:
    """The row as it comes out of the compiler now."""
    program = showcase(row.dim_qk, row.dim_v, row.element)
    schedule = put(default_schedule(program, TARGETS[row.target]), row.kernel, row.launch)
    direction = "forward" if row.kernel == "forward" else "backward"
    kernel = lower(program, schedule, direction, ("slopes",)).kernel(row.kernel)
    source, options = BACKEND.source(kernel, schedule), BACKEND.options(kernel, schedule)
    report = compile_ahead(kernel, source, row.target, options)
    return dataclasses.replace(
        row, registers=report.registers, spilled=report.spill_bytes, shared=report.shared_bytes
    )


# -- the model against compilers


def check(row: Row) -> None:
    need = predicted(row)
    assert need.shared_bytes >= row.shared, f"{row}: {need}, but {row.shared} bytes are taken"
    factor = MARGIN if row.launch.num_stages > 1 and not TARGETS[row.target].amd else 2 * MARGIN
    most = max(factor * row.shared, row.shared + MORE)
    assert need.shared_bytes <= most, f"{row}: {need}, but {row.shared} bytes are taken"
    assert not (need.fits and row.spilled > NOISE), f"{row}: {need}, but it spills {row.spilled} bytes"


def test_predictions_hold_for_every_kernel_of_the_table() -> None:
    rows = table()
    assert len(rows) > 100
    assert {(r.kernel, r.target) for r in rows} == set(product(("forward", "dq", "dkdv"), TARGETS))
    assert any(r.spilled > NOISE for r in rows)
    for row in rows:
        check(row)


def test_most_kernels_that_do_not_spill_are_offered() -> None:
    good = [r for r in table() if r.spilled <= NOISE and r.element == "bfloat16"]
    assert sum(predicted(r).fits for r in good) > 0.5 * len(good)


SAMPLE = [
    next(r for r in table() if (r.kernel, r.target, r.dim_qk, r.dim_v) == wanted)
    for wanted in (("forward", "sm_90", 128, 128), ("dq", "gfx942", 64, 64), ("dkdv", "sm_80", 64, 64))
]


@pytest.mark.parametrize("row", SAMPLE, ids=str)
def test_the_table_is_what_the_compiler_says(row: Row) -> None:
    pytest.importorskip("triton")
    now = compiled(row)
    check(now)
    assert (now.spilled > NOISE) == (row.spilled > NOISE), now


@pytest.mark.slow
@pytest.mark.parametrize("row", table(), ids=str)
def test_predictions_hold_when_compiled_again(row: Row) -> None:
    check(compiled(row))


# -- schedules


def launches(schedule: Schedule) -> dict[str, Launch]:
    return {name: schedule.launch(name) for name in ("forward", "dq", "dkdv")}


def needs(program: Attention, target: Target) -> dict[str, Resources]:
    of = launches(default_schedule(program, target))
    return {
        k.name: resources(footprint(k).sized(of[k.name].q, of[k.name].kv), of[k.name], target)
        for k in kernels_of(program)
    }


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_the_default_launches(dims: tuple[int, int], target: Target) -> None:
    for element in ("bfloat16", "float32"):
        for name, need in needs(showcase(*dims, element), target).items():
            assert need.launches, (name, element, str(need))
            assert need.shared_bytes <= target.shared_limit == SHARED_LIMITS[target.name]


def test_no_configuration_is_offered_that_cannot_launch() -> None:
    """The whole space of launches, for every kernel, target and some head dimensions."""
    offered = refused = 0
    for dims, target in product(((40, 40), (128, 128), (576, 512)), TARGETS.values()):
        for kernel in kernels_of(showcase(*dims)):
            for launch in ranked_launches(kernel, target, bounded=True):
                need = resources(footprint(kernel).sized(launch.q, launch.kv), launch, target)
                assert need.fits and need.shared_bytes <= target.shared_limit, (
                    kernel.name,
                    launch,
                    str(need),
                )
                offered += 1
            tried = set(launches_worth_trying(kernel, target))
            for launch in legal_launches():
                need = resources(footprint(kernel).sized(launch.q, launch.kv), launch, target)
                assert need.launches == (need.blocks >= 1)
                if need.shared_bytes > target.shared_limit:
                    assert not need.launches and launch not in tried
                    refused += 1
    assert offered > 1000 and refused > 300, (offered, refused)


def test_predictions_grow_with_tiles_and_stages() -> None:
    kernel = facts("dkdv", 128, 128, "bfloat16")
    for target in TARGETS.values():
        for launch in legal_launches():
            need = resources(kernel.sized(launch.q, launch.kv), launch, target)
            for larger in (
                dataclasses.replace(launch, q=launch.q * 2),
                dataclasses.replace(launch, kv=launch.kv * 2),
                dataclasses.replace(launch, num_stages=launch.num_stages + 1),
            ):
                if launch.num_stages == 1:
                    continue  # no pipeline: tiles are turned in place
                more = resources(kernel.sized(larger.q, larger.kv), larger, target)
                assert more.blocks <= need.blocks or target.amd, (target.name, launch, larger)


def test_a_measured_launch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    program, best = showcase(64, 64), Launch(64, 128, 8, 3)
    row = ("NVIDIA H200", "forward", program.element, 64, 64, True)
    monkeypatch.setattr(gpu_schedule, "TUNED", {row: best})
    target = target_named("sm_90")
    assert default_schedule(program, target, "NVIDIA H200").forward_launch == best
    assert default_schedule(program, target).forward_launch != best


def test_facts_of_a_kernel() -> None:
    found = facts("dkdv", 192, 128, "bfloat16").sized(32, 64)
    assert [(t.tensor, t.axes, t.bytes) for t in found.resident] == [
        ("K", ("kv", "d"), 64 * 128 * 2), ("K", ("kv", "d2"), 64 * 64 * 2), ("V", ("kv", "dv"), 64 * 128 * 2),
    ]  # fmt: skip
    assert {(t.tensor, t.axes) for t in found.staged} == {
        ("Q", ("q", "d")), ("Q", ("q", "d2")), ("dO", ("q", "dv")),
    }  # fmt: skip
    assert [len(t.products) for t in found.staged] == [2, 2, 2]
    assert found.flops == 2 * 32 * 64 * (2 * 192 + 2 * 128)
    assert sum(t.elements for t in found.carried) >= 64 * (192 + 128)
    forward = facts("forward", 64, 64, "bfloat16").sized(128, 64)
    assert [t.tensor for t in forward.staged] == ["K", "V"]
    assert [t.bytes for t in forward.made] == [128 * 64 * 2]
    assert forward.pairs == 128 * 64


def test_a_prediction_reads_well() -> None:
    program = showcase(64, 64)
    kernel = lower(program, default_schedule(program, target_named("sm_90")), "forward").kernel("forward")
    text = str(predict(kernel, Launch(128, 64, 8, 2), target_named("sm_90")))
    assert "KiB shared" in text and "registers" in text and "multiprocessor" in text


# -- targets


def test_targets_and_devices() -> None:
    assert TARGETS.keys() == SHARED_LIMITS.keys()
    assert all(t.shared_limit <= t.shared_total for t in TARGETS.values())
    assert {"A100", "H100", "H200", "MI300X"} <= DEVICES.keys()
    assert all(devices_of(name) for name in TARGETS)
    with pytest.raises(errors.UnknownTarget, match="sm_90"):
        target_named("sm_75")


class Properties:
    """What torch says of a device."""

    def __init__(self, major: int, minor: int, optin: int = 0, arch: str = "") -> None:
        self.major, self.minor, self.gcnArchName = major, minor, arch
        if optin:
            self.shared_memory_per_block_optin = optin


def test_the_target_of_a_device() -> None:
    assert target_of(Properties(9, 0)) is TARGETS["sm_90"]
    assert target_of(Properties(8, 0)) is TARGETS["sm_80"]
    assert target_of(Properties(10, 0)) is TARGETS["sm_100"]
    small = target_of(Properties(8, 6, 99 * 1024))
    assert (small.name, small.shared_limit) == ("sm_80", 99 * 1024)
    assert target_of(Properties(12, 0, 99 * 1024)).matrix_groups is False
    assert target_of(Properties(9, 4, arch="gfx942:sramecc+:xnack-")) is TARGETS["gfx942"]


def test_defaults_follow_the_target_and_the_mask() -> None:
    program = showcase(128, 128)
    by_target = {default_schedule(program, t) for t in TARGETS.values()}
    assert len(by_target) > 2
    metas = [meta_tensor(None, None, None, 64, dtype=torch.bfloat16)] * 3
    window = AttentionEngine(metas, mask_mod=sliding_window(128), backend="triton")
    assert window.source(target="sm_80") != window.source(target="sm_90")
    assert "block_q=" in window.source(target="gfx942")

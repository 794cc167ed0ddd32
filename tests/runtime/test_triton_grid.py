"""The order in which a launch hands out tiles: every tile once, whatever the section; heads in sections that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.backends.triton_grid import section_size
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import KV_IDX, Q_IDX
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.triton_launch import compile_triton
from tests.runtime.rules import function, program
from tests.runtime.test_triton_launch import CASES, check

SCHEDULE = Schedule(32, 32, 32, 64, Edges.BRANCH, Gradients.TWO_KERNELS, sections=True)


def kernels(mask: bool = True, dims: int = 128) -> dict[str, Kernel]:
    causal = program(None, function(KV_IDX <= Q_IDX) if mask else None, dim_qk=dims, dim_v=dims)
    return {k.name: k for d in ("forward", "backward") for k in lower(causal, SCHEDULE, d).kernels}


@pytest.mark.parametrize("most", [1, 3, 8])
def test_sections_give_the_reference(
    most: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd numbers of tiles, heads and batches, in sections of one head, of some, of all."""
    case = replace(CASES["causal"], heads=(6, 3), batches=3, lengths=(70, 70), dims=(16, 16))
    monkeypatch.setattr("attn_engine.codegen.backends.triton_grid.SECTION_NUMBERS", most * 70 * 32)
    check(case, Storage.FLOAT32, generator, 2e-5, SCHEDULE)


def test_sections_are_whole_and_as_large_as_fits() -> None:
    sizes = {"batches": 2, "heads": 64, "kv_heads": 8, "q_len": 8192, "kv_len": 8192}
    found = {name: section_size(kernels()[name], sizes) for name in ("forward", "dq", "dkdv")}
    assert found == {"forward": 32, "dq": 32, "dkdv": 4}  # 4 MiB of keys and values a group
    assert section_size(kernels()["forward"], {**sizes, "kv_len": 512, "q_len": 512}) == 128
    assert section_size(kernels()["forward"], {**sizes, "heads": 7, "kv_heads": 7, "batches": 1}) == 1
    assert section_size(kernels()["forward"], {**sizes, "kv_len": 0, "batches": 0}) == 1


def test_launches_have_every_tile() -> None:
    sizes = {"batches": 3, "heads": 6, "kv_heads": 2, "q_len": 70, "kv_len": 130}
    for name, tiles, heads in (("forward", 3, 6), ("dkdv", 3, 2)):
        kernel = kernels()[name]
        section = section_size(kernel, sizes)
        assert compile_triton(kernel, render_triton(kernel)).grid(sizes) == (
            section,
            tiles,
            heads * 3 // section,
        )


def test_only_unequal_work_is_ordered() -> None:
    assert kernels()["forward"].sections
    assert "tl.num_programs(1) - 1" in render_triton(kernels()["forward"])  # the last rows see most keys
    assert "place % kv_heads" in render_triton(kernels()["dkdv"])  # the first keys are seen by most rows
    full = kernels(mask=False)["forward"]
    assert not full.sections
    assert "place" not in render_triton(full)

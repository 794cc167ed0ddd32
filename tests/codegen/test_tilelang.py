"""Placed kernels and their TileLang text: where tiles lie, which loop runs ahead, what is lowered for which GPU."""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor, online
from attn_engine.codegen.backends.tilelang import render_tilelang
from attn_engine.codegen.backends.tilelang_types import TileLangOptions
from attn_engine.codegen.lower.placed import CopyIn, Gemm, Map, Scope, Steps, walk_placed
from attn_engine.codegen.lower.placement import place
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.program import Attention, ListedBlocks
from attn_engine.ir.tile import Kernel
from attn_engine.library.dense.retention import OnlineRetention
from attn_engine.runtime.tilelang_aot import cubin_of, find_nvcc, lower_tilelang
from attn_engine.runtime.tilelang_backend import TileLangBackend, tilelang_schedule
from tests.test_golden import SHOWCASE

TILES = Schedule(128, 64, 64, 128, Edges.BRANCH, Gradients.TWO_KERNELS)
LEARNED = {"soft_cap_alibi_window": ("slopes",), "learned_pair_bias": ("bias",)}


def program(name: str, dim: int = 64, **options: Any) -> Attention:
    meta = [meta_tensor(None, None, None, dim, dtype=torch.bfloat16)] * 3
    return AttentionEngine(meta, **(options or SHOWCASE[name]()), backend="torch").program


def kernels(name: str, dim: int = 64) -> dict[str, Kernel]:
    one = program(name, dim)
    learned = LEARNED.get(name, ())
    return {k.name: k for d in ("forward", "backward") for k in lower(one, TILES, d, learned).kernels}


def text(name: str, kernel: str, options: TileLangOptions | None = None, dim: int = 64) -> str:
    return render_tilelang(with_header(kernels(name, dim)[kernel], "tilelang", "test"), options)


@pytest.mark.parametrize("name", SHOWCASE)
def test_every_kernel_is_python_that_reads_only_what_it_has(name: str) -> None:
    for kernel in kernels(name).values():
        for options in (TileLangOptions(), TileLangOptions(cpu=True)):
            tree = ast.parse(render_tilelang(kernel, options))
            read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            made |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for a in n.args.args}
            made |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} | {"T", "strides"}
            assert read <= made, read - made


def test_what_products_read_is_shared_and_what_they_make_is_not() -> None:
    placed = place(kernels("softmax_causal")["forward"], rounds=True)
    scopes = {b.name: b.scope for b in placed.buffers}
    assert {scopes[n] for n in ("query", "key", "value")} == {Scope.SHARED}
    assert {scopes[n] for n in ("score", "probs_rounded", "out", "row_max")} == {Scope.FRAGMENT}


@pytest.mark.parametrize("name", SHOWCASE)
def test_one_loop_over_tiles_holds_the_products(name: str) -> None:
    for kernel in (k for n, k in kernels(name).items() if n in ("forward", "dq", "dkdv")):
        placed = place(kernel, rounds=True)
        loops = [s for s in walk_placed(placed.body) if isinstance(s, Steps)]
        assert [s.pipelined for s in loops] == [True], kernel.name
        inside = list(walk_placed(loops[0].body))
        assert sum(isinstance(s, Gemm) for s in inside) == {"forward": 2, "dq": 3, "dkdv": 4}[kernel.name]
        assert all(s.ahead for s in inside if isinstance(s, CopyIn))


def test_neighbouring_loop_nests_are_one() -> None:
    placed = place(kernels("soft_cap_alibi_window")["forward"], rounds=True)
    bodies = [placed.body, *(s.body for s in walk_placed(placed.body) if isinstance(s, Steps))]
    for body in bodies:
        for a, b in itertools.pairwise(body):
            assert not (isinstance(a, Map) and isinstance(b, Map) and a.axes == b.axes)


def test_users_names_and_lines_are_in_the_text() -> None:
    shown = text("soft_cap_alibi_window", "forward")
    assert "squashed = cap * T.tanh(" in shown
    assert re.search(r"# test_golden\.py:\d+: distance = q_idx - kv_idx", shown)


def test_users_names_do_not_hide_the_files_own() -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        T = score * 2.0
        qi = T + q_idx
        return qi * T

    (kernel,) = lower(program("", score_mod=score_mod), TILES, "forward").kernels
    shown = render_tilelang(kernel)
    assert re.search(r"\bT_\d = ", shown) and not re.search(r"(?m)^ *(T|qi) = ", shown)


def test_the_cpu_text_has_no_threads_and_one_memory() -> None:
    shown = text("softmax_causal", "dkdv", TileLangOptions(cpu=True))
    assert not re.search(
        r"alloc_shared|alloc_fragment|T\.Parallel|T\.Pipelined|threads|disable_tma|assume", shown
    )


def test_a_rule_that_asks_for_the_mask_in_every_tile() -> None:
    options = {"online_func": OnlineRetention(), "mask_mod": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx}
    (kernel,) = lower(program("", **options), TILES, "forward").kernels
    assert render_tilelang(kernel).count("visible = ") >= 1


def two_passes(scores: Any) -> Any:
    return torch.relu(scores - scores.sum() / 70.0)


def test_loops_that_follow_each_other_own_what_they_load() -> None:
    (kernel,) = lower(program("", online_func=online(two_passes)), TILES, "forward").kernels
    placed = place(kernel, rounds=True)
    first, second = (s for s in walk_placed(placed.body) if isinstance(s, Steps))
    loaded = [{s.buffer for s in walk_placed(loop.body) if isinstance(s, CopyIn)} for loop in (first, second)]
    assert not loaded[0] & loaded[1] and len(loaded[1]) == 2
    assert "num_stages=2" not in render_tilelang(kernel)


def test_sums_of_a_head_start_and_end_inside_the_one_loop() -> None:
    shown = text("soft_cap_alibi_window", "dkdv")
    assert shown.count("T.Pipelined(") == 1
    assert "if T.truncmod(step, q_steps) == 0:\n                T.fill(d_slopes_columns_sum, 0.0)" in shown
    assert "if T.truncmod(step, q_steps) == q_steps - 1:" in shown


def test_nothing_is_copied_in_bulk_before_a_loop_that_may_run_no_trip() -> None:
    one = replace(program("softmax_causal"), listed=ListedBlocks(128, 128, "heads", ragged=True))
    (kernel,) = lower(one, TILES, "forward").kernels
    assert "T.copy(Q[batch, head, q_start, 0], query, disable_tma=True)" in render_tilelang(kernel)
    assert "disable_tma" not in text("softmax_causal", "forward")


# -- lowered for GPUs that this machine does not have


@pytest.mark.parametrize(
    ("kernel", "target", "has"),
    [
        pytest.param("forward", "sm_90", ("wgmma_rs", "tma_load", "warpgroup_reg_alloc")),
        pytest.param("dq", "sm_90", ("wgmma_rs", "tma_load", "warpgroup_reg_alloc"), marks=pytest.mark.slow),
        pytest.param(
            "dkdv", "sm_90", ("wgmma_rs", "tma_load", "warpgroup_reg_alloc"), marks=pytest.mark.slow
        ),
        pytest.param("forward", "sm_80", ("mma_sync", "cp_async_gs"), marks=pytest.mark.slow),
        pytest.param("dq", "sm_80", ("mma_sync", "cp_async_gs"), marks=pytest.mark.slow),
        pytest.param("dkdv", "sm_80", ("mma_sync", "cp_async_gs"), marks=pytest.mark.slow),
        pytest.param("forward", "gfx942", ("mfma",), marks=pytest.mark.slow),
        pytest.param("dq", "gfx942", ("mfma",), marks=pytest.mark.slow),
        pytest.param("dkdv", "gfx942", ("mfma",), marks=pytest.mark.slow),
    ],
)
def test_lowered_with_matrix_instructions(kernel: str, target: str, has: tuple[str, ...]) -> None:
    pytest.importorskip("tilelang")
    new = target == "sm_90"
    line = 8 if target == "gfx942" else 16
    options = TileLangOptions(256, 2 if new else 1, line=line, specialised=new)
    lowered = lower_tilelang(text("softmax_causal", kernel, options), kernel, target)
    assert all(word in lowered.text for word in has)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("name", ["softmax_causal", "soft_cap_alibi_window"])
def test_machine_code_multiplies_by_warp_groups_and_keeps_values_in_registers(
    name: str, kernel: str, dim: int
) -> None:
    pytest.importorskip("tilelang")
    if find_nvcc() is None:
        pytest.skip("needs nvcc, and this machine has none")
    one, learned = program(name, dim), LEARNED.get(name, ())
    backend, schedule = TileLangBackend("tilelang", on_cpu=False), tilelang_schedule(dim)
    made = [k for d in ("forward", "backward") for k in lower(one, schedule, d, learned).kernels]
    (chosen,) = (k for k in made if k.name == kernel)
    report = cubin_of(lower_tilelang(backend.source_for(chosen, schedule, "sm_90"), kernel, "sm_90"))
    code = report.machine_code()
    assert code.count("HGMMA") and code.count("UTMALDG")
    assert report.fits, str(report)

"""Sequences in generated TileLang, run through its CPU target; GPU text compiled where there is nvcc."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_engine.codegen.backends.tilelang import render_tilelang
from attn_engine.codegen.backends.tilelang_types import TileLangOptions
from attn_engine.codegen.lower.placed import CopyIn, CopyOut, walk_placed
from attn_engine.codegen.lower.placement import place
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import Sequences
from attn_engine.ir.tile import Kernel, Param
from attn_engine.runtime.tilelang_backend import tilelang_schedule
from attn_engine.runtime.tilelang_launch import TileLangKernel
from tests.packed import test_listed_sequences, test_packed, test_places
from tests.packed.programs import PROGRAMS, engine

BACKEND = "tilelang-cpu"
DIAGONALS = "bias by distance"  # sums along diagonals are the CPU's


def kernels() -> dict[str, Kernel]:
    built = engine("causal", {}, "torch", torch.bfloat16, (64, 64))
    program = replace(built.program, sequences=Sequences(packed=True))
    schedule = tilelang_schedule(64)
    return {k.name: k for d in ("forward", "backward") for k in lower(program, schedule, d).kernels}


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_showcase(kernel: str, golden: Callable[[str, str], None]) -> None:
    golden(
        f"tilelang_softmax_packed_{kernel}.py",
        render_tilelang(with_header(kernels()[kernel], "tilelang", "golden")),
    )


def test_rows_are_read_and_written_up_to_the_end_of_a_sequence() -> None:
    """A copy of whole tiles would bring rows of the next sequence: a NaN among them would not stay there."""
    for kernel in kernels().values():
        assert not any(isinstance(s, CopyIn | CopyOut) for s in walk_placed(place(kernel, rounds=True).body))
        shown = render_tilelang(kernel, TileLangOptions())
        assert "q_rows" in shown and "T.alloc_var" in shown and "num_stages=2" not in shown


def test_shared_rows_are_not_copied_for_each_sequence() -> None:
    """Packed rows come as a batch with a stride of 0; those that begin within a line of 16 bytes are copied once."""
    kernel = next(k for k in kernels().values() if k.name == "forward")
    launch = TileLangKernel(kernel, lambda arch: "")
    types = {Storage.BFLOAT16: torch.bfloat16, Storage.FLOAT32: torch.float32, Storage.INT32: torch.int32}
    sizes = dict.fromkeys(("q_len", "kv_len"), 50) | {"heads": 4, "kv_heads": 2, "dim_qk": 64, "dim_v": 64}

    def given(p: Param, column: int) -> torch.Tensor:
        if p.storage is Storage.INT32:
            return torch.zeros([3] * len(p.shape), dtype=torch.int32)
        shape = [1, *(sizes[s] for s in p.shape[1:])]
        wide = torch.randn(*shape[:-1], shape[-1] + 4, dtype=types[p.storage])
        return wide[..., column : column + shape[-1]].expand(3, *shape[1:])

    for column in (0, 4):
        tensors = {p.name: given(p, column) for p in kernel.params}
        arguments, back = launch.arguments(tensors, {"scale": 1.0, "tile_count": 5})
        for p, x in zip(kernel.params, arguments, strict=False):
            if p.storage is not Storage.INT32:
                assert x.shape[0] == 3 and x.stride(0) == 0
                assert p.output or torch.equal(x, tensors[p.name])
        assert all(to.shape[0] == source.shape[0] == 1 for to, source in back)
        assert arguments[len(kernel.params) :] == [1.0, 5]


def test_a_sequence_between_rows_of_nan(seed: int) -> None:
    pytest.importorskip("tilelang")
    torch.manual_seed(seed)
    q, k, v = (torch.full((3, 90, n, 16), torch.nan) for n in (4, 2, 2))
    start_q, len_q, start_kv, len_kv = torch.tensor([[7, 70, 20], [64, 1, 0], [13, 0, 4], [71, 90, 5]])
    for x, start, length in ((q, start_q, len_q), (k, start_kv, len_kv), (v, start_kv, len_kv)):
        for b, (i, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            x[b, i : i + n] = torch.randn(n, *x.shape[2:])
    built = engine("causal", {}, BACKEND, torch.float32)
    places: dict[str, Any] = {"start_q": start_q, "len_q": len_q, "start_kv": start_kv, "len_kv": len_kv}
    o = built(q, k, v, **places)
    torch.testing.assert_close(o.double(), built.reference(q, k, v, **places), rtol=2e-5, atol=2e-5)
    assert o[0, 7:71].any() and not o[0, :7].any() and not o[2].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "biases by row, key and sequence"])
def test_in_a_batch_of_nan(name: str, seed: int) -> None:
    pytest.importorskip("tilelang")
    test_places.test_in_a_batch(name, "bshd", BACKEND, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n != DIAGONALS])
def test_like_each_sequence_by_itself(name: str, seed: int) -> None:
    pytest.importorskip("tilelang")
    torch.manual_seed(seed)
    test_packed.compare(name, BACKEND, test_packed.DIFFERENT)
    torch.manual_seed(seed)
    test_packed.compare(name, BACKEND, test_packed.SMALL, dims=(16, 24), group=4)


@pytest.mark.slow
@pytest.mark.parametrize(("heads_of_lists", "block"), [(1, 64), (2, 16), (4, 64)])
def test_lists(heads_of_lists: int, block: int, seed: int) -> None:
    pytest.importorskip("tilelang")
    test_listed_sequences.test_lists(BACKEND, heads_of_lists, block, seed)


@pytest.mark.slow
def test_other_places(seed: int) -> None:
    pytest.importorskip("tilelang")
    test_places.test_in_a_batch("sink", "bhsd", BACKEND, seed)
    test_places.test_rows_after_the_last_sequence(BACKEND, seed)
    test_places.test_head_first(BACKEND, seed)
    test_places.test_pooled(BACKEND, seed)

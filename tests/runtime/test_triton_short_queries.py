"""Few query rows on Triton: the heads of a group packed into one small tile, keys split, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.schedule import short_query_schedule
from attn_engine.ir.passes.pack_heads import Packing
from attn_engine.runtime import few_rows
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.triton_launch import TritonKernel
from tests.gpu_tiles import gpu_schedule

ENGINES: dict[str, AttentionEngine] = {}


def at_the_end(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx + 148) & (kv_idx >= h)


def engine(backend: str) -> AttentionEngine:
    if backend not in ENGINES:
        metas = [meta_tensor(None, None, None, 32, dtype=torch.float16)] * 3
        ENGINES[backend] = AttentionEngine(metas, mask_mod=at_the_end, layout="bhsd", backend=backend)
    return ENGINES[backend]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("q_len", [1, 3, 7])
def test_packed_heads_give_the_reference(
    q_len: int, splits: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd numbers of queries, of heads in a group and of batches."""
    launched: list[tuple[str, tuple[int, int, int]]] = []
    monkeypatch.setattr("attn_engine.runtime.compiled.choose_splits", lambda *_: splits)
    original = TritonKernel.grid
    monkeypatch.setattr(
        TritonKernel,
        "grid",
        lambda self, sizes: launched.append((self.name, original(self, sizes))) or launched[-1][1],
    )
    shapes = ((3, 6, q_len, 32), (3, 2, 150, 32), (3, 2, 150, 32))
    q, k, v = (torch.randn(*shape, generator=generator).to(torch.float16) for shape in shapes)
    o, rows = engine("triton-interpreter")(q, k, v, return_final_rowscales=True)
    wanted, wanted_rows = engine("reference")(q, k, v, return_final_rowscales=True)
    torch.testing.assert_close(o.double(), wanted.double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(rows["lse"].double(), wanted_rows["lse"].double(), atol=2e-3, rtol=0)
    names = {"forward"} if splits == 1 else {"decode", "merge"}
    assert {name for name, _ in launched} == names
    if splits == 1:
        assert sorted(launched[0][1]) in (
            [1, 2, 3],
            [1, 1, 6],
        )  # one tile for each of 2 kv heads and 3 batches


def test_tiles_follow_the_rows() -> None:
    schedule = gpu_schedule(128, 128, 2)
    rows = {n: short_query_schedule(schedule, n).block_q for n in (1, 16, 17, 64, 65, 8192)}
    assert rows == {1: 16, 16: 16, 17: 32, 64: 64, 65: schedule.block_q, 8192: schedule.block_q}
    assert short_query_schedule(schedule, 500) is schedule


def test_one_kernel_serves_all_lengths_of_a_tile() -> None:
    program = engine("triton-interpreter").program
    backend = TritonBackend("triton", interpret=False)
    compiled = CompiledAttention(program, backend, backend.schedule(program))
    assert compiled.of_rows(Packing.QUERIES, 9) is compiled.of_rows(Packing.QUERIES, 16)
    assert compiled.of_rows(Packing.QUERIES, 9) is not compiled.of_rows(Packing.ONE_QUERY, 9)
    assert compiled.of_rows(Packing.NONE, 4096) is compiled


def test_long_keys_are_split_on_a_gpu() -> None:
    program = engine("triton-interpreter").program
    schedule = gpu_schedule(128, 128, 2)
    q, k = (torch.empty(1, 8, n, 32, device="meta") for n in (1, 2**20))
    assert few_rows.choose_splits(program, schedule, q, k) == 16
    assert few_rows.choose_splits(program, schedule, torch.empty(16, 8, 1, 32, device="meta"), k) == 1

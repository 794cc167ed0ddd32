"""Block masks made by analysis as what kernels walk over, and such kernels compiled for a GPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import within_blocks
from attn_engine.errors import WrongArgument
from attn_engine.ir.program import ListedBlocks
from attn_engine.masks import create_block_mask
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.triton_aot import SHARED_LIMITS, compile_ahead
from tests.gpu_tiles import gpu_schedule
from tests.lists.draws import draw
from tests.lists.test_listed import agree, causal, formula

METAS = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3


def test_a_block_mask_brings_its_mask() -> None:
    documents = torch.sort(torch.randint(0, 5, (300,)))[0]

    def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (documents[q_idx] == documents[kv_idx]) & (kv_idx <= q_idx)

    mask = create_block_mask(same_document, None, None, 300, 300, BLOCK_SIZE=64)
    run = AttentionEngine(METAS, layout="bhsd", block_mask=mask)
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    place = torch.arange(300)
    agree(run(q, k, v), formula(q, k, v, same_document(0, 0, place[:, None], place)), 3e-6)


def test_a_mask_that_the_engine_does_not_know_is_refused() -> None:
    mask = create_block_mask(causal, None, None, 300, 300, BLOCK_SIZE=64)
    run = AttentionEngine(METAS, layout="bhsd", backend="torch")
    with pytest.raises(WrongArgument, match="mask_mod"):
        run(*(torch.randn(1, 2, 300, 32) for _ in range(3)), block_mask=mask)


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_ahead_of_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists in blocks of 128 x 128 fit sm_90 without spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lists = draw(0, (128, 128), (512, 512)).lists
    metas = [meta_tensor(None, None, None, 64, dtype=torch.bfloat16)] * 3
    program = AttentionEngine(metas, mask_mod=causal, backend="triton", block_mask=lists).program
    assert program.listed == ListedBlocks(128, 128)
    schedule = within_blocks(gpu_schedule(64, 64, 2), program.listed)
    kernel = lower(program, schedule, "forward" if name == "forward" else "backward").kernel(name)
    backend = TritonBackend("triton", interpret=False)
    report = compile_ahead(
        kernel, backend.source(kernel, schedule), "sm_90", backend.options(kernel, schedule)
    )
    assert report.spill_bytes <= 16, report
    assert 0 < report.shared_bytes <= SHARED_LIMITS["sm_90"], report
    assert "wgmma.mma_async" in dict(report.products), report

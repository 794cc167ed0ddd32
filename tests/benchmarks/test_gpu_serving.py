"""What the peers of sparse attention and of decoding are called with: stand-ins with their documented signatures."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.library import parallel_nsa
from benchmarks import gpu_rows, gpu_serving
from benchmarks.gpu_serving import ServingCase, fla, flash_mla, flashinfer, measure, ours, table

NSA = ServingCase("nsa, given blocks", 1, 130, 16, 1, 16, 130, 3)
LATENT = ServingCase("latent", 2, 1, 4, 1, 576, 100, page=64)
TOKENS = ServingCase("tokens", 1, 5, 4, 1, 576, 30, 8)
PAGED = ServingCase("paged", 2, 1, 4, 2, 32, 100, page=64)
INDEXER = ServingCase("indexer", 1, 3, 4, 1, 16, 40, 8)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (rows, heads, D), k, v (keys, kv heads, D): every key is seen."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = (torch.einsum("qhd,khd->hqk", q.float(), k) * scale).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def get_mla_metadata() -> tuple[str, None]:
    return "holder", None


def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
    softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
):  # fmt: skip
    assert tile_scheduler_metadata == "holder" and block_table.dtype is cache_seqlens.dtype is torch.int32
    assert k_cache.shape[1] == 64 and head_dim_v == 512
    rows = [k_cache[t].flatten(0, 1)[:n] for t, n in zip(block_table, cache_seqlens, strict=True)]
    out = [attend(x, k, k[..., :512], softmax_scale) for x, k in zip(q, rows, strict=True)]
    return torch.stack(out), None


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    assert kv.ndim == 3 and indices.shape[1] == 1 and indices.dtype is torch.int32
    out = [
        attend(x[None], kv[i], kv[i][..., :d_v], sm_scale)[0] for x, i in zip(q, indices[:, 0], strict=True)
    ]
    return torch.stack(out), None, None


class MlaWrapper:
    def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto") -> None:
        assert float_workspace_buffer.dtype is torch.int8

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
        causal, sm_scale, q_data_type, kv_data_type, use_profiler=False,
    ) -> None:  # fmt: skip
        assert (head_dim_ckv, head_dim_kpe, causal) == (512, 64, False) and qo_indptr.dtype is torch.int32
        self.planned = qo_indptr, kv_indptr, kv_indices, kv_len_arr, sm_scale

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False) -> Tensor:
        rows, first, pages, lengths, scale = self.planned
        q, cache = torch.cat((q_nope, q_pe), -1), torch.cat((ckv_cache, kpe_cache), -1)
        found: list[Tensor] = []
        for b, n in enumerate(lengths.tolist()):
            k = cache[pages[first[b] : first[b + 1]]].flatten(0, 1)[:n, None]
            found.append(attend(q[rows[b] : rows[b + 1]], k, k[..., :512], scale))
        return torch.cat(found)


class DecodeWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert kv_layout == "NHD"

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
        kv_data_type=None, data_type=None, sm_scale=None,
    ) -> None:  # fmt: skip
        self.planned = indptr, indices, last_page_len, page_size, sm_scale

    def run(self, q, paged_kv_cache) -> Tensor:
        first, pages, last, size, scale = self.planned
        found: list[Tensor] = []
        for b in range(len(q)):
            own = pages[first[b] : first[b + 1]]
            n = (len(own) - 1) * size + int(last[b])
            k, v = (x[own].flatten(0, 1)[:n] for x in paged_kv_cache)
            found.append(attend(q[b : b + 1], k, v, scale)[0])
        return torch.stack(found)


def nsa_of_fla(
    q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64,
    window_size=0, scale=None, cu_seqlens=None,
):  # fmt: skip
    assert block_indices is None or block_indices.shape == (1, q.shape[1], k.shape[2], 3)
    return parallel_nsa(
        q, k, v, g_cmp, g_slc, g_swa, block_indices, block_counts, block_size, window_size, scale,
        backend="torch",
    )  # fmt: skip


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "fla": {}, "fla.ops": {}, "fla.ops.nsa": {"parallel_nsa": nsa_of_fla},
        "flash_mla": {f.__name__: f for f in (get_mla_metadata, flash_mla_with_kvcache, flash_mla_sparse_fwd)},
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": DecodeWrapper},
        "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": MlaWrapper},
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu_rows, "in_turns", lambda runs, timer: {name: [0.0] for name in runs})
    contenders = {"ours": ours("torch"), "fla": fla, "FlashMLA": flash_mla, "FlashInfer": flashinfer}
    monkeypatch.setattr(gpu_serving, "CONTENDERS", contenders)


@pytest.mark.parametrize(
    "case, peers",
    [
        (LATENT, {"FlashMLA", "FlashInfer"}),
        (TOKENS, {"FlashMLA"}),
        (PAGED, {"FlashInfer"}),
        pytest.param(INDEXER, set(), marks=pytest.mark.slow),
        pytest.param(NSA, {"fla"}, marks=pytest.mark.slow),
        pytest.param(replace(NSA, kind="nsa", direction="backward"), {"fla"}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x.kind if isinstance(x, ServingCase) else "",
)
def test_libraries_are_called_as_their_signatures_say(case: ServingCase, peers: set[str], libraries: None):
    seconds, left_out = measure(case, "cpu")
    assert set(seconds) == {"ours", *peers}, left_out
    assert all("not compared" in left_out[name] for name in {"fla", "FlashMLA", "FlashInfer"} - peers)


def test_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_serving, "CONTENDERS", {"FlashMLA": flash_mla, "FlashInfer": flashinfer, "fla": fla}
    )
    for name in ("flash_mla", "flashinfer", "fla.ops.nsa"):
        monkeypatch.setitem(sys.modules, name, None)
    seconds, left_out = measure(LATENT, "cpu")
    assert not seconds and "flash_mla is not installed" in left_out["FlashMLA"]
    assert "flashinfer is not installed" in left_out["FlashInfer"]
    assert len({str(case) for case in table()}) == len(list(table()))

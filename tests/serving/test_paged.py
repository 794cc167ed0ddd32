"""Keys in pages: the same bits as keys in a batch, whatever lies around them, and the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, create_block_mask, meta_tensor, with_pooled
from attn_engine.library import OnlineSoftmax
from attn_engine.runtime import few_rows
from attn_engine.runtime.cpu_compile import find_compiler
from tests.packed.programs import HEADS, KV_HEADS, PROGRAMS, engine, tensors_of
from tests.serving.caches import Cache, attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
TORCH_PAGES = [1, 16, 24, 64, 256, 300]
LENGTHS = [70, 0, 133, 1, 64]


def from_the_end(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
    """The offset of q comes with each call, as serving has it."""
    return kv_idx <= q_idx + custom.input_tensors["offset"][b]


def decoder(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, 16, dtype=dtype)] * 3
    io = CustomIO({"offset": ("batch",)})
    return AttentionEngine(metas, mask_mod=from_the_end, custom_fwd_inputs=io, backend=backend, **options)


def both(
    built: AttentionEngine, cache: Cache, q: Tensor, *custom: Tensor, **places: Tensor
) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The call on pages and the call on rows in a batch, each with row values; layout as of the engine."""
    turned = (lambda x: x.transpose(1, 2)) if built.layout == "bhsd" else (lambda x: x)
    options: dict[str, Any] = {"len_kv": cache.lengths, "return_final_rowscales": True, **places}
    paged = (turned(x).contiguous() for x in (cache.k, cache.v))
    rows = (turned(x) for x in (cache.k_rows, cache.v_rows))
    found = built(turned(q), *paged, *custom, block_table=cache.table, **options)
    known = built(turned(q), *rows, *custom, **options)
    return (turned(found[0]), found[1]), (turned(known[0]), known[1])


def same(found: tuple[Tensor, dict[str, Tensor]], known: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(found[0], known[0])
    assert found[1].keys() == known[1].keys()
    for name, x in found[1].items():
        assert torch.equal(x, known[1][name]), name


@pytest.mark.parametrize(
    ("backend", "page", "rows", "layout"),
    [
        (CPU, 16, 1, "bshd"),
        (CPU, 48, 4, "bhsd"),
        (CPU, 128, 40, "bshd"),
        ("triton-interpreter", 16, 2, "bshd"),
        ("triton-interpreter", 64, 3, "bhsd"),
        *(("torch", page, 1 + page % 4, "bshd") for page in TORCH_PAGES),
        pytest.param(CPU, 20, 3, "bshd", marks=pytest.mark.slow),
        pytest.param(CPU, 61, 2, "bhsd", marks=pytest.mark.slow),
        pytest.param(CPU, 256, 2, "bhsd", marks=pytest.mark.slow),
        pytest.param(CPU, 16, 70, "bhsd", marks=pytest.mark.slow),
        pytest.param("triton-interpreter", 48, 70, "bshd", marks=pytest.mark.slow),
    ],
)
def test_same_bits_as_in_a_batch(backend: str, page: int, rows: int, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, page, KV_HEADS), torch.randn(len(LENGTHS), rows, HEADS, 16)
    offset = (cache.lengths - rows).to(torch.int32)
    found, known = both(decoder(backend, layout=layout), cache, q, offset)
    same(found, known)
    o, lse = attention(q, cache.k_rows, cache.v_rows, cache.lengths, 0.25, offset)
    torch.testing.assert_close(found[0].double(), o, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found[1]["lse"].double(), lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program(name: str, seed: int) -> None:
    """Any score_mod, mask_mod and normaliser; torch carries the tile kernels out."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 32, KV_HEADS), torch.randn(len(LENGTHS), 20, HEADS, 16)
    captured = {n: x.detach() for n, x in tensors_of(name, len(LENGTHS), 140, 140, torch.float32).items()}
    built = engine(name, captured, "torch", torch.float32)
    found, known = both(built, cache, q)
    same(found, known)
    dense, _ = both(engine(name, captured, "reference", torch.float32), cache, q)
    torch.testing.assert_close(found[0], dense[0], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("backend", [CPU, "torch"])
def test_every_length_of_a_page(backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = list(range(16, 33))
    cache, q = filled(lengths, 16, KV_HEADS), torch.randn(len(lengths), 1, HEADS, 16)
    found, known = both(decoder(backend), cache, q, cache.lengths - 1)
    same(found, known)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    cache = filled(LENGTHS, 16, KV_HEADS, dtype=dtype)
    q = torch.randn(len(LENGTHS), 1, HEADS, 16).to(dtype)
    found, known = both(
        decoder(CPU if dtype is torch.bfloat16 else "torch", dtype), cache, q, cache.lengths - 1
    )
    same(found, known)
    o, _ = attention(q, cache.k_rows, cache.v_rows, cache.lengths, 0.25)
    torch.testing.assert_close(found[0].double(), o, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", [CPU, "torch", "reference"])
def test_packed_queries(backend: str, seed: int) -> None:
    """Prefills and decoding steps in one call: queries packed, keys in pages, the offset from the lengths."""
    torch.manual_seed(seed)
    counts, lengths = [1, 0, 30, 1, 7], [40, 20, 30, 16, 90]
    cu_len = torch.tensor([0, *counts]).cumsum(0)
    cache, q = filled(lengths, 16, KV_HEADS), torch.randn(sum(counts), HEADS, 16)
    offset = cache.lengths - cu_len.diff().to(torch.int32)
    o, rows = decoder(backend)(
        q, cache.k, cache.v, offset,
        cu_len_q=cu_len, block_table=cache.table, len_kv=cache.lengths, return_final_rowscales=True,
    )  # fmt: skip
    assert rows["lse"].shape == (HEADS, sum(counts))
    for b, (i, j) in enumerate(zip(cu_len[:-1].tolist(), cu_len[1:].tolist(), strict=True)):
        one = slice(b, b + 1)
        inputs = q[None, i:j], cache.k_rows[one], cache.v_rows[one], cache.lengths[one], 0.25, offset[one]
        want, lse = attention(*inputs)
        torch.testing.assert_close(o[i:j].double(), want[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(rows["lse"][:, i:j].double(), lse[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", [CPU, "torch"])
def test_split_keys(backend: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Keys in several splits: as in one to rounding, and as in a batch to the bit."""
    torch.manual_seed(seed)
    cache, q = filled([600, 17], 16, KV_HEADS), torch.randn(2, 1, HEADS, 16)
    built, offset = decoder(backend), torch.tensor([599, 11], dtype=torch.int32)
    whole, _ = both(built, cache, q, offset)
    monkeypatch.setattr(few_rows, "LEAST_NUMBERS_PER_SPLIT", 2**11)
    found, known = both(built, cache, q, offset)
    same(found, known)
    assert backend == "torch" or not torch.equal(found[0], whole[0])
    torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1]["lse"], whole[1]["lse"], rtol=1e-5, atol=1e-6)


def test_lists_of_blocks_and_pooled_weights(seed: int) -> None:
    """What else a call may bring or ask for goes on meaning positions of a sequence."""
    torch.manual_seed(seed)
    cache, q = filled([100, 128, 31], 24, KV_HEADS), torch.randn(3, 128, HEADS, 16)

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    mask = create_block_mask(causal, None, None, 128, 128, device="cpu", BLOCK_SIZE=32)
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    listed = AttentionEngine(metas, block_mask=mask, backend="torch")
    same(*both(listed, cache, q))
    pooled = AttentionEngine(metas, online_func=with_pooled(OnlineSoftmax, max=32), backend="torch")
    same(*both(pooled, cache, q))


def test_a_changed_table_is_read_again(seed: int) -> None:
    """Tables and lengths may be written in place from step to step."""
    torch.manual_seed(seed)
    cache, q = filled([40, 33], 16, KV_HEADS), torch.randn(2, 1, HEADS, 16)
    built, table, lengths = decoder("torch"), cache.table.clone(), cache.lengths.clone()
    offset = torch.full((2,), 1000, dtype=torch.int32)
    first = built(q, cache.k, cache.v, offset, block_table=table, len_kv=lengths)
    table[[0, 1]], lengths[[0, 1]] = table[[1, 0]], lengths[[1, 0]]
    turned = built(q.flip(0), cache.k, cache.v, offset, block_table=table, len_kv=lengths)
    assert torch.equal(turned, first.flip(0))


def test_values_share_the_memory_of_keys(seed: int) -> None:
    """Values may be columns of the keys' cache, and K and V may alternate in one buffer."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, KV_HEADS), torch.randn(len(LENGTHS), 1, HEADS, 16)
    one = torch.stack((cache.k, cache.v), 1)
    built = decoder("torch")
    offset = cache.lengths - 1
    wanted = built(q, cache.k, cache.v, offset, block_table=cache.table, len_kv=cache.lengths)
    found = built(q, one[:, 0], one[:, 1], offset, block_table=cache.table, len_kv=cache.lengths)
    assert torch.equal(found, wanted)


def test_in_a_graph(seed: int) -> None:
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, KV_HEADS), torch.randn(len(LENGTHS), 1, HEADS, 16)
    built = decoder("torch")

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        return built(q, cache.k, cache.v, lengths - 1, block_table=cache.table, len_kv=lengths) * 2

    wanted = step(q, cache.lengths)
    found = torch.compile(step, backend="eager", fullgraph=True)(q, cache.lengths)
    assert torch.equal(found, wanted)

"""Keys and values in float8 with scales: kernels, the dense definition, caches that grow, FlashMLA's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.errors import (
    DtypeMismatch,
    ShapeMismatch,
    UnsupportedDtype,
    UnsupportedOnBackend,
    WrongArgument,
)
from attn_engine.library import (
    alibi,
    append_to_cache,
    causal_with_offset,
    dequantise,
    flash_mla_with_kvcache,
    latent_bytes,
    pack_latent_bytes,
    to_fp8,
    unpack_latent_bytes,
    write_to_slots,
)
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages
from attn_engine.runtime.scaled import WrongScales
from tests.serving.caches import attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [70, 0, 33]


def engine(dims: tuple[int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    d, dv = dims
    return AttentionEngine([meta_tensor(None, None, None, n, dtype=dtype) for n in (d, d, dv)], **options)


def narrow(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales as a call takes them, and what they mean."""
    found = to_fp8(x.float(), block=x.shape[-1] if per_row else 128)
    return found.codes, found.scales[..., 0] if per_row else found.scales, found.values


CASES = [
    ((64, 64), 4, 1, torch.float32),  # a query in registers
    ((192, 136), 8, 2, torch.bfloat16),  # heads packed; last block of columns shorter
    ((40, 24), 2, 5, torch.float32),  # few rows, no whole vectors
    ((192, 128), 2, 40, torch.bfloat16),  # query rows in lanes, where bfloat16 would be multiplied in pairs
]


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("dims", "heads", "rows", "dtype"), CASES)
@pytest.mark.parametrize("backend", dict.fromkeys((CPU, "torch")))
def test_as_the_numbers_that_they_mean(
    backend: str, dims: tuple[int, int], heads: int, rows: int, dtype: torch.dtype, per_row: bool, seed: int
) -> None:
    """In pages with NaN in all that is not used, scales too; in a batch with lengths to the same bits."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 2, dims), torch.randn(3, rows, heads, dims[0]).to(dtype)
    (k, k_scale, k_values), (v, v_scale, v_values) = (
        narrow(x, per_row) for x in (cache.k_rows, cache.v_rows)
    )
    decode = engine(
        dims, dtype, mask_mod=causal_with_offset(), scale=0.2, backend=backend,
        custom_fwd_inputs=CustomIO({"q_offset": ("batch",)}),
    )  # fmt: skip
    offset = cache.lengths - rows
    given: dict[str, Any] = {"len_kv": cache.lengths, "q_offset": offset, "return_final_rowscales": True}
    out, saved = decode(q, k, v, k_scale=k_scale, v_scale=v_scale, **given)
    want, lse = attention(q, k_values, v_values, cache.lengths, 0.2, offset)
    most = 2e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(out.double(), want, rtol=most, atol=most)
    torch.testing.assert_close(saved["lse"].double(), lse, rtol=2e-5, atol=2e-5)
    dense = decode.reference(q, k, v, k_scale=k_scale, v_scale=v_scale, **given)[0]
    torch.testing.assert_close(
        dense, want, rtol=1e-5, atol=1e-6
    )  # values are rounded once, codes times scales are not
    pages = {n: narrow(x, per_row) for n, x in (("k", cache.k), ("v", cache.v))}
    scales = {f"{n}_scale": x[1] for n, x in pages.items()}
    paged, paged_rows = decode(q, pages["k"][0], pages["v"][0], **scales, block_table=cache.table, **given)
    assert torch.equal(paged, out)
    assert torch.equal(paged_rows["lse"], saved["lse"])


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_batches_without_lengths_and_any_score_mod(layout: str, seed: int) -> None:
    """Split keys, both layouts, strides of a shared buffer, a plan from the second call on, torch.compile."""
    torch.manual_seed(seed)
    slopes = torch.rand(4) / 1000
    built = engine((64, 64), score_mod=alibi(slopes), scale=0.125, backend=CPU, layout=layout)
    both = torch.randn(2, 9000, 2, 128) / 4
    both[0, :, 1] *= 4
    parts = [narrow(x, per_row=True) for x in (both[..., :64], both[..., 64:])]
    buffer = torch.cat([codes.view(torch.uint8) for codes, _, _ in parts], -1).view(torch.float8_e4m3fn)
    k, v = buffer[..., :64], buffer[..., 64:]
    q = torch.randn(2, 1, 4, 64)
    named = {"k_scale": parts[0][1], "v_scale": parts[1][1]}
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        named = {n: x.transpose(1, 2) for n, x in named.items()}
    out = built(q, k, v, **named)
    torch.testing.assert_close(out.double(), built.reference(q, k, v, **named), rtol=2e-5, atol=2e-5)
    for _ in range(3):
        assert torch.equal(built(q, k, v, **named), out)
    torch.compiler.reset()
    compiled: Any = torch.compile(lambda *x, **n: built(*x, **n), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, **named), out)
    longer = {n: x * 2 for n, x in named.items()}
    assert not torch.equal(built(q, k, v, **longer), out)


def test_values_in_the_memory_of_keys_have_scales_of_their_own(seed: int) -> None:
    """The same bytes mean other numbers as keys and as values."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 1, (136, 8)), torch.randn(3, 1, 4, 136)
    k, scale, numbers = narrow(cache.k, per_row=False)
    built = engine((136, 128), backend=CPU)
    given: dict[str, Any] = {"len_kv": cache.lengths, "block_table": cache.table, "k_scale": scale}
    for factor in (1, 3):
        out = built(q, k, k[..., :128], v_scale=scale[..., 0] * factor, **given)
        values = numbers[..., :128] * factor
        want = built.reference(q, k, k[..., :128], v_scale=scale[..., 0] * factor, **given)
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
        wide = built(q, numbers, values, len_kv=cache.lengths, block_table=cache.table)
        torch.testing.assert_close(out, wide, rtol=2e-5, atol=2e-5)


def test_packed_sequences(seed: int) -> None:
    torch.manual_seed(seed)
    built = engine((32, 32), backend=CPU)
    cu = torch.tensor([0, 5, 5, 40])
    q, x = torch.randn(40, 4, 32), torch.randn(2, 40, 2, 32)
    (k, k_scale, k_values), (v, v_scale, v_values) = (narrow(y, True) for y in x)
    out = built(q, k, v, cu_len_q=cu, k_scale=k_scale, v_scale=v_scale)
    torch.testing.assert_close(out, built(q, k_values, v_values, cu_len_q=cu), rtol=2e-5, atol=2e-5)


def test_every_number_of_the_format() -> None:
    """Codes of all finite numbers, subnormal ones too, come out exactly; those that are none give NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()
    finite = ~numbers.isnan()
    for rows, built in ((1, engine((16, 16), backend=CPU)), (64, engine((16, 16), backend=CPU))):
        v = codes.view(256, 1, 1, 1).expand(256, 1, 1, 16)
        k = torch.zeros(256, 1, 1, 16).to(torch.float8_e4m3fn)
        one = torch.ones(256, 1, 1)
        out = built(torch.zeros(256, rows, 1, 16), k, v, k_scale=one, v_scale=one * 2)
        assert torch.equal(out[finite, 0, 0, 0], numbers[finite] * 2)
        assert bool(out[~finite].isnan().all())
        assert int(finite.sum()) == 254


def test_a_cache_that_grows(seed: int) -> None:
    """New rows are quantised on the way, with a scale for each row or for 128 columns of it, into pages and batches."""
    torch.manual_seed(seed)
    table = torch.tensor([[4, 0, 2], [3, -1, -1]])
    caches = [torch.zeros(5, 16, 2, d).to(torch.float8_e4m3fn) for d in (192, 64)]
    scales = [torch.full((5, 16, 2, 2), 7.0), torch.full((5, 16, 2), 7.0)]
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    k, v = torch.randn(2, 20, 2, 192), torch.randn(2, 20, 2, 64).bfloat16()
    counts = torch.tensor([20, 4])
    after = append_to_cache((k, v), caches, lengths, table, counts=counts, scales=scales)
    assert after.tolist() == [20, 7]
    written: list[Any] = [(k, caches[0], scales[0], 128), (v, caches[1], scales[1], 64)]
    for x, cache, scale, block in written:
        want = to_fp8(x, block=block)
        shown = scale if scale.ndim == 4 else scale[..., None]
        for b, position, i in ((0, 17, 17), (1, 3, 0), (1, 6, 3)):
            page, row = int(table[b, position // 16]), position % 16
            found = dequantise(cache[page, row], shown[page, row])
            torch.testing.assert_close(
                found,
                (want.codes.float()[b, i] * want.scales[b, i].repeat_interleave(block, -1)[:, : x.shape[-1]]),
            )
        assert float(shown[1, 0, 0, 0]) == 7.0
    kept = [x.clone() for x in scales]
    write_to_slots((k[:, :1], v[:, :1]), caches, torch.tensor([[16], [-1]]), scales=scales)
    assert torch.equal(scales[0][1, 0], to_fp8(k[0, 0]).scales)
    changed = [(a != b).flatten(1).any(1).tolist() for a, b in zip(scales, kept, strict=True)]
    assert changed == [[False, True, False, False, False]] * 2


def test_caches_refuse(seed: int) -> None:
    cache, scale = torch.zeros(2, 16, 1, 32).to(torch.float8_e4m3fn), torch.zeros(2, 16, 1)
    new, lengths = torch.randn(2, 1, 1, 32), torch.tensor([0, 0])
    for options, argument in (
        ({}, "scales"),
        ({"scales": scale[:1]}, "scales"),
        ({"scales": scale.double()}, "scales"),
        ({"scales": (scale, scale)}, "scales"),
        ({"scales": torch.zeros(2, 16, 1, 2)}, "scales"),  # of 128 columns each, where there are 32
        ({"scales": scale, "block_table": torch.tensor([[0], [0]])}, "block_table"),  # one slot for two rows
        ({"scales": scale, "block_table": torch.tensor([[0], [2]])}, "block_table"),
        ({"scales": scale, "counts": torch.tensor([1, 2])}, "counts"),
    ):
        with pytest.raises(WrongPages) as found:
            append_to_cache(new, cache, lengths, **options)  # pyright: ignore[reportArgumentType]
        assert found.value.details["argument"] == argument
    with pytest.raises(WrongPages):
        append_to_cache(new, torch.zeros(2, 16, 1, 32), lengths, scales=scale)
    assert not cache.float().any()
    assert not scale.any()


INDICES = torch.zeros(2, 1, 1, 4, dtype=torch.int32)


def bad(**changed: Any) -> dict[str, Any]:
    narrowed = torch.zeros(2, 16, 2, 32).to(torch.float8_e4m3fn)
    scale = torch.ones(2, 16, 2)
    return {
        "q": torch.zeros(2, 1, 4, 32),
        "k": narrowed,
        "v": narrowed,
        "k_scale": scale,
        "v_scale": scale,
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "error", "argument"),
    [
        ({"k_scale": None}, WrongScales, "k_scale"),
        ({"k_scale": None, "v_scale": None}, WrongScales, "k_scale"),
        ({"k_scale": torch.ones(2, 16)}, WrongScales, "k_scale"),
        ({"v_scale": torch.ones(2, 16, 1)}, WrongScales, "v_scale"),
        ({"v_scale": torch.ones(2, 16, 2, 2)}, WrongScales, "v_scale"),
        ({"v_scale": torch.ones(2, 16, 2).bfloat16()}, WrongScales, "v_scale"),
        ({"k": torch.zeros(2, 16, 2, 32)}, WrongScales, "k"),
        ({"v": torch.zeros(2, 16, 2, 32).to(torch.float8_e5m2)}, WrongScales, "v"),
        ({"q": torch.zeros(2, 1, 4, 32).to(torch.float8_e4m3fn)}, Exception, "q"),
        ({"q": torch.zeros(2, 1, 4, 32, requires_grad=True)}, CacheNotDifferentiable, "q"),
        ({"token_indices": INDICES, "k_scale": None}, WrongScales, "k_scale"),
        ({"token_indices": INDICES, "k_scale": None, "v_scale": None}, WrongScales, "k_scale"),
        ({"token_indices": INDICES, "v_scale": torch.ones(2, 16, 1)}, WrongScales, "v_scale"),
        ({"token_indices": INDICES, "v_scale": torch.ones(2, 16, 2).double()}, WrongScales, "v_scale"),
        ({"token_indices": INDICES, "v": torch.zeros(2, 16, 2, 32)}, WrongScales, "v"),
        (
            {"token_indices": INDICES, "q": torch.zeros(2, 1, 4, 32, requires_grad=True)},
            CacheNotDifferentiable,
            "q",
        ),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error) as found:
        engine((32, 32), backend="torch")(**bad(**changed))
    assert found.value.details["argument"] == argument  # pyright: ignore[reportAttributeAccessIssue]


def test_backends_that_do_not_and_captured_float8() -> None:
    with pytest.raises(UnsupportedOnBackend):
        engine((32, 32), backend="tilelang-cpu")(**bad())
    wide = torch.zeros(1, 16, 1, 1152).to(torch.float8_e4m3fn)
    scale = torch.ones(1, 16, 1)
    with pytest.raises(UnsupportedOnBackend, match="1024"):
        engine((1152, 1152), backend="triton-interpreter")(
            torch.zeros(1, 1, 1, 1152), wide, wide, k_scale=scale, v_scale=scale
        )
    table = torch.zeros(4).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedDtype):
        engine((32, 32), score_mod=lambda score, b, h, q_idx, kv_idx: score + table[h])
    with pytest.raises((DtypeMismatch, WrongScales)):
        engine((32, 32), backend="torch")(*(bad()[n] for n in ("q", "k", "v")))


# -- FlashMLA's bytes


def test_bytes_of_a_token(seed: int) -> None:
    torch.manual_seed(seed)
    latent, rope = torch.randn(3, 5, 512), torch.randn(3, 5, 64)
    rows = pack_latent_bytes(latent, rope, ue8m0=True)
    assert rows.shape == (3, 5, 656)
    parts = latent_bytes(rows)
    assert [x.shape[-1] for x in parts] == [512, 4, 64]
    assert parts.latent.data_ptr() == rows.data_ptr()
    want = to_fp8(latent, ue8m0=True)
    assert torch.equal(parts.scales, want.scales)
    assert bool((torch.frexp(parts.scales).mantissa == 0.5).all())
    wide = unpack_latent_bytes(rows.view(torch.float8_e4m3fn), torch.float32)
    assert torch.equal(wide, torch.cat((want.values, rope.bfloat16().float()), -1))
    parts.scales[0, 0] *= 2
    assert torch.equal(unpack_latent_bytes(rows, torch.float32)[0, 0, :512], want.values[0, 0] * 2)
    with pytest.raises(ShapeMismatch):
        latent_bytes(rows[..., :500])
    with pytest.raises(UnsupportedDtype):
        latent_bytes(rows.float())


def paged_bytes(cache: Any, latent: int) -> Tensor:
    return pack_latent_bytes(cache.k[..., :latent], cache.k[..., latent:])


@pytest.mark.parametrize("causal", [False, True])
def test_latent_cache_in_bytes(causal: bool, seed: int) -> None:
    """As the cache of numbers that it means; NaN in all that is not used."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 1, (136, 8)), torch.randn(3, 2, 5, 136)
    rows = paged_bytes(cache, 128)
    options: dict[str, Any] = {"head_dim_v": 128, "softmax_scale": 0.1, "causal": causal, "backend": CPU}
    sink = torch.randn(5)
    sink[0] = -torch.inf
    out, lse = flash_mla_with_kvcache(q, rows, cache.table, cache.lengths, is_fp8_kvcache=True, **options)
    numbers = unpack_latent_bytes(rows, torch.float32, 128)
    want, want_lse = flash_mla_with_kvcache(q, numbers, cache.table, cache.lengths, **options)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    sunk, same = flash_mla_with_kvcache(
        q, rows, cache.table, cache.lengths, is_fp8_kvcache=True, attn_sink=sink, **options
    )
    share = lse.exp() / (lse.exp() + sink.exp()[:, None])
    share = torch.where(lse.isinf(), 0.0, share)
    torch.testing.assert_close(sunk, out * share.transpose(1, 2)[..., None])
    assert torch.equal(same, lse)
    assert torch.equal(sunk[:, :, 0], out[:, :, 0])


@pytest.mark.parametrize("is_fp8", [False, True])
def test_places_in_the_cache(is_fp8: bool, seed: int) -> None:
    """FlashMLA's sparse decoding: any places, invalid ones anywhere, a row of none, a count of entries."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 1, (136, 8)), torch.randn(3, 2, 5, 136)
    rows = paged_bytes(cache, 128)
    numbers = unpack_latent_bytes(rows, torch.float32, 128)
    used = (~numbers.flatten(0, 2).isnan().any(-1)).nonzero().flatten()
    indices = used[torch.randint(0, len(used), (3, 2, 12))].int()
    indices[0, 0, 3:7] = torch.tensor([-1, -(2**31), len(numbers) * 16, 2**31 - 1], dtype=torch.int32)
    indices[1, 1] = -1
    counts = torch.tensor([12, 12, 5])
    out, lse = flash_mla_with_kvcache(
        q, rows if is_fp8 else numbers, None, None, 128, softmax_scale=0.1,
        is_fp8_kvcache=is_fp8, indices=indices, topk_length=counts, backend=CPU,
    )  # fmt: skip
    flat = numbers.flatten(0, 2).double()
    for b in range(3):
        for i in range(2):
            places = [j for j in indices[b, i, : int(counts[b])].tolist() if 0 <= j < len(flat)]
            score = q[b, i].double() @ flat[places].T * 0.1
            want = torch.softmax(score, -1) @ flat[places][:, :128]
            torch.testing.assert_close(out[b, i].double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b, :, i].double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert bool(lse[1, :, 1].isinf().all())
    assert not out[1, 1].any()


def test_arguments_of_flash_mla() -> None:
    q, cache = torch.zeros(1, 1, 2, 16), torch.zeros(1, 16, 1, 16)
    indices = torch.zeros(1, 1, 4, dtype=torch.int32)
    wrong: list[Any] = [
        ({"extra_k_cache": cache}, "extra_k_cache"),
        ({"indices": indices, "causal": True}, "causal"),
        ({"indices": indices.float()}, "indices"),
        ({}, "cache_seqlens"),
    ]
    for options, argument in wrong:
        with pytest.raises(WrongArgument) as found:
            flash_mla_with_kvcache(q, cache, None, None, 8, **options)
        assert found.value.details["argument"] == argument

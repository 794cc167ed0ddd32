"""Keys and values in float8 in generated Triton: numbers through the interpreter, machine code ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.footprint import footprint
from attn_engine.codegen.gpu_schedule import default_schedule
from attn_engine.codegen.lower.columns import cut_columns
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Schedule, short_query_schedule
from attn_engine.codegen.targets import target_named
from attn_engine.ir.ops import Storage
from attn_engine.ir.passes.pack_heads import Packing, pack_heads
from attn_engine.ir.program import Attention, Sequences
from attn_engine.ir.tile import Kernel
from attn_engine.library import alibi, causal_with_offset
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.scaled import dequantised
from attn_engine.runtime.source_module import load_source
from attn_engine.runtime.triton_aot import SHARED_LIMITS, AotReport, compile_ahead
from attn_engine.runtime.triton_interpreter import interpret
from tests.gpu_tiles import gpu_schedule
from tests.serving.caches import attention, filled
from tests.serving.test_float8 import engine, narrow

LENGTHS = [70, 0, 33]
BACKEND = TritonBackend("triton", interpret=False)
NOISE = 16  # bytes that ptxas keeps on the stack of some kernels, outside their loops


def rounded(values: Tensor, per_row: bool, dtype: torch.dtype) -> Tensor:
    """What a kernel multiplies: codes times scales in q's type."""
    codes, scale, _ = narrow(values, per_row)
    return dequantised(codes, scale[..., None] if per_row else scale, dtype)


@pytest.mark.parametrize(
    ("dims", "heads", "rows", "dtype", "per_row", "page"),
    [
        ((64, 64), 4, 1, torch.float32, True, 64),
        ((192, 136), 8, 2, torch.bfloat16, False, 16),
        pytest.param((40, 24), 2, 5, torch.float32, False, 24, marks=pytest.mark.slow),
        pytest.param((192, 128), 2, 40, torch.bfloat16, True, 16, marks=pytest.mark.slow),
        pytest.param((192, 136), 2, 40, torch.float16, False, 64, marks=pytest.mark.slow),
        pytest.param((320, 256), 4, 3, torch.float32, False, 256, marks=pytest.mark.slow),
        pytest.param((240, 112), 4, 3, torch.float32, False, 48, marks=pytest.mark.slow),
    ],
)
def test_as_the_numbers_that_they_mean(
    dims: tuple[int, int], heads: int, rows: int, dtype: torch.dtype, per_row: bool, page: int, seed: int
) -> None:
    """A batch with lengths, one of them 0, and pages in no order to the same bits; NaN in all that is not used."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, page, 2, dims), torch.randn(3, rows, heads, dims[0]).to(dtype)
    offset = cache.lengths - rows
    decode = engine(
        dims, dtype, mask_mod=causal_with_offset(), scale=0.2, backend="triton-interpreter",
        custom_fwd_inputs=CustomIO({"q_offset": ("batch",)}),
    )  # fmt: skip
    given: dict[str, Any] = {"len_kv": cache.lengths, "q_offset": offset, "return_final_rowscales": True}
    (k, k_scale, _), (v, v_scale, _) = (narrow(x, per_row) for x in (cache.k_rows, cache.v_rows))
    out, saved = decode(q, k, v, k_scale=k_scale, v_scale=v_scale, **given)
    numbers = (rounded(x, per_row, dtype) for x in (cache.k_rows, cache.v_rows))
    want, lse = attention(q, *numbers, cache.lengths, 0.2, offset)
    most = 2e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(out.double(), want, rtol=most, atol=most)
    torch.testing.assert_close(saved["lse"].double(), lse, rtol=2e-5, atol=2e-5)
    pages = {n: narrow(x, per_row) for n, x in (("k", cache.k), ("v", cache.v))}
    given |= {"k_scale": pages["k"][1], "v_scale": pages["v"][1], "block_table": cache.table}
    for _ in range(2):
        paged, paged_rows = decode(q, pages["k"][0], pages["v"][0], **given)
        assert torch.equal(paged, out)
        assert torch.equal(paged_rows["lse"], saved["lse"])


@pytest.mark.parametrize("per_row", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_in_the_memory_of_keys(per_row: bool, seed: int) -> None:
    """One load where their scales are those of the keys too, to the bits of two; two where they are not."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 1, (200, 8)), torch.randn(3, 1, 5, 200)
    k, scale, _ = narrow(cache.k, per_row)
    v, of_values = k[..., :128], scale if per_row else scale[..., :1]
    built = engine((200, 128), backend="triton-interpreter", scale=0.1)
    given: dict[str, Any] = {"len_kv": cache.lengths, "block_table": cache.table, "k_scale": scale}
    found = built(q, k, v, v_scale=of_values, **given)
    (call, _), *_ = built._calls.values()
    assert "_sharing" in vars(call.compiled)
    assert torch.equal(found, built(q, k, v.clone(), v_scale=of_values.clone(), **given))
    want = built.reference(q, k, v, v_scale=of_values, **given)
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5)
    doubled = built(q, k, v, v_scale=of_values * 2, **given)
    torch.testing.assert_close(doubled, found * 2, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_split_keys_and_a_score_mod(seed: int) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"score_mod": alibi(torch.rand(4) / 100), "scale": 0.125}
    built = engine((64, 64), backend="triton-interpreter", **options)
    q, x = torch.randn(1, 1, 4, 64), torch.randn(2, 1, 9000, 2, 64)
    (k, k_scale, _), (v, v_scale, _) = (narrow(y, True) for y in x)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    out = built(q, k, v, **scales)
    torch.testing.assert_close(out.double(), built.reference(q, k, v, **scales), rtol=2e-5, atol=2e-5)
    assert torch.equal(built(q, k, v, **scales), out)


DECODE = """
import triton
import triton.language as tl

{helper}

@triton.jit
def every(codes, values):
    place = tl.arange(0, 256)
    tl.store(values + place, float8_values(tl.load(codes + place)))
"""


def test_bytes_decode_to_every_number_of_the_format() -> None:
    """What targets without a conversion run: all finite numbers, subnormal ones too, exactly; NaN for those that are
    none."""
    from attn_engine.codegen.backends.triton_functions import HELPERS

    function = load_source(DECODE.format(helper=HELPERS["float8_values"]), "every").every
    codes, values = torch.arange(256, dtype=torch.uint8), torch.full((256,), 7.0)
    interpret(function, (1,), codes, values)
    want = codes.view(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(values.numpy(), want.numpy())
    assert torch.equal(values.signbit()[~want.isnan()], want.signbit()[~want.isnan()])
    assert int(want.isnan().sum()) == 2


# -- generated text and machine code


def program(dims: tuple[int, int], page: int, dtype: torch.dtype = torch.bfloat16) -> Attention:
    d, dv = dims
    built = AttentionEngine(
        [meta_tensor(None, None, None, n, dtype=dtype) for n in (d, d, dv)],
        mask_mod=causal_with_offset(),
        custom_fwd_inputs=CustomIO({"q_offset": ("batch",)}),
        backend="triton",
    )
    sequences = Sequences(packed=False, page=page) if page else None
    return replace(built.program, cache=Storage.FLOAT8, sequences=sequences, values_in_keys=dims[0] > 512)


def kernel_of(
    dims: tuple[int, int], page: int, rows: int = 0, target: str = "sm_90"
) -> tuple[Kernel, Schedule]:
    """Of a prefill, or of decoding with so many rows that share a kv head."""
    found = program(dims, page)
    schedule = default_schedule(found, target_named(target))
    if rows:
        found, schedule = pack_heads(found, Packing.ONE_QUERY), short_query_schedule(schedule, rows)
    return lower(found, schedule, "decode" if rows else "forward").kernels[0], schedule


def compiled(made: tuple[Kernel, Schedule], target: str) -> AotReport:
    kernel, schedule = made
    return compile_ahead(kernel, BACKEND.source(kernel, schedule), target, BACKEND.options(kernel, schedule))


def test_tiles_have_one_scale_for_each_row() -> None:
    """576 columns are four blocks and a rest; the tiles of products are of q's type, and are counted so."""
    kernel = lower(program((576, 512), 64), gpu_schedule(576, 512, 2), "forward").kernel("forward")
    text = render_triton(kernel)
    assert text.count("= float8_values(") == 5
    assert text.count("K_scale_base") == 10
    assert "V" not in {p.name for p in kernel.params}
    sizes = [n for axis, n in cut_columns(kernel).tile if axis.startswith("d") and not axis.startswith("dv")]
    assert sizes == [128, 128, 128, 128, 64]
    facts = footprint(kernel)
    assert facts.width == 2
    assert sum(t.bytes for t in facts.staged) == 2 * 576 * kernel.block("kv")


SPILLS = {(576, 512, 64): 72}  # of splits of 64 rows: outside the loop but for two registers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "page", "rows"),
    [
        ((128, 128), 64, 0),
        ((128, 128), 0, 0),
        ((128, 128), 16, 16),
        ((64, 64), 64, 16),
        ((192, 128), 64, 64),
        ((576, 512), 64, 0),
        ((576, 512), 64, 16),
        ((576, 512), 64, 64),
    ],
)
def test_hardware_converts_on_sm_90(
    dims: tuple[int, int], page: int, rows: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compiled(kernel_of(dims, page, rows), "sm_90")
    code = report.machine_code()
    assert code.count("F2FP.F16.E4M3") > 0, code.by_kind()
    assert report.spill_bytes <= SPILLS.get((*dims, rows), NOISE), report
    assert report.shared_bytes <= SHARED_LIMITS["sm_90"], report


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("rows", [0, 16])
def test_other_targets_compile(
    target: str, rows: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sm_80 and gfx942 take bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compiled(kernel_of((128, 128), 64, rows, target), target)
    assert report.spill_bytes <= NOISE, report
    assert report.shared_bytes <= SHARED_LIMITS[target], report
    if report.cubin:
        assert (report.machine_code().count("F2FP.F16.E4M3") > 0) == (target == "sm_100"), report

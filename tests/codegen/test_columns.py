"""Head dimensions that are no powers of two, in pieces: the kernels, and what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.lower.columns import MOST_PIECES, cut_columns, padded, pieces
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import Dot, postorder
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel, expressions, walk
from attn_engine.ir.verify import verify_kernel
from attn_engine.library import causal
from attn_engine.runtime.backends import TileProgram
from attn_engine.runtime.compiled import CompiledAttention
from tests.gpu_tiles import gpu_schedule
from tests.runtime.rules import program, softmax


def kernels(dim_qk: int, dim_v: int) -> list[Kernel]:
    wanted = program(None, None, softmax(), element=Storage.BFLOAT16, dim_qk=dim_qk, dim_v=dim_v)
    schedule = gpu_schedule(dim_qk, dim_v, 2)
    return [k for d in ("forward", "decode", "backward") for k in lower(wanted, schedule, d).kernels]


def test_pieces_hold_all_columns_and_waste_little() -> None:
    for columns in range(1, 1025):
        cut = pieces(columns)
        assert sum(cut) == columns
        assert len(cut) <= MOST_PIECES
        assert all(padded(n) == n for n in cut[:-1]), cut
        room = sum(padded(n) for n in cut)
        assert room <= padded(columns)
        assert columns < 128 or room * 8 <= columns * 9, (columns, cut)
        assert columns % 16 or columns > 112 or room == columns, (columns, cut)


def test_kernels_of_powers_of_two_are_left_alone() -> None:
    for kernel in kernels(64, 128):
        assert cut_columns(kernel) is kernel


def test_a_cut_kernel_is_legal_and_cut_once() -> None:
    for kernel in kernels(576, 512):
        cut = cut_columns(kernel)
        verify_kernel(cut)
        assert cut_columns(cut) is cut
        tile = {axis: n for axis, n in cut.tile if axis.startswith("d")}
        assert tile == {"d": 512, "d2": 64, "dv": 512}
        assert (cut.first_column("d"), cut.first_column("d2"), cut.first_column("dv")) == (0, 512, 0)


def test_products_over_columns_are_sums_of_products() -> None:
    forward = next(k for k in kernels(192, 128) if k.name == "forward")
    products = [
        n for s in walk(cut_columns(forward).body) for n in postorder(*expressions(s)) if isinstance(n, Dot)
    ]
    assert [p.contracted for p in dict.fromkeys(products)].count("d2") == 1
    text = render_triton(forward)
    assert "score = tl.dot(query, key.T) + tl.dot(query_2, key_2.T)\n" in text
    assert "d2_idx = 128 + tl.arange(0, BLOCK_D2)" in text
    assert "BLOCK_D = tl.constexpr(128)\nBLOCK_D2 = tl.constexpr(64)" in text
    assert "DIM_QK" not in text  # nothing is masked


def test_a_last_piece_is_masked() -> None:
    text = render_triton(kernels(40, 64)[0])
    assert "BLOCK_D = tl.constexpr(32)\nDIM_QK = tl.constexpr(40)\nBLOCK_D2 = tl.constexpr(16)" in text
    assert "d2_idx[None, :] < DIM_QK" in text


def test_a_users_name_is_not_taken() -> None:
    def score_mod(score: Tensor, b: int, h: int, q_idx: int, kv_idx: int) -> Tensor:
        query_2 = score * 0.5
        return query_2 * torch.tanh(query_2)

    engine = AttentionEngine([meta_tensor(None, None, None, 96)] * 3, score_mod, backend="triton")
    text = engine.source()
    assert "query_2 = score * 0.5" in text
    assert "query_2_2 = tl.load(" in text


class CutTiles:
    """The tile programs that the Triton renderer spells, carried out by torch."""

    name = "torch"

    def schedule(self, program: Attention) -> Schedule:
        return gpu_schedule(program.dim_qk, program.dim_v, 4)

    def refuse(self, program: Attention, captures: object) -> None:
        pass

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return ""

    def compile(self, kernel: Kernel, schedule: Schedule) -> TileProgram:
        return TileProgram(cut_columns(kernel))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


@pytest.mark.parametrize("dims", [(576, 512), (112, 40), (17, 100)])
def test_pieces_compute_what_the_whole_does(dims: tuple[int, int]) -> None:
    torch.manual_seed(dims[0])
    q, k, v = (
        torch.randn(1, h, n, d, dtype=torch.float64)
        for h, n, d in ((2, 37, dims[0]), (1, 45, dims[0]), (1, 45, dims[1]))
    )
    wanted = program(None, None, softmax(), element=Storage.FLOAT64, dim_qk=dims[0], dim_v=dims[1])
    backend = CutTiles()
    compiled = CompiledAttention(wanted, backend, backend.schedule(wanted))
    out, d_out = torch.full((1, 2, 37, dims[1]), torch.nan, dtype=q.dtype), torch.randn(1, 2, 37, dims[1])
    saved = compiled.forward(q, k, v, {}, {"scale": 0.3}, out)
    gradients = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    compiled.backward(d_out.double(), (q, k, v), out, saved, {}, {"scale": 0.3}, gradients, ())
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attention(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs, d_out.double()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dims", [(48, 48), (80, 96), (192, 128), (72, 64), (96, 40)])
def test_interpreted_kernels_meet_the_reference(dims: tuple[int, int]) -> None:
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (dims[0], dims[0], dims[1])]
    engine = AttentionEngine(metas, mask_mod=causal(), backend="triton-interpreter")
    torch.manual_seed(sum(dims))
    q, k, v = (torch.randn(1, 70, h, d) for h, d in ((2, dims[0]), (1, dims[0]), (1, dims[1])))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, expected = engine(q, k, v), engine.reference(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    d_out = torch.randn_like(out)
    mine = torch.autograd.grad(out, inputs, d_out)
    theirs = torch.autograd.grad(expected, inputs, d_out.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

"""Kernels that walk over block lists, against the formula evaluated densely in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import OnlineRetention
from attn_engine.masks.lists import BlockLists
from tests.lists.draws import Drawn, draw, lists_from

DIM = 32
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the largest element


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


@dataclass(frozen=True)
class Case:
    """Sizes of a call and of its lists; `lists` are (batches, heads) of the lists."""

    name: str
    shape: tuple[int, int, int] = (1, 2, 2)  # batches, heads, kv heads
    lengths: tuple[int, int] = (256, 256)
    blocks: tuple[int, int] = (64, 64)
    lists: tuple[int, int] = (1, 1)
    mask: Any = None
    density: tuple[float, float] = (0.3, 0.3)


CASES = (
    Case("one list"),
    Case("causal", mask=causal),
    Case("per head", lists=(1, 2), mask=causal),
    Case("ragged, grouped, per query head", (2, 4, 2), (200, 333), (64, 32), (2, 4), causal),
    Case("ragged, grouped, per kv head", (2, 4, 2), (200, 333), (128, 128), (2, 2), causal),
    Case("ragged, grouped, shared", (2, 4, 1), (77, 190), (32, 64), (2, 1)),
    Case("small query blocks", (1, 2, 1), (130, 100), (16, 48), (1, 2), causal),
    Case("small key blocks", (1, 2, 2), (130, 100), (96, 16)),
    Case("every block in full", lengths=(130, 100), density=(0.0, 1.0)),
    Case("every block in part", lengths=(130, 100), density=(1.0, 0.0), mask=causal),
    Case("nothing", lengths=(130, 100), density=(0.0, 0.0), mask=causal),
    Case("blocks as long as the axes", lengths=(50, 40), blocks=(50, 40), density=(0.0, 1.0), mask=causal),
    Case("blocks longer than the axes", lengths=(50, 40), blocks=(100, 57), density=(1.0, 0.0), mask=causal),
)
SHORT = tuple(c for c in CASES if c.name in ("causal", "ragged, grouped, per query head", "small key blocks"))


@cache
def engine(backend: str, dtype: torch.dtype, mask: Any) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, DIM, dtype=dtype)] * 3
    return AttentionEngine(metas, mask_mod=mask, layout="bhsd", backend=backend)


def tensors(case: Case, dtype: torch.dtype, dim: int = DIM) -> list[Tensor]:
    batches, heads, kv_heads = case.shape
    q_len, kv_len = case.lengths
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batches, h, n, dim).to(dtype).requires_grad_() for h, n in sizes]


def lists_of(case: Case, seed: int = 0) -> Drawn:
    return draw(seed, case.blocks, case.lengths, *case.lists, case.density)


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """softmax over the visible pairs; 0 in a row without one."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + bias
    dead = ~visible.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf).masked_fill(dead, 0.0), -1)
    return weights.masked_fill(dead, 0.0) @ v


def agree(found: Tensor, exact: Tensor, limit: float) -> None:
    scale = max(exact.abs().max().item(), 1e-3)
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    assert (found.double() - exact.double()).abs().max().item() <= limit * scale


def compare(case: Case, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(case.name))
    drawn, inputs = lists_of(case), tensors(case, dtype)
    o, rows = engine(backend, dtype, case.mask)(*inputs, block_mask=drawn.lists, return_final_rowscales=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    visible = drawn.visible(case.shape[1], case.mask)
    exact = formula(*exact_inputs, visible)
    agree(o, exact, LIMITS[dtype])
    empty = ~visible.any(-1).expand(o.shape[:3])
    assert torch.equal(rows["lse"].isneginf(), empty)
    assert not o[empty].any()
    weight = torch.randn(o.shape).to(dtype)
    found = torch.autograd.grad(o, inputs, weight)
    for mine, its in zip(found, torch.autograd.grad(exact, exact_inputs, weight.double()), strict=True):
        agree(mine, its, LIMITS[dtype])
    assert not found[0][empty].any()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case: Case) -> None:
    compare(case, "cpu", torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_tile_program(case: Case) -> None:
    compare(case, "torch", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SHORT, ids=lambda c: c.name)
def test_other_types(case: Case, dtype: torch.dtype) -> None:
    compare(case, "cpu", dtype)


@pytest.mark.parametrize("case", SHORT[:2], ids=lambda c: c.name)
def test_triton(case: Case) -> None:
    compare(case, "triton-interpreter", torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference(case: Case) -> None:
    drawn, inputs = lists_of(case), tensors(case, torch.float64)
    found = engine("torch", torch.float64, case.mask).reference(*inputs, block_mask=drawn.lists)
    agree(found, formula(*inputs, drawn.visible(case.shape[1], case.mask)), 1e-12)


# -- few query rows


DECODE = (
    Case("one row per head", (2, 4, 4), (1, 300), (16, 64), (2, 4)),
    Case("one row, packed", (2, 8, 2), (1, 300), (64, 64), (2, 2)),
    Case("one row, lists of its own per query head", (1, 4, 2), (1, 300), (64, 32), (1, 4)),
    Case("five rows, packed", (1, 4, 2), (5, 333), (16, 16), (1, 1), causal),
    Case("five rows", (1, 2, 2), (5, 333), (128, 128), (1, 2)),
    Case("thirty rows, several q blocks", (1, 4, 2), (30, 333), (16, 32), (1, 2), causal),
)


@pytest.mark.parametrize("splits", ["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", DECODE, ids=lambda c: c.name)
def test_few_rows(case: Case, dtype: torch.dtype, splits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if splits == "split":
        monkeypatch.setattr("attn_engine.runtime.few_rows.LEAST_NUMBERS_PER_SPLIT", DIM * 16)
    torch.manual_seed(1)
    drawn, inputs = lists_of(case, 3), [x.detach() for x in tensors(case, dtype)]
    o, rows = engine("cpu", dtype, case.mask)(*inputs, block_mask=drawn.lists, return_final_rowscales=True)
    visible = drawn.visible(case.shape[1], case.mask)
    agree(o, formula(*(x.double() for x in inputs), visible), LIMITS[dtype])
    assert torch.equal(rows["lse"].isneginf(), ~visible.any(-1).expand(o.shape[:3]))


# -- what is not listed does not exist


@pytest.mark.parametrize("q_len", [1, 256])
def test_hidden_blocks_may_hold_nan(q_len: int) -> None:
    kinds = torch.zeros(1, 1, -(-q_len // 64), 4, dtype=torch.int)
    kinds[..., 0], kinds[..., 2] = 1, 2
    drawn = lists_from(kinds, 64, 64, q_len, 256)
    q, k, v = tensors(Case("", lengths=(q_len, 256)), torch.float32)
    poisoned = [x.detach().clone() for x in (k, v)]
    for x in poisoned:
        x[:, :, 64:128], x[:, :, 192:] = math.nan, math.nan
        x.requires_grad_()
    run = engine("cpu", torch.float32, None)
    o, clean = run(q, *poisoned, block_mask=drawn.lists), run(q, k, v, block_mask=drawn.lists)
    assert torch.equal(o, clean)
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, *poisoned), weight)
    for mine, its in zip(found, torch.autograd.grad(clean, (q, k, v), weight), strict=True):
        assert torch.equal(mine, its)
    assert not any(x[:, :, 64:128].any() for x in found[1:])


def test_no_lists_hold_a_q_block_and_its_poisoned_queries_do_not_leak() -> None:
    kinds = torch.full((1, 1, 4, 4), 2, dtype=torch.int)
    kinds[:, :, 2] = 0
    drawn = lists_from(kinds, 64, 64, 256, 256)
    q, k, v = tensors(Case(""), torch.float32)
    with torch.no_grad():
        q[:, :, 128:192] = math.nan
    o = engine("cpu", torch.float32, None)(q, k, v, block_mask=drawn.lists)
    assert not o[:, :, 128:192].any()
    for x in torch.autograd.grad(o.sum(), (q, k, v)):
        assert torch.isfinite(x).all()


# -- captured gradients and other normalisers


def biased(shape: tuple[int, ...]) -> tuple[AttentionEngine, Tensor, Any]:
    """An engine with a learned bias, the bias, and how it lies over (B, H, Sq, Skv)."""
    bias = torch.randn(shape, requires_grad=True)
    scale = 1 / math.sqrt(DIM)
    if len(shape) == 1:
        places = (torch.arange(200)[:, None] - torch.arange(200)).clamp(min=0)

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * scale + bias[(q_idx - kv_idx).clamp(min=0)]

        spread = lambda x: x[places]
    elif len(shape) == 3:

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * scale + bias[h, q_idx, kv_idx]

        spread = lambda x: x[None]
    else:

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * scale + bias[h, q_idx] + bias[h, kv_idx]

        spread = lambda x: x[None, :, :, None] + x[None, :, None, :]
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    return AttentionEngine(metas, score_mod=score_mod, mask_mod=causal, layout="bhsd"), bias, spread


@pytest.mark.parametrize(
    "shape", [(2, 200, 200), (2, 200), (200,)], ids=["pairs", "rows and columns", "diagonals"]
)
def test_gradient_of_a_bias(shape: tuple[int, ...]) -> None:
    case = Case("", (2, 2, 1), (200, 200), (64, 32), (2, 2), causal)
    drawn, inputs = lists_of(case), tensors(case, torch.float32)
    run, bias, spread = biased(shape)
    weight = torch.randn(*inputs[0].shape)
    found = torch.autograd.grad(run(*inputs, block_mask=drawn.lists), (*inputs, bias), weight)
    exact_inputs = [x.detach().double().requires_grad_() for x in (*inputs, bias)]
    exact = formula(*exact_inputs[:3], drawn.visible(2, causal), spread(exact_inputs[3]))
    for mine, its in zip(found, torch.autograd.grad(exact, exact_inputs, weight.double()), strict=True):
        agree(mine, its, 1e-5)


def test_a_normaliser_that_needs_its_mask() -> None:
    """A hidden score is no -inf here: weights are multiplied by what is visible."""
    case = Case("", (1, 2, 1), (130, 200), (64, 32), (1, 2), causal)
    drawn, inputs = lists_of(case), tensors(case, torch.float32)
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    run = AttentionEngine(
        metas, online_func=OnlineRetention(), mask_mod=causal, layout="bhsd", block_mask=drawn.lists
    )
    report = run.check(*inputs)
    assert report.ok, str(report)


# -- lists are data


def test_other_lists_run_on_the_same_kernels() -> None:
    case = Case("", lists=(1, 2))
    run = AttentionEngine(
        [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3, layout="bhsd", backend="torch"
    )
    inputs = tensors(case, torch.float32)
    for seed in range(3):
        drawn = lists_of(case, seed)
        agree(run(*inputs, block_mask=drawn.lists), formula(*inputs, drawn.visible(2, None)), 3e-6)
    assert len(run._calls) == 1
    agree(run(*inputs), formula(*inputs, torch.ones(1, 1, 256, 256, dtype=torch.bool)), 3e-6)


def test_bits_do_not_depend_on_threads() -> None:
    case = Case("", (1, 2, 1), (700, 700), (64, 64), (1, 2), causal)
    drawn, inputs = lists_of(case), tensors(case, torch.float32)
    weight, threads, seen = torch.randn(*inputs[0].shape), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5, 5):
            torch.set_num_threads(n)
            o = engine("cpu", torch.float32, causal)(*inputs, block_mask=drawn.lists)
            seen.append([o, *torch.autograd.grad(o, inputs, weight)])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))


class Holder:
    """Anything that has lists."""

    def __init__(self, lists: BlockLists) -> None:
        self._lists = lists

    def lists(self) -> BlockLists:
        return self._lists


def test_an_engine_may_have_lists_of_its_own_and_a_call_others() -> None:
    case = Case("", mask=causal)
    own, other = lists_of(case, 1), lists_of(case, 2)
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    run = AttentionEngine(
        metas, mask_mod=causal, layout="bhsd", backend="torch", block_mask=Holder(own.lists)
    )
    inputs = tensors(case, torch.float32)
    agree(run(*inputs), formula(*inputs, own.visible(2, causal)), 3e-6)
    agree(run(*inputs, block_mask=other.lists), formula(*inputs, other.visible(2, causal)), 3e-6)
    assert "kv_partial_blocks" in run.source("cpu")
    assert "listed" in str(run.explain())


def test_in_a_compiled_graph() -> None:
    case = Case("", lists=(1, 2), mask=causal)
    inputs = tensors(case, torch.float32)
    run = AttentionEngine(
        [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3, mask_mod=causal, layout="bhsd"
    )

    def call(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> Tensor:
        return run(q, k, v, block_mask=lists) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        drawn = lists_of(case, seed)
        exact = formula(*inputs, drawn.visible(2, causal)) * 2
        found = compiled(*inputs, drawn.lists)
        agree(found, exact, 3e-6)
        weight = torch.randn_like(found)
        pairs = zip(
            torch.autograd.grad(found, inputs, weight),
            torch.autograd.grad(exact, inputs, weight),
            strict=True,
        )
        for mine, its in pairs:
            agree(mine, its, 3e-6)

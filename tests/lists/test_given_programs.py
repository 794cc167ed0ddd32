"""Blocks that a call gives beside score functions, normalisers, learned tensors and sequences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, OnlineFunc, meta_tensor
from attn_engine.errors import UnsupportedOnBackend
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid
from attn_engine.runtime.block_sparse import Units
from attn_engine.runtime.given_entries import ChosenUnits
from attn_engine.runtime.given_lists import UnitTable
from attn_engine.runtime.given_shapes import shape_of_blocks
from attn_engine.runtime.native_lists import units_of_indices, units_of_mask
from tests.lists.given import causal, closeness, drawn, engine, gradients, rows_visible, softmax_rows

METAS = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3


class Bias:
    """A learned number for every head and distance."""

    def __init__(self, heads: int, length: int) -> None:
        self.of_head = torch.randn(heads).requires_grad_()
        self.of_distance = torch.randn(heads, length).requires_grad_()

    def by_head(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * (0.2 + self.of_head[h] * 0.05)  # a sum would not change the softmax at all

    def by_distance(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * 0.2 + self.of_distance[h, q_idx - kv_idx]


@pytest.mark.parametrize(
    ("kind", "sizes", "backend"),
    [
        ("by_head", (32, 32), "torch"),
        ("by_head", (1, 16), "cpu"),
        ("by_distance", (1, 16), "torch"),
        pytest.param("by_distance", (1, 16), "cpu", marks=pytest.mark.slow),
        pytest.param("by_distance", (32, 32), "cpu", marks=pytest.mark.slow),
    ],
)
def test_learned_bias(kind: str, sizes: tuple[int, int], backend: str) -> None:
    x, bias = drawn((1, 4, 2), (70, 70)), Bias(4, 70)
    learned = bias.of_head if kind == "by_head" else bias.of_distance
    blocks = torch.rand(1, 2, -(-70 // sizes[0]), -(-70 // sizes[1])) < 0.5
    run = AttentionEngine(METAS, getattr(bias, kind), mask_mod=causal, backend=backend)
    found = run(*x.tensors, block_sparse_mask=blocks, block_size=sizes)
    position = torch.arange(70)
    distance = (position[:, None] - position).clamp(min=0)

    def scored(scores: Tensor) -> Tensor:
        if kind == "by_head":
            return scores * (0.2 + learned.double()[:, None, None] * 0.05)
        return scores * 0.2 + learned.double()[:, distance]

    o, _ = softmax_rows(*x.tensors, rows_visible(blocks, sizes, (70, 70), 4, causal), scored)
    wanted = (*x.tensors, learned)
    closeness(
        (found, *gradients(found, x.weight, wanted)), (o, *gradients(o, x.weight, wanted)), torch.float32
    )


@pytest.mark.parametrize("rule", [OnlineSigmoid, OnlineRelu, OnlineRetention], ids=lambda r: r.__name__)
@pytest.mark.parametrize("sizes", [(32, 32), (1, 16)], ids=str)
def test_other_normalisers(rule: type[OnlineFunc], sizes: tuple[int, int]) -> None:
    """Against the definition, where hidden pairs never reach the functions; lists have no part in it."""
    x = drawn((1, 4, 2), (70, 70))
    blocks = torch.rand(1, 2, -(-70 // sizes[0]), -(-70 // sizes[1])) < 0.5
    run = AttentionEngine(METAS, online_func=rule(), mask_mod=causal, backend="torch")
    given = {"block_sparse_mask": blocks, "block_size": sizes}
    found, o = run(*x.tensors, **given), run.reference(*x.tensors, **given)
    assert isinstance(o, Tensor)
    closeness(
        (found, *gradients(found, x.weight, x.tensors)), (o, *gradients(o, x.weight, x.tensors)), found.dtype
    )


@pytest.mark.parametrize("sizes", [(32, 32), (1, 16)], ids=str)
def test_an_engine_checks_itself(sizes: tuple[int, int]) -> None:
    """Output and gradients, those of a captured tensor too, over the given blocks; and what differs is reported."""
    x, slopes = drawn((1, 4, 2), (70, 70)), torch.rand(4, requires_grad=True)
    blocks = torch.rand(1, 2, -(-70 // sizes[0]), -(-70 // sizes[1])) < 0.5

    def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * 0.2 - slopes[h] * (q_idx - kv_idx) / 70

    run = AttentionEngine(METAS, score_mod=biased, backend="cpu")
    given = {"block_sparse_mask": blocks, "block_size": sizes}
    report = run.check(*x.tensors, **given)
    report.raise_if_failed()
    assert {t.name for t in report.tensors} >= {"o", "lse", "d q", "d k", "d v", "d slopes"}
    o = next(t for t in report.tensors if t.name == "o")
    wanted = run.reference(*x.tensors, **given)
    assert isinstance(wanted, Tensor)
    assert o.relative == pytest.approx(o.error / float(wanted.detach().abs().max()), rel=1e-6)


LENGTHS = ([70, 0, 1, 15, 16, 17], [70, 5, 1, 33, 16, 17])


@pytest.mark.parametrize("sizes", [(16, 16), (1, 16)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_packed_sequences(backend: str, sizes: tuple[int, int]) -> None:
    """Each as a call of its own: positions and blocks restart, what is said past the end is ignored."""
    lengths_q, lengths_kv = LENGTHS
    cu_q, cu_kv = (torch.tensor([0, *n]).cumsum(0) for n in LENGTHS)
    x = drawn((1, 4, 2), (sum(lengths_q), sum(lengths_kv)))
    q, k, v = (t.detach()[0].requires_grad_() for t in x.tensors)
    rows, columns = 70 // sizes[0] + 3, 70 // sizes[1] + 3
    blocks = torch.rand(6, 2, rows, columns) < 0.5
    given = {"block_sparse_mask": blocks, "block_size": sizes}
    found, saved = engine(backend)(
        q, k, v, cu_len_q=cu_q, cu_len_kv=cu_kv, return_final_rowscales=True, **given
    )
    outputs, sums = [], []
    for i, (n, m) in enumerate(zip(lengths_q, lengths_kv, strict=True)):
        parts = (
            x[int(c[i]) : int(c[i]) + size][None]
            for x, c, size in ((q, cu_q, n), (k, cu_kv, m), (v, cu_kv, m))
        )
        visible = rows_visible(blocks[i : i + 1], sizes, (n, m), 4, causal)
        o, lse = softmax_rows(*parts, visible)
        outputs.append(o[0])
        sums.append(lse[0])
    o, weight = torch.cat(outputs), x.weight[0]
    closeness(
        (found, *gradients(found, weight, (q, k, v))), (o, *gradients(o, weight, (q, k, v))), torch.float32
    )
    torch.testing.assert_close(saved["lse"].double(), torch.cat(sums, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("indices", [False, True])
def test_decoding_with_lengths_of_a_cache(indices: bool) -> None:
    lengths = torch.tensor([300, 1, 31, 64])
    x = drawn((4, 8, 2), (1, 300))
    blocks = torch.rand(4, 2, 1, 10) < 0.6
    numbers = torch.where(blocks, torch.arange(10), -1).to(torch.int32)
    given = {"block_sparse_indices": numbers} if indices else {"block_sparse_mask": blocks}
    found = engine("cpu", mask=None)(*x.tensors, len_kv=lengths, block_size=32, **given)
    visible = rows_visible(blocks, (1, 32), (1, 300), 8)
    visible = visible & (torch.arange(300) < lengths[:, None])[:, None, None]
    o, _ = softmax_rows(*x.tensors, visible)
    closeness(
        (found, *gradients(found, x.weight, x.tensors)),
        (o, *gradients(o, x.weight, x.tensors)),
        torch.float32,
    )


@pytest.mark.parametrize(
    ("run", "group", "units"), [(1, 8, 2), (4, 8, 4), (16, 8, 16), (16, 1, 16), (1, 1, 16)]
)
def test_neighbours_that_share_their_blocks_share_a_list(run: int, group: int, units: int) -> None:
    blocks = (torch.rand(1, 2, 512 // run, 64) < 0.1).repeat_interleave(run, 2)
    shape = shape_of_blocks(UnitTable(blocks, 1, 2), Units(1, 64, 512, 64), 512, group)
    assert (shape.q_units, shape.group) == (units, group)
    cut = UnitTable(blocks, 1, 2).cut(shape.q_units, shape.kv_units)
    partial = int(cut.tensors()["kv_partial_blocks"].numel())
    assert (partial == 0) == (run >= units)


@pytest.mark.filterwarnings("ignore")  # torch looks at .grad where a compiled function goes on
def test_copies_and_compiled_functions_take_blocks_too() -> None:
    x, blocks = drawn((1, 4, 2), (64, 64)), torch.rand(1, 2, 64, 4) < 0.5
    given = {"block_sparse_mask": blocks, "block_size": (1, 16)}
    run = engine("cpu")
    wanted = run(*x.tensors, **given)
    assert torch.equal(copy.deepcopy(run)(*x.tensors, **given), wanted)
    outside = torch.compiler.disable(run)
    compiled = torch.compile(lambda q, k, v: outside(q, k, v, **given) * 2, backend="eager")
    assert torch.equal(compiled(*x.tensors), wanted * 2)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it meets on the way to the error
def test_compiled_graphs_refuse_blocks() -> None:
    x, blocks = drawn((1, 4, 2), (64, 64)), torch.rand(1, 2, 64, 4) < 0.5
    run = engine("torch")
    compiled = torch.compile(
        lambda q: run(q, x.k, x.v, block_sparse_mask=blocks, block_size=(1, 16)), backend="eager"
    )
    with pytest.raises(UnsupportedOnBackend, match="blocks given by a call"):
        compiled(x.q)


@pytest.mark.parametrize("units", [(1, 1), (2, 1), (16, 1), (4, 4), (16, 16)], ids=str)
def test_lists_of_indices_are_those_of_the_mask(units: tuple[int, int]) -> None:
    blocks = torch.rand(2, 3, 37, 21) < 0.2
    blocks[0, 1, :16, :4] = True
    blocks[1, 2] = False
    numbers = torch.where(blocks, torch.arange(21), 21)[..., torch.randperm(21)]
    of_mask, of_indices = UnitTable(blocks, 2, 3), ChosenUnits(numbers, 21, 2, 3)
    unions, wanted = of_mask.unions(units[0], 32), of_mask.cut(*units).tensors()
    numbers = torch.where(numbers == 21, -1, numbers)
    wider = torch.zeros(2, 3, 37, 30, dtype=torch.bool)
    wider[..., :21] = blocks
    native = [
        units_of_mask(blocks, 2, 3),
        units_of_mask(wider[..., :21], 2, 3),
        units_of_mask(blocks.transpose(2, 3).contiguous().transpose(2, 3), 2, 3),
        *(units_of_indices(numbers.to(dtype), None, 21, 2, 3)[0] for dtype in (torch.int32, torch.int64)),
        units_of_indices(*_leading(numbers), 21, 2, 3)[0],
    ]
    for other in (of_indices, *native):
        assert other.unions(units[0], 32) == unions
        found = other.cut(*units).tensors()
        assert list(wanted) == list(found)
        for name, x in wanted.items():
            assert torch.equal(x, found[name]) and x.dtype is found[name].dtype is torch.int32, name


def _leading(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The same indices with those that count first, some of them twice, in any order, then any others."""
    order = (numbers < 0).to(torch.int8).argsort(dim=-1, stable=True)
    first, counts = numbers.gather(-1, order), (numbers >= 0).sum(-1, dtype=torch.int32)
    places = torch.arange(first.shape[-1])
    twice = first.gather(-1, (places % counts.clamp(min=1)[..., None]).clamp(max=first.shape[-1] - 1))
    wide = torch.cat((twice, torch.full_like(first, 7)), -1)
    return wide, torch.where(counts > 0, first.shape[-1], 0)


@pytest.mark.parametrize("lengths", [(0, 16), (16, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batches", [0, 2])
def test_empty_axes(batches: int, lengths: tuple[int, int]) -> None:
    x = drawn((batches, 4, 2), lengths)
    blocks = torch.ones(1, 2, lengths[0], lengths[1] // 16, dtype=torch.bool)
    numbers = torch.full((1, 2, lengths[0], 2), -1)
    for given in ({"block_sparse_mask": blocks}, {"block_sparse_indices": numbers}):
        o = engine("torch")(*x.tensors, block_size=(1, 16), **given)
        assert o.shape == (batches, lengths[0], 4, 32) and not o.any()
        assert not any(g.any() for g in gradients(o, x.weight, x.tensors))

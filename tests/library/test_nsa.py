"""Native sparse attention and its gradients against dense float64 formulas, with the same blocks selected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_engine.library import (
    LinearCompression,
    PerceptronCompression,
    WeightedPooling,
    mean_pooling,
    native_sparse_attention,
)
from tests.library.nsa_formulas import Formula, Phi, attention, branches, check_selection, importances

F, DIM, SCALE = Formula(), 32, 0.3
NSA: Any = native_sparse_attention
NAMES = ("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win", "g_cmp", "g_slc", "g_win")


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> str:
    """Kernels are made of the same programs; those in C++ take their time to compile."""
    return request.param


def drawn(
    heads: int, kv_heads: int, tokens: int, batch: int | None = 2, queries: int | None = None
) -> dict[str, Tensor]:
    """q, three pairs and three gates that require gradients, in a batch or packed."""
    leading = () if batch is None else (batch,)
    of_q = (*leading, tokens if queries is None else queries, heads)
    shapes = {"q": (*of_q, DIM)} | dict.fromkeys(NAMES[1:7], (*leading, tokens, kv_heads, DIM))
    found = {n: torch.randn(shape) for n, shape in shapes.items()} | {n: torch.rand(of_q) for n in NAMES[7:]}
    return {n: x.requires_grad_() for n, x in found.items()}


def called(x: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    """o, and the blocks that were selected."""
    options = {"scale": SCALE, "return_block_indices": True, **F.options, **more}
    return NSA(**x, **options)


def expected(
    x: dict[str, Tensor], indices: Tensor, phi: tuple[Phi, Phi], formula: Formula = F, scale: float = SCALE
) -> Tensor:
    """o of one sequence, in float64."""
    q, k, v, *others, g_cmp, g_slc, g_win = (x[n].double() for n in NAMES)
    rows = formula.compressed(k, phi[0]), formula.compressed(v, phi[1])
    pairs = (rows, (others[0], others[1]), (others[2], others[3]))
    outs = branches(q, pairs, indices, formula, scale)
    return sum((o * g[..., None] for o, g in zip(outs, (g_cmp, g_slc, g_win), strict=True)), torch.zeros(()))


def of_sequence(x: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    return {n: t[b] for n, t in x.items()}


def formula_of(phi: Any) -> Phi:
    """What a module of the library says of one block (l, heads, D), written from the paper's words."""
    if phi is mean_pooling:
        return lambda block: sum(block, torch.zeros(())) / len(block)
    position = 0.0 if phi.position is None else phi.position.double().transpose(0, 1)
    if isinstance(phi, WeightedPooling):
        return lambda block: sum(
            (phi.weight[:, i, None].double() * token for i, token in enumerate(block + position)),
            torch.zeros(()),
        )
    weight = (phi.weight if isinstance(phi, LinearCompression) else phi.first).double()

    def layer(block: Tensor) -> Tensor:
        return torch.stack([(block + position)[:, h].flatten() @ weight[h] for h in range(block.shape[1])])

    if isinstance(phi, LinearCompression):
        return layer
    return lambda block: torch.stack(
        [nn.functional.gelu(row) @ phi.second[h].double() for h, row in enumerate(layer(block))]
    )


def agree(mine: Tensor, exact: Tensor, leaves: Sequence[Tensor], atol: float = 3e-5) -> None:
    """Outputs, and the gradients of a random weighting of them."""
    torch.testing.assert_close(mine, exact.to(mine.dtype), atol=atol, rtol=atol)
    weights = torch.randn_like(exact)
    ours, theirs = (
        torch.autograd.grad((o * weights.to(o.dtype)).sum(), leaves, allow_unused=True) for o in (mine, exact)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other.to(one.dtype), atol=10 * atol, rtol=10 * atol)


def modules(name: str, heads: int) -> tuple[Any, Any]:
    """phi of keys, with a position in the block, and of values, without."""
    made: dict[str, Callable[[bool], Any]] = {
        "mean": lambda _: mean_pooling,
        "weighted": lambda p: WeightedPooling(heads, F.l, DIM, position=p),
        "linear": lambda p: LinearCompression(heads, F.l, DIM, position=p),
        "mlp": lambda p: PerceptronCompression(heads, F.l, DIM, 24, position=p),
    }
    found = made[name](True), made[name](False)
    for x in found:
        for p in x.parameters() if isinstance(x, nn.Module) else ():
            nn.init.normal_(p, std=0.3)
    return found


@pytest.mark.parametrize("phi", ["mean", "weighted", "linear", "mlp"])
def test_against_the_formulas(phi: str) -> None:
    """Output and the gradients of q, the three pairs, the gates, phi's weights and its position."""
    x, (phi_k, phi_v) = drawn(4, 2, 75), modules(phi, 2)
    mine, indices = called(x, compress_k=phi_k, compress_v=phi_v)
    formulas = formula_of(phi_k), formula_of(phi_v)
    exact = torch.stack([expected(of_sequence(x, b), indices[b], formulas) for b in range(2)])
    learned = [p for m in (phi_k, phi_v) if isinstance(m, nn.Module) for p in m.parameters()]
    agree(mine, exact, [*x.values(), *learned])


@pytest.mark.parametrize("phi", ["mean", "mlp"])
def test_selection_by_the_margin_rule(phi: str) -> None:
    x, (phi_k, phi_v) = drawn(4, 2, 150), modules(phi, 2)
    with torch.no_grad():
        _, indices = called(x, compress_k=phi_k, compress_v=phi_v, backend="torch")
        for b in range(2):
            rows = F.compressed(x["k"][b].double(), formula_of(phi_k))
            importance = importances(x["q"][b].double(), rows, 150, F, SCALE)
            assert check_selection(indices[b], importance, 0, F) > 100


SIZES = [(8, 4, 8), (8, 8, 8), (4, 4, 16), (16, 4, 16), (6, 2, 16), (12, 4, 32)]


@pytest.mark.parametrize("sizes", SIZES)
def test_selection_of_other_sizes(sizes: tuple[int, int, int]) -> None:
    formula = Formula(*sizes, n=4)
    q, k = torch.randn(1, 200, 2, DIM), torch.randn(1, 200, 1, DIM)
    gates: Any = [None, torch.ones(1, 200, 2), None]
    _, indices = NSA(
        q, k, k, *gates, **formula.options, scale=SCALE, return_block_indices=True, backend="torch"
    )
    rows = formula.compressed(k[0].double(), lambda block: block.mean(0))
    assert check_selection(indices[0], importances(q[0].double(), rows, 200, formula, SCALE), 0, formula) > 40


def test_ties_take_the_lowest() -> None:
    """Keys that are all the same: every complete block is as important as any other inside of the past."""
    q, k = torch.randn(1, 200, 2, DIM), torch.ones(1, 200, 1, DIM)
    formula = Formula(l=16, d=16, m=16, n=5)
    _, indices = NSA(
        q, k, k, *[torch.ones(1, 200, 2)] * 3, **formula.options, return_block_indices=True, backend="torch"
    )
    assert indices[0, 199, 0].tolist() == [0, 1, 2, 11, 12]


def test_the_heads_of_a_group_are_one() -> None:
    x = drawn(4, 2, 100, batch=1)
    with torch.no_grad():
        order = [1, 0, 3, 2]
        swapped = x | {n: x[n][:, :, order] for n in ("q", "g_cmp", "g_slc", "g_win")}
        o, indices = called(x, backend="torch")
        turned, other = called(swapped, backend="torch")
    torch.testing.assert_close(turned, o[:, :, order])
    assert float((indices != other).float().mean()) < 0.01  # sums of two numbers in another order


@pytest.mark.parametrize(
    "group", [1, 3, *(pytest.param(g, marks=pytest.mark.slow) for g in (2, 6, 8, 12, 16))]
)
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_groups_and_short_sequences(group: int, tokens: int, backend: str) -> None:
    x = drawn(group, 1, tokens, batch=1)
    mine, indices = called(x, backend=backend)
    mean = formula_of(mean_pooling)
    agree(mine, expected(of_sequence(x, 0), indices[0], (mean, mean))[None], list(x.values()))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence, in float64."""
    keep = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return attention(q.double(), k.double(), v.double(), keep[None], SCALE)[0].float()


def test_with_all_blocks_or_a_long_window_it_is_causal(backend: str) -> None:
    x = {n: t.detach() for n, t in drawn(4, 2, 75).items()}
    zero, one = torch.zeros_like(x["g_cmp"]), torch.ones_like(x["g_cmp"])
    every = x | {"g_cmp": zero, "g_slc": one, "g_win": zero}
    o, _ = called(every, selected_blocks=5, backend=backend)
    torch.testing.assert_close(o[1], dense(x["q"][1], x["k_slc"][1], x["v_slc"][1]), atol=2e-5, rtol=2e-5)
    o, _ = called(every | {"g_slc": zero, "g_win": one}, window=75, backend=backend)
    torch.testing.assert_close(o[1], dense(x["q"][1], x["k_win"][1], x["v_win"][1]), atol=2e-5, rtol=2e-5)


def test_gates_isolate_branches(backend: str) -> None:
    x = {n: t.detach() for n, t in drawn(4, 2, 75).items()}
    zero, one = torch.zeros_like(x["g_cmp"]), torch.ones_like(x["g_cmp"])
    for name in ("g_cmp", "g_slc", "g_win"):
        hot = x | {n: one if n == name else zero for n in NAMES[7:]}
        alone: dict[str, Any] = x | {n: one if n == name else None for n in NAMES[7:]}
        torch.testing.assert_close(called(hot, backend=backend)[0], called(alone, backend=backend)[0])


def test_tokens_of_the_future_never_matter(backend: str) -> None:
    x = {n: t.detach() for n, t in drawn(4, 2, 75).items()}
    o, indices = called(x, backend=backend)
    late = {n: t.clone() for n, t in x.items()}
    for n in NAMES[1:7]:
        late[n][:, 50:] = 100 * torch.randn_like(late[n][:, 50:])
    other, chosen = called(late, backend=backend)
    assert torch.equal(o[:, :50], other[:, :50]) and torch.equal(indices[:, :50], chosen[:, :50])
    assert not torch.equal(o[:, 50:], other[:, 50:])


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_the_last_queries_are_those_of_all(queries: int, backend: str) -> None:
    x = {n: t.detach() for n, t in drawn(4, 2, 75).items()}
    o, indices = called(x, backend=backend)
    last = {n: t[:, -queries:] if n in ("q", *NAMES[7:]) else t for n, t in x.items()}
    some, chosen = called(last, backend=backend)
    torch.testing.assert_close(some, o[:, -queries:], atol=2e-6, rtol=2e-5)
    assert torch.equal(chosen, indices[:, -queries:])


LENGTHS = [70, 0, 1, 7, 8, 33]


def test_packed_is_each_sequence_by_itself(backend: str) -> None:
    """Forward and backward; the buffer is longer than the sequences, and what lies there is never read."""
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    rows = sum(LENGTHS)
    x = drawn(4, 2, rows + 5, batch=None)
    with torch.no_grad():
        for t in x.values():
            t[rows:] = torch.nan
    o, indices = called(x, cu_seqlens=cu, backend=backend)
    mean, parts = formula_of(mean_pooling), {n: t[:rows].split(LENGTHS) for n, t in x.items()}
    exact = [
        expected({n: t[b] for n, t in parts.items()}, chosen, (mean, mean))
        for b, chosen in enumerate(indices[:rows].split(LENGTHS))
    ]
    agree(o[:rows], torch.cat(exact), list(x.values()))
    for b, chosen in enumerate(indices[:rows].split(LENGTHS)):
        if LENGTHS[b]:
            alone, own = called({n: t[b][None].detach() for n, t in parts.items()}, backend=backend)
            assert torch.equal(own[0], chosen)
            torch.testing.assert_close(alone[0], o[:rows].split(LENGTHS)[b].detach())


def test_packed_with_fewer_queries(backend: str) -> None:
    asked = [3, 0, 1, 2, 8, 10]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (asked, LENGTHS))
    x = {n: t.detach() for n, t in drawn(4, 2, sum(LENGTHS), batch=None, queries=sum(asked)).items()}
    o, indices = called(x, cu_seqlens=(cu_q, cu_k), backend=backend)
    mean = formula_of(mean_pooling)
    for b, n in enumerate(asked):
        of_q, of_k = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        own = {name: t[of_q if name in ("q", *NAMES[7:]) else of_k] for name, t in x.items()}
        if n:
            exact = expected(own, indices[of_q], (mean, mean))
            torch.testing.assert_close(o[of_q], exact.float(), atol=2e-5, rtol=2e-5)


def test_given_blocks(backend: str) -> None:
    """In any order, with holes, blocks that there are not, and any number of them."""
    x = {n: t.detach() for n, t in drawn(4, 2, 75, batch=1).items()}
    chosen = torch.rand(1, 75, 2, 5).argsort(-1).to(torch.int64)
    chosen[chosen == 3] = -1
    chosen[:, ::2][chosen[:, ::2] == 1] = 2**40
    o, found = called(x, block_indices=chosen, backend=backend)
    mean = formula_of(mean_pooling)
    exact = expected(of_sequence(x, 0), found[0], (mean, mean))
    torch.testing.assert_close(o[0], exact.float(), atol=2e-5, rtol=2e-5)
    assert int(found.max()) <= 4 and not (found == 3).any()


def test_one_pair_for_all_gets_the_sum_of_gradients() -> None:
    x = drawn(4, 2, 75, batch=1)
    one = {n: x[n] for n in ("q", "k", "v", *NAMES[7:])}
    o, indices = called(one, backend="torch")
    mean = formula_of(mean_pooling)
    shared = one | {n: one[n[0]] for n in NAMES[3:7]}
    agree(
        o, expected({n: t[0] for n, t in shared.items()}, indices[0], (mean, mean))[None], list(one.values())
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_reruns_are_equal_to_the_bit(threads: int) -> None:
    x = drawn(4, 2, 75, batch=2)
    weights = torch.randn(2, 75, 4, DIM)

    def run() -> list[Tensor]:
        o, indices = called(x, compress_k=phi)
        return [o, indices, *torch.autograd.grad((o * weights).sum(), [*x.values(), *phi.parameters()])]

    phi, before = modules("mlp", 2)[0], torch.get_num_threads()
    first = run()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_blocks_of_one_token(backend: str) -> None:
    """l = d = l' = 1 and n = T: every branch is causal attention."""
    x = {n: t.detach() for n, t in drawn(4, 2, 20, batch=1).items()}
    ones = {n: torch.full_like(x[n], 1 / 3) for n in NAMES[7:]}
    shared = x | ones | {n: x[n[0]] for n in NAMES[3:7]}
    small = {"compression_block": 1, "compression_stride": 1, "selection_block": 1, "selected_blocks": 20}
    o, _ = called(shared, **small, window=20, backend=backend)
    torch.testing.assert_close(o[0], dense(x["q"][0], x["k"][0], x["v"][0]), atol=2e-5, rtol=2e-5)


MEMORY = """
import resource, sys, torch
from attn_engine.library import native_sparse_attention
def run(tokens):
    q, k, v = (torch.randn(1, tokens, heads, 32, requires_grad=True) for heads in (4, 1, 1))
    gates = [torch.rand(1, tokens, 4) for _ in range(3)]
    native_sparse_attention(q, k, v, *gates, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(1024)
print((run(32768) - before) / 1024)
"""


@pytest.mark.slow
def test_nothing_of_the_square_is_in_memory() -> None:
    """A training step of 32768 tokens: T x T / d of 4 heads would be 1 GB, T x T of one 4 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    x = {n: t.detach().to(dtype).requires_grad_() for n, t in drawn(4, 2, 75, batch=1).items()}
    mine, indices = called(x, backend="cpu")
    mean = formula_of(mean_pooling)
    exact = expected(of_sequence(x, 0), indices[0], (mean, mean))[None]
    if dtype is torch.float64:
        agree(mine, exact, list(x.values()), atol=1e-12)
    else:
        torch.testing.assert_close(mine.double(), exact, atol=0.03, rtol=0.03)
        weights = torch.randn_like(exact)
        ours, theirs = (
            torch.autograd.grad((o.double() * weights).sum(), list(x.values())) for o in (mine, exact)
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=0.06, rtol=0.06)

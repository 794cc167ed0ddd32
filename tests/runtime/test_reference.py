"""The oracle itself, against formulas written from the definitions, and the tile program and checks against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Load, Var, call, where
from attn_engine.ir.ops import INFO, DType, Op, Signature, Storage
from attn_engine.ir.program import HEAD, KV_IDX, Q_IDX, SCORE, Captured
from attn_engine.ir.verify import VerificationError, verify_kernel
from attn_engine.runtime.dense import TORCH_FUNCTION, evaluate_dense
from attn_engine.runtime.reference import reference
from attn_engine.runtime.tile_program import run_kernel
from tests.runtime.rules import RULES, WINDOW, function, program

SCALE = {"scale": 0.3}
SLOPES = Captured("slopes", Storage.FLOAT32, 1)
CAUSAL = function(KV_IDX + 3 <= Q_IDX)  # the first three rows see nothing


def tensors(sq: int = 7, skv: int = 9, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)

    return new(heads, sq, 8), new(kv_heads, skv, 8), new(kv_heads, skv, 5)


def by_formula(name: str, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Each normaliser from its definition; rows without a visible key give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE["scale"]
    shown = visible.to(s.dtype)
    match name:
        case "softmax":
            e = torch.exp(s) * shown
            w = e / torch.where(visible.any(-1, keepdim=True), e.sum(-1, keepdim=True), 1.0)
        case "sigmoid":
            w = shown / (1 + torch.exp(-s))
        case "relu":
            w = s.clamp(min=0) * shown
        case _:
            w = s * shown / (s * shown).abs().sum(-1, keepdim=True).clamp(min=1)
    return w @ v


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_normalisers_are_their_formulas(name: str, masked: bool) -> None:
    q, k, v = tensors()
    i, j = torch.arange(7)[:, None], torch.arange(9)
    visible = j + 3 <= i if masked else torch.ones(7, 9, dtype=torch.bool)
    o, _ = reference(program(None, CAUSAL if masked else None, RULES[name]()), q, k, v, {}, SCALE)
    wanted = by_formula(name, q, k, v, visible)
    torch.testing.assert_close(o, wanted)
    weight = torch.randn_like(o)
    for a, b in zip(
        torch.autograd.grad(o, (q, k, v), weight), torch.autograd.grad(wanted, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", RULES)
def test_hidden_pairs_cannot_poison_anything(name: str) -> None:
    """log of a negative distance and 1 / 0 happen at hidden pairs only."""
    q, k, v = tensors()
    slopes = torch.rand(4, requires_grad=True)
    distance = call(Op.TO_FLOAT, Q_IDX - KV_IDX - 2)
    score = SCORE + Load("slopes", DType.FLOAT, (HEAD,)) * call(Op.LOG, distance) + 1.0 / distance
    p = program(function(score, SLOPES), CAUSAL, RULES[name]())
    o, _ = reference(p, q, k, v, {"slopes": slopes}, SCALE)
    gradients = torch.autograd.grad(o.sum(), (q, k, v, slopes))
    assert o.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert (o[:, :, :3] == 0).all() and (gradients[0][:, :, :3] == 0).all()
    assert (gradients[2][:, :, 4:] == 0).all()  # keys 4.. are seen by no row


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("sq", "skv"), [(0, 9), (7, 0), (1, 1)])
def test_empty_sequences(name: str, sq: int, skv: int) -> None:
    q, k, v = tensors(sq, skv)
    o, _ = reference(program(None, None, RULES[name]()), q, k, v, {}, SCALE)
    assert o.shape == (2, 4, sq, 5)
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    if skv == 0:
        assert (o == 0).all() and (gradients[0] == 0).all()


def test_rows_of_minus_infinity_are_empty_rows() -> None:
    q, k, v = tensors()
    p = program(function(where(Q_IDX.equals(5), -math.inf, SCORE)))
    o, rows = reference(p, q, k, v, {}, SCALE)
    gradient = torch.autograd.grad(o.sum(), (q, k, v))
    assert (o[:, :, 5] == 0).all() and (rows["lse"][:, :, 5] == -math.inf).all()
    assert (rows["lse"][:, :, 4] > -math.inf).all() and all(g.isfinite().all() for g in gradient)


def test_every_operation_means_the_same_in_torch() -> None:
    assert set(TORCH_FUNCTION) == set(Op)
    numbers = {
        DType.FLOAT: [0.4, -1.75, 2.5, 1.0],
        DType.INT: [-7, 3, 2, -2],
        DType.BOOL: [True, False, True, False],
    }
    kinds = {Signature.INTEGER: DType.INT, Signature.BIT: DType.INT, Signature.LOGICAL: DType.BOOL}
    for op, info in INFO.items():
        kind = kinds.get(info.signature, DType.FLOAT)
        variables = [
            Var(f"x{n}", DType.BOOL if op is Op.WHERE and n == 0 else kind) for n in range(info.arity)
        ]
        columns = [numbers[x.kind][n:] + numbers[x.kind][:n] for n, x in enumerate(variables)]
        e = call(op, *variables)
        if op is Op.BIT:
            columns[1] = [0, 1, 5, 31]  # places
        found = evaluate_dense(e, {x: torch.tensor(c) for x, c in zip(variables, columns, strict=True)}, {})
        wanted = [evaluate(e, dict(zip(variables, row, strict=True))) for row in zip(*columns, strict=True)]
        torch.testing.assert_close(
            found.double(), torch.tensor(wanted).double(), equal_nan=True, msg=op.value
        )


@pytest.mark.parametrize("gradients", Gradients)
@pytest.mark.parametrize("edges", Edges)
@pytest.mark.parametrize("name", RULES)
def test_lowered_kernels_are_well_formed(name: str, edges: Edges, gradients: Gradients) -> None:
    score = function(SCORE * Load("slopes", DType.FLOAT, (HEAD,)), SLOPES)
    p = program(score, CAUSAL, RULES[name]())
    for direction, learned in (("forward", ()), ("backward", ("slopes",))):
        for kernel in lower(p, Schedule(8, 16, 8, 16, edges, gradients), direction, learned).kernels:
            verify_kernel(kernel)


def test_verification_names_what_is_wrong() -> None:
    (kernel,) = lower(program(), Schedule(8, 16, 8, 16, Edges.SPLIT, Gradients.ONE_KERNEL), "forward").kernels
    broken = type(kernel)(kernel.name, kernel.params, (), kernel.grid, kernel.order, kernel.tile, kernel.body)
    with pytest.raises(VerificationError, match="'scale' is read before it is set"):
        verify_kernel(broken)


@pytest.mark.parametrize("edges", Edges)
@pytest.mark.parametrize("name", RULES)
def test_forward_tile_program(name: str, edges: Edges) -> None:
    """Ragged tiles, strided and poisoned outputs, a run-time window, empty rows."""
    q, k, v = (x.detach().float() for x in tensors(21, 37))
    mask = function((KV_IDX + 3 <= Q_IDX) & (Q_IDX - KV_IDX <= WINDOW), scalars=(WINDOW,))
    p, numbers = program(None, mask, RULES[name]()), {**SCALE, "window": 9}
    (kernel,) = lower(p, Schedule(8, 16, 8, 16, edges, Gradients.ONE_KERNEL), "forward").kernels
    o = torch.full((2, 21, 4, 5), math.nan).transpose(1, 2)
    params = {x.name: x for x in kernel.params if x.output}
    rows = {n: torch.full((2, 4, 21), math.nan) for n in params if n != "O"}
    run_kernel(kernel, {"Q": q, "K": k, "V": v, "O": o, **rows}, numbers)
    wanted, wanted_rows = reference(p, q, k, v, {}, numbers)
    torch.testing.assert_close(o, wanted.float(), rtol=1e-4, atol=1e-5)
    for found, exact in zip(rows.values(), wanted_rows.values(), strict=True):
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_check_reports_and_finds_mistakes(dtype: torch.dtype) -> None:
    slopes = torch.rand(4)

    def score(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    meta = tuple(meta_tensor(None, heads, None, 16, dtype=dtype) for heads in (4, 2, 2))
    engine = AttentionEngine(meta, score_mod=score, mask_mod=lambda b, h, q, kv: kv <= q, backend="torch")
    q, k, v = (torch.randn(1, 19, heads, 16, dtype=dtype) for heads in (4, 2, 2))
    report = engine.check(q, k, v)
    report.raise_if_failed()
    rows = [name for name, _ in engine.program.rule.saved]
    assert [t.name for t in report.tensors] == ["o", *rows, "d q", "d k", "d v", "d slopes"]
    assert "eager" in str(report) and "WRONG" not in str(report)


def test_graph_draws(tmp_path) -> None:
    pytest.importorskip("networkx")
    from attn_engine.runtime.graph import program_graph

    graph = program_graph(program(function(SCORE * Load("slopes", DType.FLOAT, (HEAD,)), SLOPES), CAUSAL))
    assert graph.nodes["lse"]["saved_for_backward"] and not graph.nodes["weights"]["saved_for_backward"]
    assert graph.nodes["visible"]["depends"] == ["index"]
    assert "tile" in graph.nodes["logit"]["depends"]
    assert {graph.nodes[n]["stage"] for n in graph.successors("logit")} == {"online", "backward"}
    assert graph.draw(tmp_path / "graph.dot").read_text().startswith("digraph")
    assert "-- score_mod" in str(graph)

"""Row functions through the engine, against the same functions in plain torch, row by row; their gradients too."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, errors, meta_tensor, online
from tests.part import part_of
from tests.row_functions import CASES, HEADS, Tensors, dense

D, DV = 4, 3
SCALE = 0.4


def mask_of(name: str) -> Callable[..., object]:
    """Row 0 sees nothing, row 1 one key; the first keys are hidden from the last rows."""
    fewest = 2 if CASES[name].kink else 1
    hidden = 5 - fewest  # row 5 sees `fewest` keys again
    return lambda b, h, q_idx, kv_idx: (
        (kv_idx < q_idx) & ((q_idx < 5) | (kv_idx >= hidden)) & (q_idx >= fewest)
    )


def inputs(q_len: int, kv_len: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((1, HEADS, q_len, D), (1, HEADS, kv_len, D), (1, HEADS, kv_len, DV))
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def engine_of(name: str, tensors: Tensors, dtype: torch.dtype, backend: str) -> AttentionEngine:
    return AttentionEngine(
        [meta_tensor(None, HEADS, None, d, dtype=dtype) for d in (D, D, DV)],
        online_func=CASES[name].make(tensors),
        mask_mod=mask_of(name),
        backend=backend,
        layout="bhsd",
        scale=SCALE,
    )


def formula(name: str, tensors: Tensors, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    function = CASES[name].make(tensors)
    visible = mask_of(name)(0, 0, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    scores = q @ k.mT * SCALE
    takes_head = "h" in inspect.signature(function.function).parameters
    return dense(function, takes_head, scores, v, visible.expand(scores.shape))


def loss_of(o: Tensor, rows: dict[str, Tensor], names: tuple[str, ...], alive: Tensor) -> Tensor:
    """A weighting of the output and of the row outputs of rows with keys, the same on both sides."""
    generator = torch.Generator().manual_seed(3)
    total = (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
    for name in names:
        weight = torch.randn(alive.shape, generator=generator, dtype=torch.float64).to(rows[name].dtype)
        total = total + torch.where(alive, rows[name] * weight, 0.0).sum()
    return total


def compare(name: str, backend: str, dtype: torch.dtype, tolerance: float, with_rows: bool) -> None:
    tensors = {n: x.detach().to(dtype).requires_grad_() for n, x in CASES[name].learned().items()}
    names = CASES[name].outputs if with_rows else ()
    qkv = inputs(8, 7, dtype)
    o, rows = engine_of(name, tensors, dtype, backend)(*qkv, return_final_rowscales=True)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    learned = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    want, want_rows = formula(name, learned, *exact)
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
    assert o.isfinite().all() and (o[:, :, 0] == 0).all()
    for n, x in want_rows.items():
        torch.testing.assert_close(rows[n].double(), x, rtol=tolerance, atol=tolerance)
    alive = torch.ones(rows[names[0]].shape, dtype=torch.bool) if names else torch.ones(())
    if names:
        alive[:, :, : 2 if CASES[name].kink else 1] = False
    got = torch.autograd.grad(loss_of(o, rows, names, alive), [*qkv, *tensors.values()], allow_unused=True)
    expected = torch.autograd.grad(
        loss_of(want, want_rows, names, alive), [*exact, *learned.values()], allow_unused=True
    )
    for what, x, y, like in zip(
        ("dq", "dk", "dv", *tensors), got, expected, [*qkv, *tensors.values()], strict=True
    ):
        x, y = (torch.zeros_like(like) if g is None else g for g in (x, y))
        torch.testing.assert_close(
            x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_function(name: str) -> None:
    compare(name, "reference", torch.float64, 1e-9, with_rows=True)


# One of every way to use a row's values, to learn numbers and to pass over the keys; the interpreter has them all.
COMPILED = (
    "softmax with rows", "sink", "gain and offset", "retention", "l1", "by largest", "two normalisers",
    "relu of centred", "standardised", "learned threshold",
)  # fmt: skip


@pytest.mark.parametrize("name", part_of(COMPILED.__contains__, CASES))
def test_cpu(name: str) -> None:
    compare(name, "cpu", torch.float64, 1e-8, with_rows=True)


@pytest.mark.parametrize("name", ["softmax with rows", "sink", "by largest", "standardised"])
def test_cpu_in_float32(name: str) -> None:
    compare(name, "cpu", torch.float32, 3e-4, with_rows=True)


def engine(function: object, **options: object) -> AttentionEngine:
    metas = [meta_tensor(None, HEADS, None, d, dtype=torch.float32) for d in (D, D, DV)]
    return AttentionEngine(metas, online_func=function, layout="bhsd", **options)


@pytest.mark.parametrize("name", CASES)
def test_triton_interpreter(name: str) -> None:
    compare(name, "triton-interpreter", torch.float32, 3e-4, with_rows=True)


def outputs(backend: str, name: str, tensors: Tensors, qkv: list[Tensor], **options: object) -> list[Tensor]:
    """o and the gradients of its sum of squares."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    o = engine(CASES[name].make(tensors), backend=backend, **options)(*leaves)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["softmax with rows", "sink", "two normalisers", "by largest", "standardised"]
)
def test_a_first_tile_that_is_hidden(name: str) -> None:
    """All keys of the first tiles are hidden, from some rows every key."""
    tensors = {n: x.detach().float() for n, x in CASES[name].learned().items()}
    mask = {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx >= 150) & (q_idx != 2)}
    qkv = inputs(4, 200, torch.float32)
    assert_near(outputs("cpu", name, tensors, qkv, **mask), outputs("reference", name, tensors, qkv, **mask))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["softmax", "softmax by lse", "sink", "softmax + 1", "exp without max"])
def test_scores_of_minus_infinity_are_hidden_keys(name: str, backend: str) -> None:
    """Row 3 has no other scores: it is a row without keys."""
    tensors = {n: x.detach().float() for n, x in CASES[name].learned().items()}

    def some(score, b, h, q_idx, kv_idx):
        return torch.where((kv_idx % 3 == 1) | (q_idx == 3), -torch.inf, score * 0.5)

    qkv = inputs(5, 9, torch.float32)
    hidden = {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx % 3 != 1) & (q_idx != 3), "scale": 0.5}
    got = outputs(backend, name, tensors, qkv, score_mod=some)
    assert all(x.isfinite().all() for x in got)
    assert_near(got, outputs("reference", name, tensors, qkv, **hidden))


def test_huge_scores_computed_again_stay_below_their_maximum() -> None:
    """A score of 1e12 that is rounded differently in the backward pass would be exp(65536)."""
    function = CASES["softmax"].make({})
    qkv = [x.detach().requires_grad_() for x in inputs(70, 90, torch.float32)]
    o = engine(function, backend="cpu", scale=1e12)(*qkv)
    torch.testing.assert_close(o, engine(function, backend="reference", scale=1e12)(*qkv), check_dtype=False)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.square().sum(), qkv))


def test_explain_says_how_many_passes_and_why() -> None:
    one = engine(CASES["softmax"].make({})).explain().sections["Passes"]
    assert one == "one pass over the keys computes the output"
    two = engine(CASES["relu of centred"].make({})).explain().sections["Passes"]
    assert two.startswith("2 passes over the keys: pass 1 finds ")
    assert "needs mean of the whole row" in two and "logit - mean" in two
    assert "one more pass before the gradient" in two


def test_the_graph_shows_every_pass() -> None:
    import networkx

    graph = engine(CASES["relu of centred"].make({})).graph()
    assert networkx.has_path(graph, "new running_row_sum", "row_sum_of_row")
    assert networkx.has_path(graph, "row_sum_of_row", "weights") and networkx.has_path(graph, "logit", "o")


def test_built_in_normalisers_do_not_import_sympy() -> None:
    script = (
        "import sys, torch\n"
        "from attn_engine import AttentionEngine, meta_tensor\n"
        "from attn_engine.library import OnlineRetention\n"
        "meta = [meta_tensor(None, 2, None, 8, dtype=torch.float32)] * 3\n"
        "AttentionEngine(meta), AttentionEngine(meta, online_func=OnlineRetention())\n"
        "print(*{'sympy', 'networkx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_captures_are_read_at_every_call() -> None:
    factor, shift = 2.0, torch.zeros(HEADS)

    @online
    def gated(s, h):
        return torch.sigmoid(s * factor - shift[h])

    made = engine(gated, backend="reference")
    qkv = [x.detach() for x in inputs(5, 6, torch.float32)]
    before = made(*qkv)
    factor = 0.5
    scaled = made(*qkv)
    shift.fill_(1.0)
    shifted = made(*qkv)
    scores = qkv[0] @ qkv[1].mT / D**0.5
    torch.testing.assert_close(before, torch.sigmoid(scores * 2) @ qkv[2])
    torch.testing.assert_close(scaled, torch.sigmoid(scores * 0.5) @ qkv[2])
    torch.testing.assert_close(shifted, torch.sigmoid(scores * 0.5 - 1) @ qkv[2])


def test_a_parameter_that_is_too_small() -> None:
    sink = torch.zeros(HEADS - 1)

    @online
    def with_sink(s, h):
        p = torch.exp(s - s.max())
        return p / (p.sum() + torch.exp(sink[h] - s.max()))

    with pytest.raises(errors.IndexOutOfRange, match="sink"):
        engine(with_sink, backend="reference")(*inputs(5, 6, torch.float32))


class Module(torch.nn.Module):
    """A learned sink as a module's parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = torch.nn.Parameter(torch.zeros(HEADS))
        self.attention = engine(online(self.weights), backend="reference")

    def weights(self, s, h):
        m = s.max()
        p = torch.exp(s - m)
        return p / (p.sum() + torch.exp(self.sink[h] - m))


def test_modules_and_copies() -> None:
    module = Module()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.sink.fill_(3.0)
    qkv = [x.detach() for x in inputs(5, 6, torch.float32)]
    before, after = module.attention(*qkv), copied.attention(*qkv)
    assert (after.norm() < before.norm() * 0.8).item()
    after.sum().backward()
    assert copied.sink.grad is not None and module.sink.grad is None


@online
def module_level(s):
    return torch.relu(s)


def test_pickles_by_name() -> None:
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert copy.deepcopy(module_level).function is module_level.function


def test_numeric_names_and_torch_spellings() -> None:
    """torch's functions and methods, with dim and keepdim as on a real row."""

    @online
    def spelled(s):
        m = torch.amax(s, dim=-1, keepdim=True)
        top, _ = s.max(-1)
        p = torch.exp(s - m)
        w = torch.softmax(s, -1) + p / torch.sum(p, 0) + torch.exp(torch.nn.functional.log_softmax(s, dim=-1))
        return w / 3, {
            "range": top - s.min(dim=-1).values,
            "spread": s.std(),
            "size": torch.linalg.vector_norm(s),
        }

    o, rows = engine(spelled, backend="reference")(
        *(qkv := inputs(5, 6, torch.float32)), return_final_rowscales=True
    )
    scores = qkv[0] @ qkv[1].mT / D**0.5
    torch.testing.assert_close(o, torch.softmax(scores, -1) @ qkv[2])
    torch.testing.assert_close(rows["range"].float(), scores.amax(-1) - scores.amin(-1))
    torch.testing.assert_close(rows["spread"].float(), scores.std(-1))
    torch.testing.assert_close(rows["size"].float(), scores.norm(dim=-1))


TABLE = torch.ones(3)


def _assigned(s): s[0] = 0.0  # fmt: skip


MISTAKES = {
    "one value": (lambda s: s.max(), errors.RowFunctionResult, "not a row"),
    "nothing": (lambda s: None, errors.RowFunctionResult, "return"),
    "three": (lambda s: (s, {}, 1.0), errors.RowFunctionResult, "3 values"),
    "row value is a row": (lambda s: (s, {"x": s * 2}), errors.RowFunctionResult, "'x'"),
    "name": (lambda s: (s, {"d_x": s.sum()}), errors.RowFunctionResult, "'d_x'"),
    "reduced twice": (lambda s: s / s.max().max(), errors.WrongOperands, "reduced already"),
    "max of a sum": (lambda s: s / (s - s.mean()).max(), errors.UnorderedReduction, "raw scores"),
    "min of a maximum": (lambda s: s / (s / s.max()).amin(), errors.UnorderedReduction, "minimum"),
    "if": (lambda s: s if s.sum() > 0 else -s, errors.ControlFlowOnTraced, "torch.where"),
    "unknown method": (lambda s: s.cumsum(0), errors.UnknownMethod, ".cumsum"),
    "unknown function": (lambda s: torch.sort(s)[0], errors.UnknownOperation, "sort"),
    "product": (lambda s: s / s.prod(), errors.UnknownMethod, ".prod"),
    "an element": (lambda s: s - s[0], errors.NumberFromTraced, "An index"),
    "its length": (lambda s: s / len(s), errors.NumberFromTraced, "s.numel()"),
    "its shape": (lambda s: s / s.shape[0], errors.NumberFromTraced, "s.numel()"),
    "an assignment": (_assigned, errors.NumberFromTraced, "torch.where"),
    "another dimension": (lambda s: s / s.sum(1), errors.WrongOperands, "dim=1"),
    "a loop": (lambda s: sum(x for x in s), errors.NumberFromTraced, "loop"),
    "a tensor": (lambda s: s * TABLE, errors.WrongIndexCount, "dimensions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_typed_errors_at_the_users_line(name: str) -> None:
    function, error, words = MISTAKES[name]
    with pytest.raises(error) as caught:
        engine(online(function))
    assert words in str(caught.value)
    assert caught.value.location is not None and caught.value.location.path == __file__
    assert caught.value.location.line == function.__code__.co_firstlineno


@pytest.mark.parametrize("function", [3, int, lambda: 0, lambda s, kv_idx: s, lambda *, s: s])
def test_what_is_not_a_row_function(function: object) -> None:
    with pytest.raises(errors.WrongParameters):
        online(function)

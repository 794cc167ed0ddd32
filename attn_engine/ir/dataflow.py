"""What a program computes from what: the nodes and edges that `engine.graph()` draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_engine.ir.expr import Call, Const, Expr, Load, Reduce, Var, postorder
from attn_engine.ir.printer import format_expr
from attn_engine.ir.program import (
    BATCH,
    D_PROBS,
    DELTA,
    HEAD,
    KV_IDX,
    LOGIT,
    OUT,
    PROBS,
    Q_IDX,
    SCORE,
    Attention,
    saved_var,
)

_INDICES = {BATCH, HEAD, Q_IDX, KV_IDX}
_TILE = {"q", "kv"}


@dataclass(frozen=True, slots=True)
class FlowNode:
    """An operator, a variable, a read or a number of the program.

    depends: which of "row" (the row's state, or anything else that one query row holds), "tile" (the (q, kv) pair)
    and "index" (a position) it depends on. stage: "score_mod", "mask_mod", "online", "epilogue" or "backward".
    """

    key: str
    label: str
    op: str
    depends: frozenset[str]
    stage: str
    saved_for_backward: bool


@dataclass(frozen=True, slots=True)
class Dataflow:
    """Nodes in an order in which operands come first, and (operand, user) edges between their keys."""

    nodes: tuple[FlowNode, ...]
    edges: tuple[tuple[str, str], ...]


def dataflow(program: Attention) -> Dataflow:
    """The graph of the traced functions and the row rule, results last; what one stage hands to the next is an edge."""
    rule = program.rule
    graph = _Graph()
    if program.score is not None:
        graph.add("score_mod", program.score.result, program.score.names)
        graph.result("logit", "score_mod", program.score.result)
    else:
        graph.add("score_mod", SCORE, {})
        graph.result("logit", "score_mod", SCORE)
    graph.known[LOGIT] = "logit"
    if program.mask is not None:
        graph.add("mask_mod", program.mask.result, program.mask.names)
        graph.result("visible", "mask_mod", program.mask.result)
    for step in rule.earlier:
        for state, new in zip(step.states, step.new_states, strict=True):
            graph.add("online", new, rule.names)
            graph.result(f"new {state.name}", "online", new)
            graph.known[state.var] = f"new {state.name}"
        for name, value in step.values:
            graph.add("online", value, rule.names)
            graph.result(name, "online", value)
            graph.known[saved_var(name)] = name
    for name, value in (
        *((f"new {s.name}", e) for s, e in zip(rule.states, rule.new_states, strict=True)),
        ("rescale", rule.out_scale),
        ("weights", rule.weights),
    ):
        graph.add("online", value, rule.names)
        graph.result(name, "online", value)
    graph.connect("visible", "weights")
    graph.result("out", "online", OUT, label="out * rescale + weights @ v", follows=("rescale", "weights"))
    graph.known[OUT] = "out"
    graph.known.update({s.var: f"new {s.name}" for s in rule.states})
    _epilogue_and_backward(program, graph)
    return Dataflow(tuple(graph.nodes.values()), tuple(graph.edges))


def _epilogue_and_backward(program: Attention, graph: _Graph) -> None:
    rule = program.rule
    graph.add("epilogue", rule.output, rule.names)
    graph.result("o", "epilogue", rule.output, saved=DELTA in postorder(rule.gradient))
    for name, value in rule.saved:
        graph.add("epilogue", value, rule.names)
        graph.result(name, "epilogue", value, saved=True)
    graph.known.update({var: var.name for var in rule.saved_vars})
    graph.add("backward", rule.recompute, rule.names)
    graph.result("probs", "backward", rule.recompute)
    graph.known[PROBS] = "probs"
    graph.add("backward", rule.gradient, rule.names)
    graph.result("d_logit", "backward", rule.gradient)
    graph.connect("o", f"backward:{DELTA.name}")


class _Graph:
    """Collects nodes; an expression shared within a stage is one node."""

    def __init__(self) -> None:
        self.nodes: dict[str, FlowNode] = {}
        self.edges: dict[tuple[str, str], None] = {}
        self.known: dict[Expr, str] = {}  # variables that an earlier stage's result stands for
        self._keys: dict[tuple[str, Expr], str] = {}

    def add(self, stage: str, root: Expr, names: Mapping[Expr, str]) -> None:
        for node in postorder(root):
            if node in self.known or (stage, node) in self._keys or isinstance(node, Const):
                continue
            key = self._fresh(f"{stage}:{names.get(node) or _short(node)}")
            self._keys[stage, node] = key
            label = f"{names[node]} = {format_expr(node)}" if node in names else format_expr(node)
            self.nodes[key] = FlowNode(key, label, _operation(node), _depends(node), stage, False)
            for operand in node.operands:
                self.connect(self.key(stage, operand), key)

    def result(
        self,
        name: str,
        stage: str,
        value: Expr,
        *,
        label: str = "",
        follows: tuple[str, ...] = (),
        saved: bool = False,
    ) -> None:
        """A value that leaves its stage."""
        label = label or name
        self.nodes[name] = FlowNode(name, label, "result", _depends(value), stage, saved)
        for operand in follows or (self.key(stage, value),):
            self.connect(operand, name)

    def key(self, stage: str, node: Expr) -> str:
        return self.known.get(node) or self._keys.get((stage, node), "")

    def connect(self, operand: str, user: str) -> None:
        if operand in self.nodes and user in self.nodes:
            self.edges[operand, user] = None

    def _fresh(self, wanted: str) -> str:
        key, n = wanted, 2
        while key in self.nodes:
            key, n = f"{wanted}_{n}", n + 1
        return key


def _operation(node: Expr) -> str:
    match node:
        case Call(op):
            return op.value
        case Reduce(kind):
            return f"reduce {kind}"
        case _:
            return type(node).__name__.lower()


def _short(node: Expr) -> str:
    match node:
        case Var(name):
            return name
        case Load(tensor):
            return tensor
        case _:
            return _operation(node)


def _depends(node: Expr) -> frozenset[str]:
    found: set[str] = set()
    for x in postorder(node):
        if x in _INDICES:
            found.add("index")
        elif isinstance(x, Var) and x.axes == ("q",):
            found.add("row")
        elif isinstance(x, Var) and set(x.axes) >= _TILE:
            found.add("tile")
        elif x in (OUT, D_PROBS):
            found.add("row")
    return frozenset(found)

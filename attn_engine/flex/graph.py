"""flex_attention inside torch.compile.

Dynamo knows FlexAttention's operator: it traces score_mod and mask_mod into graphs of their own and finds the tensors
that they capture, also where the functions are made inside the compiled region. `flex_in_graph` is an operator that
asks for the same treatment. When Dynamo's graph is run on fake tensors, the two graphs are traced by our front end, as
any other functions, and what remains is one call of attn_engine::forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from attn_engine.flex.programs import Kind, call_of, describe


class _FlexInGraph(torch._ops.HigherOrderOperator):
    """(query, key, value, score graph, (mask graph,), scale, options, lifted tensors of each) -> [o, saved rows...]"""

    def __init__(self) -> None:
        super().__init__("attn_engine_flex_attention")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score: Any,
        masks: tuple[Any, ...],
        scale: float,
        options: dict[str, str],
        score_captures: Sequence[Any] = (),
        mask_captures: Sequence[Any] = (),
    ) -> list[Tensor]:
        kind = Kind(query.dtype, int(query.shape[3]), int(value.shape[3]), options["backend"])
        score_captures, mask_captures = (_as_tensors(x, query) for x in (score_captures, mask_captures))
        score_mod = None if options["score"] == "none" else _function(score, score_captures, _score)
        mask_mod = None if options["mask"] == "none" else _function(masks[-1], mask_captures, _mask)
        traced = describe(score_mod, mask_mod, kind).trace({})
        _, number = call_of(traced.program, kind, query.device.type)
        numbers = [float(scale), *(float(x) for x in traced.scalars().values())]
        captured = list(traced.tensors({}).values())
        return torch.ops.attn_engine.forward(query, key, value, captured, numbers, number)


flex_in_graph = _FlexInGraph()


def known_to_dynamo() -> bool:
    """Have Dynamo treat the operator as FlexAttention's own; called while it traces, so it is there."""
    from torch._dynamo.variables import higher_order_ops

    table = higher_order_ops._hop_name_to_variable_class
    table.setdefault(flex_in_graph.__name__, higher_order_ops.FlexAttentionHigherOrderVariable)
    return True


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
known_to_dynamo._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def identity(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """What stands for no score_mod in a graph."""
    return score


def _function(graph: Any, captures: Sequence[Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """A graph as the function that it came from, with what it captures bound by name."""
    if not isinstance(graph, GraphModule):
        return functools.partial(graph, *captures) if captures else graph
    inputs = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    names = [str(name).removeprefix("l_").strip("_") or "captured" for name in inputs[-len(captures) :]]
    unique = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return functools.partial(body(Interpreter(graph)), **dict(zip(unique, captures, strict=bool(captures))))


def _as_tensors(captures: Sequence[Any], query: Tensor) -> tuple[Any, ...]:
    """Numbers that vary from call to call of one graph as 0-dim tensors: an operator takes no symbols for numbers."""
    precise = torch.float64 if query.dtype is torch.float64 else torch.float32
    kinds = {torch.SymInt: torch.int64, torch.SymFloat: precise}
    # A sum, for torch keeps a symbol only where it meets a tensor in plain arithmetic; else it compiles for each value.
    return tuple(
        torch.zeros((), dtype=kinds[type(x)], device=query.device) + x if type(x) in kinds else x
        for x in captures
    )


def _score(graph: Interpreter) -> Callable[..., Any]:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, **captures: Any) -> Any:
        return graph.run(score, b, h, q_idx, kv_idx, *captures.values(), enable_io_processing=False)

    return score_mod


def _mask(graph: Interpreter) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any, **captures: Any) -> Any:
        return graph.run(b, h, q_idx, kv_idx, *captures.values(), enable_io_processing=False)

    return mask_mod

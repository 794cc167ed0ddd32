"""Expressions on torch tensors, all positions at once.

Layout: every value has six dimensions (batch, head, q, kv, d, dv), of size 1 where the value does not depend on
them, so broadcasting does the rest and an axis is always the same dimension. A value over no axis may also be a
plain number or a 0-dimensional tensor. Where a list of single positions is wanted instead, hand in variables of one
flat dimension; then `Reduce` is not available.

Everything is differentiable by torch autograd, independently of this package's own differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attn_engine.ir.expr import REDUCE_IDENTITY, Call, Cast, Const, Expr, Full, Load, Reduce, Var, postorder
from attn_engine.ir.ops import INFO, DType, Number, Op, Signature

DIMENSION = {"batch": 0, "head": 1, "q": 2, "kv": 3, "d": 4, "dv": 5}

TORCH_FUNCTION: dict[Op, Callable[..., Tensor]] = {
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.div,
    Op.FLOORDIV: lambda a, b: torch.div(a, b, rounding_mode="floor"),
    Op.MOD: torch.remainder,
    Op.NEG: torch.neg,
    Op.ABS: torch.abs,
    Op.MAX: torch.maximum,
    Op.MIN: torch.minimum,
    Op.LE: torch.le,
    Op.LT: torch.lt,
    Op.EQ: torch.eq,
    Op.NE: torch.ne,
    Op.BIT: lambda a, b: torch.bitwise_right_shift(a, b).bitwise_and(1) != 0,
    Op.AND: torch.logical_and,
    Op.OR: torch.logical_or,
    Op.NOT: torch.logical_not,
    Op.WHERE: torch.where,
    Op.TO_FLOAT: lambda a: a,  # the operand arrives converted
    Op.TO_INT: lambda a: a.to(torch.int64),
    Op.FLOOR: torch.floor,
    Op.EXP: torch.exp,
    Op.EXP2: torch.exp2,
    Op.LOG: torch.log,
    Op.LOG2: torch.log2,
    Op.TANH: torch.tanh,
    Op.SIGMOID: torch.sigmoid,
    Op.SQRT: torch.sqrt,
    Op.RSQRT: torch.rsqrt,
    Op.SIN: torch.sin,
    Op.COS: torch.cos,
}

_FLOAT_OPERANDS = (Signature.DIVISION, Signature.TO_FLOAT, Signature.FUNCTION)


def torch_kind(dtype: DType, compute: torch.dtype) -> torch.dtype:
    """The torch dtype that holds values of one kind when FLOAT is `compute`."""
    match dtype:
        case DType.BOOL:
            return torch.bool
        case DType.INT:
            return torch.int64
        case DType.ELEMENT | DType.FLOAT:
            return compute


def apply_op(node: Call, operands: list[Tensor], compute: torch.dtype) -> Tensor:
    """`node.op` on broadcastable operands, converted first to the kind that the operation works in."""
    signature = INFO[node.op].signature
    if signature in _FLOAT_OPERANDS:
        operands = [_to(x, compute) for x in operands]
    elif signature is Signature.ARITHMETIC:
        operands = [_to(x, torch_kind(node.dtype, compute)) for x in operands]
    elif signature is Signature.SELECT:
        condition, *choices = operands
        operands = [condition, *(_to(x, torch_kind(node.dtype, compute)) for x in choices)]
    return TORCH_FUNCTION[node.op](*operands)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def gather(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """tensor[indices] with indices clamped into the tensor; zeros where the tensor has no element at all."""
    if tensor.numel() == 0:
        return tensor.new_zeros(torch.broadcast_shapes(*(i.shape for i in indices)))
    clamped = tuple(i.clamp(0, size - 1) for i, size in zip(indices, tensor.shape, strict=True))
    return tensor[clamped] if clamped else tensor


def evaluate_dense(
    expr: Expr,
    environment: Mapping[Var, Tensor | Number],
    tensors: Mapping[str, Tensor],
    compute: torch.dtype = torch.float64,
    visible: Tensor | None = None,
) -> Tensor:
    """The value of `expr` as a tensor in this module's layout; kinds are bool, int64 and `compute`.

    environment: every variable's value. tensors: the captured tensors, of any dtype. visible: bool, broadcastable
    to (batch, head, q, kv, 1, 1); a `Reduce` over "kv" sees only those keys, and its identity where there is none.
    """
    (result,) = evaluate_all((expr,), environment, tensors, compute, visible)
    return result


def evaluate_all(
    roots: tuple[Expr, ...],
    environment: Mapping[Var, Tensor | Number],
    tensors: Mapping[str, Tensor],
    compute: torch.dtype = torch.float64,
    visible: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`evaluate_dense` of several expressions; what they share is computed once."""
    places = [x.device for x in (*environment.values(), *tensors.values()) if isinstance(x, Tensor)]
    device = places[0] if places else torch.device("cpu")

    def number(value: Tensor | Number, dtype: DType) -> Tensor:
        return torch.as_tensor(value, dtype=torch_kind(dtype, compute), device=device)

    values: dict[Expr, Tensor] = {}
    for node in postorder(*roots):
        match node:
            case Const(value) | Full(value):
                values[node] = number(value, node.dtype)
            case Var():
                values[node] = number(environment[node], node.dtype)
            case Call(_, args):
                values[node] = apply_op(node, [values[a] for a in args], compute)
            case Load(name, _, indices):
                loaded = gather(tensors[name], [values[i] for i in indices])
                values[node] = _to(loaded, torch_kind(node.dtype, compute))
            case Reduce(kind, x, axis):
                values[node] = _reduce(kind, values[x], axis, visible)
            case Cast(x):
                values[node] = values[x]
            case _:
                raise TypeError(f"{type(node).__name__} does not occur in a scalar function")
    return tuple(values[root] for root in roots)


def _reduce(kind: str, x: Tensor, axis: str, visible: Tensor | None) -> Tensor:
    if axis == "kv" and visible is not None:
        x = torch.where(visible, x, torch.full((), REDUCE_IDENTITY[kind], dtype=x.dtype, device=x.device))
    functions: dict[str, Callable[..., Tensor]] = {"max": torch.amax, "min": torch.amin, "sum": torch.sum}
    return functions[kind](x, dim=DIMENSION[axis], keepdim=True)

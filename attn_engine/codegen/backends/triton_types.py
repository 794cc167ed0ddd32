"""Element types in Triton: their names, and arithmetic on stored elements in the compute type."""

from __future__ import annotations

from collections.abc import Mapping

from attn_engine.ir.expr import Call, Expr, Load, Reduce, call, postorder
from attn_engine.ir.ops import INFO, DType, Op, Signature, Storage
from attn_engine.ir.tile import Kernel, expressions, walk

TYPES: Mapping[Storage, str] = {
    Storage.FLOAT64: "float64", Storage.FLOAT32: "float32", Storage.FLOAT16: "float16", Storage.BFLOAT16: "bfloat16",
}  # fmt: skip

_WIDENING = (Signature.ARITHMETIC, Signature.DIVISION, Signature.FUNCTION)


def widened(e: Expr) -> Expr | None:
    """A node whose stored operands are converted first; None where nothing needs it."""
    match e:
        case Call(op, args) if INFO[op].signature in _WIDENING:
            return Call(op, tuple(call(Op.TO_FLOAT, a) if a.dtype is DType.ELEMENT else a for a in args))
        case Reduce(kind, x, axis) if x.dtype is DType.ELEMENT:
            return Reduce(kind, call(Op.TO_FLOAT, x), axis)
        case _:
            return None


def element_storage(kernel: Kernel) -> Storage:
    """The storage of q, k and v: that of the tensors whose tiles are read as elements."""
    for s in walk(kernel.body):
        for e in postorder(*expressions(s)):
            if isinstance(e, Load) and e.kind is DType.ELEMENT:
                return kernel.param(e.tensor).storage
    return Storage.FLOAT32

"""The closed table of scalar operations: what each is called, what it takes, what it means.

Add an operation here; `tests/ir/test_completeness.py` then names every table that still lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Number = bool | int | float


class DType(Enum):
    """The kind of a scalar value inside a kernel.

    FLOAT is the compute type of the program: float32, or float64 where q, k and v are float64.
    ELEMENT is the storage type of q, k and v: only `Cast` and tile loads have it.
    """

    BOOL = "bool"
    INT = "int"
    ELEMENT = "element"
    FLOAT = "float"

    @property
    def rank(self) -> int:
        """Position in the promotion order bool < int < element < float."""
        return _PROMOTION[self.value]


_PROMOTION = {"bool": 0, "int": 1, "element": 2, "float": 3}


class Storage(Enum):
    """How a tensor's elements lie in memory."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def dtype(self) -> DType:
        """The kind of scalar that an element of this storage becomes once loaded."""
        if self is Storage.BOOL:
            return DType.BOOL
        return DType.FLOAT if "float" in self.value else DType.INT

    @property
    def floating(self) -> bool:
        return self.dtype is DType.FLOAT


class Op(Enum):
    """Scalar operations; `INFO` says what each means."""

    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    FLOORDIV = "floordiv"
    MOD = "mod"
    NEG = "neg"
    ABS = "abs"
    MAX = "max"
    MIN = "min"
    LE = "le"
    LT = "lt"
    EQ = "eq"
    NE = "ne"
    AND = "and"
    OR = "or"
    NOT = "not"
    WHERE = "where"
    TO_FLOAT = "to_float"
    TO_INT = "to_int"
    FLOOR = "floor"
    EXP = "exp"
    EXP2 = "exp2"
    LOG = "log"
    LOG2 = "log2"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    SIN = "sin"
    COS = "cos"


class Signature(Enum):
    """Which operand kinds an operation takes and which kind it gives."""

    ARITHMETIC = "numbers -> the wider of them"
    DIVISION = "numbers -> float"
    INTEGER = "ints -> int"
    COMPARISON = "two values -> bool"
    LOGICAL = "bools -> bool"
    SELECT = "bool, two values -> the wider of them"
    TO_FLOAT = "anything -> float"
    TO_INT = "anything -> int"
    FUNCTION = "a float -> float"


@dataclass(frozen=True, slots=True)
class OpInfo:
    """Arity, signature and meaning on Python numbers of one operation."""

    arity: int
    signature: Signature
    evaluate: Callable[..., Number]


def _divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _guarded(function: Callable[[float], float], outside: float = math.nan) -> Callable[[float], float]:
    """`function` with IEEE results where Python raises."""

    def evaluate(x: float) -> float:
        try:
            return function(x)
        except ValueError:
            return outside
        except OverflowError:
            return math.inf

    return evaluate


def _log(base_log: Callable[[float], float]) -> Callable[[float], float]:
    return lambda x: -math.inf if x == 0 else _guarded(base_log)(x)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else 1.0 - 1.0 / (1.0 + math.exp(max(x, -745.0)))


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _smaller(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else min(a, b)


_A, _S = Signature.ARITHMETIC, Signature
INFO: dict[Op, OpInfo] = {
    Op.ADD: OpInfo(2, _A, lambda a, b: a + b),
    Op.SUB: OpInfo(2, _A, lambda a, b: a - b),
    Op.MUL: OpInfo(2, _A, lambda a, b: a * b),
    Op.DIV: OpInfo(2, _S.DIVISION, _divide),
    Op.FLOORDIV: OpInfo(2, _S.INTEGER, lambda a, b: a // b),  # rounds toward minus infinity, as Python
    Op.MOD: OpInfo(2, _S.INTEGER, lambda a, b: a % b),  # takes the sign of the divisor, as Python
    Op.NEG: OpInfo(1, _A, lambda a: -a),
    Op.ABS: OpInfo(1, _A, abs),
    Op.MAX: OpInfo(2, _A, _larger),
    Op.MIN: OpInfo(2, _A, _smaller),
    Op.LE: OpInfo(2, _S.COMPARISON, lambda a, b: a <= b),
    Op.LT: OpInfo(2, _S.COMPARISON, lambda a, b: a < b),
    Op.EQ: OpInfo(2, _S.COMPARISON, lambda a, b: a == b),
    Op.NE: OpInfo(2, _S.COMPARISON, lambda a, b: a != b),
    Op.AND: OpInfo(2, _S.LOGICAL, lambda a, b: a and b),
    Op.OR: OpInfo(2, _S.LOGICAL, lambda a, b: a or b),
    Op.NOT: OpInfo(1, _S.LOGICAL, lambda a: not a),
    Op.WHERE: OpInfo(3, _S.SELECT, lambda c, a, b: a if c else b),
    Op.TO_FLOAT: OpInfo(1, _S.TO_FLOAT, float),
    Op.TO_INT: OpInfo(1, _S.TO_INT, int),
    Op.FLOOR: OpInfo(1, _S.FUNCTION, lambda x: float(math.floor(x)) if math.isfinite(x) else x),
    Op.EXP: OpInfo(1, _S.FUNCTION, _guarded(math.exp)),
    Op.EXP2: OpInfo(1, _S.FUNCTION, _guarded(lambda x: math.pow(2.0, x))),
    Op.LOG: OpInfo(1, _S.FUNCTION, _log(math.log)),
    Op.LOG2: OpInfo(1, _S.FUNCTION, _log(math.log2)),
    Op.TANH: OpInfo(1, _S.FUNCTION, math.tanh),
    Op.SIGMOID: OpInfo(1, _S.FUNCTION, _sigmoid),
    Op.SQRT: OpInfo(1, _S.FUNCTION, _guarded(math.sqrt)),
    Op.RSQRT: OpInfo(1, _S.FUNCTION, lambda x: math.inf if x == 0 else _guarded(lambda y: 1.0 / math.sqrt(y))(x)),
    Op.SIN: OpInfo(1, _S.FUNCTION, _guarded(math.sin)),
    Op.COS: OpInfo(1, _S.FUNCTION, _guarded(math.cos)),
}


def result_dtype(op: Op, operands: tuple[DType, ...]) -> DType:
    """The kind of `op` applied to operands of these kinds.

    Raises TypeError where the operation does not take them; the front end turns that into a message for the user.
    """
    signature = INFO[op].signature
    widest = max(operands, key=lambda d: d.rank)
    match signature:
        case Signature.ARITHMETIC:
            _require(op, operands, widest is not DType.BOOL, "numbers")
            return DType.FLOAT if widest is DType.ELEMENT else widest
        case Signature.INTEGER:
            _require(op, operands, all(d is DType.INT for d in operands), "ints")
            return DType.INT
        case Signature.LOGICAL:
            _require(op, operands, all(d is DType.BOOL for d in operands), "bools")
            return DType.BOOL
        case Signature.SELECT:
            _require(op, operands, operands[0] is DType.BOOL, "a bool first")
            return max(operands[1:], key=lambda d: d.rank)
        case Signature.FUNCTION:
            _require(op, operands, widest.rank >= DType.ELEMENT.rank, "a float")
            return DType.FLOAT
        case Signature.DIVISION | Signature.TO_FLOAT:
            return DType.FLOAT
        case Signature.TO_INT:
            return DType.INT
        case Signature.COMPARISON:
            return DType.BOOL


def _require(op: Op, operands: tuple[DType, ...], legal: bool, wanted: str) -> None:
    if not legal:
        raise TypeError(f"{op.value} takes {wanted}, not {', '.join(d.value for d in operands)}")

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
    FLOAT8 = "float8_e4m3fn"  # of caches alone: with scales
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
    BIT = "bit"
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
    BIT = "ints -> bool"
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


Unary = Callable[[float], Number]
Binary = Callable[[float, float], Number]


def _bit_of(word: float, place: float) -> bool:
    return bool(int(word) >> int(place) & 1)


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


def _floor(x: float) -> float:
    return float(math.floor(x)) if math.isfinite(x) else x


def _rsqrt(x: float) -> float:
    return math.inf if x == 0 else _guarded(lambda y: 1.0 / math.sqrt(y))(x)


def _choose(condition: Number, a: Number, b: Number) -> Number:
    return a if condition else b


def _unary(signature: Signature, evaluate: Unary) -> OpInfo:
    return OpInfo(1, signature, evaluate)


def _binary(signature: Signature, evaluate: Binary) -> OpInfo:
    return OpInfo(2, signature, evaluate)


_A, _S = Signature.ARITHMETIC, Signature
INFO: dict[Op, OpInfo] = {
    Op.ADD: _binary(_A, lambda a, b: a + b),
    Op.SUB: _binary(_A, lambda a, b: a - b),
    Op.MUL: _binary(_A, lambda a, b: a * b),
    Op.DIV: _binary(_S.DIVISION, _divide),
    Op.FLOORDIV: _binary(_S.INTEGER, lambda a, b: a // b),  # rounds toward minus infinity, as Python
    Op.MOD: _binary(_S.INTEGER, lambda a, b: a % b),  # takes the sign of the divisor, as Python
    Op.NEG: _unary(_A, lambda a: -a),
    Op.ABS: _unary(_A, abs),
    # A NaN: the reference and the torch backend spread it as torch does. Generated C++ and Triton may drop it, because
    # the machines' own instructions return one operand and telling them otherwise costs every row maximum more.
    Op.MAX: _binary(_A, _larger),
    Op.MIN: _binary(_A, _smaller),
    Op.LE: _binary(_S.COMPARISON, lambda a, b: a <= b),
    Op.LT: _binary(_S.COMPARISON, lambda a, b: a < b),
    Op.EQ: _binary(_S.COMPARISON, lambda a, b: a == b),
    Op.NE: _binary(_S.COMPARISON, lambda a, b: a != b),
    Op.BIT: _binary(_S.BIT, _bit_of),  # places from 0 to 31
    Op.AND: _binary(_S.LOGICAL, lambda a, b: a and b),
    Op.OR: _binary(_S.LOGICAL, lambda a, b: a or b),
    Op.NOT: _unary(_S.LOGICAL, lambda a: not a),
    Op.WHERE: OpInfo(3, _S.SELECT, _choose),
    Op.TO_FLOAT: _unary(_S.TO_FLOAT, float),
    Op.TO_INT: _unary(_S.TO_INT, int),
    Op.FLOOR: _unary(_S.FUNCTION, _floor),
    Op.EXP: _unary(_S.FUNCTION, _guarded(math.exp)),
    Op.EXP2: _unary(_S.FUNCTION, _guarded(lambda x: math.pow(2.0, x))),
    Op.LOG: _unary(_S.FUNCTION, _log(math.log)),
    Op.LOG2: _unary(_S.FUNCTION, _log(math.log2)),
    Op.TANH: _unary(_S.FUNCTION, math.tanh),
    Op.SIGMOID: _unary(_S.FUNCTION, _sigmoid),
    Op.SQRT: _unary(_S.FUNCTION, _guarded(math.sqrt)),
    Op.RSQRT: _unary(_S.FUNCTION, _rsqrt),
    Op.SIN: _unary(_S.FUNCTION, _guarded(math.sin)),
    Op.COS: _unary(_S.FUNCTION, _guarded(math.cos)),
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
        case Signature.BIT:
            _require(op, operands, all(d is DType.INT for d in operands), "ints")
            return DType.BOOL
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

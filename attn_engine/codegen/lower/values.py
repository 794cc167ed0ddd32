"""The named values and tensor parameters that every lowering shares."""

from __future__ import annotations

from attn_engine.ir.expr import Expr, Load, Var
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Attention
from attn_engine.ir.tile import Param

INT, FLOAT, ELEMENT = DType.INT, DType.FLOAT, DType.ELEMENT


def scalar(name: str) -> Var:
    return Var(name, INT)


def tile(name: str, *axes: str) -> Var:
    return Var(name, FLOAT, axes)


KV_HEAD, SPLIT = scalar("kv_head"), scalar("split")
HEADS, KV_HEADS, BATCHES = scalar("heads"), scalar("kv_heads"), scalar("batches")
Q_LEN, KV_LEN, SPLITS = scalar("q_len"), scalar("kv_len"), scalar("splits")
D_IDX, DV_IDX = Var("d_idx", INT, ("d",)), Var("dv_idx", INT, ("dv",))
SCALE, SCALE_LOG2 = Var("scale", FLOAT), Var("scale_log2", FLOAT)

QUERY, KEY = Var("query", ELEMENT, ("q", "d")), Var("key", ELEMENT, ("kv", "d"))
VALUE, D_OUT = Var("value", ELEMENT, ("kv", "dv")), Var("d_out", ELEMENT, ("q", "dv"))

Q_ROW = (BATCH, HEAD, Q_IDX)  # indices of a row value of this program's or this trip's q tile
KV_ROW = (BATCH, KV_HEAD, KV_IDX)
INSIDE = {"q": Q_IDX < Q_LEN, "kv": KV_IDX < KV_LEN}

_SHAPES = {
    "Q": ("batches", "heads", "q_len", "dim_qk"),
    "K": ("batches", "kv_heads", "kv_len", "dim_qk"),
    "V": ("batches", "kv_heads", "kv_len", "dim_v"),
    "O": ("batches", "heads", "q_len", "dim_v"),
}
ROW_SHAPE = ("batches", "heads", "q_len")
COLUMN_SHAPE = ("batches", "heads", "kv_len")
DIAGONAL_SHAPE = ("splits", "batches", "heads", "diagonals")  # q_len + kv_len - 1 of them
GROUP_OF_HEADS = HEADS // KV_HEADS  # query heads per kv head

_INDICES = {
    "Q": (*Q_ROW, D_IDX),
    "K": (*KV_ROW, D_IDX),
    "V": (*KV_ROW, DV_IDX),
    "O": (*Q_ROW, DV_IDX),
}


def like(tensor: str) -> str:
    """The tensor whose shape `tensor` has: dQ is like Q."""
    return tensor.removeprefix("d")


def indices(tensor: str) -> tuple[Expr, ...]:
    """Where this program's tile of Q, K, V, O or of their gradients lies."""
    return _INDICES[like(tensor)]


def load_tile(tensor: str) -> Load:
    return Load(tensor, ELEMENT, indices(tensor))


def load_rows(tensor: str) -> Load:
    return Load(tensor, FLOAT, Q_ROW)


def wide(program: Attention, tensor: str, *, output: bool = False) -> Param:
    """Q, K, V, O and their gradients: (batch, head, row, dimension), in the program's element type."""
    return Param(tensor, program.element, _SHAPES[like(tensor)], output)


def compute_storage(program: Attention) -> Storage:
    """How row values and partial gradients are kept: float64 for float64 programs, else float32."""
    return Storage.FLOAT64 if program.element is Storage.FLOAT64 else Storage.FLOAT32


def rows(program: Attention, name: str, *, output: bool = False) -> Param:
    return Param(name, compute_storage(program), ROW_SHAPE, output)


def saved_param(name: str) -> str:
    """The tensor that keeps a saved row value between the passes; in kernels the value itself has the bare name."""
    return f"saved_{name}"


def captured_params(program: Attention) -> tuple[Param, ...]:
    return tuple(
        Param(c.name, c.storage, tuple(f"{c.name}_size_{i}" for i in range(c.rank))) for c in program.captures
    )

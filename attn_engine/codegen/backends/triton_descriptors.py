"""Tiles that the tensor memory accelerator (TMA) loads: which tensors come as descriptors, and how their loads read.

A descriptor is made on the host before the launch (triton.tools.tensor_descriptor): it knows the tensor's sizes and
strides, so the kernel computes no addresses and no masks, and rows past the end read zero. It needs a last stride of 1
and all else at multiples of 16 bytes: `runtime/triton_launch.py` asks each call's tensors and takes the text with
pointers otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attn_engine.codegen.lower.columns import cut_columns, padded
from attn_engine.ir.expr import COLUMNS, Expr, Load, Var, postorder
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Accumulate, Kernel, Let, Loop, Stmt, StoreTile, expressions, walk

_ROWS = {"q_len": "q", "kv_len": "kv"}
_ELEMENTS = (Storage.BFLOAT16, Storage.FLOAT16)


@dataclass(frozen=True, slots=True)
class TileDescriptor:
    """A kernel's argument `name`: tiles of `tensor` of so many rows and columns, of one batch and head."""

    name: str
    tensor: str
    columns: str  # the axis: "d", "dv" or a piece of them
    shape: tuple[int, int, int, int]


@lru_cache(maxsize=1024)
def tile_descriptors(kernel: Kernel) -> tuple[TileDescriptor, ...]:
    """The tensors of 16-bit elements that loops over tiles read, and nothing else reads otherwise."""
    kernel = cut_columns(kernel)
    loops = (s for s in walk(kernel.body) if isinstance(s, Loop) and s.axis is not None)
    in_loops = {id(s) for loop in loops for s in walk(loop.body)}
    found: dict[str, dict[str, TileDescriptor]] = {}
    others: set[str] = set()
    for s in walk(kernel.body):
        whole = tile_load(kernel, s)
        for load in (e for e in postorder(*expressions(s)) if isinstance(e, Load)):
            if load is whole and id(s) in in_loops:
                made = _descriptor(kernel, load)
                found.setdefault(load.tensor, {})[made.columns] = made
            else:
                others.add(load.tensor)
        if isinstance(s, StoreTile | Accumulate):
            others.add(s.tensor)
    return tuple(d for tensor, made in found.items() if tensor not in others for d in made.values())


def tile_load(kernel: Kernel, s: Stmt) -> Load | None:
    """The load of a whole tile of Q, K, V or their like that a statement is, if it is one."""
    if not isinstance(s, Let) or not isinstance(s.value, Load) or s.value.kind is not DType.ELEMENT:
        return None
    param = kernel.param(s.value.tensor)
    rows, columns = s.value.indices[2:] if len(s.value.indices) == 4 else (None, None)
    if param.storage not in _ELEMENTS or param.shape[2] not in _ROWS or columns is None:
        return None
    axis = _ROWS[param.shape[2]]
    whole = _is_axis(rows, axis) and any(_is_axis(columns, c) for c in COLUMNS)
    return s.value if whole else None


def descriptor_name(tensor: str, columns: str) -> str:
    """K for its first columns, K_d2 for the second piece of them."""
    return tensor if columns in ("d", "dv") else f"{tensor}_{columns}"


def _descriptor(kernel: Kernel, load: Load) -> TileDescriptor:
    rows, columns = (index.axes[0] for index in load.indices[2:])
    shape = (1, 1, kernel.block(rows), padded(kernel.block(columns)))
    return TileDescriptor(descriptor_name(load.tensor, columns), load.tensor, columns, shape)


def _is_axis(index: Expr | None, axis: str) -> bool:
    return isinstance(index, Var) and index.name == f"{axis}_idx"

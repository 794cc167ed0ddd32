"""Names of types, sizes and dimensions in generated TileLang, and how a kernel is compiled and launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_engine.codegen.backends.tilelang_sequences import LENGTHS
from attn_engine.codegen.backends.triton_address import DIMENSION_WORDS, captured
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Kernel, Param

COUNTERS = {"q": "qi", "kv": "ki", "d": "di", "dv": "vi"}
BLOCKS = {"q": "BLOCK_Q", "kv": "BLOCK_KV", "d": "BLOCK_D", "dv": "BLOCK_DV"}
DIMENSIONS = {"dim_qk": "DIM_QK", "dim_v": "DIM_V", "span": "2"}
LINE = 16  # bytes: what one copy instruction moves, and where rows must begin
AMD_LINE = 8
BYTES = {Storage.FLOAT64: 8, Storage.FLOAT32: 4, Storage.FLOAT16: 2, Storage.BFLOAT16: 2}
SMALLEST_BLOCK = 16  # what a matrix unit multiplies

# Numbers of a kernel that are never below zero: their quotients need no rounding toward minus infinity.
COUNTS = frozenset(
    """batch head kv_head split batches heads kv_heads splits group q_len kv_len q_start kv_start step q_tile kv_tile
    q_idx kv_idx d_idx dv_idx q_steps kv_steps entry kv_tiles first_head
    tile place tiles_of_head tile_start q_first kv_first""".split()
)


@dataclass(frozen=True, slots=True)
class TileLangOptions:
    """threads of a block, copies that run ahead, and whether the text is for TileLang's CPU target.

    line: bytes that one instruction copies; 8 for AMD, where TileLang 0.1.15 has no vectors of more than four elements.
    specialised: warps of their own issue bulk copies (sm_90 and newer), and need few registers.

    A loop whose trips are counted at run time takes no second stage where copies are cp.async (sm_80, sm_89): TileLang
    0.1.15 does not lower it.
    """

    threads: int = 256
    num_stages: int = 2
    cpu: bool = False
    line: int = LINE
    specialised: bool = True


def dtype_name(dtype: DType, element: Storage, compute: str) -> str:
    """The type of a buffer's numbers."""
    match dtype:
        case DType.ELEMENT:
            return element.value
        case DType.FLOAT:
            return compute
        case DType.INT:
            return "int32"
        case DType.BOOL:
            return "bool"


def stride_names(param: Param) -> tuple[str, ...]:
    """One run-time number per dimension; Q, K, V, rows and their like have neighbours along the last, which is no
    argument."""
    if captured(param):
        return tuple(f"{param.name}_stride_{i}" for i in range(len(param.shape)))
    words = {**DIMENSION_WORDS, **dict.fromkeys(LENGTHS, "row")}
    return tuple(f"{param.name}_{words[size]}_stride" for size in param.shape[:-1])


def block_sizes(kernel: Kernel, cpu: bool) -> Mapping[str, int]:
    """Positions of a tile along each axis: of the head dimensions whole matrix instructions, but on the CPU."""
    up = 1 if cpu else SMALLEST_BLOCK
    return {axis: n if axis in ("q", "kv") else -(-n // up) * up for axis, n in kernel.tile}

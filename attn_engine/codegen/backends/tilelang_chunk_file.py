"""The frame of a generated TileLang file of chunk kernels: its constants, and how it declares tensors."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from attn_engine.codegen.backends.triton_chunk_params import ROWS, ChunkOptions, ChunkTensor
from attn_engine.codegen.backends.triton_layout import WIDTH
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.codegen.lower.columns import padded
from attn_engine.ir.chunk import RowOutput
from attn_engine.ir.ops import Storage


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor argument as the text declares it: names of the sizes that are not constants, and of the strides."""

    tensor: ChunkTensor
    shape: tuple[str, ...]
    strides: tuple[str, ...]


def argument_of(t: ChunkTensor, outputs: Sequence[RowOutput]) -> Argument:
    """How the text declares a tensor of a phase with these outputs."""
    if t.name in ("sequences", "chunks"):
        rows = "sequence_count" if t.name == "sequences" else "chunk_total"
        return Argument(t, (rows, "4"), ())
    if t.captured:
        return Argument(t, t.sizes, t.strides)
    heads = {"Q": "q_heads", "K": "k_heads"}.get(t.name, "heads")
    words = {
        "batch": "batches", "head": heads, "token": "tokens", "sequence": "sequence_count",
        "chunk": "chunk_total", "part": "PARTS", "row": "DIM_QK",
    }  # fmt: skip
    shape = [words.get(d, d) for d in t.dims]
    if t.dims[-1] == "column":
        rows = t.dims == ROWS or "part" in t.dims or t.dims[:2] == ("chunk", "head")
        states = t.dims[-2:] == ("row", "column")
        wide = any(w.tensor == t.name and "dv" in w.axes for w in outputs)
        of_v = t.name in ("V", "dO") or wide
        shape[-1] = f"{t.name}_columns" if states or not rows else "DIM_V" if of_v else "DIM_QK"
    return Argument(t, tuple(shape), t.strides)


def constants(phase: ChunkPhase, option: ChunkOptions, cpu: bool, text: str) -> list[str]:
    program = phase.program
    compute = "float64" if program.element is Storage.FLOAT64 else "float32"
    values = {
        "CHUNK": option.chunk,
        "LEVELS": option.chunk.bit_length() - 1,
        "BLOCK_D": padded(program.dim_qk),
        "BLOCK_DV": option.columns_of(program),
        "DIM_QK": program.dim_qk,
        "DIM_V": program.dim_v,
        "PARTS": option.parts(program),
        "ELEMENT": f'"{program.element.value}"',
        "COMPUTE": f'"{compute}"',
        "THREADS": 32 * option.num_warps,
        "each": "T.grid" if cpu else "T.Parallel",
        "memory": "T.alloc_local" if cpu else "T.alloc_shared",
        "registers": "T.alloc_local" if cpu else "T.alloc_fragment",
    }
    return [f"{n} = {x}" for n, x in values.items() if re.search(rf"\b{n}\b", text)]


def dynamic_names(arguments: Sequence[Argument]) -> list[str]:
    """Sizes and strides are read from the tensors of a call: no compilation for their values."""
    constants = {"DIM_QK", "DIM_V", "PARTS", "4"}
    sizes = dict.fromkeys(s for a in arguments for s in a.shape if s not in constants)
    lines = [f'{s} = T.dynamic("{s}")' for s in sizes]
    for a in dict.fromkeys(arguments):
        if a.strides:
            lines += _stride_lines(a)
    return lines


def _stride_lines(a: Argument) -> list[str]:
    line = f'{a.tensor.name}_strides = T.dynamic("{", ".join(a.strides)}", "int64")'
    if len(line) <= WIDTH:
        return [line]
    names = textwrap.wrap(", ".join(a.strides), WIDTH - 8, drop_whitespace=False)
    quoted = [f'    "{n}"' for n in names]
    return [f"{a.tensor.name}_strides = T.dynamic(", *quoted[:-1], f"{quoted[-1]},", '    "int64",', ")"]

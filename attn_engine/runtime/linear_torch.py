"""Backend "torch" of linear attentions: the lowered chunk programs, carried out by torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.codegen.lower.chunked import lower_chunked_forward
from attn_engine.codegen.lower.chunked_backward import D_OUTPUT, lower_chunked_backward
from attn_engine.ir.chunk import ChunkKernel, RowOutput
from attn_engine.ir.linear import LinearProgram
from attn_engine.runtime.chunk_program import ChunkRun
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.storage import compute_dtype

DEFAULT_CHUNK = 64


@dataclass(frozen=True)
class TorchChunks:
    """A program in chunks of tokens. dtype: what it computes in; None: the program's compute type."""

    program: LinearProgram
    chunk: int | None
    dtype: torch.dtype | None = None

    name = "torch"

    @property
    def compute(self) -> torch.dtype:
        return self.dtype or compute_dtype(self.program.element)

    def run(self, kernel: ChunkKernel, inputs: LinearInputs) -> ChunkRun:
        outputs = {w.tensor: empty_output(w, inputs, self.compute) for w in kernel.outputs}
        return ChunkRun(kernel, inputs, self.chunk or DEFAULT_CHUNK, self.compute, outputs)

    def forward(self, inputs: LinearInputs, keep: bool = False) -> tuple[Tensor, Tensor, None]:
        """o (B, H, T, Dv) and the final states, in the type that is computed in; nothing is kept for the backward."""
        run = self.run(lower_chunked_forward(self.program), inputs)
        states = inputs.start(self.program.state_columns, self.compute)
        found = [run.forward(b, first, n, states[s]) for s, b, first, n in inputs.sequences.groups()]
        return run.outputs["O"], torch.cat(found) if found else states, None

    def backward(
        self,
        inputs: LinearInputs,
        kept: object,
        d_out: Tensor,
        d_states: Tensor,
        wanted: Sequence[str],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the rows by output name (see lower_chunked_backward), and that of the initial states."""
        run = self.run(lower_chunked_backward(self.program, wanted), inputs)
        run.given[D_OUTPUT] = d_out  # pyright: ignore[reportIndexIssue]
        states, d_states = inputs.start(self.program.state_columns, self.compute), d_states.to(self.compute)
        groups = inputs.sequences.groups()
        found = [run.backward(b, first, n, states[s], d_states[s]) for s, b, first, n in groups]
        return run.outputs, torch.cat(found) if found else d_states


def empty_output(output: RowOutput, inputs: LinearInputs, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape of a tensor that rows are written to: (B, H), then its axes."""
    sizes = {"q": inputs.q.shape[2], "d": inputs.q.shape[3], "dv": inputs.v.shape[3]}
    shape = (inputs.v.shape[0], inputs.heads, *(sizes[axis] for axis in output.axes))
    return torch.zeros(shape, dtype=dtype, device=inputs.q.device)

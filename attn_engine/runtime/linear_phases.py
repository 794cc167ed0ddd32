"""Linear attentions in phases: the states of all chunks first, then all chunks at once. What GPU backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions, output_dims
from attn_engine.codegen.chunk_schedule import ChunkSchedule
from attn_engine.codegen.lower.chunk_phases import (
    ChunkPhase,
    gradients_phase,
    output_phase,
    state_gradients_phase,
    states_phase,
)
from attn_engine.codegen.lower.chunked_backward import lower_chunked_backward
from attn_engine.errors import UnknownOption
from attn_engine.ir.chunk import RowOutput
from attn_engine.ir.linear import LinearProgram
from attn_engine.ir.ops import Number
from attn_engine.linear_errors import DecayInfinite, DecayPositive
from attn_engine.runtime.linear_inputs import LinearInputs, Sequences
from attn_engine.runtime.storage import compute_dtype

NO_FAULT = 2**31 - 1


class PhaseLaunch(Protocol):
    """One phase, ready to launch."""

    over_sequences: bool

    def __call__(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number], grid: tuple[int, int]
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class ChunkFile:
    """A direction's kernels: phases, how they are launched, and their text."""

    phases: tuple[ChunkPhase, ...]
    options: tuple[ChunkOptions, ...]
    source: str
    launches: tuple[PhaseLaunch, ...]


@dataclass(eq=False)
class PhaseChunks(ABC):
    """A program in chunks, compiled when first needed."""

    program: LinearProgram
    chunk: int | None
    _files: dict[tuple[str, tuple[str, ...]], ChunkFile] = field(
        default_factory=dict[tuple[str, tuple[str, ...]], ChunkFile], init=False
    )

    # -- what a backend says

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def chosen(self) -> ChunkSchedule:
        """How the phases are cut and launched."""

    @abstractmethod
    def source(self, direction: str, wanted: Sequence[str] = ()) -> str:
        """The text of "forward" or "backward"."""

    @abstractmethod
    def load(
        self, source: str, phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions]
    ) -> tuple[PhaseLaunch, ...]: ...

    @abstractmethod
    def check_device(self, device: torch.device) -> None:
        """Raise where tensors lie on a device that the kernels do not run on."""

    def states_dtype(self, inputs: LinearInputs) -> torch.dtype:
        """Of the states that a forward pass writes down between its phases."""
        return compute_dtype(self.program.element)

    def phases(
        self, direction: str, wanted: Sequence[str] = ()
    ) -> tuple[tuple[ChunkPhase, ...], tuple[ChunkOptions, ...]]:
        """The phases of "forward" or "backward", and how they are spelled and launched."""
        if direction == "forward":
            return (states_phase(self.program, True), output_phase(self.program)), self.chosen().forward
        if direction != "backward":
            known = "'forward', 'backward'"
            raise UnknownOption(option="kernel", value=direction, where="source", known=known)
        kernel = lower_chunked_backward(self.program, wanted)
        found = states_phase(self.program, False), state_gradients_phase(kernel), gradients_phase(kernel)
        return found, self.chosen().backward

    def file(self, direction: str, wanted: Sequence[str] = ()) -> ChunkFile:
        key = direction, tuple(wanted)
        found = self._files.get(key)
        if found is None:
            phases, options = self.phases(direction, wanted)
            source = self.source(direction, wanted)
            launches = self.load(source, phases, options)
            found = self._files[key] = ChunkFile(phases, options, source, launches)
        return found

    # -- the two passes

    def forward(self, inputs: LinearInputs, keep: bool = False) -> tuple[Tensor, Tensor, None]:
        """o (B, H, T, Dv) and the final states; nothing is kept: the backward pass finds the states again."""
        self.check_device(inputs.q.device)
        file = self.file("forward")
        call = PhaseCall(self, file, inputs)
        call.add_states(self.states_dtype(inputs))
        final = call.tensors["final"] = call.empty_state()
        faults = call.tensors["faults"] = call.integers(final.shape[:2], NO_FAULT)
        o = call.tensors["O"] = call.rows_like(inputs.v, None, inputs.v.shape[3], inputs.v.dtype)
        for launch in file.launches:
            call.launch(launch)
        if self.program.decay is not None:
            _report(faults, inputs, self.program.reverse)
        return o, final, None

    def backward(
        self, inputs: LinearInputs, kept: object, d_out: Tensor, d_states: Tensor, wanted: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the rows by output name (see lower_chunked_backward), and that of the initial states."""
        file = self.file("backward", wanted)
        call = PhaseCall(self, file, inputs)
        call.add_states(call.compute)
        call.tensors["final"] = call.empty_state()
        call.tensors["dO"], call.tensors["d_final"] = d_out, d_states.to(call.compute)
        call.tensors["d_states"] = call.empty_states(call.compute, call.parts)
        d_initial = call.tensors["d_initial"] = call.empty_state(call.parts)
        outputs = {w.tensor: (w, call.output(w)) for w in file.phases[-1].outputs}
        call.tensors |= {name: x for name, (_, x) in outputs.items()}
        for launch in file.launches:
            call.launch(launch)
        found = {name: call.total(w, x) for name, (w, x) in outputs.items()}
        return found, self._joined(d_initial)

    def _joined(self, d_state: Tensor) -> Tensor:
        """The column beyond those of v is a sum over what each program has of it."""
        columns = self.program.state_columns
        if d_state.shape[3] <= columns:
            return d_state
        dims = self.program.dim_v
        return torch.cat([d_state[..., :dims], d_state[..., dims:].sum(-1, keepdim=True)], -1)


class PhaseCall:
    """The tensors of one pass."""

    def __init__(self, machine: PhaseChunks, file: ChunkFile, inputs: LinearInputs) -> None:
        self.machine, self.program, self.inputs = machine, machine.program, inputs
        self.options = file.options[0]
        self.parts = self.options.parts(self.program)
        self.element, self.compute = inputs.v.dtype, compute_dtype(self.program.element)
        self.device = inputs.q.device
        sequences, chunks = chunk_tables(inputs.sequences, self.options.chunk, self.device)
        self.tensors: dict[str, Tensor] = inputs.for_kernels() | {
            "sequences": sequences,
            "chunks": chunks,
            "initial": inputs.start(self.program.state_columns, self.compute),
        }

    def launch(self, launch: PhaseLaunch) -> None:
        heads = self.inputs.heads
        if not heads:
            return
        count = self.tensors["sequences" if launch.over_sequences else "chunks"].shape[0]
        groups = {"q_group": heads // self.inputs.q.shape[1], "k_group": heads // self.inputs.k.shape[1]}
        launch(self.tensors, {**self.inputs.scalars, **groups}, (count * self.parts, heads))

    def integers(self, shape: Sequence[int], value: int) -> Tensor:
        return torch.full(tuple(shape), value, dtype=torch.int32, device=self.device)

    def empty_state(self, last: int = 1) -> Tensor:
        """A state of every sequence; last: how many columns a normaliser has."""
        columns = self.program.dim_v + (last if self.program.divisor is not None else 0)
        return torch.empty(self.inputs.state_shape(columns), dtype=self.compute, device=self.device)

    def empty_states(self, dtype: torch.dtype, last: int = 1) -> Tensor:
        """A state of every chunk, in rows that begin at multiples of 16 numbers."""
        columns = self.program.dim_v + (last if self.program.divisor is not None else 0)
        shape = (
            self.tensors["chunks"].shape[0],
            self.inputs.heads,
            self.inputs.q.shape[3],
            -(-columns // 16) * 16,
        )
        return torch.empty(shape, dtype=dtype, device=self.device)

    def add_states(self, dtype: torch.dtype) -> None:
        self.tensors["states"] = self.empty_states(dtype)

    def rows_like(self, x: Tensor, parts: int | None, columns: int | None, dtype: torch.dtype) -> Tensor:
        """(parts, batch, head of v, token, columns) in the order of x's dimensions."""
        batch, heads, tokens = self.inputs.v.shape[:3]
        ends = [] if columns is None else [columns]
        tokens_first = x.stride(1) <= x.stride(2)
        shape = [batch, tokens, heads] if tokens_first else [batch, heads, tokens]
        found = torch.empty((parts or 1, *shape, *ends), dtype=dtype, device=self.device)
        found = found.transpose(2, 3) if tokens_first else found
        return found if parts else found[0]

    def output(self, w: RowOutput) -> Tensor:
        """Where a gradient's rows, or its sums over each chunk, are written to."""
        columns = {"d": self.inputs.q.shape[3], "dv": self.inputs.v.shape[3]}
        width = next((columns[a] for a in w.axes if a in columns), None)
        parts = self.parts if output_dims(w)[0] == "part" else None
        if "q" in w.axes:
            return self.rows_like(self.inputs.v, parts, width, self.compute)
        shape = (self.tensors["chunks"].shape[0], self.inputs.heads, *([] if width is None else [width]))
        return torch.empty((parts, *shape) if parts else shape, dtype=self.compute, device=self.device)

    def total(self, w: RowOutput, x: Tensor) -> Tensor:
        """(batch, head), then the output's axes: parts, and chunks, are added up in a fixed order."""
        x = x if output_dims(w)[0] != "part" else x[0] if x.shape[0] == 1 else x.sum(0)
        if "q" in w.axes:
            return x
        batches, x = self.inputs.v.shape[0], x.double()
        if self.inputs.sequences.packed or not x.shape[0]:
            return x.sum(0, keepdim=True).expand(batches, *x.shape[1:])
        return x.unflatten(0, (batches, -1)).sum(1)


@lru_cache(maxsize=64)
def chunk_tables(sequences: Sequences, chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(batch element, first token, length, first chunk) of each sequence; (batch element, first token of its sequence,
    length of that, its own first token in it) of each chunk."""
    rows: list[tuple[int, int, int, int]] = []
    chunks: list[tuple[int, int, int, int]] = []
    for batch, first, length in zip(sequences.batch, sequences.first, sequences.length, strict=True):
        rows.append((batch, first, length, len(chunks)))
        chunks += [(batch, first, length, start) for start in range(0, length, chunk)]
    made = [torch.tensor(x, dtype=torch.int32).reshape(-1, 4).to(device) for x in (rows, chunks)]
    return made[0], made[1]


def _report(faults: Tensor, inputs: LinearInputs, reverse: bool) -> None:
    """Raise for the first token whose decay is none."""
    found = faults.cpu()
    if not bool((found != NO_FAULT).any()):
        return
    sequence, head = (int(i) for i in (found != NO_FAULT).nonzero()[0])
    fault, s = int(found[sequence, head]), inputs.sequences
    place = fault // 2
    token = s.first[sequence] + (s.length[sequence] - 1 - place if reverse else place)
    error = DecayInfinite if fault % 2 else DecayPositive
    raise error(batch=s.batch[sequence], head=head, token=token)

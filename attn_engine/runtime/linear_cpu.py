"""Backend "cpu" of linear attentions: generated C++ on torch's threads, one task for each head of each sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from attn_engine.codegen.backends.chunk_cpu import render_chunk_cpu
from attn_engine.codegen.backends.chunk_params import SEGMENT_TOKENS, chunk_params, output_storage
from attn_engine.codegen.lower.chunked import lower_chunked_forward, lower_token_step
from attn_engine.codegen.lower.chunked_backward import lower_chunked_backward
from attn_engine.ir.chunk import ChunkKernel
from attn_engine.ir.linear import LinearProgram
from attn_engine.ir.ops import Number
from attn_engine.linear_errors import DecayInfinite, DecayPositive
from attn_engine.runtime import large_outputs
from attn_engine.runtime.cpu_compile import compile_library, host_target
from attn_engine.runtime.cpu_launch import run_in_slots
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.storage import TORCH_DTYPES, compute_dtype
from attn_engine.version import VERSION

# Tokens of a chunk, measured on Zen 5: fewer products inside chunks beat the state's more frequent steps, of which the
# backward pass has several. A single step is a chunk with one token in it.
CHUNKS = {"forward": 16, "backward": 32, "step": 16}


class ChunkLibrary:
    """A loaded chunk kernel."""

    def __init__(self, kernel: ChunkKernel, library: Path) -> None:
        self._function = ctypes.CDLL(str(library))[f"attn_engine_{kernel.name}"]
        self._function.argtypes = [ctypes.c_void_p]
        self._function.restype = None
        self._tensors = [(p.name, p.rank) for p in chunk_params(kernel)]
        self._scalars = [(v.name, v.dtype.value == "float") for v in kernel.program.scalars]

    def prepare(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int], scalars: Mapping[str, Number]
    ) -> PreparedStep:
        """The slots of a call, whose addresses, position and numbers later calls like it change."""
        places: dict[str, int] = {}
        place = 1
        for name, rank in self._tensors:
            places[name] = place
            place += 1 + 2 * max(rank, 1)
        position = place + len(sizes) - 1
        slots = self._slots(tensors, sizes, scalars)
        return PreparedStep(self._function, (ctypes.c_int64 * len(slots))(*slots), places, position)

    def launch(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int], scalars: Mapping[str, Number], tasks: int
    ) -> None:
        """Run the kernel to its end; `sizes` in the order of SIZES."""
        slots = self._slots(tensors, sizes, scalars)
        run_in_slots(self._function, (ctypes.c_int64 * len(slots))(*slots), tasks)

    def _slots(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int], scalars: Mapping[str, Number]
    ) -> list[int]:
        slots: list[int] = [0]
        for name, _ in self._tensors:
            x = tensors[name]
            slots += (x.data_ptr(), *(x.shape or (1,)), *(x.stride() or (0,)))
        slots += sizes
        for name, floating in self._scalars:
            number = scalars[name]
            as_bits = ctypes.c_double(number) if floating else ctypes.c_int64(int(number))
            slots.append(ctypes.c_int64.from_buffer_copy(as_bits).value)
        return slots


@dataclass(eq=False)
class PreparedStep:
    """A step's kernel with everything in place but addresses and the position. One call at a time."""

    function: Callable[[int], None]
    slots: ctypes.Array[ctypes.c_int64]
    places: Mapping[str, int]
    position: int

    def launch(self, addresses: Sequence[tuple[int, int]], position: int) -> None:
        """addresses: (slot, address) of every tensor."""
        slots = type(self.slots).from_buffer_copy(self.slots)
        for place, address in addresses:
            slots[place] = address
        slots[self.position] = position
        self.function(ctypes.addressof(slots))


@dataclass(eq=False)
class CpuChunks:
    """A program in chunks, compiled when first needed. Thread-safe: a race compiles twice and keeps one."""

    program: LinearProgram
    chunk: int | None
    _libraries: dict[tuple[str, tuple[str, ...]], tuple[ChunkKernel, ChunkLibrary]] = field(
        default_factory=dict
    )

    name = "cpu"

    def tokens(self, direction: str) -> int:
        """Tokens of a chunk of "forward", "backward" or "step"."""
        return self.chunk if self.chunk is not None and direction != "step" else CHUNKS[direction]

    def kernel(self, direction: str, wanted: Sequence[str] = ()) -> ChunkKernel:
        if direction == "forward":
            return lower_chunked_forward(self.program)
        if direction == "step":
            return lower_token_step(self.program)
        return lower_chunked_backward(self.program, wanted)

    def source(self, direction: str, wanted: Sequence[str] = ()) -> str:
        """The C++ of "forward", "backward" or "step"."""
        tokens = self.tokens(direction)
        header = (
            f"attn_engine {VERSION} | {self.program.name}: {direction} | cpu | chunks of {tokens} tokens",
            f'regenerate: engine.source("{direction}")',
        )
        return render_chunk_cpu(self.kernel(direction, wanted), host_target(), tokens, header)

    def library(self, direction: str, wanted: Sequence[str] = ()) -> tuple[ChunkKernel, ChunkLibrary]:
        key = direction, tuple(wanted)
        found = self._libraries.get(key)
        if found is None:
            kernel, source = self.kernel(direction, wanted), self.source(direction, wanted)
            library = compile_library(kernel.name, source, lambda path: ChunkLibrary(kernel, path))
            found = self._libraries[key] = kernel, library
        return found

    def forward(self, inputs: LinearInputs, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """o (B, H, T, Dv), the final states, and the states at the starts of segments (none unless `keep`)."""
        _, library = self.library("forward")
        about = _about(inputs)
        compute = compute_dtype(self.program.element)
        shape = inputs.state_shape(self.program.state_columns)
        segments = int(about[-1, 3]) if keep else 0
        tensors = inputs.for_kernels() | {
            "initial": inputs.start(self.program.state_columns, compute),
            "final": torch.empty(shape, dtype=compute),
            "kept": torch.empty((segments, *shape[1:]), dtype=compute),
            "sequences": about,
            "faults": torch.zeros(shape[:2], dtype=torch.int64),
            "O": _empty_like(inputs.v),
        }
        self._launch(library, inputs, tensors, keep)
        return tensors["O"], tensors["final"], tensors["kept"]

    def backward(
        self,
        inputs: LinearInputs,
        kept: Tensor,
        d_out: Tensor,
        d_states: Tensor,
        wanted: Sequence[str],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the rows by output name (see lower_chunked_backward), and that of the initial states."""
        kernel, library = self.library("backward", wanted)
        compute = compute_dtype(self.program.element)
        shape = inputs.state_shape(self.program.state_columns)
        sizes = {"q": inputs.q.shape[2], "d": inputs.q.shape[3], "dv": inputs.v.shape[3]}
        outputs: dict[str, Tensor] = {}
        for w in kernel.outputs:
            dtype = TORCH_DTYPES[output_storage(kernel, w)]
            rows = (inputs.v.shape[0], inputs.heads) if "q" in w.axes else shape[:2]
            made = large_outputs.empty if "q" in w.axes else torch.zeros
            outputs[w.tensor] = made(*rows, *(sizes[axis] for axis in w.axes), dtype=dtype)
        tensors = inputs.for_kernels() | {
            "dO": d_out,
            "d_final": d_states.to(compute),
            "kept": kept,
            "d_initial": torch.empty(shape, dtype=compute),
            "sequences": _about(inputs),
            "faults": torch.zeros(shape[:2], dtype=torch.int64),
        }
        self._launch(library, inputs, tensors | outputs, False)
        sums = {w.tensor for w in kernel.outputs if "q" not in w.axes} if inputs.sequences.packed else set()
        found = {n: x.sum(0, keepdim=True) if n in sums else x for n, x in outputs.items()}
        return found, tensors["d_initial"]

    def prepare_step(self, inputs: LinearInputs) -> Step:
        """What carries out steps of inputs that lie like these, of one token; the initial state is changed in place."""
        _, library = self.library("step")
        assert inputs.initial_state is not None
        shape = inputs.state_shape(self.program.state_columns)
        kept = {
            "sequences": _about(inputs),
            "faults": torch.zeros(shape[:2], dtype=torch.int64),
            "initial": torch.empty((0, 0, 0, 0), dtype=inputs.initial_state.dtype),
            "kept": torch.empty((0, 0, 0, 0), dtype=inputs.initial_state.dtype),
        }
        out = torch.empty(inputs.v.shape, dtype=inputs.v.dtype)  # o of a step has no gaps, whatever v has
        tensors = inputs.for_kernels() | kept | {"final": inputs.initial_state, "O": out}
        heads = inputs.heads
        sizes = (shape[0], heads, inputs.q.shape[1], inputs.k.shape[1], 0, 0)
        return Step(self.program, library.prepare(tensors, sizes, inputs.scalars), kept, inputs)

    def _launch(
        self, library: ChunkLibrary, inputs: LinearInputs, tensors: Mapping[str, Tensor], keep: bool
    ) -> None:
        count, heads = len(inputs.sequences.batch), inputs.heads
        sizes = (count, heads, inputs.q.shape[1], inputs.k.shape[1], int(keep), 0)
        library.launch(tensors, sizes, inputs.scalars, count * heads)
        if self.program.decay is not None:
            _report(tensors["faults"], inputs, self.program.reverse)


@dataclass(eq=False)
class Step:
    """Steps of one kind of input."""

    program: LinearProgram
    prepared: PreparedStep
    kept: Mapping[str, Tensor]
    inputs: LinearInputs

    def __call__(self, tensors: Mapping[str, Tensor], state: Tensor, out: Tensor, position: int) -> None:
        """Fill out (without gaps), and change the state to that after the token. tensors: by the kernel's names."""
        places = self.prepared.places
        addresses = [(places[name], x.data_ptr()) for name, x in tensors.items()]
        addresses += [(places["final"], state.data_ptr()), (places["O"], out.data_ptr())]
        self.prepared.launch(addresses, position)
        if self.program.decay is not None:
            faults = self.kept["faults"]
            if faults.any():
                found = faults.clone()
                faults.zero_()
                _report(found, self.inputs, False)


def _empty_like(v: Tensor) -> Tensor:
    """In v's order of dimensions, where it repeats nothing."""
    return large_outputs.empty_like(v) if 0 not in v.stride() else torch.empty(v.shape, dtype=v.dtype)


def _about(inputs: LinearInputs) -> Tensor:
    """For each sequence its batch element, first token, length and first segment; at the end the number of segments."""
    rows: list[tuple[int, int, int, int]] = []
    segment, s = 0, inputs.sequences
    for batch, first, length in zip(s.batch, s.first, s.length, strict=True):
        rows.append((batch, first, length, segment))
        segment += -(-length // SEGMENT_TOKENS)
    return torch.tensor([*rows, (0, 0, 0, segment)], dtype=torch.int64)


def _report(faults: Tensor, inputs: LinearInputs, reverse: bool) -> None:
    """Raise for the first token whose decay is none."""
    if not bool(faults.any()):
        return
    sequence, head = (int(i) for i in faults.nonzero()[0])
    fault, s = int(faults[sequence, head]), inputs.sequences
    place = fault // 2 - 1
    token = s.first[sequence] + (s.length[sequence] - 1 - place if reverse else place)
    error = DecayInfinite if fault % 2 else DecayPositive
    raise error(batch=s.batch[sequence], head=head, token=token)

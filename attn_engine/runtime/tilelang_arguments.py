"""Where the numbers of a TileLang launch come from: tensors' addresses, sizes and strides, a call's scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from attn_engine.codegen.backends.tilelang_sequences import sized
from attn_engine.codegen.backends.tilelang_types import stride_names
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import Kernel

Call = tuple[Mapping[str, Tensor], Mapping[str, Number], Mapping[str, int]]


def argument_values(kernel: Kernel) -> dict[str, Callable[[Call], Number]]:
    """How to get each number of a launch, by the name that it has in the generated text; tensors as addresses."""

    def address(name: str) -> Callable[[Call], Number]:
        return lambda call: call[0][name].data_ptr()

    def extent(name: str, dimension: int) -> Callable[[Call], Number]:
        return lambda call: call[0][name].shape[dimension]

    def stride(name: str, dimension: int) -> Callable[[Call], Number]:
        return lambda call: call[0][name].stride(dimension)

    def number(name: str, kind: Callable[[Number], Number]) -> Callable[[Call], Number]:
        return lambda call: kind(call[1][name])

    found: dict[str, Callable[[Call], Number]] = {}
    for s in kernel.scalars:
        found[s.name] = number(s.name, float if s.dtype is DType.FLOAT else int)
    for p in sized(kernel).params:
        found[p.name] = address(p.name)
        found |= {size: extent(p.name, i) for i, size in enumerate(p.shape)}
        found |= {name: stride(p.name, i) for i, name in enumerate(stride_names(p))}
    return found

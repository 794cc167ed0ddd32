"""Generated Triton with tensor descriptors: which tensors they take, and the same results as with pointers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_engine.codegen.backends.triton import TritonOptions, argument_names, render_triton
from attn_engine.codegen.backends.triton_descriptors import tile_descriptors
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.errors import LaunchFailed
from attn_engine.ir.ops import Storage
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.triton_launch import TritonKernel, compile_triton, fits_descriptor, tensor_descriptor
from tests.runtime.rules import program
from tests.runtime.test_triton_launch import CASES, Case, check

SCHEDULE = Schedule(64, 64, 32, 64, Edges.BRANCH, Gradients.TWO_KERNELS, folded=True, descriptors=True)
OPTIONS = TritonOptions(descriptors=True)
DESCRIBED = {
    "causal": replace(CASES["causal"], dims=(24, 40), heads=(4, 2), batches=2, lengths=(70, 130)),
    "window": replace(CASES["window"], dims=(32, 16), lengths=(140, 50)),
    "soft-cap, ALiBi": replace(CASES["soft-cap, ALiBi"], lengths=(70, 70)),
    "pieces": Case(dims=(96, 80), lengths=(40, 70)),
}


def rows_side_by_side(case: Case, generator: torch.Generator, element: torch.dtype) -> list[Tensor]:
    """q, k, v and d_out as (B, S, H, D) seen as (B, H, S, D): what descriptors take."""
    (heads, kv_heads), (rows, columns), (d, dv) = case.heads, case.lengths, case.dims
    shapes = ((heads, rows, d), (kv_heads, columns, d), (kv_heads, columns, dv), (heads, rows, dv))
    return [
        torch.randn(case.batches, n, h, width, generator=generator).transpose(1, 2).to(element)
        for h, n, width in shapes
    ]


@pytest.fixture
def without_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel may fall back to pointers."""

    def refused(self: TritonKernel) -> None:
        raise AssertionError(f"{self.name} took pointers")

    monkeypatch.setattr(TritonKernel, "with_pointers", refused)


@pytest.mark.usefixtures("without_pointers")
@pytest.mark.parametrize("name", DESCRIBED)
def test_described_tiles_give_the_reference(name: str, generator: torch.Generator) -> None:
    case = DESCRIBED[name]
    element = Storage.BFLOAT16 if name == "pieces" else Storage.FLOAT16
    inputs = rows_side_by_side(case, generator, getattr(torch, element.value))
    check(case, element, generator, 6e-2 if name == "pieces" else 1e-2, SCHEDULE, inputs)


def test_tensors_that_do_not_fit_take_pointers(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    made = TritonKernel.with_pointers
    monkeypatch.setattr(TritonKernel, "with_pointers", lambda self: taken.append(self.name) or made(self))
    case = replace(CASES["causal"], dims=(16, 16), lengths=(70, 70))
    inputs = rows_side_by_side(case, generator, torch.float16)
    inputs[1] = inputs[1].mT.contiguous().mT  # k, transposed within its last two dimensions
    check(case, Storage.FLOAT16, generator, 1e-2, SCHEDULE, inputs)
    assert taken == ["forward", "dq"]  # dK and dV have descriptors of Q and dO


def kernels(dims: int = 64) -> dict[str, Kernel]:
    described = program(element=Storage.BFLOAT16, dim_qk=dims, dim_v=64)
    return {k.name: k for d in ("forward", "backward") for k in lower(described, SCHEDULE, d).kernels}


def test_what_loops_read_is_described() -> None:
    found = {name: [d.name for d in tile_descriptors(kernel)] for name, kernel in kernels().items()}
    assert found == {"forward": ["K", "V"], "delta": [], "dq": ["K", "V"], "dkdv": ["Q", "dO"]}
    assert [d.shape for d in tile_descriptors(kernels()["dkdv"])] == [(1, 1, 32, 64)] * 2
    assert [d.name for d in tile_descriptors(kernels(192)["forward"])] == ["K", "K_d2", "V"]
    exact = lower(program(dim_qk=64, dim_v=64), SCHEDULE, "forward").kernels[0]
    assert tile_descriptors(exact) == ()  # float32 is not multiplied from where descriptors put it


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_text_has_no_addresses_of_described_tensors(name: str) -> None:
    kernel = kernels()[name]
    text = render_triton(kernel, OPTIONS)
    for d in tile_descriptors(kernel):
        assert f"load_tile({d.name}, " in text
        assert not re.search(rf"\b{d.name}_\w+_stride\b", text)
    assert "tensor descriptors of tiles" in text
    assert "load_tile" not in render_triton(kernel)
    assert len(argument_names(kernel, descriptors=True)) < len(argument_names(kernel))


def misaligned() -> Tensor:
    return torch.zeros(2 * 3 * 8 * 16 + 1, dtype=torch.float16)[1:].view(2, 3, 8, 16)


X = torch.zeros(2, 3, 8, 16, dtype=torch.float16)
MISFITS: dict[str, Callable[[], Tensor]] = {
    "last stride": lambda: X.mT,
    "stride of no 16 bytes": lambda: torch.zeros(2, 3, 8, 20, dtype=torch.float16)[..., :16],
    "address": misaligned,
    "repeated rows": lambda: X[:, :1].expand(2, 3, 8, 16),
    "nothing": lambda: X[:, :, :0],
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit(name: str) -> None:
    assert not fits_descriptor(MISFITS[name]())


def test_what_fits() -> None:
    assert fits_descriptor(X)
    assert fits_descriptor(X.transpose(1, 2))
    one = torch.zeros(1, 1, 8, 16, dtype=torch.float16).as_strided((1, 1, 8, 16), (3, 5, 16, 1))
    assert fits_descriptor(one)  # strides of a single position say nothing
    assert tensor_descriptor(one, (1, 1, 8, 16)).strides == [8, 8, 16, 1]


def test_without_another_text_a_misfit_is_an_error(generator: torch.Generator) -> None:
    kernel = kernels()["forward"]
    launchable = compile_triton(kernel, render_triton(kernel, OPTIONS), OPTIONS, interpret=True)
    tensors = {p.name: torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16) for p in kernel.params}
    tensors["saved_lse"] = torch.zeros(1, 1, 8)
    tensors["K"] = tensors["K"].mT.contiguous().mT
    sizes = {"batches": 1, "heads": 1, "kv_heads": 1, "q_len": 8, "kv_len": 8}
    with pytest.raises(LaunchFailed, match=r"(?s)forward.*16-byte aligned"):
        launchable.launch(tensors, {"scale": 1.0}, sizes)

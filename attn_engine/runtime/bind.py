"""What a call's tensors must be: every check on q, k, v, custom inputs and captured tensors, before anything runs."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_engine.errors import (
    CapturedOnOtherDevice,
    CustomInputShape,
    DeviceMismatch,
    DtypeMismatch,
    ExtraCustomInput,
    HeadDimMismatch,
    HeadsNotDivisible,
    IndexOutOfRange,
    MetaDtypeMismatch,
    MetaMismatch,
    MissingCustomInput,
    NotATensor,
    ShapeMismatch,
    StaleGraph,
    UnsupportedDtype,
    WrongLayout,
    WrongRank,
)
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.program import Captured
from attn_engine.runtime.captured_indices import CallValues, Functions, check_indices
from attn_engine.runtime.storage import STORAGES

PACKED_LAYOUTS = {"bshd": "(rows, heads, dim)", "bhsd": "(heads, rows, dim)"}
LAYOUTS = {"bshd": "(batch, length, heads, dim)", "bhsd": "(batch, heads, length, dim)"}
OTHER_LAYOUT = {"bshd": "bhsd", "bhsd": "bshd"}
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the engine was told: head dimensions, dtype, and the sizes that its meta tensors fix (None: any)."""

    layout: str
    dtype: torch.dtype
    dims: tuple[int, int, int]
    sizes: tuple[tuple[int | None, int | None, int | None], ...]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, expected: Expected, packed: bool = False) -> None:
    """Raise a typed error for the first thing that is wrong with q, k, v; packed: they have no batch."""
    named = {"q": q, "k": k, "v": v}
    rank, layouts = (3, PACKED_LAYOUTS) if packed else (4, LAYOUTS)
    for name, x in named.items():
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.ndim != rank:
            raise WrongRank(
                argument=name,
                got=x.ndim,
                shape=tuple(x.shape),
                expected=rank,
                layout=layouts[expected.layout],
            )
    if packed:  # as a batch of one; what its meta tensors say of batch and length is about other calls
        named = {name: x.unsqueeze(0) for name, x in named.items()}
        q, k, v = named.values()
        expected = replace(expected, sizes=tuple((None, heads, None) for _, heads, _ in expected.sizes))
    _check_kinds(named, expected)
    problem = _shape_problem(named, expected, expected.layout)
    if problem is None:
        return
    other = OTHER_LAYOUT[expected.layout]
    if _plausible(q, expected.layout, problem):
        if _shape_problem(named, expected, other) is None:
            argument = problem.details.get("argument", "q")
            raise WrongLayout(argument=argument, shape=tuple(q.shape), layout=expected.layout, other=other)
        for name, x in named.items():
            if _shape_problem({**named, name: x.transpose(1, 2)}, expected, expected.layout) is None:
                raise WrongLayout(argument=name, shape=tuple(x.shape), layout=expected.layout, other=other)
    raise problem


def _plausible(q: Tensor, layout: str, problem: Exception) -> bool:
    """Whether the other layout may have been meant: numbers of heads that do not divide are a mistake of their own,
    unless there are more heads than positions."""
    heads, length = (q.shape[2], q.shape[1]) if layout == "bshd" else (q.shape[1], q.shape[2])
    return not isinstance(problem, HeadsNotDivisible) or heads > length


def _check_kinds(named: Mapping[str, Tensor], expected: Expected) -> None:
    q = named["q"]
    for name, x in named.items():
        if x.dtype != q.dtype:
            raise DtypeMismatch(argument=name, got=x.dtype, expected=q.dtype)
        if x.device != q.device:
            raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
    if q.dtype not in ELEMENTS:
        raise UnsupportedDtype(argument="q", got=q.dtype, supported=", ".join(map(str, ELEMENTS)))
    if q.dtype != expected.dtype:
        raise MetaDtypeMismatch(argument="q", dimension="dtype", got=q.dtype, expected=expected.dtype)


def _shape_problem(
    named: Mapping[str, Tensor], expected: Expected, layout: str
) -> HeadDimMismatch | HeadsNotDivisible | ShapeMismatch | MetaMismatch | None:
    """The first error of the shapes read in `layout`, or None."""
    shapes = {n: (x.shape if layout == "bhsd" else x.transpose(1, 2).shape) for n, x in named.items()}
    for (name, shape), dim in zip(shapes.items(), expected.dims, strict=True):
        if shape[3] != dim:
            reason = "its meta_tensor says so"
            return HeadDimMismatch(argument=name, got=shape[3], expected=dim, reason=reason)
    (batches, heads, *_), (_, kv_heads, kv_len, _) = shapes["q"], shapes["k"]
    for name, position, wanted, reason in (
        ("k", 0, batches, "q and k share the batch"),
        ("v", 0, batches, "q and v share the batch"),
        ("v", 1, kv_heads, "k and v share their heads"),
        ("v", 2, kv_len, "k and v share their length"),
    ):
        if shapes[name][position] != wanted:
            full = list(shapes[name])
            full[position] = wanted
            full = full if layout == "bhsd" else [full[0], full[2], full[1], full[3]]
            return ShapeMismatch(
                argument=name, got=tuple(named[name].shape), expected=tuple(full), reason=reason
            )
    if kv_heads == 0 or heads % max(kv_heads, 1):
        return HeadsNotDivisible(heads=heads, kv_heads=kv_heads)
    for (name, shape), sizes in zip(shapes.items(), expected.sizes, strict=True):
        for dimension, got, wanted in zip(("batch", "heads", "length"), shape, sizes, strict=False):
            if wanted is not None and got != wanted:
                return MetaMismatch(argument=name, dimension=dimension, got=got, expected=wanted)
    return None


def custom_by_name(
    names: Collection[str], positional: Sequence[Tensor], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Custom inputs by name, from tensors in the declared order and by keyword; each exactly once."""
    if not (names or positional or named):
        return {}
    expected = ", ".join(names) or "none"
    if len(positional) > len(names):
        raise ExtraCustomInput(name=f"number {len(names) + 1}", expected=expected)
    found = dict(zip(names, positional, strict=False))
    for name, x in named.items():
        if name not in names or name in found:
            raise ExtraCustomInput(name=repr(name), expected=expected)
        found[name] = x
    for name in names:
        if name not in found:
            raise MissingCustomInput(name=name, expected=expected)
        if not isinstance(found[name], Tensor):
            raise NotATensor(argument=f"custom input {name!r}", got=type(found[name]).__name__)
    return found


def storage_of(name: str, dtype: torch.dtype) -> Storage:
    """How a custom input lies in memory; raises UnsupportedDtype."""
    if dtype not in STORAGES:
        supported = ", ".join(s.value for s in STORAGES.values())
        raise UnsupportedDtype(argument=f"custom input {name!r}", got=dtype, supported=supported)
    return STORAGES[dtype]


def check_custom_input(name: str, x: Tensor, declared: Sequence[str | int], sizes: Mapping[str, int]) -> None:
    """A custom input's shape against its declaration, in this call's sizes."""
    names = {"batch": "batches", "heads": "heads", "seq_len": "q_len", "seq_len_kv": "kv_len"}
    wanted = tuple(d if isinstance(d, int) else sizes[names[d]] for d in declared)
    if tuple(x.shape) != wanted:
        raise CustomInputShape(name=name, got=tuple(x.shape), declared=tuple(declared), expected=wanted)


def check_captured(
    program: Functions,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    device: torch.device,
) -> None:
    """Captured tensors are what the program was traced with, lie on q's device, hold integers that fit into 32 bits,
    and no index leaves its tensor at a visible pair (`captured_indices` says how that is decided)."""
    for captured in program.captures:
        check_kind(captured, tensors[captured.name])
    for name, x in tensors.items():
        if x.device != device:
            raise CapturedOnOtherDevice(name=name, got=x.device, expected=device)
        if x.numel() == 0 and sizes["batches"] * sizes["q_len"] * sizes["kv_len"]:
            raise IndexOutOfRange(position=list(x.shape).index(0), tensor=name, index=0, size=0)
        check_int64(name, x)
    check_indices(program, CallValues(tensors, scalars, sizes))


def check_kind(captured: Captured, x: Tensor) -> None:
    """The dtype and the number of dimensions that the kernels were made for."""
    if STORAGES.get(x.dtype) is not captured.storage or x.ndim != captured.rank:
        what = f"{captured.name!r} is now {x.dtype} with {x.ndim} dimensions, traced as {captured.storage.value} "
        raise StaleGraph(what=f"{what}with {captured.rank}")


def check_int64(name: str, x: Tensor) -> None:
    """Kernels hold integers in 32 bits: an int64 tensor must fit."""
    if x.dtype is torch.int64 and x.numel():
        limits = torch.iinfo(torch.int32)
        low, high = torch.aminmax(x)
        if int(low) < limits.min or int(high) > limits.max:
            raise UnsupportedDtype(
                argument=f"captured tensor {name!r}",
                got=f"int64 with values up to {int(high)}",
                supported="32-bit integers",
            )


def shape_signature(x: Tensor) -> tuple[object, ...]:
    """What the checks of q, k and v depend on, and the plan of a call."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:  # pyright: ignore[reportUnnecessaryIsInstance]
        return (type(x),)
    return x.shape, x.stride(), x.dtype, x.device


def call_signature(x: Tensor, contents: bool = False) -> tuple[object, ...]:
    """What the checks of a captured tensor and the plan of a call depend on; with `contents`, and for integers, also
    what is in it."""
    if contents or not (x.dtype.is_floating_point or x.dtype is torch.bool):
        return x.shape, x.stride(), x.dtype, x.device, _fingerprint(x)
    return x.shape, x.stride(), x.dtype, x.device


# By identity: a version counter tells about changes of one tensor, not that another one took its place in memory.
_fingerprints: dict[int, tuple[weakref.ref[Tensor], object, int]] = {}


def _fingerprint(x: Tensor) -> int:
    """A hash of the contents, remembered for as long as the same tensor lives unchanged."""
    if x.device.type == "meta":
        return 0
    state = None if x.is_inference() else (x._version, x.data_ptr(), x.stride())
    found = _fingerprints.get(id(x))
    if found is not None and found[0]() is x and state is not None and found[1] == state:
        return found[2]
    # A copy: memory that numpy has seen may change behind torch's back, and is taken for such from then on.
    # clone, not contiguous: that keeps the stride 0 of a single element, which no view of bytes can have.
    data = x.detach().to("cpu").clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    print_ = hash(data.numpy().tobytes())
    key = id(x)
    _fingerprints[key] = weakref.ref(x, lambda _: _fingerprints.pop(key, None)), state, print_
    return print_

"""What a call of a linear attention must bring: every check that needs no arithmetic, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attn_engine.errors import (
    CapturedOnOtherDevice,
    CustomInputShape,
    DeviceMismatch,
    DtypeMismatch,
    HeadDimMismatch,
    HeadsNotDivisible,
    MetaDtypeMismatch,
    MetaMismatch,
    NotATensor,
    ShapeMismatch,
    UnsupportedDtype,
    WrongArgument,
    WrongRank,
)
from attn_engine.ir.linear import Rank
from attn_engine.linear_errors import DecayRank, SequenceBounds, StateMismatch, WrongInputs
from attn_engine.runtime.bind import ELEMENTS, LAYOUTS
from attn_engine.runtime.linear_inputs import Sequences
from attn_engine.runtime.storage import STORAGES, compute_dtype
from attn_engine.traced_linear import LinearDescription

Sizes = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class LinearExpected:
    """What the engine was told: dtype, head dimensions, and the sizes that its meta tensors fix (None: any)."""

    layout: str
    dtype: torch.dtype
    dims: tuple[int, int, int]
    sizes: tuple[Sizes, Sizes, Sizes]


def check_parts(d: LinearDescription) -> None:
    """Raise WrongArgument for mods that do not go together."""
    if d.bonus_mod is not None and not d.exclusive:
        raise WrongArgument(
            argument="bonus_mod",
            got="a function",
            expected='None where phase is "inclusive"',
            instead='Give phase="exclusive" with it, or add the term in the k_mod.',
        )
    if d.normalizer_mod is not None and d.delta:
        raise WrongArgument(
            argument="normalizer_mod",
            got="a function",
            expected="None with the delta rule",
            instead="Leave one of them out: with the delta rule the weights have no sum to divide by.",
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, expected: LinearExpected) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in logical order, once they fit each other and what the engine was told."""
    given = {"q": q, "k": k, "v": v}
    _check_kinds(given, expected)
    logical = {n: x.transpose(1, 2) if expected.layout == "bshd" else x for n, x in given.items()}
    for (name, x), dim, sizes in zip(logical.items(), expected.dims, expected.sizes, strict=True):
        if x.shape[3] != dim:
            reason = "its meta_tensor says so"
            raise HeadDimMismatch(argument=name, got=x.shape[3], expected=dim, reason=reason)
        for dimension, got, wanted in zip(("batch", "heads", "length"), x.shape, sizes, strict=False):
            if wanted is not None and got != wanted:
                raise MetaMismatch(argument=name, dimension=dimension, got=got, expected=wanted)
    _check_together(given, logical, expected.layout)
    return logical["q"], logical["k"], logical["v"]


def _check_kinds(given: Mapping[str, Tensor], expected: LinearExpected) -> None:
    q = given["q"]
    for name, x in given.items():
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.ndim != 4:
            layout = LAYOUTS[expected.layout]
            raise WrongRank(argument=name, got=x.ndim, shape=tuple(x.shape), expected=4, layout=layout)
        if x.dtype != q.dtype:
            raise DtypeMismatch(argument=name, got=x.dtype, expected=q.dtype)
        if x.device != q.device:
            raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
    if q.dtype not in ELEMENTS:
        raise UnsupportedDtype(argument="q", got=q.dtype, supported=", ".join(map(str, ELEMENTS)))
    if q.dtype != expected.dtype:
        raise MetaDtypeMismatch(argument="q", dimension="dtype", got=q.dtype, expected=expected.dtype)


def _check_together(given: Mapping[str, Tensor], logical: Mapping[str, Tensor], layout: str) -> None:
    v = logical["v"]
    for name in ("q", "k"):
        x = logical[name]
        if (x.shape[0], x.shape[2]) != (v.shape[0], v.shape[2]):
            wanted = (v.shape[0], x.shape[1], v.shape[2], x.shape[3])
            wanted = wanted if layout == "bhsd" else (wanted[0], wanted[2], wanted[1], wanted[3])
            reason = f"{name} and v share batch and length"
            got = tuple(given[name].shape)
            raise ShapeMismatch(argument=name, got=got, expected=wanted, reason=reason)
        if not x.shape[1] or v.shape[1] % x.shape[1]:
            raise HeadsNotDivisible(heads=v.shape[1], kv_heads=x.shape[1])


def checked_decay(decay: Tensor | None, v: Tensor, dim: int, layout: str, rank: Rank | None) -> Tensor | None:
    """The decay in logical order; raises DecayRank where it is not of the rank that the engine was told."""
    names = {1: Rank.HEAD, 3: Rank.TOKEN, 4: Rank.VECTOR}
    if decay is not None and not isinstance(decay, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument="decay", got=type(decay).__name__)
    found = Rank.NONE if decay is None else names.get(decay.ndim)
    batch, heads, tokens = v.shape[:3]
    order = (batch, tokens, heads) if layout == "bshd" else (batch, heads, tokens)
    shapes = {Rank.NONE: (), Rank.HEAD: (heads,), Rank.TOKEN: order, Rank.VECTOR: (*order, dim)}
    got = None if decay is None else tuple(decay.shape)
    if rank is not None and found is not rank:
        expected = (
            f"{shapes[rank]}, one number for each {rank.value}" if rank is not Rank.NONE else "no decay"
        )
        raise DecayRank(got=got, expected=expected)
    if decay is None:
        return None
    if found is None or got != shapes[found]:
        expected = " or ".join(str(shapes[r]) for r in (Rank.HEAD, Rank.TOKEN, Rank.VECTOR))
        raise DecayRank(got=got, expected=expected)
    check_input("decay", decay, v)
    return decay.transpose(1, 2) if layout == "bshd" and decay.ndim > 1 else decay


def checked_beta(beta: Tensor | None, v: Tensor, layout: str, wanted: bool) -> Tensor | None:
    """beta in logical order."""
    if beta is None:
        return None
    if not wanted:
        instead = "Make the engine with delta=True or a beta_mod, or leave beta out."
        raise WrongInputs(
            argument="beta", got="given", reason="the engine has no delta rule", instead=instead
        )
    if not isinstance(beta, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument="beta", got=type(beta).__name__)
    batch, heads, tokens = v.shape[:3]
    expected = (batch, tokens, heads) if layout == "bshd" else (batch, heads, tokens)
    if tuple(beta.shape) != expected:
        reason = "it has one number for each token and head"
        raise ShapeMismatch(argument="beta", got=tuple(beta.shape), expected=expected, reason=reason)
    check_input("beta", beta, v)
    return beta.transpose(1, 2) if layout == "bshd" else beta


def check_input(name: str, x: Tensor, v: Tensor) -> None:
    if x.device != v.device:
        raise DeviceMismatch(argument=name, got=x.device, expected=v.device)
    if x.dtype not in STORAGES or not x.dtype.is_floating_point:
        raise UnsupportedDtype(argument=name, got=x.dtype, supported=", ".join(map(str, ELEMENTS)))


def check_custom(
    custom: Mapping[str, Tensor], declared: Mapping[str, tuple[str | int, ...]], q: Tensor, v: Tensor
) -> None:
    """Custom inputs against their declared shapes, in this call's sizes."""
    named = {
        "batch": v.shape[0], "heads": v.shape[1], "seq_len": v.shape[2], "seq_len_kv": v.shape[2],
        "dimqk": q.shape[3], "dimv": v.shape[3],
    }  # fmt: skip
    for name, x in custom.items():
        expected = tuple(d if isinstance(d, int) else named[d] for d in declared[name])
        if tuple(x.shape) != expected:
            raise CustomInputShape(name=name, got=tuple(x.shape), declared=declared[name], expected=expected)
        if x.dtype not in STORAGES:
            supported = ", ".join(str(d) for d in STORAGES)
            raise UnsupportedDtype(argument=f"custom input {name!r}", got=x.dtype, supported=supported)


def check_captured(tensors: Mapping[str, Tensor], v: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != v.device:
            raise CapturedOnOtherDevice(name=name, got=x.device, expected=v.device)


def checked_state(
    name: str, state: Tensor | None, shape: tuple[int, int, int, int], v: Tensor
) -> Tensor | None:
    """A state of that shape, in the type that states have."""
    if state is None:
        return None
    if not isinstance(state, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument=name, got=type(state).__name__)
    if tuple(state.shape) != shape:
        raise StateMismatch(argument=name, got=f"shape {tuple(state.shape)}", expected=f"shape {shape}")
    wanted = compute_dtype(STORAGES[v.dtype])
    if state.dtype != wanted:
        raise StateMismatch(argument=name, got=f"dtype {state.dtype}", expected=str(wanted))
    if state.device != v.device:
        raise DeviceMismatch(argument=name, got=state.device, expected=v.device)
    return state


def sequences_of(cu_seqlens: Tensor | None, batch: int, tokens: int) -> Sequences:
    """Where the sequences lie. Raises SequenceBounds."""
    if cu_seqlens is None:
        return Sequences.whole(batch, tokens)
    if not isinstance(cu_seqlens, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument="cu_seqlens", got=type(cu_seqlens).__name__)
    shape = tuple(cu_seqlens.shape)
    if cu_seqlens.ndim != 1 or shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"a tensor of shape {shape} and {cu_seqlens.dtype}"
        raise SequenceBounds(got=got, expected="one dimension of int32 or int64, at least two numbers")
    if batch != 1:
        raise SequenceBounds(got=f"given with a batch of {batch}", expected="None, or a batch of 1")
    bounds = tuple(int(x) for x in cu_seqlens.tolist())
    if bounds[0] != 0 or bounds[-1] != tokens:
        got = f"from {bounds[0]} to {bounds[-1]}"
        raise SequenceBounds(got=got, expected=f"from 0 to {tokens}, the length of v")
    if any(b < a for a, b in pairwise(bounds)):
        raise SequenceBounds(got=f"{list(bounds)}", expected="numbers that never become smaller")
    return Sequences.of_bounds(bounds)

"""What the operands of prologs and of the operator around them must be; errors name the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import DeviceMismatch, NotATensor, ShapeMismatch, WrongArgument

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROTATIONS = {
    "first_interleaved": (True, True),
    "first_halves": (True, False),
    "last_interleaved": (False, True),
    "last_halves": (False, False),
}
Shape = tuple[str, ...]
# A name is a size, the same wherever it stands; a + b and a * b are made of such sizes.
_MLA: Mapping[str, Shape] = {
    "x": ("b", "s1", "h"),
    "w_dq": ("h", "q_rank"),
    "w_uk": ("n1", "nope", "kv_rank"),
    "sin": ("b", "s1", "rope"),
    "cos": ("b", "s1", "rope"),
    "w_uq_qr": ("q_rank", "n1 * nope + n1 * rope"),
    "w_dkv_kr": ("h", "kv_rank + rope"),
    "gamma_cq": ("q_rank",),
    "gamma_ckv": ("kv_rank",),
}
_INDEXER: Mapping[str, Shape] = {
    "x": ("b", "s1", "h"),
    "c_q": ("b", "s1", "q_rank"),
    "w_idx_proj": ("h", "heads"),
    "w_idx_k": ("h", "dim"),
    "w_idx_qb": ("q_rank", "heads * dim"),
    "in_gamma_k": ("dim",),
    "in_beta_k": ("dim",),
    "sin": ("b", "s1", "rope"),
    "cos": ("b", "s1", "rope"),
}
CACHES: Mapping[str, Shape] = {
    "kv_cache": ("blocks", "block_size", "1", "kv_rank"),
    "kr_cache": ("blocks", "block_size", "1", "rope"),
    "index_k_cache": ("blocks", "block_size", "1", "dim"),
}
Sizes = dict[str, int]


def check_mla_operands(**given: Tensor) -> Sizes:
    """The sizes by name; raises a typed error for the first operand of `mla_prolog` that does not fit."""
    sizes = _check(given, _MLA, {})
    _check_even(sizes, given["sin"])
    return sizes


def check_indexer_operands(**given: Tensor) -> Sizes:
    """The sizes by name; raises a typed error for the first operand of `indexer_prolog` that does not fit."""
    # c_q may be wider than the rest, where nothing is rounded.
    narrow = {n: x for n, x in given.items() if n != "c_q"}
    sizes = _check(
        narrow, {n: s for n, s in _INDEXER.items() if n in narrow}, {"q_rank": _last(given["c_q"])}
    )
    _check_shape("c_q", given["c_q"], _INDEXER["c_q"], sizes, {})
    _check_even(sizes, given["sin"])
    if sizes["rope"] > sizes["dim"]:
        _wrong_shape(
            "sin", given["sin"], f"({sizes['b']}, {sizes['s1']}, up to {sizes['dim']})", "rope <= dim"
        )
    return sizes


def check_pto_operands(**given: Tensor) -> Sizes:
    """The same of all floating tensors of `sparse_attention_pto`, caches too."""
    of_indexer = {n: s for n, s in _INDEXER.items() if n != "c_q"}
    sizes = _check(given, {**_MLA, **of_indexer, **CACHES}, {"1": 1})
    _check_even(sizes, given["sin"])
    if sizes["rope"] > sizes["dim"]:
        _wrong_shape(
            "sin", given["sin"], f"({sizes['b']}, {sizes['s1']}, up to {sizes['dim']})", "rope <= dim"
        )
    return sizes


def rotation_of(name: str) -> tuple[bool, bool]:
    """Whether the first columns turn (else the last), and whether neighbours are pairs (else halves)."""
    if name not in ROTATIONS:
        known = ", ".join(f'"{n}"' for n in ROTATIONS)
        instead = "The first word says which columns turn, the second how they pair."
        raise WrongArgument(argument="indexer_rope", got=name, expected=f"one of {known}", instead=instead)
    return ROTATIONS[name]


def _check(given: Mapping[str, Tensor], shapes: Mapping[str, Shape], sizes: Sizes) -> Sizes:
    x = given["x"]
    for name, y in given.items():
        if not isinstance(y, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(y).__name__)
    if x.dtype not in FLOATING:
        expected = ", ".join(map(str, FLOATING))
        raise WrongArgument(argument="x", got=x.dtype, expected=expected, instead="Convert it with .to(...).")
    sources: dict[str, str] = {}
    for name, shape in shapes.items():
        _check_shape(name, given[name], shape, sizes, sources)
    for name, y in given.items():
        if y.dtype != x.dtype:
            expected, instead = f"{x.dtype}, the type of x", f"Convert it: {name}.to({x.dtype})."
            raise WrongArgument(argument=name, got=y.dtype, expected=expected, instead=instead)
        if y.device != x.device:
            raise DeviceMismatch(argument=name, got=y.device, expected=x.device)
    return sizes


def _check_shape(name: str, x: Tensor, shape: Shape, sizes: Sizes, sources: dict[str, str]) -> None:
    """Sizes that are met for the first time are remembered, and where."""
    if x.ndim != len(shape):
        nz = "; from_nz makes a matrix of a weight in tiles" if len(shape) == 2 < x.ndim else ""
        _wrong_shape(name, x, f"({', '.join(shape)})", f"it has {len(shape)} dimensions{nz}")
    for size, got in zip(shape, x.shape, strict=True):
        if size.isidentifier() and size not in sizes:
            sizes[size], sources[size] = got, name
    wanted = tuple(_size(size, sizes) for size in shape)
    if tuple(x.shape) != wanted:
        read = dict.fromkeys(
            part for size in shape for part in size.replace("*", " ").replace("+", " ").split()
        )
        known = ", ".join(f"{n} = {sizes[n]}" + (f" ({sources[n]})" if n in sources else "") for n in read)
        _wrong_shape(name, x, str(wanted), f"it is ({', '.join(shape)}) with {known}")


def _size(text: str, sizes: Sizes) -> int:
    """A sum of products of named sizes."""
    total = 0
    for term in text.split(" + "):
        product = 1
        for factor in term.split(" * "):
            product *= sizes[factor]
        total += product
    return total


def _check_even(sizes: Sizes, sin: Tensor) -> None:
    if sizes["rope"] % 2:
        _wrong_shape("sin", sin, f"({sizes['b']}, {sizes['s1']}, an even number)", "columns turn in pairs")


def _last(x: Tensor) -> int:
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument="c_q", got=type(x).__name__)
    return x.shape[-1] if x.ndim else 1


def _wrong_shape(name: str, x: Tensor, expected: str, reason: str) -> None:
    raise ShapeMismatch(argument=name, got=tuple(x.shape), expected=expected, reason=reason)

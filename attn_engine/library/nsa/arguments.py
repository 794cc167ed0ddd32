"""What native sparse attention is called with: typed errors that name the argument, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library import arguments
from attn_engine.library.arguments import divisible, integers
from attn_engine.library.sparse.seer_arguments import shaped

BATCH, PACKED = ("batch", "T"), ("rows",)


def check_queries(q: Tensor, packed: bool) -> None:
    """Raise WrongArgument for what is no batch (batch, TQ, heads, D), or no packed (rows, heads, D)."""
    meaning = "packed, as cu_seqlens says" if packed else "a batch"
    shaped("q", q, (*(PACKED if packed else BATCH), "heads", "D"), meaning)


def check_pair(
    names: tuple[str, str], pair: tuple[Tensor, Tensor], q: Tensor, first: tuple[Tensor, Tensor]
) -> None:
    """Raise WrongArgument for keys or values that do not fit q, or are not shaped as the first pair."""
    (name_k, name_v), (keys, values) = names, pair
    batch = (q.shape[0],) if q.ndim == 4 else ()
    shaped(name_k, keys, (*batch, "T", "kv heads", q.shape[-1]), "keys with the head dimension of q")
    divisible(q.shape[-2], keys.shape[-2])
    shaped(name_v, values, (*keys.shape[:-1], "Dv"), f"values, one for each of {name_k}")
    for name, x, like in ((name_k, keys, first[0]), (name_v, values, first[1])):
        if x.shape != like.shape:
            of = f"of the shape of {name[0]}, {tuple(like.shape)}"
            _refuse(name, tuple(x.shape), of, "The branches have the same tokens and heads.")
    for name, x in ((name_k, keys), (name_v, values)):
        if x.dtype != q.dtype or x.device != q.device:
            got, want = f"{x.dtype} on {x.device}", f"of the dtype and device of q, {q.dtype} on {q.device}"
            _refuse(name, got, want, "Convert it with .to(q).")


def check_gates(
    q: Tensor, gates: Mapping[str, Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gates, each (..., heads) for the tokens of q or None; raises WrongArgument."""
    if all(g is None for g in gates.values()):
        names = ", ".join(gates)
        _refuse(names, "None, None, None", "a gate of one branch at least", "Give torch.ones for no gate.")
    for name, gate in gates.items():
        if gate is None:
            continue
        shaped(name, gate, q.shape[:-1], "a gate for each token and query head")
        if not gate.dtype.is_floating_point:
            _refuse(name, gate.dtype, "floating", "Gates are numbers, mostly in [0, 1].")
    g_cmp, g_slc, g_win = gates.values()
    return g_cmp, g_slc, g_win


def check_function(name: str, given: object) -> None:
    """Raise WrongArgument for what cannot be called."""
    if not callable(given):
        _refuse(
            name,
            given,
            "a function of blocks (..., l, heads, D)",
            "Take mean_pooling or another of docs/nsa.md.",
        )


def check_rows(name: str, rows: object, like: Tensor, blocks: int) -> Tensor:
    """What phi made of the blocks of `like`, (batch, blocks, heads, D) or packed (blocks, heads, D)."""
    leading = like.shape[:-3]
    return shaped(name, rows, (*leading, blocks, *like.shape[-2:]), "what phi makes of each block")


def given_blocks(block_indices: object, q: Tensor, kv_heads: int, blocks: int) -> Tensor:
    """`block_indices` as int32, -1 for every block that there is not; raises WrongArgument."""
    integers("block_indices", block_indices, (q.ndim,))
    meaning = "the blocks of each token and kv head"
    found = shaped("block_indices", block_indices, (*q.shape[:-2], kv_heads, "n"), meaning)
    return torch.where((found >= 0) & (found < blocks), found, -1).to(torch.int32)


def scale_of(scale: object, q: Tensor) -> float:
    """`scale`, or 1/sqrt(D) for None; raises WrongArgument."""
    return arguments.scale_of("scale", scale, q.shape[-1])


def _refuse(argument: str, got: object, expected: str, instead: str) -> None:
    raise WrongArgument(argument=argument, got=got, expected=expected, instead=instead)

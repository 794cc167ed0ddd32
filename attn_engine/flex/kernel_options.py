"""kernel_options: what torch's kernels take, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_engine.errors import UnknownOption, UnsupportedOnBackend, WrongArgument
from attn_engine.runtime.backends import NAMES

# What torch's Triton kernels are told, and why it changes nothing here. Results of torch's do not depend on it either.
_TILES = "tiles are chosen here by the program, the dtype and the head dimensions"
_PIPELINE = "the pipeline of a kernel is part of its schedule here"
_LAYOUT = "block lists are compact here, in any order"
IGNORED = {
    **dict.fromkeys("BLOCK_M BLOCK_N BLOCK_M1 BLOCK_N1 BLOCK_M2 BLOCK_N2".split(), _TILES),
    **dict.fromkeys(
        "num_warps num_stages kpack matrix_instr_nonkdim waves_per_eu USE_TMA".split(), _PIPELINE
    ),
    "PRESCALE_QK": "the scale is folded where that changes no result",
    "ROWS_GUARANTEED_SAFE": "rows without a key are always safe here, at no cost that could be saved",
    "BLOCKS_ARE_CONTIGUOUS": _LAYOUT,
    "WRITE_DQ": "which kernel writes dQ is part of the schedule here",
    "FORCE_USE_FLEX_ATTENTION": "few rows take split keys where that is faster; results are the same",
}
# torch's names for its own kernels: whichever of them is asked for, the tensors' device decides here.
TORCH_BACKENDS = frozenset({"AUTO", "TRITON", "TRITON_DECODE"})


def chosen_backend(options: Mapping[str, Any] | None) -> str:
    """The backend that kernel_options ask for: "auto", or one of this package's names under the key BACKEND.

    Raises UnknownOption for a key or a backend that is not known, UnsupportedOnBackend for torch's "FLASH".
    """
    if not options:
        return "auto"
    if not isinstance(options, Mapping):
        instead = 'Give a dictionary, for example {"BLOCK_M": 64}.'
        raise WrongArgument(
            argument="kernel_options", got=options, expected="a dictionary or None", instead=instead
        )
    for key, value in options.items():
        plain = key.removeprefix("fwd_").removeprefix("bwd_") if isinstance(key, str) else key
        if plain not in IGNORED and key != "BACKEND":
            known = ", ".join(sorted([*IGNORED, "BACKEND"])) + "; each also with fwd_ or bwd_ in front"
            raise UnknownOption(option=key, value=value, where="kernel_options", known=known)
    return _backend(options.get("BACKEND", "AUTO"))


def _backend(name: Any) -> str:
    if name in TORCH_BACKENDS:
        return "auto"
    if name == "FLASH":
        instead = "It names another package's kernels; leave BACKEND out."
        raise UnsupportedOnBackend(backend="attn_engine", feature='BACKEND="FLASH"', instead=instead)
    if name not in NAMES:
        known = ", ".join([*sorted(TORCH_BACKENDS), *NAMES])
        raise UnknownOption(option="BACKEND", value=name, where="kernel_options", known=known)
    return name

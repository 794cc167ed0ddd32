"""kernel_options: what torch's kernels take, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_engine.errors import UnknownOption, UnsupportedOnBackend, WrongArgument
from attn_engine.runtime.backends import NAMES

# Advice about tiles and pipelines of torch's Triton kernels. Ours choose their own; results do not depend on it.
ADVICE = frozenset(
    "num_warps num_stages BLOCK_M BLOCK_N BLOCK_M1 BLOCK_N1 BLOCK_M2 BLOCK_N2 PRESCALE_QK ROWS_GUARANTEED_SAFE "
    "BLOCKS_ARE_CONTIGUOUS WRITE_DQ FORCE_USE_FLEX_ATTENTION USE_TMA kpack matrix_instr_nonkdim waves_per_eu".split()
)
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
        if plain not in ADVICE and key != "BACKEND":
            known = ", ".join(sorted(ADVICE | {"BACKEND"})) + "; each also with fwd_ or bwd_ in front"
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

"""What the engine is told about q, k and v before it sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_engine.errors import WrongMeta

Dimension = int | str | None


@dataclass(frozen=True, slots=True)
class MetaTensor:
    """Shape (batch, heads, length, head dimension) and dtype. None or a name stands for any size."""

    shape: tuple[Dimension, Dimension, Dimension, int]
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """The head dimension, the only one that is compiled in."""
        return self.shape[3]


def meta_tensor(
    B: Dimension,
    H: Dimension,
    S: Dimension,
    D: int,
    dtype: torch.dtype = torch.float16,
) -> MetaTensor:
    """Describe one of q, k, v, always in the order batch, heads, length, dim, whatever the layout of the tensors.

    B, H and S may be None or a name: any size, which may change from call to call. Raises WrongMeta.

    >>> meta_tensor(None, 8, None, 64).shape
    (None, 8, None, 64)
    """
    for name, size in (("B", B), ("H", H), ("S", S)):
        if not (size is None or isinstance(size, str) or _is_size(size, least=0 if name == "S" else 1)):
            raise WrongMeta(argument=name, got=size, expected="a positive int, a name or None")
    if not _is_size(D, least=1):
        raise WrongMeta(argument="D", got=D, expected="a positive int (the head dimension is compiled in)")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise WrongMeta(argument="dtype", got=dtype, expected="a floating torch.dtype")
    return MetaTensor((B, H, S, D), dtype)


def _is_size(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

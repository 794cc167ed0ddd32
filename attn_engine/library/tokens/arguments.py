"""What functions over lists of tokens are called with: typed errors that name the argument."""

from __future__ import annotations

from torch import Tensor

from attn_engine.errors import NotATensor, WrongArgument


def shaped(name: str, x: object, layout: str) -> Tensor:
    """x, once it is a tensor with as many dimensions as `layout` names; raises NotATensor and WrongArgument."""
    if not isinstance(x, Tensor):
        raise NotATensor(argument=name, got=type(x).__name__)
    if x.ndim != layout.count(",") + 1:
        refuse_shape(name, x, layout)
    return x


def refuse_shape(name: str, x: Tensor, expected: str) -> None:
    """Raise WrongArgument for a tensor's shape."""
    raise WrongArgument(
        argument=f"{name}.shape",
        got=tuple(x.shape),
        expected=expected,
        instead="Check the layout of the tensors.",
    )


def alike(first: str, like: Tensor, **others: Tensor) -> None:
    """Raise WrongArgument for tensors of another type than `like`, which the caller calls `first`."""
    for name, x in others.items():
        if x.dtype is not like.dtype:
            expected = f"{like.dtype}, as {first} is"
            raise WrongArgument(
                argument=f"{name}.dtype", got=x.dtype, expected=expected, instead="Convert it."
            )


def prefix(name: str, value: object, dim: int) -> int:
    """A number of columns from 1 to dim; raises WrongArgument."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= dim:
        expected = f"an integer from 1 to {dim}, the columns of the keys"
        raise WrongArgument(
            argument=name, got=value, expected=expected, instead="Values are the first columns."
        )
    return value

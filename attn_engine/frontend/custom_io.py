"""Extra tensors that the engine's caller passes beside q, k and v."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from attn_engine.errors import NotACustomIO, WrongCustomIO
from attn_engine.frontend.names import type_name

NAMED_DIMENSIONS = ("batch", "heads", "seq_len", "seq_len_kv")
LINEAR_DIMENSIONS = ("dimqk", "dimv")  # of a LinearAttentionEngine alone
CustomShape = tuple[str | int, ...]


class CustomIO:
    """Names and shapes of custom inputs, in the order in which the engine takes them after v.

    A dimension is "batch", "heads", "seq_len" (of q), "seq_len_kv" or a positive int. Inside a traced function
    `custom.input_tensors["bias"]` can be indexed, `[h, q_idx]`, or used as it is: then it means the element that
    belongs to the current (b, h, q_idx, kv_idx), dimension by dimension; a dimension of 1 is read at 0.
    Immutable: one CustomIO serves any number of engines. Raises NotACustomIO, WrongCustomIO.

    >>> CustomIO({"slopes": ("heads",)}).shapes
    {'slopes': ('heads',)}
    """

    __slots__ = ("_shapes",)

    def __init__(self, input_tensors: Mapping[str, CustomShape | list[str | int]] | None = None) -> None:
        shapes = cast(object, {} if input_tensors is None else input_tensors)
        if not isinstance(shapes, Mapping):
            expected = "a dictionary of names and shapes"
            raise NotACustomIO(argument="CustomIO's argument", got=type_name(shapes), expected=expected)
        given = cast(Mapping[object, object], shapes)
        self._shapes = {str(name): _checked(name, shape) for name, shape in given.items()}

    @property
    def shapes(self) -> dict[str, CustomShape]:
        """The declared shapes, a fresh dictionary."""
        return dict(self._shapes)

    @property
    def input_tensors(self) -> dict[str, CustomShape]:
        """The declared shapes; while a function is traced, its own argument holds symbols here."""
        return self.shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomIO) and list(self._shapes.items()) == list(other._shapes.items())

    def __hash__(self) -> int:
        return hash(tuple(self._shapes.items()))

    def __repr__(self) -> str:
        return f"CustomIO({self._shapes!r})"


def _checked(name: object, shape: object) -> CustomShape:
    if not isinstance(name, str) or not name:
        raise WrongCustomIO(name=name, shape=shape, reason="its name is not a string")
    if not isinstance(shape, tuple | list):
        raise WrongCustomIO(
            name=name, shape=shape, reason='a shape is a tuple, such as ("heads",) with its comma'
        )
    sizes: list[str | int] = []
    for size in cast(Sequence[object], shape):
        is_count = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not is_count and size not in NAMED_DIMENSIONS + LINEAR_DIMENSIONS:
            raise WrongCustomIO(name=name, shape=cast(object, shape), reason=f"{size!r} is not a dimension")
        sizes.append(cast(str | int, size))
    return tuple(sizes)

"""Hugging Face transformers: `attn_implementation="attn_engine"`.

    from attn_engine.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attn_engine")

The library describes a mask as a Python function of (batch, head, query, key): exactly a mask_mod.
`describe_mask` takes such a function apart into its shape (which functions, composed how, with which
constants) and the tensors that it reads. The shape chooses the engine, so the next batch with new tensors
compiles nothing; the tensors are inputs of the call. No mask of queries x keys is ever made.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.errors import AttnEngineError

MaskFunction = Callable[[Any, Any, Any, Any], Any]
Dims = tuple[str | int, ...]


class UnsupportedModelFeature(AttnEngineError, NotImplementedError):
    """A model asks for something in its attention that the registered function does not compute."""

    template = "{module} gives its attention {feature}, which attn_engine does not compute inside a model."
    advice = "{instead}"


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of the n-th tensor in a mask function's shape, and its type: a mask reads booleans or positions."""

    position: int
    boolean: bool


@dataclass(frozen=True, slots=True)
class _Elements:
    """A tensor whose elements are read as booleans or as integers, whatever type a custom input has."""

    tensor: Any
    boolean: bool

    def __getitem__(self, index: Any) -> Any:
        return self.tensor[index] != 0 if self.boolean else self.tensor[index].int()


@dataclass(frozen=True, slots=True)
class Closed:
    """A function by its code and what it closes over: constants, `Slot`s for tensors, functions again."""

    code: types.CodeType
    cells: tuple[Hashable, ...]
    defaults: Hashable
    module: dict[str, Any] = field(compare=False, repr=False)

    def restore(self, tensors: list[Any]) -> MaskFunction:
        cells = tuple(types.CellType(restore(cell, tensors)) for cell in self.cells)
        return types.FunctionType(self.code, self.module, None, restore(self.defaults, tensors), cells)


@dataclass(frozen=True, slots=True)
class Combined:
    """`and` or `or` of mask functions, which the library spells with methods that only tensors have."""

    every: bool
    parts: tuple[Hashable, ...]

    def restore(self, tensors: list[Any]) -> MaskFunction:
        functions = [restore(part, tensors) for part in self.parts]

        def combined(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            values = [function(b, h, q_idx, kv_idx) for function in functions]
            return functools.reduce(lambda x, y: x & y if self.every else x | y, values)

        return combined


def restore(shape: Hashable, tensors: list[Any]) -> Any:
    """What `shape` was taken from, reading `tensors` in place of its own."""
    match shape:
        case Slot(position, boolean):
            return _Elements(tensors[position], boolean)
        case Closed() | Combined():
            return shape.restore(tensors)
        case tuple():
            return tuple(restore(part, tensors) for part in shape)
        case _:
            return shape


@dataclass(frozen=True, slots=True)
class Mask:
    """What a model hands from layer to layer in place of a mask tensor.

    shape: the mask function without its tensors; None lets every query see every key. tensors, dims: what it reads.
    padding: how the last tensor says which keys are padding: "" (none), "lengths" (batch,) or "keep" (batch, keys).
    offsets: the position of the first query and of the first key, not zero while a cache is in use.
    """

    shape: Hashable = None
    tensors: tuple[Tensor, ...] = ()
    dims: tuple[Dims, ...] = ()
    padding: str = ""
    offsets: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Parts:
    """Collects the tensors of a mask function while it is taken apart."""

    sizes: tuple[tuple[str, int], ...]
    tensors: list[Tensor] = field(default_factory=list[Tensor])
    dims: list[Dims] = field(default_factory=list[Dims])

    def shape(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return self.slot(value, tuple(size for _, size in self.sizes))
        if isinstance(value, tuple | list):
            return tuple(self.shape(part) for part in value)
        if not isinstance(value, types.FunctionType):
            if isinstance(value, Hashable):
                return value
            raise UnsupportedModelFeature(
                module="The model's mask function",
                feature=f"a {type(value).__name__}",
                instead="Close over tensors, numbers, tuples and functions.",
            )
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        if value.__module__ == "transformers.masking_utils" and value.__name__ in ("and_mask", "or_mask"):
            return Combined(value.__name__ == "and_mask", tuple(self.shape(part) for part in cells[0]))
        defaults = self.shape(value.__defaults__)
        return Closed(value.__code__, tuple(self.shape(cell) for cell in cells), defaults, value.__globals__)

    def slot(self, tensor: Tensor, sizes: tuple[int, ...]) -> Slot:
        """Dimensions that follow the batch and the keys vary from call to call; others belong to the shape."""
        names = [name for name, _ in self.sizes][: tensor.dim()]
        dims = [name if n == size else n for name, size, n in zip(names, sizes, tensor.shape, strict=False)]
        self.tensors.append(tensor)
        self.dims.append((*dims, *tensor.shape[len(dims) :]))
        return Slot(len(self.tensors) - 1, tensor.dtype == torch.bool)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Mask:
    """The function for AttentionMaskInterface: mask_function and the 2-D padding mask, ready for `attention`.

    attention_mask: (batch, keys), true for keys that are not padding. The arguments not named here concern masks that
    are made as tensors (their type, whether one may be left out).
    """
    parts = _Parts((("batch", batch_size), ("seq_len_kv", kv_length)))
    plain = mask_function is None or mask_function.__name__ == "bidirectional_mask_function"
    shape = None if plain else parts.shape(mask_function)
    padding = ""
    if attention_mask is not None:
        padding, tensor = _padding(attention_mask.bool(), kv_offset, kv_length)
        if padding:
            parts.slot(tensor, (batch_size, kv_length))
    return Mask(shape, tuple(parts.tensors), tuple(parts.dims), padding, (int(q_offset), int(kv_offset)))


def _padding(keep: Tensor, start: int, length: int) -> tuple[str, Tensor]:
    """The padding of keys start, start + 1, ... in the least that says it (a GPU is not asked: it would wait)."""
    keep = torch.nn.functional.pad(keep, (0, max(0, start + length - keep.shape[1])))[
        :, start : start + length
    ]
    if keep.device.type != "cpu":
        return "keep", keep
    lengths = keep.sum(1, dtype=torch.int32)
    if int(lengths.sum()) == keep.numel():
        return "", keep
    ends_padded = torch.equal(keep, torch.arange(length) < lengths[:, None])
    return ("lengths", lengths) if ends_padded else ("keep", keep)


@dataclass(frozen=True, slots=True)
class _Key:
    """All that decides what is compiled; lengths, tensors and offsets are not in it."""

    shape: Hashable
    dims: tuple[Dims, ...]
    padding: str
    moved: bool
    dim_qk: int
    dim_v: int
    dtype: torch.dtype
    scaling: float | None
    softcap: float | None


class _ModelAttention:
    """One engine, and the setting of the run-time numbers in its mask."""

    def __init__(self, key: _Key) -> None:
        self.shape = key.shape
        self.moving = threading.Lock() if key.moved else contextlib.nullcontext()
        names = tuple(f"mask_tensor_{i}" for i in range(len(key.dims)))
        mask_mod, self.move = _mask_mod(self, names, key)
        masked = key.shape is not None or key.padding
        meta = [
            meta_tensor(None, None, None, d, dtype=key.dtype) for d in (key.dim_qk, key.dim_qk, key.dim_v)
        ]
        self.engine = AttentionEngine(
            meta,
            score_mod=None if key.softcap is None else _soft_cap(key.softcap),
            custom_fwd_inputs=CustomIO(dict(zip(names, key.dims, strict=True))),
            mask_mod=mask_mod if masked else None,
            scale=key.scaling if key.scaling is not None else key.dim_qk**-0.5,
            layout="bshd",
        )

    def __call__(self, mask: Mask, *inputs: Tensor) -> Tensor:
        with self.moving:  # the offsets belong to the engine, and another thread may be at another position
            self.move(mask.offsets)
            return self.engine(*inputs, *mask.tensors)


# The tracer watches what a function closes over, and where it cannot it traces again at every call: so a mask_mod
# closes over plain values alone and finds the shape of its mask here.
_attentions: weakref.WeakValueDictionary[str, _ModelAttention] = weakref.WeakValueDictionary()


def _mask_mod(
    attention: _ModelAttention, names: tuple[str, ...], key: _Key
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The mask_mod of an engine, and the function that sets the offsets it reads."""
    own, moved, shaped, padding = str(id(attention)), key.moved, key.shape is not None, key.padding
    _attentions[own] = attention
    q_offset = kv_offset = 0

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom_fwd_inputs: CustomIO) -> Any:
        tensors: list[Any] = [custom_fwd_inputs.input_tensors[name] for name in names]
        visible = None
        if shaped:
            q_place, kv_place = (q_idx + q_offset, kv_idx + kv_offset) if moved else (q_idx, kv_idx)
            visible = restore(_attentions[own].shape, tensors)(b, h, q_place, kv_place)
        if padding:
            real = kv_idx < tensors[-1][b] if padding == "lengths" else tensors[-1][b, kv_idx] != 0
            visible = real if visible is None else visible & real
        return visible

    def move(offsets: tuple[int, int]) -> None:
        nonlocal q_offset, kv_offset
        q_offset, kv_offset = offsets

    return mask_mod, move


def _soft_cap(cap: float) -> Callable[..., Any]:
    def soft_cap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return soft_cap


@functools.lru_cache(maxsize=128)
def _model_attention(key: _Key) -> _ModelAttention:
    return _ModelAttention(key)


def _causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def _mask_of(module: Any, attention_mask: Any, queries: int, is_causal: bool | None) -> Mask:
    """The mask of a call; a model that hands over none means its own default, as with the library's sdpa."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    if attention_mask is not None:
        raise UnsupportedModelFeature(
            module=type(module).__name__,
            feature=f"a ready {type(attention_mask).__name__} as its mask",
            instead="Pass the model a 2-D padding mask (batch, keys); patterns go in as and_mask_function.",
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return Mask(_Parts(()).shape(_causal)) if causal and queries > 1 else Mask()


def _refuse(module: Any, dropout: float, unsupported: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelFeature(
            module=type(module).__name__,
            feature=f"dropout={dropout}",
            instead="Set the attention dropout in the model's config to 0, or call model.eval().",
        )
    for name, value in unsupported.items():
        if value is not None:
            raise UnsupportedModelFeature(
                module=type(module).__name__,
                feature=name,
                instead='Load the model with attn_implementation="eager".',
            )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function for AttentionInterface.

    query: (batch, heads, queries, dim); key, value: (batch, kv_heads, keys, dim), heads a multiple of kv_heads.
    Returns the output as (batch, queries, heads, dim) and no weights. Raises UnsupportedModelFeature for
    dropout, sinks, position biases, head masks and masks that come as tensors.
    """
    _refuse(module, dropout, {"s_aux": s_aux, "position_bias": position_bias, "head_mask": head_mask})
    mask = _mask_of(module, attention_mask, query.shape[2], is_causal)
    compiled = _model_attention(
        _Key(
            mask.shape, mask.dims, mask.padding, mask.offsets != (0, 0),
            query.shape[3], value.shape[3], query.dtype, scaling, softcap,
        )
    )  # fmt: skip
    return compiled(mask, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)), None


def register(name: str = "attn_engine") -> None:
    """Make `attn_implementation=name` known to transformers, for this process. Doing it twice changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, describe_mask)

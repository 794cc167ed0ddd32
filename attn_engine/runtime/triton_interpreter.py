"""Run one Triton kernel through Triton's own interpreter, in a process that also compiles kernels.

Triton decides once per process, by an environment variable read on import, whether kernels are interpreted. Here a
kernel stays an ordinary `triton.jit` function; `interpret` swaps in the interpreter for one launch and puts everything
back afterwards, also when the kernel raises. On the way it repairs what the interpreter of triton 3.6 and 3.7 gets
wrong:

- bfloat16, which it keeps as uint16: arithmetic and products used the bits as integers, and casts truncated;
- scalars as loop bounds under numpy 2.4 and newer (triton 3.6);
- calls between device functions, which patched triton.language without restoring it.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import triton.experimental.gluon.language  # noqa: F401  # reads triton.language on import: must see it unpatched
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_lock = threading.RLock()  # triton.language is patched as a whole


def interpret(function: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run `function[grid](*args, **kwargs)` on the CPU, one program instance after another.

    function: a `triton.jit` function. args: CPU tensors (written in place) and numbers. Raises the interpreter's
    InterpreterError with the kernel's own exception as its cause.
    """
    with _lock, ExitStack() as stack:
        stack.enter_context(_repaired())
        stack.enter_context(_interpreted(function.fn.__globals__))
        # The interpreter's own launch patches `tl` alone; triton's device functions call `tl.core` as well.
        languages = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        stack.callback(interpreter._patch_lang(languages).restore)
        # Rows past the end hold inf and NaN that nobody stores.
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        InterpretedFunction(function.fn)[grid](*args, **kwargs)


@contextmanager
def _interpreted(namespace: dict[str, Any]) -> Iterator[None]:
    """Device functions of the kernel's file and of triton.language, as interpreted functions."""
    compiled = {name: value for name, value in namespace.items() if isinstance(value, JITFunction)}
    with ExitStack() as stack:
        stack.callback(namespace.update, compiled)
        namespace.update({name: InterpretedFunction(value.fn) for name, value in compiled.items()})
        for module in (tl, tl.standard, tl.random, tl.math):
            for name in dir(module):
                value = getattr(module, name)
                if isinstance(value, JITFunction):
                    _set(stack, module, name, InterpretedFunction(value.fn))
        yield


@contextmanager
def _repaired() -> Iterator[None]:
    builder = InterpreterBuilder
    with ExitStack() as stack:
        _set(stack, builder, "create_dot", _wide_product(builder.create_dot))
        for name, operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
            _set(stack, builder, name, _wide_operation(getattr(builder, name), operands))
        _set(stack, builder, "cast_impl", _rounding_cast(builder.cast_impl))
        _set(stack, interpreter, "_patch_lang_tensor", _with_scalar_index(interpreter._patch_lang_tensor))
        _set(stack, InterpretedFunction, "__call__", _call_patched)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


def _call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function called by an interpreted kernel: the language is patched already."""
    return self.rewrite()(*args, **kwargs)


def _with_scalar_index(patch: Callable[..., Any]) -> Callable[..., Any]:
    """numpy 2.4 no longer turns an array of one element into an int: take the element."""

    def patched(tensor: Any, *scope: Any) -> Any:
        result = patch(tensor, *scope)
        assign = scope[0].set_attr if scope else setattr
        assign(tensor, "__index__", lambda self: int(self.handle.data.item()))
        return result

    return patched


# bfloat16: the upper half of a float32, held in uint16


def _is_brain(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even."""
    wide = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape)
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def _widened(x: Any) -> Any:
    return TensorHandle(_to_float(x.data), tl.float32) if _is_brain(x) else x


def _wide_product(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, a, b, *rest, **options: create_dot(self, _widened(a), _widened(b), *rest, **options)


def _wide_operation(operation: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """Compute in float32; round the result where it is a number."""

    def wide(self: Any, *args: Any) -> Any:
        if not any(_is_brain(x) for x in args[:operands]):
            return operation(self, *args)
        result = operation(self, *(_widened(x) for x in args[:operands]), *args[operands:])
        if result.data.dtype != np.float32:
            return result
        return TensorHandle(_to_bits(result.data), tl.bfloat16)

    return wide


def _rounding_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    def rounding(self: Any, x: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and not _is_brain(x):
            return TensorHandle(_to_bits(x.data.astype(np.float32)), tl.bfloat16)
        if _is_brain(x) and target.scalar != tl.bfloat16:
            wide = _widened(x)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        return cast(self, x, target)

    return rounding

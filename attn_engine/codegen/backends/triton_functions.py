"""Small device functions that generated Triton files carry where they use them, and their texts."""

from __future__ import annotations

# Triton rounds integer quotients toward zero; programs floor, as Python does.
_FLOOR_DIVIDE = '''
@triton.jit
def floor_divide(a, b):
    """a // b, rounded toward minus infinity."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), a // b - 1, a // b)
'''

_FLOOR_MODULO = '''
@triton.jit
def floor_modulo(a, b):
    """a % b with the sign of b."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
'''

# The quotient of exponentials cancels near zero; the polynomial is good to one float32 rounding below 0.625.
_TANH = '''
@triton.jit
def tanh(x):
    """The hyperbolic tangent to float32 accuracy."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    far = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return tl.where(tl.abs(x) < 0.625, near, far)
'''

_TANH_DOUBLE = '''
@triton.jit
def tanh(x):
    """The hyperbolic tangent to about 1e-16."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
'''

HELPERS: dict[str, str] = {"floor_divide": _FLOOR_DIVIDE, "floor_modulo": _FLOOR_MODULO, "tanh": _TANH}


def helper_lines(names: set[str], compute: str) -> list[str]:
    """The definitions of these functions, each followed by the two empty lines of a top-level definition."""
    texts = {**HELPERS, "tanh": _TANH_DOUBLE} if compute == "float64" else HELPERS
    return [
        line for name, text in texts.items() if name in names for line in [*text.strip().split("\n"), "", ""]
    ]

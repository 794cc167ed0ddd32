"""Small device functions that generated Triton files carry where they use them, and their texts."""

from __future__ import annotations

from attn_engine.ir.ops import Storage

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

_BIT_OF = '''
@triton.jit
def bit_of(word, place):
    """One bit of a word, from the lowest."""
    return ((word >> place) & 1) != 0
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

# For elements of 16 bits: a few operations instead of thirty.
_TANH_SHORT = '''
@triton.jit
def tanh(x):
    """The hyperbolic tangent, to 2e-7 beside 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))
'''

_LOAD_TILE = '''
@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)
'''

# Bytes are what the launch hands over where the hardware does not convert. As float16 their exponents are 8 too small.
_FLOAT8_VALUES = '''
@triton.jit
def float8_values(codes):
    """The numbers of e4m3 codes, or of their bytes, in float32."""
    if codes.dtype == tl.uint8:
        code = codes.to(tl.uint16)
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = tl.where((code & 0x7F) == 0x7F, float("nan"), values)
    else:
        values = codes.to(tl.float32)
    return values
'''

HELPERS: dict[str, str] = {
    "floor_divide": _FLOOR_DIVIDE,
    "floor_modulo": _FLOOR_MODULO,
    "bit_of": _BIT_OF,
    "tanh": _TANH,
    "load_tile": _LOAD_TILE,
    "float8_values": _FLOAT8_VALUES,
}


def helper_lines(names: set[str], element: Storage) -> list[str]:
    """The definitions of these functions, each followed by the two empty lines of a top-level definition.

    element: the storage of q, k and v, which says how exact is exact enough.
    """
    by_element = {Storage.FLOAT64: _TANH_DOUBLE, Storage.FLOAT32: _TANH}
    texts = {**HELPERS, "tanh": by_element.get(element, _TANH_SHORT)}
    return [
        line for name, text in texts.items() if name in names for line in [*text.strip().split("\n"), "", ""]
    ]

"""Launches that compile without spilling, with registers to spare where they can, although the model chooses others.

Of the showcase in 16 bits, compiled ahead of time with triton 3.7: `tests/codegen/compiled_kernels.csv` has what the
compilers reported, and the slow tests compile every one again. They come before the model's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping

from attn_engine.codegen.schedule import Launch

Row = tuple[str, str, int, int]  # target, kernel, dim_qk, dim_v

COMPILED: Mapping[Row, Launch] = {
    ("sm_80", "forward", 64, 64): Launch(128, 64, 8, 2),
    ("sm_90", "dkdv", 64, 64): Launch(64, 64, 8, 2),
    ("sm_100", "forward", 96, 96): Launch(32, 64, 4, 2),
    ("sm_100", "dq", 96, 96): Launch(32, 32, 4, 2),
    ("sm_100", "dkdv", 96, 96): Launch(64, 16, 4, 2),
    ("sm_100", "dkdv", 128, 128): Launch(16, 64, 8, 2),
    ("sm_80", "dkdv", 256, 256): Launch(32, 32, 8, 2),
    ("sm_100", "dkdv", 256, 256): Launch(64, 32, 8, 2),
    ("sm_100", "dq", 192, 128): Launch(32, 32, 4, 2),
    ("sm_100", "dkdv", 192, 128): Launch(16, 32, 4, 2),
    ("gfx942", "dkdv", 192, 128): Launch(16, 64, 4, 2),
    ("sm_80", "forward", 576, 512): Launch(32, 32, 8, 2),
    ("sm_80", "dkdv", 576, 512): Launch(16, 16, 8, 2),
    ("sm_90", "forward", 576, 512): Launch(64, 16, 8, 2),
    ("sm_90", "dq", 576, 512): Launch(16, 32, 4, 2),
    ("sm_90", "dkdv", 576, 512): Launch(32, 16, 8, 1),
    ("sm_100", "forward", 576, 512): Launch(64, 16, 8, 2),
    ("sm_100", "dq", 576, 512): Launch(16, 32, 8, 2),
    ("sm_100", "dkdv", 576, 512): Launch(32, 16, 8, 1),
    ("gfx942", "forward", 576, 512): Launch(32, 16, 4, 2),
    ("gfx942", "dq", 576, 512): Launch(32, 16, 4, 2),
    ("gfx942", "dkdv", 576, 512): Launch(16, 16, 4, 2),
}

# The same where a mask asks every tile what it holds (documents), which takes registers that the model does not count.
TESTING_TILES: Mapping[Row, Launch] = {
    ("sm_90", "forward", 64, 64): Launch(128, 64, 8, 2),
    ("sm_100", "forward", 64, 64): Launch(64, 64, 8, 2),
    ("sm_80", "dkdv", 64, 64): Launch(32, 64, 8, 2),
    ("sm_80", "dkdv", 128, 128): Launch(64, 32, 8, 2),
    ("sm_90", "dkdv", 64, 64): Launch(32, 64, 8, 2),
    ("sm_90", "dkdv", 128, 128): Launch(64, 32, 8, 2),
}

# The same where keys lie in pages: their places take registers that the model does not count.
IN_PAGES: Mapping[Row, Launch] = {("sm_90", "forward", 128, 128): Launch(128, 64, 8, 2)}

# The same where keys and values are bytes that are converted by shifts, tile for tile.
OF_BYTES: Mapping[Row, Launch] = {("sm_80", "forward", 128, 128): Launch(64, 64, 8, 2)}

# The same where rows belong to sequences, as those of lists of tokens that are not equally long.
OF_SEQUENCES: Mapping[Row, Launch] = {("sm_90", "dq", 576, 512): Launch(16, 32, 8, 1)}

# The same where values lie in their keys: in tiles of 64 rows a few bytes are spilled (24 to 56).
VALUES_IN_KEYS: Mapping[Row, Launch] = {("sm_100", "forward", 576, 512): Launch(32, 32, 8, 2)}

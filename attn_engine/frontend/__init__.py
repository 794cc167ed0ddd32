"""The user's world: descriptions of attention in plain Python, and their traces."""

from attn_engine.frontend.constants import Constant
from attn_engine.frontend.custom_io import CustomIO
from attn_engine.frontend.meta import MetaTensor, meta_tensor
from attn_engine.frontend.names import KernelNames
from attn_engine.frontend.online import OnlineFunc, RuleTrace, given_methods, trace_combine, trace_online
from attn_engine.frontend.row_function import RowFunction, online
from attn_engine.frontend.session import BoundScalar, BoundTensor, Guard
from attn_engine.frontend.symbols import (
    SymbolicArray,
    SymbolicColReduceArray,
    SymbolicConst,
    SymbolicTensor,
    SymbolScalar,
    Var,
)
from attn_engine.frontend.trace import (
    MaskMod,
    ScoreMod,
    Trace,
    trace_mask_mod,
    trace_plain_mask,
    trace_score_mod,
)
from attn_engine.frontend.traced import Traced

__all__ = [
    "BoundScalar",
    "BoundTensor",
    "Constant",
    "CustomIO",
    "Guard",
    "KernelNames",
    "MaskMod",
    "MetaTensor",
    "OnlineFunc",
    "RowFunction",
    "RuleTrace",
    "ScoreMod",
    "SymbolScalar",
    "SymbolicArray",
    "SymbolicColReduceArray",
    "SymbolicConst",
    "SymbolicTensor",
    "Trace",
    "Traced",
    "Var",
    "given_methods",
    "meta_tensor",
    "online",
    "trace_combine",
    "trace_mask_mod",
    "trace_online",
    "trace_plain_mask",
    "trace_score_mod",
]

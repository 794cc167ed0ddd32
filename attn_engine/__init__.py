"""attn_engine: describe an attention in a few lines of Python, get kernels with gradients for CPU and GPU.

>>> import torch
>>> from attn_engine import AttentionEngine, meta_tensor
>>> meta = meta_tensor(None, 4, None, 32, dtype=torch.float32)
>>> engine = AttentionEngine([meta] * 3, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)
>>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
>>> engine(q, k, v).shape
torch.Size([1, 100, 4, 32])
"""

from attn_engine.engine import AttentionEngine
from attn_engine.errors import AttnEngineError
from attn_engine.flex import AuxOutput, AuxRequest, flex_attention, noop_mask
from attn_engine.frontend import (
    CustomIO,
    MetaTensor,
    OnlineFunc,
    SymbolicArray,
    SymbolicColReduceArray,
    SymbolicConst,
    SymbolicTensor,
    SymbolScalar,
    Var,
    meta_tensor,
    online,
)
from attn_engine.frontend.pooling import with_pooled
from attn_engine.ir.selection import Overlap
from attn_engine.library import AttentionLibrary, and_masks, not_mask, or_masks
from attn_engine.linear_engine import LinearAttentionEngine
from attn_engine.masks import BlockMask, create_block_mask
from attn_engine.selection_engine import SelectionEngine
from attn_engine.version import VERSION as __version__

__all__ = [
    "AttentionEngine",
    "AttentionLibrary",
    "AttnEngineError",
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "CustomIO",
    "LinearAttentionEngine",
    "MetaTensor",
    "OnlineFunc",
    "Overlap",
    "SelectionEngine",
    "SymbolScalar",
    "SymbolicArray",
    "SymbolicColReduceArray",
    "SymbolicConst",
    "SymbolicTensor",
    "Var",
    "__version__",
    "and_masks",
    "create_block_mask",
    "flex_attention",
    "meta_tensor",
    "noop_mask",
    "not_mask",
    "online",
    "or_masks",
    "with_pooled",
]

"""Linear attentions and state space models, one file per paper: arguments of a LinearAttentionEngine.

engine = LinearAttentionEngine(qkv_meta, **gla())
"""

from attn_engine.library.linear.delta_net import delta_net
from attn_engine.library.linear.gated_delta_net import gated_delta_net
from attn_engine.library.linear.gla import gla, simple_gla
from attn_engine.library.linear.hgrn2 import hgrn2
from attn_engine.library.linear.kimi_delta import kimi_delta
from attn_engine.library.linear.lightning import lightning
from attn_engine.library.linear.linear_transformer import linear_transformer
from attn_engine.library.linear.mamba2 import mamba2
from attn_engine.library.linear.mlstm import mlstm, mlstm_gates
from attn_engine.library.linear.retnet import retnet
from attn_engine.library.linear.rwkv6 import rwkv6
from attn_engine.library.linear.rwkv7 import rwkv7, rwkv7_rows

__all__ = [
    "delta_net",
    "gated_delta_net",
    "gla",
    "hgrn2",
    "kimi_delta",
    "lightning",
    "linear_transformer",
    "mamba2",
    "mlstm",
    "mlstm_gates",
    "retnet",
    "rwkv6",
    "rwkv7",
    "rwkv7_rows",
    "simple_gla",
]

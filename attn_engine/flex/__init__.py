"""FlexAttention's interface on this compiler: change one import."""

from attn_engine.flex.attention import flex_attention
from attn_engine.flex.auxiliary import AuxOutput, AuxRequest

__all__ = ["AuxOutput", "AuxRequest", "flex_attention"]

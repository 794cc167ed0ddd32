"""attn_engine."""

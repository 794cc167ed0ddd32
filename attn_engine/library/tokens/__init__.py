"""Attention over lists of token indices (DeepSeek-V3.2), made of engines."""

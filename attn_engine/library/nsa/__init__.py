"""Native sparse attention (NSA, arXiv:2502.11089): three gated branches over blocks, a selection, and a window."""

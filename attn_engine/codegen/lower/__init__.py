"""Lowering: an attention program and a schedule become tile kernels. One file per loop structure, none per variant."""

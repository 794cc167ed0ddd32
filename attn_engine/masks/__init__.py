"""Masks ahead of a call: which blocks a mask meets, for kernels, for torch's BlockMask and for the eye."""

"""Attention over all the keys that a mask keeps: one file per paper."""

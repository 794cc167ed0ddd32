"""Attention that leaves out most pairs: operators with the names and arguments of their papers' code."""

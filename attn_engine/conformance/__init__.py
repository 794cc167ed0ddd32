"""What an implementation of FlexAttention must do, as a table that any implementation can be run against.

The list follows the description of PyTorch's own tests: score functions, masks, properties of kernels, row values,
compilation, block masks, learned biases. `python -m attn_engine conformance` runs it.
"""

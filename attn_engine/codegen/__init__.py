"""From programs to kernel text: scheduling, lowering to tile kernels, rendering. Pure: no torch, no device."""

"""One command that tries the GPU backends on the machine it runs on: python -m attn_engine.gpu_check (docs/gpu.md)."""

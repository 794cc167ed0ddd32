"""Linear attentions as scripts of microsoft/AttentionEngine write them: python -m examples.linear.mamba2 [--small]"""

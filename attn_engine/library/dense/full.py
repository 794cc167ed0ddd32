"""Full attention (Vaswani et al., arXiv:1706.03762, section 3.2)."""


def full() -> None:
    """Each query sees every key: no mask."""
    return

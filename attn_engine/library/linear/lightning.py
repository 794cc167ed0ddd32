"""Lightning Attention-2 (arXiv:2401.04658): slopes that fall with the layer."""

from __future__ import annotations

from typing import Any


def lightning(heads: int, layer: int = 0, layers: int = 1) -> dict[str, Any]:
    """log decay of head h in layer l of L: -(8 / heads) (1 - l / L) h."""
    slope = 8.0 / heads * (1.0 - layer / layers)

    def head_decay(_: Any, b: Any, h: Any, t: Any) -> Any:
        return -slope * h

    return {"decay_mod": head_decay, "decay_rank": "none"}

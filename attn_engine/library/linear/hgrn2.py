"""HGRN2 (arXiv:2404.07904, section 3): keys are what the forget gates leave."""

from __future__ import annotations

from typing import Any

import torch


def hgrn2() -> dict[str, Any]:
    """k_t = 1 - e^{g_t} for the log forget gates g_t, which a call brings as its decay; its k is not used."""

    def what_is_left(_: Any, inputs: Any) -> Any:
        return 1.0 - torch.exp(inputs.input_tensors["decay"])

    return {"k_mod": what_is_left, "decay_rank": "vector"}

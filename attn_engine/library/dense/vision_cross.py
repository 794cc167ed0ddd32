"""Text that looks at the last image before it (Flamingo, arXiv:2204.14198, section 2.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least, integers


def vision_cross(image_of_text: Tensor, tokens_per_image: int = 64) -> MaskMod:
    """A text token sees the `tokens_per_image` keys of one image, or none.

    image_of_text: int tensor (batch, text length), the number of the last image before each text token, -1 where
    there is none; or (text length,).
    """
    integers("image_of_text", image_of_text, ranks=(1, 2))
    at_least("tokens_per_image", tokens_per_image, 1)
    per_batch = image_of_text.ndim == 2

    def vision_cross_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        image = image_of_text[b, q_idx] if per_batch else image_of_text[q_idx]
        return kv_idx // tokens_per_image == image

    return vision_cross_mask

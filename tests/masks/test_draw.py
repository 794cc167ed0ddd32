"""Pictures of masks: their counts are those of the mask, a big one is drawn coarser, and each form is well-formed."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pytest
import torch

from attn_engine import AttentionEngine, CustomIO, create_block_mask, library, meta_tensor
from attn_engine.masks.mistakes import CannotDraw, WrongBlockMask
from attn_engine.masks.picture import EMPTY, FULL, PARTIAL, picture

SVG = "{http://www.w3.org/2000/svg}"


def causal(length: int = 1024, **options):
    return create_block_mask(library.causal(), 1, 1, length, length, **options)


def test_text():
    text = causal(512).draw()
    assert text.splitlines()[1:5] == ["▒▒······   25%", "██▒▒····   50%", "████▒▒··   75%", "██████▒▒  100%"]
    assert text.endswith("4 x 4 blocks: 6 full, 4 partial, 6 empty; 37.5% skipped")


def test_cells_of_several_blocks():
    shown = picture(causal(1024), 0, 0, (4, 4))
    assert [row[:] for row in shown.cells] == [
        [PARTIAL, EMPTY, EMPTY, EMPTY],
        [FULL, PARTIAL, EMPTY, EMPTY],
        [FULL, FULL, PARTIAL, EMPTY],
        [FULL, FULL, FULL, PARTIAL],
    ]
    assert shown.listed[0][0] == 0.75 and shown.work[0] == pytest.approx(1.5 / 8)
    assert (shown.full, shown.partial) == (28, 8)


def test_a_big_mask_is_drawn_coarser():
    text = causal(100_000).draw()
    assert len(text.splitlines()) <= 34 and max(map(len, text.splitlines()[1:-1])) <= 72
    assert "782 x 782 blocks" in text
    uneven = picture(causal(128 * 33), 0, 0, (32, 32))
    assert len(uneven.cells) == 17 and uneven.work[-1] == 1


def test_each_head_has_its_picture():
    windows = torch.tensor([1, 10_000])
    mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < windows[h]), 1, 2, 2048, 2048)
    assert "16 partial" in mask.draw(head=0) and "120 full" in mask.draw(head=-1)
    with pytest.raises(WrongBlockMask, match="head"):
        mask.draw(head=2)


def test_svg():
    drawn = ElementTree.fromstring(causal(512).draw("svg"))
    colours = [x.get("fill") for x in drawn.iter(f"{SVG}rect")]
    assert colours.count("#2f6f9f") == 3 + 1 and colours.count("#e8a33d") == 4 + 1  # runs, and the legend
    words = " ".join(x.text or "" for x in drawn.iter(f"{SVG}text"))
    assert "work per row" in words and "37.5% skipped" in words


def test_names_cannot_break_the_page():
    def evil(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    evil.__name__ = "<script>"
    page = create_block_mask(evil, 1, 1, 256, 256).draw("html")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_html_and_notebooks():
    mask = causal(512)
    page = mask._repr_html_()
    assert page == mask.draw("html") and "<svg" in page and "37.5%" in page and "25% to 100%" in page
    ElementTree.fromstring(page)
    assert mask._repr_svg_() == mask.draw("svg") and mask._repr_svg_() in page


def test_png():
    pytest.importorskip("matplotlib")
    assert causal(512).draw("png").startswith(b"\x89PNG")


def test_png_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(CannotDraw, match="pip install matplotlib"):
        causal(512).draw("png")


def test_an_unknown_kind():
    with pytest.raises(WrongBlockMask, match="'svg'"):
        causal(512).draw("jpeg")


def engine(length: int | None = None, **options) -> AttentionEngine:
    meta = meta_tensor(None, None, length, 16, dtype=torch.float32)
    return AttentionEngine([meta] * 3, **options)


def test_an_engine_shows_its_program_and_mask():
    page = engine(512, mask_mod=library.causal())._repr_html_()
    assert "AttentionEngine(" in page and "4 x 4 blocks" in page and "causal_mask" in page
    ElementTree.fromstring(page)
    ids = torch.arange(384) // 100
    assert "3 x 3 blocks" in engine(mask_mod=library.document(ids))._repr_html_()
    assert "No mask" in engine()._repr_html_()


def test_an_engine_whose_mask_needs_a_calls_tensors_says_so():
    def from_input(b, h, q_idx, kv_idx, custom):
        return custom["keep"][kv_idx] > 0

    page = engine(mask_mod=from_input, custom_fwd_inputs=CustomIO({"keep": ("seq_len_kv",)}))._repr_html_()
    assert "not drawn" in page

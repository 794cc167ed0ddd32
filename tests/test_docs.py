"""What the documentation says is run: fenced Python in Markdown, examples in docstrings, links between pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import attn_engine

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(attn_engine.__path__, "attn_engine.")
    if not m.name.endswith("__main__")
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of a page run one after the other, as a reader would type them, from files as tracebacks want them."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(BLOCK.findall(page.read_text())):
        path = tmp_path / f"block_{number}.py"
        path.write_text(block)
        exec(compile(block, str(path), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{name(page)} links to {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str):
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, f"{failed} examples in {module} gave something else; the output above shows which"


def test_every_file_of_the_package_is_short():
    """The house rule: a file over 400 lines is two ideas."""
    files = ROOT.glob("attn_engine/**/*.py")
    long = {name(f): n for f in files if (n := len(f.read_text().splitlines())) > 400}
    assert not long


LISTING = re.compile(r"(<!-- listing:.*?-->\n```text\n)(.*?)(```\n<!-- end of listing -->)", re.DOTALL)


def heart(kernel: str) -> str:
    """The part of a Triton kernel that the README shows: bounds and loop, the loads left out."""
    begin, end = (
        kernel.index("    # -- kv tiles this tile can see"),
        kernel.index("    # -- normalise and store"),
    )
    shown: list[str] = []
    loading = False
    for line in kernel[begin:end].rstrip().splitlines():
        if re.match(r" +(K_base|V_base|key|value) = ", line):
            loading = line.endswith("(")
            if not shown[-1].endswith("..."):
                shown.append("        ...")
        elif loading:
            loading = line != "        )"
        else:
            shown.append(line)
    return "\n".join(shown) + "\n"


def test_the_listing_in_the_readme_is_the_kernel(tmp_path: Path, request: pytest.FixtureRequest):
    """The README shows what its own description gives; --update-golden writes it there."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    path = tmp_path / "capped.py"
    path.write_text(BLOCK.findall(text)[0])
    scope: dict[str, object] = {"__name__": "page"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    engine = scope["engine"]
    assert isinstance(engine, attn_engine.AttentionEngine)
    expected = heart(engine.source(backend="triton", kernel="forward"))
    if request.config.getoption("--update-golden"):
        readme.write_text(LISTING.sub(lambda found: found[1] + expected + found[3], text))
        return
    found = LISTING.search(text)
    assert found is not None
    assert found[2] == expected, "pytest tests/test_docs.py --update-golden writes the README's listing anew"

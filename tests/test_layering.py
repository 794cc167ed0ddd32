"""Who may import whom. The tables are the architecture (docs/adr/0006): change them with an ADR, not in passing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "attn_engine"
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer may import itself, these layers and errors.py. Files directly in the package count as "top".
MAY_IMPORT = {
    "ir": set[str](),
    "frontend": {"ir"},
    "library/dense": {
        "frontend",
        "library",
    },  # describes mathematics; of the library only the checks of arguments
    "library/linear": {"frontend", "library"},
    "library": {"library/dense", "frontend", "runtime", "top"},  # what is made of engines
    "codegen": {"ir"},
    "runtime": {"codegen", "ir"},
    "flex": {
        "frontend",
        "library",
        "library/dense",
        "ir",
        "runtime",
        "masks",
        "top",
    },  # joins what it needs, as the engine does
    "conformance": {"flex", "top"},  # through the public package, as a user would
    "gpu_check": {"top", "library", "frontend", "runtime", "codegen", "ir"},  # a tool: nothing imports it
    "masks": {"frontend", "ir", "runtime"},  # plans made from user functions and the tensors that they read
    "integrations": {"top"},  # through the public package, as a user would
    "top": {
        "frontend",
        "library",
        "library/dense",
        "library/linear",
        "ir",
        "codegen",
        "runtime",
        "masks",
        "flex",
        "conformance",
        "integrations",
    },
}
# The packages beyond the standard library that a layer may name.
PACKAGES = {
    "ir": {"sympy", "networkx"},  # passes/: row functions (docs/adr/0020)
    "codegen": set[str](),
    "frontend": {"torch"},
    "library/dense": {"torch"},
    "library/linear": {"torch"},
    "library": {"torch"},
    "runtime": {"torch", "numpy", "networkx", "triton", "tilelang"},
    "flex": {"torch"},
    "conformance": {"torch"},
    "gpu_check": {"torch"},
    "masks": {"torch", "numpy", "matplotlib"},
    "integrations": {"torch", "transformers"},
    "top": {"torch"},
}
# The files that see frontend and runtime.
ONLY_BOTH_BRANCHES = {
    "engine.py",
    "engine_state.py",
    "tracing.py",
    "graph_checks.py",
    "options.py",
    "traced_program.py",
    "linear_engine.py",
    "traced_linear.py",
    "selection_engine.py",
    "traced_selection.py",
    "__main__.py",
    "__init__.py",
}
# Imported by everybody, so they import nobody (but the errors their base, and that the locations).
ERRORS = {"errors.py", "device_errors.py", "linear_errors.py", "schedule_errors.py", "error_base.py"}
STANDALONE = ERRORS | {"locations.py", "version.py"}
LAZY = {
    "triton",
    "tilelang",
    "sympy",
    "networkx",
    "transformers",
    "matplotlib",
}  # imported where they are used
# Files that need such a package from their first line on: nobody imports them but where they are used.
LAZY_FILES = {"runtime/triton_interpreter.py": "attn_engine.runtime.triton_interpreter"}


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if parts[:2] in (("library", "dense"), ("library", "linear")) and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0] if len(parts) > 1 else "top"


def modules(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module, names, 0) if module is not None:
            return [f"{module}.{alias.name}" for alias in names] if module == "attn_engine" else [module]
        case _:
            return []


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {module for node in ast.walk(tree) for module in modules(node)}


def runs_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module executes: those of functions and of `if TYPE_CHECKING` are not."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            yield from runs_on_import(statement.orelse)
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from runs_on_import(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from runs_on_import(handler.body)


def target_layer(module: str) -> str:
    """The layer that `attn_engine.x.y` belongs to."""
    name = module.split(".")[1] if "." in module else ""
    for room in ("dense", "linear"):
        if module.startswith(f"attn_engine.library.{room}"):
            return f"library/{room}"
    return name if name and (PACKAGE / name).is_dir() else "top"


def forbidden(path: Path, module: str) -> bool:
    own = layer(path)
    name = module.removeprefix("attn_engine.")
    if name == "locations" or (f"{name}.py" in ERRORS and name != "errors"):
        return path.name in STANDALONE - ERRORS
    if module in ("attn_engine.errors", "attn_engine.version"):
        return path.name in STANDALONE
    if module.split(".")[0] == "attn_engine":
        return path.name in STANDALONE or target_layer(module) not in MAY_IMPORT[own] | {own}
    root = module.split(".")[0]
    return root not in sys.stdlib_module_names and root not in PACKAGES[own]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path):
    wrong = sorted(module for module in imports(path) if forbidden(path, module))
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(wrong)}; see the tables in this test"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path):
    name = str(path.relative_to(PACKAGE))
    at_import = {m for s in runs_on_import(ast.parse(path.read_text()).body) for m in modules(s)}
    wrong = at_import & set(LAZY_FILES.values())
    if name not in LAZY_FILES:
        wrong |= {module for module in at_import if module.split(".")[0] in LAZY}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))} as soon as it is imported itself"


def test_only_the_engine_joins_the_two_branches():
    joins = {
        path.name
        for path in FILES
        if layer(path) == "top" and {"frontend", "runtime"} <= {target_layer(m) for m in imports(path)}
    }
    assert joins <= ONLY_BOTH_BRANCHES


def test_importing_the_package_is_light():
    """`import attn_engine` loads none of the heavy packages that torch has not already loaded."""
    script = (
        "import sys, torch; before = set(sys.modules); import attn_engine;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & LAZY


def test_the_table_would_notice():
    """A rule that never fires protects nothing: a few imports that must be refused, and some that must not."""
    ir, runtime, top = PACKAGE / "ir" / "expr.py", PACKAGE / "runtime" / "launch.py", PACKAGE / "errors.py"
    assert forbidden(ir, "torch") and forbidden(ir, "triton") and forbidden(ir, "attn_engine.codegen.render")
    assert forbidden(runtime, "attn_engine.frontend.trace") and forbidden(
        PACKAGE / "library" / "x.py", "triton"
    )
    assert forbidden(top, "attn_engine.ir.expr") and not forbidden(ir, "dataclasses")
    assert not forbidden(runtime, "triton") and not forbidden(runtime, "attn_engine.errors")
    lazy = (
        "def f():\n    import triton\n"
        "if TYPE_CHECKING:\n    import tilelang\n"
        "try:\n    import sympy\nfinally:\n    pass\n"
    )
    found = [m for s in runs_on_import(ast.parse(lazy).body) for m in modules(s)]
    assert found == ["sympy"]

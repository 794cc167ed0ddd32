"""`engine.graph()`: a program's dataflow as a networkx.DiGraph, and as text that draws it.

Attributes of a node: label, op, depends (a sorted list of "index", "row", "tile"), stage, saved_for_backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attn_engine.errors import BackendNotInstalled
from attn_engine.ir.dataflow import dataflow
from attn_engine.ir.program import Attention

if TYPE_CHECKING:
    from networkx import DiGraph

_COLOURS = {
    "score_mod": "lightblue",
    "mask_mod": "khaki",
    "online": "palegreen",
    "epilogue": "lightsalmon",
    "backward": "plum",
}


def program_graph(program: Attention) -> DiGraph:
    """The dataflow of `program`; edges run from operand to user. `graph.draw(path)` writes it in DOT.

    Raises BackendNotInstalled where networkx is missing.
    """
    try:
        import networkx
    except ImportError as missing:
        raise BackendNotInstalled(
            backend="graph", needs="the package networkx", instead="Install it: pip install networkx."
        ) from missing

    class ProgramGraph(networkx.DiGraph):
        """A DiGraph that draws itself."""

        def draw(self, path: str | Path) -> Path:
            """Write the graph in DOT (`dot -Tsvg` turns it into a picture); returns the path."""
            return draw(self, path)

        def __str__(self) -> str:
            return draw_text(self)

    graph = ProgramGraph(name=program.name)
    flow = dataflow(program)
    for node in flow.nodes:
        graph.add_node(
            node.key,
            label=node.label,
            op=node.op,
            depends=sorted(node.depends),
            stage=node.stage,
            saved_for_backward=node.saved_for_backward,
        )
    graph.add_edges_from(flow.edges)
    return graph


def draw_text(graph: DiGraph) -> str:
    """One line per node under its stage: what it is, what it depends on, what is saved, and what it reads."""
    lines: list[str] = [str(graph.graph.get("name", "program"))]
    for stage in _COLOURS:
        inside = [(key, data) for key, data in graph.nodes(data=True) if data["stage"] == stage]
        lines += ["", f"-- {stage}"] if inside else []
        for key, data in inside:
            marks = ", ".join(data["depends"]) or "constant"
            saved = "; saved for backward" if data["saved_for_backward"] else ""
            reads = ", ".join(graph.predecessors(key))
            lines.append(f"{key} [{marks}{saved}]" + (f" <- {reads}" if reads else ""))
    return "\n".join(lines)


def to_dot(graph: DiGraph) -> str:
    """The graph in the DOT language: a box per stage, double frames around what is saved for backward."""
    lines = ["digraph attention {", "  node [shape=box, style=filled];"]
    for index, (stage, colour) in enumerate(_COLOURS.items()):
        lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(stage)};"]
        for key, data in graph.nodes(data=True):
            if data["stage"] != stage:
                continue
            label = f"{data['label']}\n{', '.join(data['depends']) or 'constant'}"
            frames = 2 if data["saved_for_backward"] else 1
            lines.append(
                f"    {_quoted(key)} [label={_quoted(label)}, fillcolor={_quoted(colour)}, peripheries={frames}];"
            )
        lines.append("  }")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges]
    return "\n".join([*lines, "}"])


def draw(graph: DiGraph, path: str | Path) -> Path:
    """Write `to_dot(graph)` to `path`."""
    path = Path(path)
    path.write_text(to_dot(graph) + "\n")
    return path


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

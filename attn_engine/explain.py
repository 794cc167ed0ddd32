"""What the compiler understood and decided, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from attn_engine.codegen.lower.row_values import uses_delta
from attn_engine.codegen.targets import Target
from attn_engine.errors import UnknownOption
from attn_engine.explain_work import Known, bound_text, occupancy_text, sizes_of_call, work_of, work_text
from attn_engine.ir.expr import Expr, Var, postorder, substitute
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.mask_range import MaskPlan, NoneKnown, plan_mask
from attn_engine.ir.passes.mask_tiles import TileClass, classify_tiles
from attn_engine.ir.passes.merge_rule import MergeRule, NotMergeable, derive_merge
from attn_engine.ir.passes.pack_heads import Packing, packable
from attn_engine.ir.passes.rule_analysis import vanishes_when_masked
from attn_engine.ir.printer import format_expr, format_program
from attn_engine.ir.program import Attention, OnlineRule
from attn_engine.runtime.compiled import CompiledAttention

Kernel = Literal["forward", "decode", "backward", "delta"]


@dataclass(frozen=True)
class Explanation:
    """Titled paragraphs; `str()` is the text, `sections[title]` one of them."""

    sections: dict[str, str]

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{_indented(text)}" for title, text in self.sections.items())


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is explained besides the kernels: where the schedule comes from, a call's sizes and numbers, the GPU.

    known: (batch, heads, length) of q, k and v as far as they are fixed. target: None where no GPU is meant.
    """

    origin: str
    known: Known
    sizes: Mapping[str, int]
    numbers: Mapping[str, Number]
    target: Target | None


def explain(
    program: Attention, scale: float, compiled: CompiledAttention, about: Circumstances | None = None
) -> Explanation:
    """Traced functions, scale, mask plans with their reasons, what is saved, tiles and backend; what a call computes
    and moves and what a GPU makes of it, where the circumstances are given."""
    tiles = f"{compiled.schedule}" + (f"\n{about.origin}" if about else "")
    counted = _counted(compiled, about) if about else {}
    return Explanation(
        {
            "Program": format_program(program),
            "Scale": _scale_text(program, scale),
            "Mask plan, for a tile of queries": _plan_of(program, "kv"),
            "Mask plan, for a tile of keys (dK, dV)": _plan_of(program, "q"),
            "Passes": _passes_text(program.rule),
            "Masking": _masking_text(program),
            "Saved for the backward pass": _saved_text(program),
            "Few query rows": _few_rows_text(compiled),
            "Tiles": tiles,
            **counted,
            "Backend": compiled.backend.name,
        }
    )


def _counted(compiled: CompiledAttention, about: Circumstances) -> dict[str, str]:
    """The sections that count."""
    sizes, assumed = sizes_of_call(about.known, about.sizes)
    work = work_of(compiled, sizes, about.numbers)
    sections = {"Work": work_text(work, sizes, assumed)}
    if about.target is not None:
        occupancy = occupancy_text(compiled, about.target)
        sections = {
            "Occupancy": occupancy,
            **sections,
            "Bound": bound_text(compiled, work, about.target),
        }
    return sections


def _plan_of(program: Attention, loop: str) -> str:
    """Lists say which tiles are visited where there are some, else the mask does."""
    mask, listed = program.mask.result if program.mask else None, program.listed
    if listed is None or listed.tested:
        text = plan_text(plan_mask(mask, loop), classify_tiles(mask, loop))
        return (
            text if listed is None else f"{text}\nof them those in the given blocks of {listed.block(loop)}"
        )
    partial = "by mask_mod" if mask is not None else "nowhere, for there is no mask_mod"
    return "\n".join(
        [
            f"{loop} tiles visited: those of the listed blocks, {listed.block(loop)} positions each",
            f"masked: {partial} in blocks listed as partial; never in those listed as full",
            "because the call brings lists of blocks",
        ]
    )


def plan_text(plan: MaskPlan, classes: TileClass | None = None) -> str:
    """The ranges of the loop axis, what is asked of each tile within them, and why."""
    axis = plan.loop
    if plan.everything:
        return f"every {axis} tile is visited and none is masked: {', '.join(plan.reasons)}"
    hull = f"[{_bound(plan.hull.lo, '0')}, {_bound(plan.hull.hi, f'{axis}_len')})"
    lines = [f"{axis} tiles visited: {hull}" + ("" if plan.bounded else " (all of them)")]
    if classes is not None:
        what = f"what {' and '.join(classes.tensors)} holds" if classes.tensors else "the positions"
        lines += [
            f"each of them is tested: {what} in the two tiles says",
            f"  skipped unless {format_expr(classes.may_hold)}",
            f"  visible entirely, so not masked, where {format_expr(classes.must_hold)}",
        ]
    elif isinstance(plan.full, NoneKnown):
        lines.append("visible entirely: none known, so every visited tile is masked")
    else:
        lines.append(
            f"visible entirely: [{_bound(plan.full.lo, '0')}, {_bound(plan.full.hi, f'{axis}_len')})"
        )
    return "\n".join([*lines, *(f"because {reason}" for reason in plan.reasons)])


def _bound(e: object, unbounded: str) -> str:
    return unbounded if e is None else format_expr(e)  # pyright: ignore[reportArgumentType]


def _scale_text(program: Attention, scale: float) -> str:
    return f"score = q . k * {scale:.6g}" + ("; score_mod is applied to that" if program.score else "")


def _passes_text(rule: OnlineRule) -> str:
    """How often the keys of a row are gone through, and why."""
    lines = ["one pass over the keys computes the output" if not rule.earlier else _before(rule)]
    lines += [f"because {reason}" for reason in rule.reasons]
    if rule.pooled:
        found = " and ".join(f"{p.name} of every {p.block} keys" for p in rule.pooled)
        lines.append(f"then, in the same kernel, the keys once more: {found}")
    if rule.adjoints:
        found = ", ".join(name for p in rule.adjoints for name, _ in p.values)
        lines.append(f"backward: one more pass before the gradient finds {found}")
    return "\n".join(lines)


def _before(rule: OnlineRule) -> str:
    found = [", ".join(name for name, _ in p.values) for p in rule.earlier]
    passes = "; ".join(f"pass {i + 1} finds {names}" for i, names in enumerate(found))
    return f"{len(found) + 1} passes over the keys: {passes}; the last one computes the output"


def _masking_text(program: Attention) -> str:
    if vanishes_when_masked(program.rule):
        return "a hidden score becomes -inf, which the normaliser turns into weight 0"
    return "hidden pairs are left out of every reduction and their weights are set to 0"


def _few_rows_text(compiled: CompiledAttention) -> str:
    rule = compiled.program.rule
    if packable(rule):
        heads = "the heads that share a kv head become the rows of one tile"
    else:
        heads = "heads keep a tile each, because the normaliser asks for the head or the position"
    merge = derive_merge(rule)
    if isinstance(merge, NotMergeable):
        return f"{heads}\nthe keys of a row are never split, because {merge.reason}"
    if not compiled.schedule.split_tasks:
        return f"{heads}\nthe keys of a row are not split on this backend"
    return "\n".join([heads, "the keys of few rows are split among tasks and merged:", *_merge_lines(merge)])


def _merge_lines(merge: MergeRule) -> list[str]:
    """How the next part joins a row, one named value a line."""
    lines: list[str] = []
    known: dict[Expr, Expr] = {}
    for node in postorder(*merge.states, merge.left_scale, merge.right_scale):
        if node in merge.names:
            lines.append(f"{merge.names[node]} = {format_expr(substitute(node, known))}")
            known[node] = Var(merge.names[node], node.dtype, node.axes)
    left, right = (format_expr(known.get(e, e)) for e in (merge.left_scale, merge.right_scale))
    return [*lines, f"out = out * {left} + part_out * {right}"]


def sources(compiled: CompiledAttention, kernel: str) -> list[str]:
    """The texts of `engine.source(kernel=...)`; raises UnknownOption for another kernel."""
    if kernel not in (kernels := get_args(Kernel)):
        known = ", ".join(map(repr, kernels))
        raise UnknownOption(option="kernel", value=kernel, where="engine.source", known=known)
    if kernel == "decode" and isinstance(merge := derive_merge(compiled.program.rule), NotMergeable):
        return [f"no kernels: {merge.reason}, so the keys of a row are never split"]
    learned = tuple(c.name for c in compiled.program.differentiable_captures)
    if kernel == "decode":
        compiled = compiled.of_rows(Packing.NONE, 1)
    direction = kernel if kernel in ("forward", "decode") else "backward"
    kernels = compiled.module(direction, compiled.supported(learned)).kernels
    wanted = [k for k in kernels if direction != "backward" or (k.name == "delta") is (kernel == "delta")]
    return [compiled.backend.source(k, compiled.schedule) for k in wanted]


def _saved_text(program: Attention) -> str:
    names = [f"{name} = {format_expr(value)} per query row" for name, value in program.rule.saved]
    names.append("q, k, v and o" if uses_delta(program) else "q, k and v")
    return "\n".join(names)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

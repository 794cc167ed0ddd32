"""Readable text of expressions, programs and tile kernels: for dumps, explanations and error messages."""

from __future__ import annotations

from collections.abc import Mapping

from attn_engine.ir.expr import Call, Cast, Const, Dot, Expr, FirstColumns, Full, Load, Reduce, Var
from attn_engine.ir.ops import Op
from attn_engine.ir.program import Attention, OnlineRule, RowPass, ScalarFn
from attn_engine.ir.tile import Accumulate, Choose, If, Kernel, Let, Loop, Narrow, Section, Stmt, StoreTile

# operator, precedence: higher binds tighter, as in Python
INFIX: Mapping[Op, tuple[str, int]] = {
    Op.LE: ("<=", 2),
    Op.LT: ("<", 2),
    Op.EQ: ("==", 2),
    Op.NE: ("!=", 2),
    Op.OR: ("|", 3),
    Op.AND: ("&", 4),
    Op.ADD: ("+", 5),
    Op.SUB: ("-", 5),
    Op.MUL: ("*", 6),
    Op.DIV: ("/", 6),
    Op.FLOORDIV: ("//", 6),
    Op.MOD: ("%", 6),
}
PREFIX: Mapping[Op, str] = {Op.NEG: "-", Op.NOT: "~"}


def format_expr(e: Expr, outer: int = 0) -> str:  # noqa: C901  one line per kind of node
    """The expression in Python's notation, with brackets where precedence `outer` needs them.

    >>> from attn_engine.ir.program import KV_IDX, Q_IDX
    >>> format_expr((Q_IDX - KV_IDX) * 2 <= 8)
    '(q_idx - kv_idx) * 2 <= 8'
    """
    match e:
        case Call(op, (a, b)) if op in INFIX:
            symbol, level = INFIX[op]
            text = f"{format_expr(a, level)} {symbol} {format_expr(b, level + 1)}"
            return f"({text})" if level < outer else text
        case Call(op, (a,)) if op in PREFIX:
            return f"{PREFIX[op]}{format_expr(a, 7)}"
        case Call(op, args):
            return f"{op.value}({', '.join(format_expr(a) for a in args)})"
        case Const(value):
            return repr(value)
        case Var(name):
            return name
        case Load(tensor, _, indices):
            return f"{tensor}[{', '.join(format_expr(i) for i in indices)}]"
        case Full(value, spans):
            return f"full({value!r} over {', '.join(spans)})"
        case Dot(a, b):
            return f"dot({format_expr(a)}, {format_expr(b)})"
        case Reduce(kind, x, axis):
            return f"{kind}({format_expr(x)} over {axis})"
        case Cast(x, like):
            return f"round({format_expr(x)} as {like})"
        case FirstColumns(x, axis):
            return f"first_columns({format_expr(x)} as {axis})"
        case _:
            raise TypeError(f"no text for {type(e).__name__}")


def format_function(fn: ScalarFn, returns: str) -> str:
    """A traced function: the values that the user named, then the result."""
    lines = [f"{fn.name}:"]
    lines += [f"    {fn.names[node]} = {format_expr(node)}" for node in fn.names if node is not fn.result]
    lines.append(f"    {returns} = {format_expr(fn.result)}")
    lines += [f"    reads {c.name}: {c.storage.value}, {c.rank} dimension(s)" for c in fn.captures]
    lines += [f"    runtime number {s.name}: {s.dtype.value}" for s in fn.scalars]
    return "\n".join(lines)


def format_rule(rule: OnlineRule) -> str:
    """The normaliser: states, online update, epilogue, recomputation and gradient."""
    lines = [f"{rule.name}:"]
    for i, step in enumerate(rule.earlier):
        lines += _format_pass(f"pass {i + 1}", step)
    lines += [f"    state {s.name}, at first {s.initial}" for s in rule.states]
    lines.append(f"    weights = {format_expr(rule.weights)}")
    lines += [
        f"    new {s.name} = {format_expr(value)}"
        for s, value in zip(rule.states, rule.new_states, strict=True)
    ]
    lines.append(f"    out = out * ({format_expr(rule.out_scale)}) + weights @ v")
    lines.append(f"    at the end: out = {format_expr(rule.output)}")
    lines += [f"    saved {name} = {format_expr(value)}" for name, value in rule.saved]
    lines.append(f"    backward: probs = {format_expr(rule.recompute)}")
    for step in rule.adjoints:
        lines += _format_pass("backward, a pass before", step)
    lines.append(f"    backward: d_logit = {format_expr(rule.gradient)}")
    for p in rule.parameters:
        name = f"d {format_expr(p.load)}"
        lines += [] if p.per_pair is None else [f"    backward: {name} = sum of {format_expr(p.per_pair)}"]
        lines += [] if p.per_row is None else [f"    backward: {name} += {format_expr(p.per_row)} per row"]
    return "\n".join(lines)


def _format_pass(title: str, step: RowPass) -> list[str]:
    states = zip(step.states, step.new_states, strict=True)
    lines = [f"    {title}: {s.name} = {format_expr(new)}, at first {s.initial}" for s, new in states]
    return lines + [f"    {title}: {name} = {format_expr(e)} at the end" for name, e in step.values]


def format_program(program: Attention) -> str:
    """Everything that defines the attention."""
    head = f"{program.name}: {program.element.value}, head dimensions {program.dim_qk} and {program.dim_v}"
    parts = [head]
    parts += [] if program.score is None else [f"score_mod {format_function(program.score, 'logit')}"]
    parts += [] if program.mask is None else [f"mask_mod {format_function(program.mask, 'visible')}"]
    if (listed := program.listed) is not None:
        of = "head" if listed.heads == "heads" else "kv head"
        what = "given" if listed.tested else "visible"
        parts.append(f"{what} blocks of {listed.q or 'all'} queries x {listed.kv} keys from lists per {of}")
        parts += [f"{listed.group} query heads side by side"] if listed.group > 1 else []
    if program.sequences is not None:
        pages = f", keys in pages of {program.sequences.page} rows" if program.sequences.page else ""
        parts.append(
            f"sequences of their own lengths, {'packed' if program.sequences.packed else 'in a batch'}{pages}"
        )
    parts += ["values are the first columns of the keys, in one memory"] if program.values_in_keys else []
    return "\n".join([*parts, f"normaliser {format_rule(program.rule)}"])


def format_kernel(kernel: Kernel) -> str:
    """A tile kernel: header, parameters, statements."""
    lines = [f"# {line}" for line in kernel.header]
    tiles = ", ".join(f"{axis}={n}" for axis, n in kernel.tile)
    lines.append(f"kernel {kernel.name}: grid ({', '.join(kernel.grid)}), tiles {tiles}")
    for p in kernel.params:
        kind = "out" if p.output else "in"
        lines.append(f"  {kind} {p.name}: {p.storage.value} ({', '.join(p.shape)})")
    lines += [f"  number {s.name}: {s.dtype.value}" for s in kernel.scalars]
    return "\n".join([*lines, *_block(kernel.body, 1)])


def _block(body: tuple[Stmt, ...], depth: int) -> list[str]:
    lines: list[str] = []
    for s in body:
        match s:
            case Section(title):
                lines += ["", f"-- {title}"]
            case Let(name, value, source):
                lines += [f"# {source}"] if source else []
                lines.append(f"{name} = {format_expr(value)}")
            case Loop(var, lo, hi, axis, inner):
                step = f" by tiles of {axis}" if axis else ""
                lines.append(f"for {var} from {format_expr(lo)} to {format_expr(hi)}{step}:")
                lines += _block(inner, 1)
            case If(condition, inner):
                lines += [f"if {format_expr(condition)}:", *_block(inner, 1)]
            case Narrow(tensor, _, first, length, page, places):
                of = tensor if page is None else f"page {format_expr(page)} of {tensor}"
                of += f" that {places} names" if places else ""
                lines.append(f"{tensor} = {format_expr(length)} rows of {of} from {format_expr(first)} on")
            case Choose(choice, states, row, value):
                where = f"{states}[{', '.join(format_expr(i) for i in row)}]"
                lines.append(f"{choice.value} {where}: {format_expr(value)}")
            case StoreTile(tensor, indices, value):
                lines.append(f"{tensor}[{', '.join(format_expr(i) for i in indices)}] = {format_expr(value)}")
            case Accumulate(tensor, indices, value):
                lines.append(
                    f"{tensor}[{', '.join(format_expr(i) for i in indices)}] += {format_expr(value)}"
                )
    return [("  " * depth + line).rstrip() for line in lines]

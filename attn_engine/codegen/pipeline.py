"""The ordered list of stages from a program to kernel text, nothing else.

program, schedule -> lower_forward / lower_decode / lower_backward -> Kernel -> (backend's renderer) -> source
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.adjoints import lower_adjoints
from attn_engine.codegen.lower.backward import lower_backward
from attn_engine.codegen.lower.capture import capture_gradients
from attn_engine.codegen.lower.decode import lower_decode
from attn_engine.codegen.lower.forward import lower_forward
from attn_engine.codegen.lower.paged import PAGED, over_pages
from attn_engine.codegen.lower.pair_gradient import lower_pair_gradients
from attn_engine.codegen.lower.pooled import lower_pooled_forward
from attn_engine.codegen.lower.scaled import with_scales
from attn_engine.codegen.lower.sequences import over_sequences
from attn_engine.codegen.lower.shared import share_tiles, values_from_keys
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.passes.merge_rule import MergeRule, derive_merge
from attn_engine.ir.passes.pooled_gradient import backward_program
from attn_engine.ir.passes.powers_of_two import backward_in_powers_of_two, forward_in_powers_of_two
from attn_engine.ir.passes.unread import without_unread
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel, Lanes, Module
from attn_engine.ir.verify import verify_kernel

DIRECTIONS = ("forward", "decode", "backward")


def lower(
    program: Attention,
    schedule: Schedule,
    direction: str,
    learned: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
) -> Module:
    """The kernels of one direction; `learned` names the captured tensors that need a gradient, `rows` the row
    outputs that have one.

    "decode" is the forward pass with the keys split, for rules that have a merge.
    """
    assert direction in DIRECTIONS, direction
    if direction == "forward":
        program = (
            replace(program, rule=forward_in_powers_of_two(program.rule)) if schedule.folded else program
        )
        lower_one = lower_pooled_forward if program.rule.pooled else lower_forward
        module = Module("forward", (lower_one(program, schedule),))
    elif direction == "decode":
        folded = forward_in_powers_of_two(program.rule) if schedule.folded else program.rule
        if isinstance(derive_merge(folded), MergeRule):
            program = replace(program, rule=folded)
        merge = derive_merge(program.rule)
        assert isinstance(merge, MergeRule), "keys are split where the parts can be merged"
        module = lower_decode(program, schedule, merge)
    else:
        program = backward_program(program, rows)
        if schedule.folded:
            program = replace(program, rule=backward_in_powers_of_two(program.rule))
        module = lower_backward(program, schedule, learned)
        if program.rule.adjoints:  # they read delta, and the kernels of the gradients read them
            first = [k for k in module.kernels if k.name == "delta"]
            kernels = (*first, lower_adjoints(program, schedule), *module.kernels[len(first) :])
            module = replace(module, kernels=kernels)
        module = replace(module, kernels=module.kernels + lower_pair_gradients(program, schedule, learned))
    if direction != "backward" and share_tiles(program):
        module = replace(module, kernels=tuple(values_from_keys(k) for k in module.kernels))
    module = replace(module, kernels=tuple(without_unread(k) for k in module.kernels))
    if program.sequences is not None:
        # Sums for captured tensors, and what users are given per block of keys, keep a row for every position.
        dense = [
            *(c.buffer for c in capture_gradients(program, learned)),
            *(p.name for p in program.rule.pooled),
        ]
        page = 0 if direction == "backward" else program.sequences.page  # paged keys have no gradients
        dense += PAGED if page else ()
        listed = program.sequences.listed
        kernels = (over_sequences(k, dense, listed) for k in module.kernels)
        module = replace(module, kernels=tuple(over_pages(k, page) if page else k for k in kernels))
    if program.cache is not None and direction != "backward":  # such caches have no gradients
        cache = program.cache
        module = replace(module, kernels=tuple(with_scales(k, cache) for k in module.kernels))
    for kernel in module.kernels:
        verify_kernel(kernel)
    return module


def with_header(kernel: Kernel, backend: str, version: str) -> Kernel:
    """The kernel under a header that says what it is, how it is cut into tiles and how to make it again."""
    blocks = " ".join(f"block_{axis}={n}" for axis, n in kernel.tile if axis in ("q", "kv"))
    first = f"attn_engine {version} | {kernel.header[0]} | {backend} | {blocks}"
    wanted = "decode" if kernel.name == "merge" or kernel.lanes is Lanes.FEW_ROWS else kernel.name
    again = f'regenerate: engine.source(backend="{backend}", kernel="{wanted}")'
    return replace(kernel, header=(first, again, *kernel.header[1:]))

"""The command line: `python -m attn_engine list | show | explain | conformance`."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from attn_engine.conformance.__main__ import add_options, conformance
from attn_engine.engine import AttentionEngine
from attn_engine.errors import AttnEngineError
from attn_engine.explain import Kernel
from attn_engine.frontend import meta_tensor
from attn_engine.library import AttentionLibrary
from attn_engine.library.catalogue import ATTENTIONS, MASKS, found
from attn_engine.library.samples import sample
from attn_engine.runtime.backends import NAMES
from attn_engine.version import VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of attn_engine are printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except AttnEngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attn_engine", description="A compiler for attention.")
    parser.add_argument("--version", action="version", version=f"attn_engine {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("list", help="the attentions of the library, and the backends")
    listing.set_defaults(run=_list)
    show = commands.add_parser("show", help="print a generated kernel")
    show.add_argument("--kernel", default="forward", choices=get_args(Kernel))
    show.set_defaults(run=_show)
    explanation = commands.add_parser(
        "explain", help="what was understood and decided: plans, saved values, tiles"
    )
    explanation.set_defaults(run=_explain)
    table = commands.add_parser(
        "conformance", help="what FlexAttention must do: pass counts here and in torch"
    )
    add_options(table)
    table.set_defaults(run=conformance)
    for command in (show, explanation):
        _add_engine_options(command)
    return parser


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "attention", help="a name from `list`, or file.py:name of an AttentionEngine in your file"
    )
    command.add_argument("--mask", help="the mask of a named attention (default Causal)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of either"
    )
    command.add_argument("--backend", default="cpu", choices=[n for n in NAMES if n != "auto"])
    command.add_argument("--dim", type=int, default=64, help="head dimension of q and k (default 64)")
    command.add_argument("--dim-v", type=int, default=None, help="head dimension of v (default: the same)")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    command.add_argument("--dtype", default="float32", choices=dtypes)


def _list(_: argparse.Namespace) -> str:
    return str(AttentionLibrary.list())


def _show(options: argparse.Namespace) -> str:
    return _engine(options).source(backend=options.backend, kernel=options.kernel)


def _explain(options: argparse.Namespace) -> str:
    return str(_engine(options).explain())


def _engine(options: argparse.Namespace) -> AttentionEngine:
    """The engine that the first argument names."""
    if ".py:" in options.attention:
        return _engine_of_file(*options.attention.rsplit(":", 1))
    attention, mask = _parts(options.attention, options.mask)
    dtype = getattr(torch, options.dtype)
    dims = (options.dim, options.dim, options.dim_v or options.dim)
    metas = [meta_tensor(None, None, None, dim, dtype=dtype) for dim in dims]
    given = dict(_parameter(text) for text in options.set)
    parameters = sample(ATTENTIONS[attention]) | sample(MASKS[mask]) | given
    made = AttentionLibrary(attention, mask, qkv_meta=metas, backend=options.backend, **parameters)
    return made.engine(*(torch.empty(0) for _ in range(3)))


def _parts(name: str, mask: str | None) -> tuple[str, str]:
    """The names of an attention and of a mask: one of them is `name`."""
    if attention := found(ATTENTIONS, name):
        masked = found(MASKS, mask or "Causal")
    else:
        attention, masked = ATTENTIONS["SoftmaxAttention"], found(MASKS, name if mask is None else "")
    if masked is None:
        known = ", ".join((*ATTENTIONS, *MASKS))
        raise SystemExit(f"attn_engine: no attention {name!r} with mask {mask!r}; known: {known}")
    return attention.name, masked.name


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        what = "is no Python number, tuple or text" if equals else "has no ="
        raise SystemExit(f"attn_engine: --set {text}: {what}; write --set window=512") from None


def _engine_of_file(path: str, name: str) -> AttentionEngine:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise SystemExit(f"attn_engine: cannot read {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = getattr(module, name, None)
    if not isinstance(engine, AttentionEngine):
        raise SystemExit(f"attn_engine: {path} has no AttentionEngine named {name!r}")
    return engine


if __name__ == "__main__":
    sys.exit(main())

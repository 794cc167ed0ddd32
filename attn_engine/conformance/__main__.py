"""`python -m attn_engine.conformance`: run the table and print "n of N"."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from attn_engine.conformance.report import markdown, summary
from attn_engine.conformance.run import NOTHING, PASS, Outcome, everything, run
from attn_engine.conformance.subjects import Subject, ours, torch_flex


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        action="append",
        help="a backend of this package, several times for several (default: cpu and reference)",
    )
    parser.add_argument(
        "--torch",
        action="append",
        choices=["eager", "compiled"],
        default=[],
        help="torch's flex_attention too",
    )
    parser.add_argument("--only", default="", help="rows whose name or section contains this text")
    parser.add_argument("--seconds", type=float, default=None, help="begin no row after so long, per subject")
    parser.add_argument("--kept", type=Path, default=None, help="a JSON file: go on from what it holds")
    parser.add_argument("--markdown", type=Path, default=None, help="write the page")


def conformance(options: argparse.Namespace) -> str:
    """Run what the options ask for; returns one line per subject."""
    warnings.simplefilter("ignore")
    backends = ["cpu", "reference"] if options.backend is None else options.backend
    subjects: list[Subject] = [ours(name) for name in backends if name != "none"]
    subjects += [torch_flex(compiled=way == "compiled") for way in options.torch]
    rows = [row for row in everything() if options.only in row.name or options.only in row.section]
    columns: dict[str, list[Outcome]] = {}
    for subject in subjects:
        print(subject.name, flush=True)
        columns[subject.name] = run(subject, rows, options.kept, options.seconds, _tell)
    if options.markdown is not None:
        options.markdown.write_text(markdown(columns))
    return "\n".join(summary(name, outcomes) for name, outcomes in columns.items())


def _tell(outcome: Outcome, seconds: float) -> None:
    answers = {a for a in (outcome.forward, outcome.backward) if a not in (PASS, NOTHING)}
    said = "; ".join(sorted(answers)) or PASS
    print(f"  {outcome.section:16} {outcome.name}: {said} ({seconds:.1f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attn_engine.conformance", description=__doc__)
    add_options(parser)
    print(conformance(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

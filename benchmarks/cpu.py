"""Speed of the CPU backend on this machine: ratios to other implementations, and share of the machine's peak.

    ./run benchmark                                everything (about 50 minutes on two cores)
    ./run benchmark --quick                        a part of it (two minutes)
    ./run benchmark --part table                   parts by the beginnings of their names; --list shows them
    ./run benchmark --only 'window.*float32.*forward$'
    ./run benchmark --resume --minutes 9           go on where the last run of today stopped, for nine minutes

For every case the contenders run in turns, round after round, and each round gives one ratio: the contender's time over
ours, above 1 where we are faster. Printed is the median over the rounds; the file under benchmarks/results has the
quartiles as well, and the machine. A later run of the same day replaces in it what it measures again. A report and
figures are drawn from the file at the end; python -m benchmarks.report FILE draws them again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import PARTS, Case, is_quick
from benchmarks.contenders import against_one_thread, against_others, against_softmax
from benchmarks.measure import Outcome, measure
from benchmarks.memory import measure_memory
from benchmarks.peak import against_peak
from benchmarks.results import FOLDER, ResultNotUsable, Results, go_on, machine
from benchmarks.targets import target_of

BUSY = 0.3


def measure_case(case: Case, rounds: int, with_flex: bool) -> Outcome:
    """Measured with all threads of this process, which is what it has afterwards too."""
    torch.manual_seed(0)
    most = torch.get_num_threads()
    try:
        if case.part == "memory":
            return measure_memory(case)
        if case.part == "share":
            return measure(against_peak(case, most), rounds=rounds)
        if case.part == "threads":
            return measure(against_one_thread(case, most), rounds=rounds)
        if case.part == "mods":
            return measure(against_softmax(case), base="softmax", rounds=rounds)
        return measure(against_others(case, with_flex), rounds=rounds)
    finally:
        torch.set_num_threads(most)


def selected(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases to measure, by part."""
    wanted = tuple(options.part.split(",")) if options.part else ("",)
    return {
        name: [
            c for c in part.cases() if (not options.quick or is_quick(c)) and re.search(options.only, str(c))
        ]
        for name, part in PARTS.items()
        if name.startswith(wanted)
    }


def minutes(name: str, count: int) -> float:
    return PARTS[name].minutes * count / sum(1 for _ in PARTS[name].cases())


def line(case: Case, outcome: Outcome) -> str:
    """A case as printed while measuring: medians, each with its target where it misses that."""
    cells = []
    for contender, (_, median, _) in outcome.ratios.items():
        target = target_of(asdict(case), contender)
        missed = f" (target {target})" if target and not target.met(median) else ""
        cells.append(f"{contender} {median:.2f}{missed}")
    busy = f"   others used {outcome.others} cores" if (outcome.others or 0) > BUSY else ""
    return f"{case!s:62} {'   '.join(cells)}{busy}"


def measure_all(options: argparse.Namespace, results: Results, path: Path) -> bool:
    """Measure what is not there yet, saving after each case; False where the time ran out before the end."""
    end = time.monotonic() + 60 * options.minutes
    with_flex = not options.quick if options.flex is None else options.flex
    for name, cases in selected(options).items():
        missing = [case for case in cases if not (options.resume and results.has(case))]
        if not missing:
            continue
        print(
            f"\n{name}: {PARTS[name].about}; {len(missing)} cases, {minutes(name, len(missing)):.1f} minutes"
        )
        for case in missing:
            if time.monotonic() > end:
                return False
            outcome = measure_case(case, options.rounds, with_flex)
            results.add(case, outcome)
            results.machine["load after"] = round(os.getloadavg()[0], 2)
            results.save(path)
            print(line(case, outcome), flush=True)
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="short lengths, dimension 64, without flex")
    add("--part", default="", help="beginnings of the names of parts, with commas between them")
    add("--only", default="", help="regular expression that a case's name must match")
    add("--list", action="store_true", help="show the parts and how long they take, and measure nothing")
    add("--flex", action=argparse.BooleanOptionalAction, help="compile flex_attention: 4 to 20 s a case")
    add("--rounds", type=int, default=7)
    add("--resume", action="store_true", help="keep what the result file has and measure only what it lacks")
    add("--minutes", type=float, default=float("inf"), help="stop after so long; --resume goes on")
    add("--output", type=Path, help="the result's path; default: benchmarks/results/cpu-DATE.json")
    return parser.parse_args(arguments)


def list_parts(options: argparse.Namespace) -> None:
    for name, cases in selected(options).items():
        print(
            f"{name:20} {len(cases):4} cases {minutes(name, len(cases)):5.1f} minutes   {PARTS[name].about}"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        list_parts(options)
        return 0
    warnings.filterwarnings("ignore", module="torch")
    here = machine()
    print(*(f"{key}: {value}" for key, value in here.items()), sep="\n")
    if here["load before"] > BUSY * here["cores"]:
        print("This machine is busy: ratios will be rough. Stop what else is running.")
    name = f"cpu-{here['date']:.10}{'-quick' * options.quick}.json"
    path: Path = options.output or FOLDER / name
    try:
        results = go_on(path, here) if path.exists() else Results(here)
    except ResultNotUsable as problem:
        print(problem)
        return 1
    words = shlex.join(["./run", "benchmark", *(sys.argv[1:] if arguments is None else arguments)])
    results.commands.append(f"{here['date']} {here['commit']} {words}")
    whole = measure_all(options, results, path)
    if not whole:
        print("\nStopped because the time is over; --resume goes on.")
    if results.entries:
        print(f"\nwritten: {path}")
        report.write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

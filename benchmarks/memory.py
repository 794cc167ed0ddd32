"""Peak memory of one training step in a process of its own: the part memory.

    python -m benchmarks.memory CONTENDER CASE-AS-JSON

prints the bytes of inputs, output and gradients, and by how much the process grew at most once the inputs were there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.measure import Outcome, rounded

ROOT = Path(__file__).parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TENSORS, INPUTS = 8, 4  # q, k, v, d_out; o, d_q, d_k, d_v
SECONDS = 300


def peak_bytes() -> int:
    """The most memory this process had. Linux puts the parent's into ru_maxrss as well, but not into VmHWM."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak start again from what is in use now, where the system can; else only growth beyond it shows."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def grown(case: Case, contender: str) -> dict[str, int]:
    """Bytes of the tensors of one call, and the growth during it; everything is compiled and warm before."""
    from benchmarks.contenders import call, ours, sdpa, tensors
    from benchmarks.patterns import pattern

    make = {"ours": ours, "sdpa": sdpa}[contender]
    function = make(case, pattern(case.pattern, case.keys))
    if function is None:
        raise SystemExit(f"{contender} cannot compute {case}")
    tiny = replace(case, queries=256, keys=256)
    call(function, tiny, tensors(tiny))()
    inputs = tensors(case)
    run = call(function, case, inputs)
    forget_peak()
    before = peak_bytes()
    result = run()
    after = peak_bytes()
    del result
    return {"input bytes": sum(t.nbytes for t in inputs), "growth": after - before}


def measure_memory(case: Case) -> Outcome:
    """Inputs plus growth over the bytes of inputs, output and gradients, for ours and for SDPA."""
    ratios = {}
    for contender in ("ours", "sdpa"):
        command = [sys.executable, "-m", "benchmarks.memory", contender, json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{case}: the process that measures memory failed.\n{done.stderr[-2000:]}")
        counted = json.loads(done.stdout.splitlines()[-1])
        tensors = counted["input bytes"] * TENSORS / INPUTS
        ratios[contender] = [rounded((counted["input bytes"] + counted["growth"]) / tensors)] * 3
    return Outcome(ratios, {})


if __name__ == "__main__":
    print(json.dumps(grown(Case(**json.loads(sys.argv[2])), sys.argv[1])))

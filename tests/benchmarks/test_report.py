"""One command measures, goes on after being cut off, and writes a report; targets are marked as they should be."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import cpu, plots, report
from benchmarks.cases import PARTS, Case
from benchmarks.measure import Outcome
from benchmarks.results import ResultNotUsable, Results, go_on, load, machine
from benchmarks.targets import target_of

WINDOW = Case("table", "window 512", "float32", "forward", 4096, 4096)
DRAWS = importlib.util.find_spec("matplotlib") is not None


def outcome(case: Case) -> Outcome:
    """Invented: every contender takes twice our time."""
    others = {
        "share": ["peak"], "mods": ["ours"], "threads": ["one thread"], "memory": ["ours", "sdpa"],
    }.get(case.part, ["sdpa", "flex", "eager"] if case.part in ("table", "sweep") else ["sdpa"])  # fmt: skip
    return Outcome(
        {name: [1.9, 2.0, 2.1] for name in others}, {"ours": 0.001, **dict.fromkeys(others, 0.002)}, 0.0
    )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    results = Results(machine(), ["2026-11-21 abc ./run benchmark"])
    for part in PARTS.values():
        for case in part.cases():
            results.add(case, outcome(case))
    results.save(tmp_path / "cpu.json")
    return tmp_path / "cpu.json"


@pytest.mark.parametrize(
    "case, contender, bound",
    [
        (WINDOW, "sdpa", 8),
        (Case("table", "full", "bfloat16", "backward", 1024, 1024), "sdpa", 1.6),
        (Case("table", "causal", "bfloat16", "forward", 4096, 4096, 128), "sdpa", 2.3),
        (Case("table", "window 512", "float32", "forward", 1024, 1024), "sdpa", None),
        (Case("table", "alibi", "bfloat16", "forward", 1024, 1024), "flex", 4.3),
        (Case("table", "causal", "float32", "forward+backward", 4096, 4096), "eager", 5.5),
        (Case("table", "causal", "float32", "forward", 4096, 4096), "eager", None),
        (Case("share", "full", "bfloat16", "forward", 1024, 1024), "peak", 0.75),
        (Case("share", "full", "bfloat16", "backward", 1024, 1024), "peak", None),
        (Case("decode", "full", "bfloat16", "forward", 1, 512), "sdpa", 8),
        (Case("decode", "full", "bfloat16", "forward", 4, 512), "sdpa", 1),
        (Case("mods", "relu", "float32", "forward", 1024, 1024), "ours", 1.25),
        (Case("memory", "full", "float32", "forward+backward", 16384, 16384), "sdpa", None),
    ],
)
def test_targets_are_the_stated_ones(case: Case, contender: str, bound: float | None):
    target = target_of(asdict(case), contender)
    assert (None if target is None else target.bound) == bound


def test_a_target_is_met_from_the_right_side():
    at_least = target_of(asdict(WINDOW), "sdpa")
    at_most = target_of(asdict(Case("mods", "relu", "float32", "forward", 1024, 1024)), "ours")
    assert at_least is not None
    assert at_most is not None
    assert [at_least.met(x) for x in (7.99, 8.0, 9.0)] == [False, True, True]
    assert [at_most.met(x) for x in (1.2, 1.25, 1.26)] == [True, True, False]


def test_the_report_marks_what_is_met_and_what_is_missed():
    results = Results({"date": "2026-11-21"})
    results.add(
        WINDOW, Outcome({"sdpa": [7.5, 7.9, 8.1], "flex": [1.6, 1.7, 1.8], "eager": [9, 9, 9]}, {}, 0.5)
    )
    text = report.markdown(results, [])
    assert "| window 512 | 4096 | 64 | 7.90 (7.50-8.10)~ ✗ ≥ 8 | 1.70 (1.60-1.80)~ ✓ | 9.00~ | - |" in text
    assert "| table | 1 | 1 of 2 |" in text


def test_a_stored_file_becomes_a_report(stored: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "draw", lambda results, folder: [])
    assert report.main([str(stored)]) == 0
    text = stored.with_suffix(".md").read_text()
    for heading in (
        "Against SDPA",
        "Share of the peak",
        "Decode",
        "Normalisers",
        "Small",
        "Threads",
        "Memory",
    ):
        assert f"## {heading}" in text
    assert "./run benchmark" in text
    assert "| decode | 216 |" in text


def test_without_matplotlib_there_is_a_report_and_a_message(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(stored)
    assert "pip install -e '.[benchmarks]'" in capsys.readouterr().out
    assert "## Figures" not in stored.with_suffix(".md").read_text()


@pytest.mark.skipif(not DRAWS, reason="matplotlib is not installed (pip install -e '.[benchmarks]')")
@pytest.mark.filterwarnings("default")
def test_figures_are_drawn_and_the_report_shows_them(stored: Path):
    report.write(stored)
    names = {path.stem for path in stored.with_suffix("").glob("*.png")}
    assert {"speed-float32-forward", "speed-bfloat16-backward", "over-sdpa", "over-flex"} <= names
    assert {"over-eager", "share-of-peak", "decode"} <= names
    text = stored.with_suffix(".md").read_text()
    assert all(f"(cpu/{name}.png)" in text for name in names)


@pytest.mark.skipif(not DRAWS, reason="matplotlib is not installed (pip install -e '.[benchmarks]')")
@pytest.mark.filterwarnings("default")
def test_one_result_alone_can_be_drawn(tmp_path: Path):
    results = Results(machine())
    results.add(WINDOW, outcome(WINDOW))
    assert {path.stem for path in plots.draw(results, tmp_path / "figures")} == {
        "over-sdpa", "over-flex", "over-eager",
    }  # fmt: skip


def test_results_come_back_as_they_were_saved(stored: Path):
    results = load(stored)
    assert results.has(WINDOW)
    assert not results.has(Case("table", "full", "float32", "forward", 77, 77))
    assert stored.read_text().count("\n") > len(results.entries), "an entry per line"
    results.add(WINDOW, Outcome({"sdpa": [1.0, 1.0, 1.0]}, {}))
    results.save(stored)
    assert [e["ratios"] for e in load(stored).entries if e["case"] == asdict(WINDOW)] == [{"sdpa": [1, 1, 1]}]


def test_files_that_cannot_be_used_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "r.json"
    with pytest.raises(ResultNotUsable, match="cannot be read"):
        load(path)
    path.write_text(json.dumps({"machine": {}, "results": []}))
    with pytest.raises(ResultNotUsable, match="not of format"):
        load(path)
    Results({**machine(), "torch": "0.1"}).save(path)
    with pytest.raises(ResultNotUsable, match=r"torch: 0.1 then"):
        go_on(path, machine())
    assert cpu.main(["--output", str(path), "--only", "nothing"]) == 1
    assert report.main([]) == 2
    assert "0.1 then" in capsys.readouterr().out


def test_one_command_writes_ratios_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measured: list[Case] = []

    def fake(case: Case, rounds: int, with_flex: bool) -> Outcome:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return outcome(case)

    monkeypatch.setattr(cpu, "measure_case", fake)
    monkeypatch.setattr(plots, "draw", lambda results, folder: [])
    path = tmp_path / "result.json"
    options = ["--part", "small", "--only", "forward$", "--output", str(path)]
    with pytest.raises(KeyboardInterrupt):
        cpu.main(options)
    assert len(load(path).entries) == 2
    before = list(measured)
    measured[:] = []
    monkeypatch.setattr(cpu, "measure_case", lambda case, *_: (measured.append(case), outcome(case))[1])
    assert cpu.main([*options, "--resume"]) == 0
    assert not set(before) & set(measured)
    assert len(load(path).entries) == len(measured) + 2 == 4
    assert len(load(path).commands) == 2
    assert cpu.main([*options, "--minutes", "0"]) == 0
    assert "--resume goes on" in capsys.readouterr().out
    assert len(load(path).entries) == 4


def test_a_real_case_is_measured_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "draw", lambda results, folder: [])
    path = tmp_path / "result.json"
    options = ["--part", "small", "--rounds", "2", "--only", "^causal float32 .* forward$"]
    assert cpu.main([*options, "--output", str(path)]) == 0
    (entry,) = load(path).entries
    assert set(entry["ratios"]) == {"sdpa"}
    assert all(0.01 < ratio < 100 for ratio in entry["ratios"]["sdpa"])
    assert {"processor", "cores", "torch", "compiler", "date", "commit"} <= set(load(path).machine)
    assert "✓" in path.with_suffix(".md").read_text() or "✗" in path.with_suffix(".md").read_text()


def test_parts_are_chosen_by_the_beginnings_of_their_names(capsys: pytest.CaptureFixture[str]):
    assert cpu.main(["--list", "--part", "table,share"]) == 0
    shown = capsys.readouterr().out.split()
    assert {"table-1024", "table-4096-bfloat16", "share"} <= set(shown)
    assert "decode" not in shown
